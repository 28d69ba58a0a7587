"""Find tumours in CT, MR and PET volumes by words: a mask and its evidence, or the answer "absent" with the reason.

    zeroseg tumor CASES --output-dir OUT --organ liver --tumor "liver tumour" --modality ct

Beside the mask: _aova (how much more a place answers to the tumour's words than to normal and to empty ones), _healthy (the suspect
region painted anew), _pixel_residual and _feature_residual (what that changed). The same as python -m monai.bundle run with
the bundle's inference_tumor.yaml.
"""

from __future__ import annotations

import argparse
from typing import Any

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, add_model, add_set, given, run_cases, words


def add_arguments(parser: Parser) -> None:
    parser.add_argument("input", metavar="CASES", help="folder, or one file")
    parser.add_argument("--output-dir", required=True, help="folder for the results")
    what = parser.add_argument_group("what to find")
    what.add_argument("--organ", help="where to look (default: where --tumor says, else the body)")
    what.add_argument("--tumor", help="what to look for (default: the organ's first tumour)")
    what.add_argument("--modality", choices=["ct", "mr", "pet"], help="default: what the file says, else guessed")
    what.add_argument("--prompts", help="prompts.json: organ, tumor, modality, points, labels, box by case")
    how = parser.add_argument_group("how")
    how.add_argument("--stages", help="with commas, of aova,inpaint,pixel,feature,lungs,head (default: all)")
    how.add_argument("--steps", type=int, help="of inpainting")
    how.add_argument("--seed", type=int)
    add_set(how)
    add_model(parser, "embedded (default), or a folder in that layout")
    parser.add_argument("--autoencoder", metavar="FILE", help="of MAISI, in place of the backbone; needs --unet")
    parser.add_argument("--unet", metavar="FILE", help="of MAISI; needs --autoencoder, and --adapters trained for it")
    parser.add_argument("--contrast", help="of MR, for MAISI's models of MR: t1, t2, flair, ...")
    parser.add_argument("--adapters", help="folder of adapters (default embedded)")
    parser.add_argument("--text-encoder", help="a transformers folder (default embedded)")
    add_json(parser, "manifest.json")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from zeroseg.configs import build_runner, find_config, parse_settings

    settings: dict[str, Any] = {name: words(text) for name, text in given(args, "organ", "tumor").items()}
    settings |= given(args, "modality", "steps", "seed", "backbone", "device", "dtype", "adapters", "text_encoder")
    settings |= given(args, "autoencoder", "unet", "contrast")
    if args.stages is not None:
        settings["stages"] = [stage.strip() for stage in args.stages.split(",")]
    runner = build_runner(
        find_config("inference_tumor.yaml"), parse_settings(args.set) | settings, Path(args.output_dir)
    )
    runner.prompts = args.prompts
    return run_cases(runner, args.input, args.json)
