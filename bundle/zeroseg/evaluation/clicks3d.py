"""Clicks in volumes, by the rule of the CVPR 2025 challenge on interactive 3-D segmentation: five clicks, each scored.

clicks3d       each click at the centre of the largest 26-connected component of what is wrong
box+clicks3d   the tight box first, whose answer counts for nothing, then the clicks

The largest 26-connected component of the mask is the object. The same annotator drives every method.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.annotator import next_click_3d
from zeroseg.evaluation.clicks import LOSS, overlap
from zeroseg.evaluation.pairs import find_pairs, sets_of
from zeroseg.evaluation.tables import markdown_rows, write_csv, write_text
from zeroseg.evaluation.volume_baselines import CLICKED
from zeroseg.evaluation.volume_metrics import surface_dice
from zeroseg.evaluation.volumes import Volume, load_volume
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import versions, write_json

CLICKS = 5
TOLERANCE = 2.0
"""mm of the NSD."""
VOLUME_PROTOCOLS = ("clicks3d", "box+clicks3d")

Answer = Callable[[list[list[float]], list[int]], np.ndarray]
"""Points (x, y, z) and labels so far -> (X, Y, Z) bool."""


@dataclass
class VolumeCurve:
    """One method on one object.

    Attributes:
        dice, nsd: (K,) after each of K clicks; once nothing is wrong any more, the last value stays.
        seconds: what each click that was made took; the first one with all that has to be worked out once.
    """

    dice: np.ndarray
    nsd: np.ndarray
    seconds: list[float]

    @property
    def auc(self) -> float:
        """Area under Dice over the clicks by trapezoids, divided by its largest value: in [0, 1]."""
        if len(self.dice) == 1:
            return float(self.dice[0])
        return float((self.dice[1:] + self.dice[:-1]).mean() / 2)


def volume_curve(
    answer: Answer,
    truth: np.ndarray,
    spacing: Sequence[float],
    clicks: int = CLICKS,
    first: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> VolumeCurve:
    """Click until nothing is wrong, ``clicks`` times at most.

    Args:
        answer: the method.
        truth: (X, Y, Z) bool, not empty.
        spacing: voxel size in mm.
        clicks: K.
        first: (X, Y, Z) bool, an answer that is there before the first click, or None.
        tolerance: mm of the NSD.
    """
    mask = np.zeros(truth.shape, bool) if first is None else first
    points: list[list[float]] = []
    labels: list[int] = []
    dice, nsd, seconds = [], [], []
    for _ in range(clicks):
        following = next_click_3d(mask, truth)
        if following is None:
            break
        points.append([float(v) for v in following[0]])
        labels.append(following[1])
        start = time.perf_counter()
        mask = answer(points, labels)
        seconds.append(time.perf_counter() - start)
        dice.append(overlap(mask, truth)[0])
        nsd.append(surface_dice(mask, truth, spacing, tolerance))
    dice, nsd = (v + (v[-1:] or [1.0]) * (clicks - len(v)) for v in (dice, nsd))
    return VolumeCurve(np.array(dice), np.array(nsd), seconds)


def object_of(truth: np.ndarray) -> np.ndarray:
    """The largest 26-connected component of a bool mask."""
    parts, _ = ndimage.label(truth, np.ones((3,) * truth.ndim))
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def box_of(mask: np.ndarray) -> list[float]:
    """[x0, y0, z0, x1, y1, z1] of the outermost voxels, both included."""
    corners = [np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))[[0, -1]] for axis in range(3)]
    return [float(c[end]) for end in (0, 1) for c in corners]


def run_clicks3d(
    methods: dict[str, AttentionSegmentationInferer], volume: Volume, protocols: Sequence[str], clicks: int
) -> dict[tuple[str, str], VolumeCurve]:
    """(protocol, method) -> its curve on one volume; baselines are driven alike where no box is given.

    Args:
        methods: name -> inferer.
        volume: the scan.
        protocols: of ``VOLUME_PROTOCOLS``.
        clicks: of a curve.
    """
    truth = object_of(volume.truth)
    out = {}
    for name, inferer in methods.items():

        def answer(points, labels, inferer=inferer, **further):
            return inferer.segment(
                volume.values, "points", affine=volume.affine, points=points, labels=labels, **further
            ).labels.astype(bool)  # fmt: skip

        for protocol in protocols:
            if protocol == "clicks3d":
                out[protocol, name] = volume_curve(answer, truth, volume.spacing, clicks)
                continue
            box = box_of(truth)
            first = inferer.segment(volume.values, "box", affine=volume.affine, box=box).labels > 0

            def within(points, labels, answer=answer, box=box):
                return answer(points, labels, box=box)

            out[protocol, name] = volume_curve(within, truth, volume.spacing, clicks, first)
    if "clicks3d" in protocols:
        gray = volume.values.mean(0)
        for name, method in CLICKED.items():

            def drawn(points, labels, method=method):
                marks = np.zeros(truth.shape, np.uint8)
                for point, label in zip(points, labels, strict=True):
                    marks[tuple(int(v) for v in point)] = 1 if label else 2
                return method(gray, marks, volume.spacing)

            out["clicks3d", name] = volume_curve(drawn, truth, volume.spacing, clicks)
    return out


def summarise_volume_curves(curves: Sequence[VolumeCurve]) -> dict:
    """Means over objects of one method.

    Returns:
        ``objects``; ``dice`` and ``nsd``, lists over the clicks; ``auc`` in [0, 1]; ``lossy``: share of further clicks that lose more
        than ``LOSS`` Dice; ``seconds_first``, ``seconds_further``: means.
    """
    further = np.concatenate([np.diff(c.dice[: max(1, len(c.seconds))]) for c in curves])
    later = [s for c in curves for s in c.seconds[1:]]
    return {
        "objects": len(curves),
        "dice": np.mean([c.dice for c in curves], 0).round(4).tolist(),
        "nsd": np.mean([c.nsd for c in curves], 0).round(4).tolist(),
        "auc": float(np.mean([c.auc for c in curves])),
        "lossy": float((further < -LOSS).mean()) if len(further) else 0.0,
        "further_clicks": len(further),
        "seconds_first": float(np.mean([c.seconds[0] for c in curves if c.seconds] or [0.0])),
        "seconds_further": float(np.mean(later or [0.0])),
    }


def clicks3d_table(summary: dict[str, dict[str, dict]]) -> str:
    """Protocol -> method -> ``summarise_volume_curves``, as Markdown."""
    lines = []
    for protocol, methods in summary.items():
        count = len(next(iter(methods.values()))["dice"])
        head = [protocol, "n", *(f"Dice@{k + 1}" for k in range(count)), "AUC/4", f"NSD@{count}", "lossy", "s first", "s further"]  # fmt: skip
        lines += [head, ["---"] + ["---:"] * (len(head) - 1)]
        for name, m in methods.items():
            values = [*m["dice"], m["auc"], m["nsd"][-1]]
            seconds = [f"{m['seconds_first']:.1f}", f"{m['seconds_further']:.1f}"]
            lines.append([name, str(m["objects"]), *(f"{v:.3f}" for v in values), f"{m['lossy']:.1%}", *seconds])
        lines.append([])
    return markdown_rows(lines).replace("|  |\n", "\n")


def evaluate_clicks3d(
    name: str,
    images: Path,
    masks: Path,
    out: Path,
    inferer: AttentionSegmentationInferer,
    protocols: Sequence[str] = ("clicks3d",),
    half: str = "all",
    limit: int | None = None,
    clicks: int = CLICKS,
) -> tuple[dict, int]:
    """Evaluate one folder of volumes and write its results to ``out``: cases.csv, summary.json, table.md.

    Args:
        name: of the set, in tables.
        images, masks: folders with the same names in them; any nonzero voxel is foreground.
        out: folder to write to.
        inferer: what is measured; with ``refiner`` head, ``rules`` is measured beside it.
        protocols: of ``VOLUME_PROTOCOLS``.
        half: ``dev``, ``test`` or ``all``.
        limit: evaluate that many cases at most.
        clicks: of a curve.

    Returns:
        the summary, and how many cases failed.

    Raises:
        ZeroSegError: no case could be evaluated.
    """
    pairs, unmatched = find_pairs(images, masks, out, half, limit)
    if unmatched:
        print(f"{name}: {len(unmatched)} images without a mask are left out, e.g. {unmatched[0]}", file=sys.stderr)
    methods = {"zeroseg": inferer}
    if inferer.refiner == "head":
        methods["zeroseg, refiner rules"] = inferer.replace(refiner="rules")
    curves: dict[str, dict[str, list[VolumeCurve]]] = defaultdict(lambda: defaultdict(list))
    rows, failed = [], []
    for image_case, mask_case in tqdm(pairs, desc=name, unit="volume"):
        try:
            volume = load_volume(image_case, mask_case, None)
            if not volume.truth.any():
                raise ZeroSegError(f"{mask_case.paths[0]}: the mask is empty, so there is nothing to click on")
            answered = run_clicks3d(methods, volume, protocols, clicks)
        except ZeroSegError as error:
            failed.append({"case": image_case.stem, "error": str(error)})
            tqdm.write(f"{name}: {image_case.stem} failed: {error}", file=sys.stderr)
            continue
        for (protocol, method), curve in answered.items():
            curves[protocol][method].append(curve)
            per_click = zip(curve.dice, curve.nsd, strict=True)
            rows += [
                {"case": volume.stem, "protocol": protocol, "method": method, "click": k + 1, "dice": d, "nsd": n}
                for k, (d, n) in enumerate(per_click)
            ]
    if not rows:
        raise ZeroSegError(f"{name}: all {len(failed)} cases failed, the first: {failed[0]['error']}")
    found = {p: {m: summarise_volume_curves(c) for m, c in each.items()} for p, each in curves.items()}
    summary = {
        "interaction": found,
        "settings": {
            "protocols": list(protocols),
            "clicks": clicks,
            "tolerance_mm": TOLERANCE,
            "half": half,
            "limit": limit,
            "inferer": inferer.settings(),
            "failed": failed,
            "versions": versions(),
        },
        "backbone": inferer.backbone.describe(),
    }
    write_csv(out / "cases.csv", ("case", "protocol", "method", "click", "dice", "nsd"), rows)
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", clicks3d_table(found))
    return summary, len(failed)


def evaluate_clicks3d_suite(
    suite: Path,
    out: Path,
    inferer: AttentionSegmentationInferer,
    protocols: Sequence[str] = ("clicks3d",),
    half: str = "all",
    limit: int | None = None,
    clicks: int = CLICKS,
) -> int:
    """Evaluate every set of volumes of a folder, arguments as ``evaluate_clicks3d``; returns how many cases and sets failed.

    Raises:
        ZeroSegError: there is no set of volumes, or none could be evaluated.
    """
    summaries, tables, failures = {}, [], 0
    for folder, volumes in sets_of(suite):
        if not volumes:
            print(f"{folder.name}: skipped, it holds no volumes")
            continue
        try:
            summary, failed = evaluate_clicks3d(
                folder.name, folder / "images", folder / "masks", out / folder.name, inferer, protocols, half, limit, clicks
            )  # fmt: skip
        except ZeroSegError as error:
            print(f"{folder.name} failed: {error}", file=sys.stderr)
            failures += 1
            continue
        summaries[folder.name] = summary
        tables.append(f"{folder.name}\n\n{clicks3d_table(summary['interaction'])}")
        failures += failed
    if not summaries:
        raise ZeroSegError(f"{suite}: no set of volumes could be evaluated")
    write_json(out / "table.json", {"sets": summaries})
    write_text(out / "table.md", "\n".join(tables))
    print("\n".join(tables))
    return failures
