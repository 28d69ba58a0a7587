"""Run the cases of a manifest again: same settings, prompts, weights and input, and so the same masks.

    zeroseg rerun OUT/manifest.json --dataset-dir IMAGES --output-dir AGAIN
    zeroseg rerun OUT/manifest.json --case lesion --dataset-dir IMAGES --output-dir AGAIN --compare

The manifest may come from zeroseg segment, tumor or batch, or from python -m monai.bundle run. It holds names and SHA-256 of
the input and the weights, but no folders: --dataset-dir says where the images are, --set backbone=FOLDER (adapters,
text_encoder, ...) where weights are that are not the embedded ones. Nothing is run unless settings and weights are those of the
manifest, and no case whose files have changed.

--compare says of every case whether the mask is the same bit for bit. That holds on the same machine; another processor,
device or library version may round differently, and what differs from the manifest is said.

Exit code: 0; 1 when --compare found a mask that differs; 2 when something the user can mend went wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, add_set, print_json, spoken_to_stderr


def add_arguments(parser: Parser) -> None:
    parser.add_argument("manifest", type=Path, help="manifest.json of a run")
    parser.add_argument("--dataset-dir", required=True, type=Path, help="folder with the images of that run")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder for the results")
    parser.add_argument("--case", action="append", help="only this case; may be repeated (default: all)")
    parser.add_argument("--compare", action="store_true", help="say whether the masks are the same bit for bit")
    add_set(parser, "where weights are, or the device; may be repeated")
    add_json(parser, "how many cases failed, and how many masks differ")


def run(args: argparse.Namespace) -> int:
    from zeroseg.cohort import rerun
    from zeroseg.configs import parse_settings

    with spoken_to_stderr(args.json):
        failed, differing = rerun.run(
            args.manifest, args.dataset_dir, args.output_dir, args.case, args.compare, parse_settings(args.set)
        )
    if args.json:
        print_json({"failed": failed, "differing": differing})
    return 2 if failed else int(args.compare and differing > 0)
