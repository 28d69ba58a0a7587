"""Evaluating folders of 2-D images: a set, or a suite of sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from scipy import ndimage
from tqdm import tqdm

from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.annotator import bounding_box
from zeroseg.evaluation.confidence import reliability_diagram
from zeroseg.evaluation.interactive import (
    INTERACTIVE,
    empty_curves,
    mean_interactive,
    run_interactive,
    summarise_interactive,
    write_interactive,
)
from zeroseg.evaluation.pairs import find_pairs, sets_of
from zeroseg.evaluation.protocols import CLICKED, Sample, load_sample, run_baselines, run_protocols
from zeroseg.evaluation.summaries import best_median_worst, mean_over_sets, summarise_groups
from zeroseg.evaluation.tables import report_tables, write_csv, write_text
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import contact_html, contact_sheet, draw_overlay, versions, write_json

COLUMNS = ("case", "protocol", "dice", "iou", "hd95", "seconds", "score")
TRUTH_COLOR = (86, 180, 233)
"""Okabe and Ito's sky blue: the overlay's second colour."""


def overlay(sample: Sample, mask: np.ndarray, protocol: str) -> PILImage.Image:
    """The image with the prediction (yellow), the mask (blue, just outside of it) and the prompt."""
    prompt: dict[str, Any] = {"points": [CLICKED[protocol](sample)]} if protocol in CLICKED else {}
    prompt = {"box": bounding_box(sample.component)} if protocol == "box" else prompt
    picture = draw_overlay(sample.image, mask.astype(np.uint8), **prompt)
    truth = np.asarray(PILImage.fromarray(sample.truth).resize(picture.size, PILImage.Resampling.NEAREST))
    canvas = np.array(picture)
    canvas[ndimage.binary_dilation(truth, iterations=4) & ~ndimage.binary_dilation(truth)] = TRUTH_COLOR
    return PILImage.fromarray(canvas)


def evaluate_set(
    name: str,
    images: Path,
    masks: Path,
    out: Path,
    inferer: AttentionSegmentationInferer,
    protocols: Sequence[str],
    text: str | None = None,
    control: AttentionSegmentationInferer | None = None,
    half: str = "all",
    limit: int | None = None,
    clicks: int = 20,
) -> tuple[dict, list[tuple[str, PILImage.Image]], int]:
    """Evaluate one folder and write its results to ``out``.

    Args:
        name: of the set, in tables.
        images: folder of 2-D images.
        masks: folder of masks with the images' names; any nonzero pixel is foreground.
        out: folder to write to.
        inferer: what is measured, with its weights loaded.
        protocols: names of ``protocols.PROTOCOLS`` and ``interactive.INTERACTIVE``.
        text: prompt of the protocol ``text``, which is left out without one.
        control: the same pipeline on random weights, or None.
        half: ``dev``, ``test`` or ``all``.
        limit: evaluate that many cases at most.
        clicks: of an interactive protocol.

    Returns:
        the summary, (title, picture) of the report, and how many cases failed.

    Raises:
        ZeroSegError: no case could be evaluated.
    """
    protocols = [p for p in protocols if p != "text" or text is not None]
    pairs, unmatched = find_pairs(images, masks, out, half, limit)
    if unmatched:
        print(f"{name}: {len(unmatched)} images without a mask are left out, e.g. {unmatched[0]}", file=sys.stderr)
    interactive = [p for p in protocols if p in INTERACTIVE]
    protocols = [p for p in protocols if p not in INTERACTIVE] or ["points"]
    shown = next(p for p in ("points", "auto", *protocols) if p in protocols)
    rows, predictions, failed, curves = [], {}, [], empty_curves()
    methods = {"zeroseg": inferer}
    if interactive and inferer.refiner == "head":
        methods["zeroseg, refiner rules"] = inferer.replace(refiner="rules")
    if control is not None:
        methods["untrained backbone"] = control
    for image_case, mask_case in tqdm(pairs, desc=name, unit="image"):
        try:
            sample = load_sample(image_case, mask_case)
            case_rows, answers = run_protocols(inferer, sample, protocols, text)
            if control is not None:
                controls, _ = run_protocols(control, sample, protocols, text)
                case_rows += [row | {"protocol": f"untrained/{row['protocol']}"} for row in controls]
            case_rows += run_baselines(sample, protocols)
            if interactive:
                run_interactive(methods, sample, interactive, clicks, curves)
        except ZeroSegError as error:
            failed.append({"case": image_case.stem, "error": str(error)})
            tqdm.write(f"{name}: {image_case.stem} failed: {error}", file=sys.stderr)
            continue
        rows += [{"case": sample.stem} | row for row in case_rows]
        predictions[sample.stem] = answers[shown]
    if not rows:
        raise ZeroSegError(f"{name}: all {len(failed)} cases failed, the first: {failed[0]['error']}")

    run = {
        "settings": {
            "protocols": [*protocols, *interactive],
            "clicks": clicks if interactive else None,
            "text": text if "text" in protocols else None,
            "half": half,
            "limit": limit,
            "inferer": inferer.settings(),
            "failed": failed,
            "versions": versions(),
        },
        "backbone": inferer.backbone.describe(),
    }
    summary = summarise_groups(rows, run)
    if interactive:
        summary["interaction"] = summarise_interactive(curves)
        write_interactive(summary["interaction"], out, name)
    write_csv(out / "cases.csv", COLUMNS, [row for row in rows if not row["protocol"].startswith("polarity/")])
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", report_tables({name: summary}))
    judged = {protocol: values for protocol, values in summary["protocols"].items() if "reliability" in values}
    if judged:
        reliability_diagram(judged, out / "reliability.png", f"{name}: confidence of pixels")
    cases = {image_case.stem: (image_case, mask_case) for image_case, mask_case in pairs}
    entries = []
    for place, row in best_median_worst([row for row in rows if row["protocol"] == shown]):
        title = f"{name}, {shown}, {place}: {row['case']}, Dice {row['dice']:.3f}"
        entries.append((title, overlay(load_sample(*cases[row["case"]]), predictions[row["case"]], shown)))
    contact_html(entries, out / "report.html", title=f"ZeroSeg on {name}: {shown}")
    contact_sheet(entries, out / "report.png")
    return summary, entries, len(failed)


def picture_sets(suite: Path) -> dict[str, tuple[Path, Path]]:
    """The 2-D sets of a folder: name -> its folders of images and masks; those of volumes are named and left out.

    Raises:
        ZeroSegError: as ``pairs.sets_of``.
    """
    sets = {}
    for folder, volumes in sets_of(suite):
        if volumes:
            print(f"{folder.name}: skipped, it holds volumes")
        else:
            sets[folder.name] = folder / "images", folder / "masks"
    return sets


def evaluate_suite(
    suite: Path,
    out: Path,
    inferer: AttentionSegmentationInferer,
    protocols: Sequence[str],
    texts: Mapping[str | None, str],
    control: AttentionSegmentationInferer | None = None,
    half: str = "all",
    limit: int | None = None,
    clicks: int = 20,
) -> int:
    """Evaluate every 2-D set of a folder; returns how many cases and sets failed.

    Args:
        suite: folder of sets, each with ``images`` and ``masks``; sets of volumes are left out.
        texts: prompt of the protocol ``text`` by the name of its set; None: of every other set.
        other arguments: as ``evaluate_set``.

    Raises:
        ZeroSegError: there is no set, or none could be evaluated.
    """
    summaries, entries, failures = {}, [], 0
    for name, pair in picture_sets(suite).items():
        text = texts.get(name, texts.get(None))
        try:
            summary, pictures, failed = evaluate_set(
                name, *pair, out / name, inferer, protocols, text, control, half, limit, clicks
            )
        except ZeroSegError as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            failures += 1
            continue
        summaries[name] = summary
        entries += pictures
        failures += failed
    if not summaries:
        raise ZeroSegError(f"{suite}: no set could be evaluated")
    if all("interaction" in s for s in summaries.values()):
        write_interactive(mean_interactive([s["interaction"] for s in summaries.values()]), out, "mean over sets")
    table = report_tables(summaries)
    write_text(out / "table.md", table)
    write_json(out / "table.json", {"sets": summaries, "mean_dice": mean_over_sets(summaries)})
    contact_html(entries, out / "report.html", title="ZeroSeg: best, median and worst case of every set")
    print(table)
    return failures
