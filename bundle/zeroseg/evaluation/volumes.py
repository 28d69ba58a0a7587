"""Measuring text-prompted tumour masks against the truth: one folder of volumes (or of 2-D images, as single slices)."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from tqdm import tqdm

from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.pairs import find_pairs
from zeroseg.evaluation.summaries import best_median_worst, methods_of, summarise_groups
from zeroseg.evaluation.tables import markdown_rows, write_csv, write_text
from zeroseg.evaluation.volume_baselines import AUTOMATIC, BRIGHT, PET
from zeroseg.evaluation.volume_metrics import METRICS, score_volume, tolerance_of
from zeroseg.io import (
    Case,
    atomic_path,
    check_same_grid,
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
from zeroseg.tumor.prompts import DICOM_MODALITIES

COLUMNS = ("case", "protocol", *METRICS, "seconds")
ABLATION: dict[str, tuple[str, ...]] = {
    "tumor_aova": ("aova",),
    "tumor_pixel": ("aova", "inpaint", "pixel"),
    "tumor_feature": ("aova", "inpaint", "feature"),
    "tumor_words": ("aova", "inpaint", "pixel", "feature"),
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
        ZeroSegError: a file cannot be read, or the mask does not lie on the image's grid.
    """
    image, mask = read_image(image_case), read_image(mask_case)
    check_same_grid(f"the mask {mask_case.paths[0]}", mask.shape, mask.affine, image.shape, image.affine)
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
    try:
        for name, value in settings.items():
            setattr(inferer, name, value)
        yield inferer
    finally:
        for name, value in before.items():
            setattr(inferer, name, value)


def variants(inferer: TumorSegmentationInferer, ablation: bool, steps: Sequence[int]) -> dict[str, dict]:
    """Row -> settings of the inferer that differ."""
    rows: dict[str, dict] = {"tumor": {}}
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
        # What it takes to find these belongs to every row that needs them.
        encoded.forget()
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


def evaluate_volumes(
    inferer: TumorSegmentationInferer,
    images: Path,
    masks: Path,
    out: Path,
    modality: str | None = None,
    prompts: Mapping[str, Mapping[str, str]] | None = None,
    half: str = "all",
    limit: int | None = None,
    ablation: bool = False,
    steps: Sequence[int] = (),
    nonsense: bool = False,
    tolerance: float | None = None,
) -> tuple[dict, int]:
    """Evaluate one folder and write its results to ``out``.

    Args:
        inferer: what is measured, with organ, tumour and weights.
        images: folder of volumes, or of 2-D images, which count as volumes of one slice.
        masks: folder of masks with the images' names; an empty one says that the scan is healthy.
        out: folder to write to.
        modality: ct, mr or pet; None: what the file says, else guessed.
        prompts: case -> its own ``organ``, ``tumor`` and ``modality``.
        half: ``dev``, ``test`` or ``all``.
        limit: evaluate that many cases at most.
        ablation: also with fewer stages.
        steps: numbers of inpainting steps to compare.
        nonsense: also ask for what is no tumour.
        tolerance: of the NSD in mm; None: twice the voxel's mean side.

    Returns:
        the summary, and how many cases failed.

    Raises:
        ZeroSegError: no case could be evaluated.
    """
    folder = images.resolve()
    name = folder.name if folder.name != "images" else folder.parent.name
    pairs, unmatched = find_pairs(images, masks, out, half, limit)
    if unmatched:
        print(f"{name}: {len(unmatched)} images without a mask are left out, e.g. {unmatched[0]}", file=sys.stderr)
    asked = variants(inferer, ablation, steps)
    rows, answers, predictions, failed, tolerances = [], [], {}, [], []
    for pair in tqdm(pairs, desc=name, unit="volume"):
        stem = pair[0].stem
        try:
            own = {
                "organ": inferer.organ,
                "tumor": inferer.tumor,
                "modality": modality,
                **(prompts or {}).get(stem, {}),
            }
            volume = load_volume(pair[0], pair[1], own.pop("modality"))
            allowed = tolerance or tolerance_of(volume.spacing)
            with changed(inferer, **own):
                scored, absent, mask = run_volume(inferer, volume, asked, allowed, nonsense)
            # Bits, for three of all will be shown.
            predictions[stem] = np.packbits(mask)
            scored += run_baselines(volume, allowed) if scored else []
        except ZeroSegError as error:
            failed.append({"case": stem, "error": str(error)})
            tqdm.write(f"{name}: {stem} failed: {error}", file=sys.stderr)
            continue
        tolerances.append(allowed)
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
            "modality": modality,
            "half": half,
            "limit": limit,
            "tolerance_mm": [min(tolerances), max(tolerances)],
            "inferer": inferer.settings(),
            "failed": failed,
            "versions": versions(),
        },
        "backbone": inferer.backbone.describe(),
    }
    summary = summarise_groups(rows, run, METRICS)
    write_csv(out / "cases.csv", COLUMNS, [r for r in rows if not r["protocol"].startswith("polarity/")])
    write_csv(out / "absent.csv", ("case", "kind", "text", "absent", "because", "image_probability"), answers)
    write_json(out / "summary.json", summary)
    table = volume_table(name, summary)
    write_text(out / "table.md", table)
    print(table)
    if rows and steps:
        write_curve(summary, steps, out)
    cases = {pair[0].stem: pair for pair in pairs}
    entries = []
    for place, row in best_median_worst([row for row in rows if row["protocol"] == "tumor"]) if rows else ():
        title = f"{name}, {place}: {row['case']}, Dice {row['dice']:.3f}"
        volume = load_volume(*cases[row["case"]], modality)
        mask = np.unpackbits(predictions[row["case"]], count=volume.truth.size).reshape(volume.truth.shape)
        entries.append((title, picture(volume, mask, title)))
    if entries:
        contact_html(entries, out / "report.html", title=f"ZeroSeg on {name}: tumour by text")
        contact_sheet(entries, out / "report.png")
    return summary, len(failed)
