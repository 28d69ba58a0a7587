"""Measure text-prompted tumour masks against the truth: one folder of volumes (or of 2-D images, as single slices).

    zeroseg evaluate --inferer tumor --images DIR --masks DIR --organ limb --text "soft tissue sarcoma" \\
        --modality ct --ablation --nonsense --out OUT

Rows of the result:
  tumor            all stages, or those of --stages
  tumor_aova, tumor_pixel, tumor_feature, tumor_words   with --ablation: AOVA alone; with inpainting and the pixel
                   residual; with inpainting and the feature residual; all stages but those for lungs and the promptable head
  tumor_steps_N    with --steps: N inpainting steps; also written as steps.csv and steps.png
  baselines        everything foreground, Otsu, 2-means (*_best_polarity is an oracle over one bit per set), for PET 40 %
                   of the highest uptake
A scan is encoded once for all rows; their seconds are encoding plus the row's own prompt.

Dice, IoU, HD95 (mm; the volume's diagonal for an empty prediction) and NSD (normalised surface distance within
--tolerance mm) come from MONAI; lesions are counted as ``volume_metrics.lesions`` says. The answer "absent" is an empty
mask and scores Dice 0. Cases with an empty mask are healthy: they enter no mean, only how often "absent" is answered.
--nonsense asks every case for what is no tumour as well, and counts the same.

Written to OUT: cases.csv, absent.csv, summary.json, table.md, report.html and report.png (best, median and worst case;
prediction yellow, truth blue).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import DTYPES, add_json, measured
from zeroseg.errors import ZeroSegError

if TYPE_CHECKING:
    from zeroseg.tumor import TumorSegmentationInferer


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--inferer", choices=["tumor"], default="tumor", help="this evaluation")
    parser.add_argument("--protocol", choices=["tumor"], default="tumor", help="the only one")
    parser.add_argument("--images", type=Path, required=True, help="folder of volumes or 2-D images")
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks with the images' names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--organ", default="body", help="where to look (default: where --text says, else the body)")
    parser.add_argument("--text", help="what to look for (default: the organ's first tumour)")
    parser.add_argument("--modality", help="ct, mr or pet (default: what the file says, else guessed)")
    parser.add_argument("--prompts", help="JSON of organ, tumor and modality by case, e.g. the cases.json of phantoms")
    parser.add_argument(
        "--stages", help="comma-separated, of aova, inpaint, pixel, feature, lungs, head (default: all)"
    )
    parser.add_argument("--ablation", action="store_true", help="also with fewer stages")
    parser.add_argument(
        "--steps", default="", help="comma-separated numbers of inpainting steps to compare, e.g. 2,5,20"
    )
    parser.add_argument("--nonsense", action="store_true", help="also ask for what is no tumour")
    parser.add_argument("--tolerance", type=float, help="of the NSD in mm (default: 2 x the voxel's mean side)")
    parser.add_argument("--backbone", default="embedded", help="embedded, or a folder in that layout")
    parser.add_argument("--adapters", help="folder of adapters (default: with the backbone)")
    parser.add_argument("--text-encoder", help="a transformers folder (default: with the backbone)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the frozen model (default: fp32)")
    parser.add_argument("--half", choices=["dev", "test", "all"], default="all", help="fixed halves of every set")
    parser.add_argument("--limit", type=int, help="evaluate the first N cases only")
    add_json(parser, "summary.json")


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ZeroSegError("--limit must be at least 1")
    if args.tolerance is not None and not args.tolerance > 0:
        raise ZeroSegError("--tolerance must be a number of mm above 0")
    from zeroseg.tumor.prompts import check_modality

    args.modality = check_modality(args.modality) if args.modality else None
    args.prompts = read_prompts(args.prompts) if args.prompts else {}
    args.stages = [s.strip() for s in args.stages.split(",")] if args.stages else None
    try:
        args.steps = sorted({int(s) for s in args.steps.split(",") if s.strip()})
    except ValueError:
        raise ZeroSegError(f"--steps must be whole numbers with commas between, not {args.steps!r}") from None
    if any(not 1 <= count <= 1000 for count in args.steps):
        raise ZeroSegError("--steps must lie in 1..1000")
    return measured(args, lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the folder of a command line; returns how many cases failed."""
    from zeroseg.evaluation.volumes import evaluate_volumes

    _, failures = evaluate_volumes(
        make_inferer(args),
        args.images,
        args.masks,
        args.out,
        modality=args.modality,
        prompts=args.prompts,
        half=args.half,
        limit=args.limit,
        ablation=args.ablation,
        steps=args.steps,
        nonsense=args.nonsense,
        tolerance=args.tolerance,
    )
    return failures


def read_prompts(path: str) -> dict[str, dict[str, str]]:
    """Case -> its own organ, tumor and modality; other keys, such as a phantom's seed, are left aside.

    Raises:
        ZeroSegError: the file cannot be read or is not of that form.
    """
    from zeroseg.tumor.cases import TUMOR_PROMPT_KEYS

    try:
        found = json.loads(Path(path).read_text())
        return {stem: {k: v for k, v in case.items() if k in TUMOR_PROMPT_KEYS and v} for stem, case in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ZeroSegError(f"--prompts must be a JSON file of objects by case: {error}") from error


def make_inferer(args: argparse.Namespace) -> TumorSegmentationInferer:
    """The inferer of a command line, its settings checked and its weights loaded."""
    from zeroseg.backbones.maisi import MaisiBackbone
    from zeroseg.backbones.text_encoder import TextEncoder
    from zeroseg.tumor import TumorSegmentationInferer

    embedded = args.backbone == "embedded"
    inferer = TumorSegmentationInferer(
        MaisiBackbone(args.backbone, device=args.device, dtype=args.dtype),
        TextEncoder(args.text_encoder or ("embedded" if embedded else str(Path(args.backbone) / "text"))),
        args.adapters or args.backbone,
        organ=args.organ,
        tumor=args.text,
        **({"stages": args.stages} if args.stages else {}),
    )
    inferer.check()
    return inferer
