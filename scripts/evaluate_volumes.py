#!/usr/bin/env python
"""Measure text-prompted tumour masks against the truth: one folder of volumes (or of 2-D images, as single slices).

    python scripts/evaluate.py --inferer tumor --images DIR --masks DIR --organ limb --text "soft tissue sarcoma" \\
        --modality ct --ablation --nonsense --out OUT

Rows of the result:
  tumor            all stages, or those of --stages
  tumor_aova, tumor_pixel, tumor_feature   with --ablation: AOVA alone; with inpainting and the pixel residual; with
                   inpainting and the feature residual
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
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from tqdm import tqdm

import _path  # noqa: F401
from results import (
    Parser,
    best_median_worst,
    find_pairs,
    markdown_rows,
    methods_of,
    run_evaluation,
    summarise_groups,
    write_csv,
    write_text,
)
from volume_baselines import AUTOMATIC, BRIGHT, PET
from volume_metrics import METRICS, score_volume, tolerance_of
from zeroseg.backbones.frozen import DTYPES
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.errors import ZeroSegError
from zeroseg.io import (
    Case,
    atomic_path,
    contact_html,
    contact_sheet,
    overlay_slices,
    read_image,
    slice_affine,
    to_unit_range,
    versions,
    write_json,
)
from zeroseg.tumor import TumorSegmentationInferer
from zeroseg.tumor.cases import TUMOR_PROMPT_KEYS
from zeroseg.tumor.prompts import DICOM_MODALITIES, check_modality

COLUMNS = ("case", "protocol", *METRICS, "seconds")
ABLATION: dict[str, tuple[str, ...]] = {
    "tumor_aova": ("aova",),
    "tumor_pixel": ("aova", "inpaint", "pixel"),
    "tumor_feature": ("aova", "inpaint", "feature"),
}
"""Row -> stages. Inpainting alone has no row: only the residuals turn it into evidence."""
NONSENSE = ("bicycle saddle", "wooden chair", "football match", "green apple", "qwertz uiop")
"""What no scan shows, so that the answer must be "absent"."""


@dataclass(frozen=True)
class Volume:
    """A scan and its mask.

    Attributes:
        stem: name of the case.
        values: (C, X, Y, Z) float32 in the scan's own units.
        unit: the same in [0, 1], for pictures.
        truth: (X, Y, Z) bool; empty for a healthy scan.
        affine: (4, 4) voxel index -> RAS mm, or None.
        spacing: voxel size in mm; 1 where unknown.
        modality: ct, mr or pet, or None.
    """

    stem: str
    values: np.ndarray
    unit: np.ndarray
    truth: np.ndarray
    affine: np.ndarray | None
    spacing: tuple[float, float, float]
    modality: str | None


def load_volume(image_case: Case, mask_case: Case, modality: str | None) -> Volume:
    """Read one pair; a 2-D image becomes a volume (C, H, W, 1).

    Raises:
        ZeroSegError: a file cannot be read, or the mask is of another size.
    """
    image, mask = read_image(image_case), read_image(mask_case)
    if mask.shape != image.shape:
        sizes = ("x".join(map(str, shape)) for shape in (mask.shape, image.shape))
        raise ZeroSegError("{}: the mask is {}, its image {}".format(mask_case.paths[0], *sizes))
    values, unit, truth = image.array, to_unit_range(image), (mask.array != 0).any(axis=0)
    spacing, affine = image.spacing or (1.0,) * truth.ndim, image.affine
    if not image.is_volume:
        values, unit, truth = values[..., None], unit[..., None], truth[..., None]
        spacing, affine = (*spacing, 1.0), slice_affine(spacing)
    modality = modality or DICOM_MODALITIES.get(image.modality or "")
    return Volume(image_case.stem, values, unit, truth, affine, tuple(spacing), modality)


@contextmanager
def changed(inferer: TumorSegmentationInferer, **settings):
    """The inferer with some settings changed for the time of a ``with`` block."""
    before = {name: getattr(inferer, name) for name in settings}
    vars(inferer).update(settings)
    try:
        yield inferer
    finally:
        vars(inferer).update(before)


def variants(inferer: TumorSegmentationInferer, ablation: bool, steps: Sequence[int]) -> dict[str, dict]:
    """Row -> settings of the inferer that differ."""
    rows = {"tumor": {}}
    if ablation:
        rows |= {name: {"stages": stages} for name, stages in ABLATION.items()}
    return rows | {f"tumor_steps_{count}": {"steps": count} for count in steps}


def run_volume(
    inferer: TumorSegmentationInferer, volume: Volume, rows: dict[str, dict], tolerance: float, nonsense: bool
) -> tuple[list[dict], list[dict], np.ndarray]:
    """Encode a scan once and ask everything of it.

    Args:
        inferer: with organ and tumour set.
        volume: the scan.
        rows: from ``variants``; a healthy scan is only asked ``tumor``.
        tolerance: of the NSD, in mm.
        nonsense: ask for one of ``NONSENSE`` too, which one depends on the case's name.

    Returns:
        scored rows and answers to "is it absent?", both without the case, and the mask of ``tumor``.
    """
    start = time.perf_counter()
    encoded = inferer.encode(volume.values, volume.affine, volume.modality)
    encode_seconds = time.perf_counter() - start
    sick = bool(volume.truth.any())
    scored, answers, shown = [], [], np.zeros_like(volume.truth)
    for name, settings in rows.items() if sick else (("tumor", {}),):
        encoded._reconstruction = None  # its time belongs to every row that needs it
        start = time.perf_counter()
        with changed(inferer, **settings):
            result = inferer.predict(encoded)
        seconds = encode_seconds + time.perf_counter() - start
        mask = result.labels > 0
        if sick:
            scores = score_volume(mask, volume.truth, volume.spacing, tolerance)
            scored.append({"protocol": name, "seconds": seconds, "absent": bool(result.absent), **scores})
        if name == "tumor":
            shown = mask
            answers.append(_answer("tumor" if sick else "healthy", inferer.tumor, result))
    if nonsense:
        words = NONSENSE[zlib.crc32(volume.stem.encode()) % len(NONSENSE)]
        answers.append(_answer("nonsense", words, inferer.predict(encoded, tumor=words)))
    return scored, answers, shown


def _answer(kind: str, text: str | None, result) -> dict:
    return {
        "kind": kind,
        "text": text or "",
        "absent": bool(result.absent),
        "because": result.reason or "",
        "image_probability": result.details["image_probability"],
    }


def run_baselines(volume: Volume, tolerance: float) -> list[dict]:
    """Rows of every method that needs no model."""
    gray, rows = volume.values.mean(axis=0), []

    def add(name: str, seconds: float, mask: np.ndarray) -> None:
        scores = score_volume(mask, volume.truth, volume.spacing, tolerance)
        rows.append({"protocol": name, "seconds": seconds, **scores})

    for name, method in {**AUTOMATIC, **(PET if volume.modality == "pet" else {})}.items():
        start = time.perf_counter()
        mask = method(gray)
        add(f"baseline/{name}", time.perf_counter() - start, mask)
    for name, method in BRIGHT.items():
        start = time.perf_counter()
        bright = method(gray)
        seconds = time.perf_counter() - start
        for side, mask in (("bright", bright), ("dark", ~bright)):
            add(f"polarity/{name}_{side}", seconds, mask)
    return rows


# Reports.


def absent_rates(answers: list[dict]) -> dict[str, dict]:
    """How often "absent" was answered, by kind: tumor (should be never), healthy and nonsense (should be always)."""
    kinds = {kind: [a["absent"] for a in answers if a["kind"] == kind] for kind in ("tumor", "healthy", "nonsense")}
    return {k: {"n": len(v), "absent": sum(v), "rate": sum(v) / len(v)} for k, v in kinds.items() if v}


def volume_table(name: str, summary: dict) -> str:
    """All metrics of a set, a row per method, and the rates of "absent"."""
    shown = {
        "dice": "Dice",
        "nsd": "NSD",
        "hd95": "HD95 mm",
        "lesion_recall": "lesions found",
        "lesion_f1": "lesion F1",
    }
    methods = methods_of(summary)
    lines = []
    if methods:
        lines = [[name, "n", *shown.values(), "s"], ["---"] + ["---:"] * (len(shown) + 2)]
    for method, figures in methods.items():
        cells = [f"{figures[key]:.1f}" if key == "hd95" else f"{figures[key]:.3f}" for key in shown]
        lines.append([method, str(figures["n"]), *cells, f"{figures['seconds']:.1f}"])
    rates = [f"{kind} {r['absent']} of {r['n']}" for kind, r in summary["absent"].items()]
    return markdown_rows(lines) + f"\n{name}: answered absent: {', '.join(rates)}\n"


def picture(volume: Volume, mask: np.ndarray, title: str) -> PILImage.Image:
    """The prediction (yellow) on the left, the truth (blue) on the right, each over the slices it occupies."""
    views = [
        overlay_slices(volume.unit, mask.astype(np.uint8), affine=volume.affine, title=title),
        overlay_slices(volume.unit, 2 * volume.truth.astype(np.uint8), affine=volume.affine, title="truth"),
    ]
    canvas = PILImage.new("RGB", (sum(v.width for v in views), max(v.height for v in views)))
    canvas.paste(views[0], (0, 0))
    canvas.paste(views[1], (views[0].width, 0))
    return canvas


def write_curve(summary: dict, steps: Sequence[int], out: Path) -> None:
    """Dice and seconds against the number of inpainting steps, with AOVA alone as a line where it was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    protocols = summary["protocols"]
    rows = [{"steps": n, **protocols[f"tumor_steps_{n}"]} for n in sorted(steps)]
    write_csv(out / "steps.csv", ("steps", "dice", "nsd", "seconds", "n"), rows)
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot([r["steps"] for r in rows], [r["dice"] for r in rows], "o-", label="all stages")
    if "tumor_aova" in protocols:
        axes.axhline(protocols["tumor_aova"]["dice"], color="gray", linestyle="--", label="AOVA alone")
    axes.set(xlabel="inpainting steps", ylabel="mean Dice", xscale="log")
    axes.legend()
    with atomic_path(out / "steps.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


# A set, and the command line.


def evaluate_volumes(inferer: TumorSegmentationInferer, args: argparse.Namespace) -> tuple[dict, int]:
    """Evaluate one folder and write its results to ``args.out``.

    Returns:
        the summary, and how many cases failed.

    Raises:
        ZeroSegError: no case could be evaluated.
    """
    name = args.images.resolve().name if args.images.resolve().name != "images" else args.images.resolve().parent.name
    pairs, unmatched = find_pairs(args.images, args.masks, args.out, args.half, args.limit)
    if unmatched:
        print(f"{name}: {len(unmatched)} images without a mask are left out, e.g. {unmatched[0]}", file=sys.stderr)
    asked = variants(inferer, args.ablation, args.steps)
    rows, answers, masks, failed, tolerances = [], [], {}, [], []
    for pair in tqdm(pairs, desc=name, unit="volume"):
        stem = pair[0].stem
        try:
            own = {"organ": args.organ, "tumor": args.text, "modality": args.modality} | args.prompts.get(stem, {})
            volume = load_volume(*pair, own.pop("modality"))
            tolerance = args.tolerance or tolerance_of(volume.spacing)
            with changed(inferer, **own):
                scored, absent, masks[stem] = run_volume(inferer, volume, asked, tolerance, args.nonsense)
            scored += run_baselines(volume, tolerance) if scored else []
        except ZeroSegError as error:
            failed.append({"case": stem, "error": str(error)})
            tqdm.write(f"{name}: {stem} failed: {error}", file=sys.stderr)
            continue
        tolerances.append(tolerance)
        rows += [{"case": stem} | row for row in scored]
        answers += [{"case": stem} | answer for answer in absent]
    if not answers:
        raise ZeroSegError(f"{name}: all {len(failed)} cases failed, the first: {failed[0]['error']}")

    run = {
        "absent": absent_rates(answers),
        "settings": {
            "protocols": list(asked),
            "text": inferer.tumor,
            "organ": inferer.organ,
            "modality": args.modality,
            "half": args.half,
            "limit": args.limit,
            "tolerance_mm": [min(tolerances), max(tolerances)],
            "inferer": inferer.settings(),
            "failed": failed,
            "versions": versions(),
        },
        "backbone": inferer.backbone.describe(),
    }
    summary = summarise_groups(rows, run, METRICS)
    write_csv(args.out / "cases.csv", COLUMNS, [r for r in rows if not r["protocol"].startswith("polarity/")])
    write_csv(args.out / "absent.csv", ("case", "kind", "text", "absent", "because", "image_probability"), answers)
    write_json(args.out / "summary.json", summary)
    table = volume_table(name, summary)
    write_text(args.out / "table.md", table)
    print(table)
    if rows and args.steps:
        write_curve(summary, args.steps, args.out)
    cases = {pair[0].stem: pair for pair in pairs}
    entries = []
    for place, row in best_median_worst([row for row in rows if row["protocol"] == "tumor"]) if rows else ():
        title = f"{name}, {place}: {row['case']}, Dice {row['dice']:.3f}"
        volume = load_volume(*cases[row["case"]], args.modality)
        entries.append((title, picture(volume, masks[row["case"]], title)))
    if entries:
        contact_html(entries, args.out / "report.html", title=f"ZeroSeg on {name}: tumour by text")
        contact_sheet(entries, args.out / "report.png")
    return summary, len(failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ZeroSegError: an argument is missing, unknown or of a wrong value.
    """
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inferer", choices=["tumor"], default="tumor", help="this evaluation")
    parser.add_argument("--protocol", choices=["tumor"], default="tumor", help="the only one")
    parser.add_argument("--images", type=Path, required=True, help="folder of volumes or 2-D images")
    parser.add_argument("--masks", type=Path, required=True, help="folder of masks with the images' names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--organ", default="body", help="where to look (default: body)")
    parser.add_argument("--text", help="what to look for (default: the organ's first tumour)")
    parser.add_argument("--modality", help="ct, mr or pet (default: what the file says, else guessed)")
    parser.add_argument("--prompts", help="JSON of organ, tumor and modality by case, e.g. the cases.json of phantoms")
    parser.add_argument("--stages", help="comma-separated, of aova, inpaint, pixel, feature (default: all)")
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
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the frozen model (default: fp32)")
    parser.add_argument("--half", choices=["dev", "test", "all"], default="all", help="fixed halves of every set")
    parser.add_argument("--limit", type=int, help="evaluate the first N cases only")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ZeroSegError("--limit must be at least 1")
    if args.tolerance is not None and not args.tolerance > 0:
        raise ZeroSegError("--tolerance must be a number of mm above 0")
    args.modality = check_modality(args.modality) if args.modality else None
    args.prompts = read_prompts(args.prompts) if args.prompts else {}
    args.stages = [s.strip() for s in args.stages.split(",")] if args.stages else None
    try:
        args.steps = sorted({int(s) for s in args.steps.split(",") if s.strip()})
    except ValueError:
        raise ZeroSegError(f"--steps must be whole numbers with commas between, not {args.steps!r}") from None
    if any(not 1 <= count <= 1000 for count in args.steps):
        raise ZeroSegError("--steps must lie in 1..1000")
    return args


def read_prompts(path: str) -> dict[str, dict[str, str]]:
    """Case -> its own organ, tumor and modality; other keys, such as a phantom's seed, are left aside.

    Raises:
        ZeroSegError: the file cannot be read or is not of that form.
    """
    try:
        found = json.loads(Path(path).read_text())
        return {stem: {k: v for k, v in case.items() if k in TUMOR_PROMPT_KEYS and v} for stem, case in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ZeroSegError(f"--prompts must be a JSON file of objects by case: {error}") from error


def make_inferer(args: argparse.Namespace) -> TumorSegmentationInferer:
    """The inferer of a command line, its settings checked and its weights loaded."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; or 2 when the arguments were refused or some cases failed (the others are evaluated).
    """
    return run_evaluation(parse, lambda args: evaluate_volumes(make_inferer(args), args)[1], argv)


if __name__ == "__main__":
    sys.exit(main())
