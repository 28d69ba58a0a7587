"""Interactive protocols over the largest component of a mask; every method is driven by the same simulated annotator.

clicks           RITM's rule: the first click innermost, each further one at the deepest pixel of the larger error
clicks_random    the same with every click at a random pixel of that error
box+clicks       the tight box first, then clicks
scribbles        one stroke on the object and one beside it, drawn by program in three ways; a single answer
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zeroseg.evaluation.annotator import bounding_box, innermost_point
from zeroseg.evaluation.baselines import grabcut_marks, random_walker_marks
from zeroseg.evaluation.clicks import (
    AT,
    NOC,
    Curve,
    click_curve,
    draw_curves,
    generator_of,
    overlap,
    scribble_pair,
    summarise_curves,
)
from zeroseg.evaluation.protocols import Sample

INTERACTIVE = ("clicks", "clicks_random", "box+clicks", "scribbles")
STROKES = ("centre", "contour", "walk")
Curves = dict[str, dict[str, list[Curve]]]
"""Protocol -> method -> one curve an object."""


def run_interactive(methods: dict, sample: Sample, protocols: Sequence[str], clicks: int, curves: Curves) -> None:
    """Run the interactive protocols on one image and add what they gave to ``curves``.

    Args:
        methods: name -> inferer; those that differ in how they answer share one encoding.
        sample: the image; its largest component is the object.
        protocols: of ``INTERACTIVE``.
        clicks: of a curve.
        curves: is added to; ``defaultdict(lambda: defaultdict(list))``.
    """
    truth = sample.component
    size = truth.shape
    encodings: dict = {}
    for name, inferer in methods.items():
        key = id(inferer.backbone), inferer.encoding_key
        if key not in encodings:
            encodings[key] = inferer.encode(sample.image)
        encoded = encodings[key].fresh()

        def answer(points, labels, inferer=inferer, encoded=encoded, **further):
            return inferer.predict(encoded, select="points", points=points, labels=labels, **further).labels > 0

        for protocol in protocols:
            rng = generator_of(sample.stem) if protocol != "clicks" else None
            if protocol in ("clicks", "clicks_random"):
                curves[protocol][name].append(click_curve(answer, truth, clicks, rng))
            elif protocol == "box+clicks":
                box = bounding_box(truth)
                first = inferer.predict(encoded, select="box", box=box).labels > 0

                def within(points, labels, answer=answer, box=box):
                    return answer(points, labels, box=box)

                curves[protocol][name].append(click_curve(within, truth, clicks, None, first))
            else:
                for kind in STROKES:
                    strokes = scribble_pair(truth, kind, generator_of(sample.stem))
                    mask = inferer.predict(encoded, select="points", scribbles=strokes).labels > 0
                    curves[f"scribbles_{kind}"][name].append(_single(mask, truth))
        if "clicks" in protocols and inferer.refiner == "head":
            curves["clicks"][f"oracle_best_of_three ({name})"].append(_best_of_three(inferer, encoded, sample))
    for name, method in (("GrabCut", grabcut_marks), ("random walker", random_walker_marks)):
        for protocol in protocols:
            if protocol in ("clicks", "clicks_random"):

                def drawn(points, labels, method=method):
                    marks = np.zeros(size, np.uint8)
                    for (x, y), label in zip(points, labels, strict=True):
                        marks[int(y), int(x)] = 1 if label else 2
                    return method(sample.image, marks)

                rng = generator_of(sample.stem) if protocol != "clicks" else None
                curves[protocol][name].append(click_curve(drawn, truth, clicks, rng))
            elif protocol == "scribbles":
                for kind in STROKES:
                    strokes = scribble_pair(truth, kind, generator_of(sample.stem))
                    curves[f"scribbles_{kind}"][name].append(_single(method(sample.image, strokes), truth))


def _best_of_three(inferer, encoded, sample: Sample) -> Curve:
    """The candidate of the first click that fits the truth best: an upper bound, nobody's answer."""
    x, y = innermost_point(sample.component)
    point = [[float(x), float(y)]]
    masks = [inferer.predict(encoded, select="points", points=point, candidate=k).labels > 0 for k in (1, 2, 3)]
    return _single(max(masks, key=lambda m: overlap(m, sample.component)[0]), sample.component)


def _single(mask: np.ndarray, truth: np.ndarray) -> Curve:
    dice, iou = overlap(mask, truth)
    return Curve(np.array([dice]), np.array([iou]), [], 1)


def empty_curves() -> Curves:
    return defaultdict(lambda: defaultdict(list))


def summarise_interactive(curves: Curves) -> dict:
    """Protocol -> method -> ``summarise_curves``."""
    return {
        protocol: {name: summarise_curves(c) for name, c in methods.items()} for protocol, methods in curves.items()
    }


def mean_interactive(summaries: Sequence[dict]) -> dict:
    """The mean over sets of what ``summarise_interactive`` gave for each, every set counting alike."""

    def mean(values):
        if isinstance(values[0], dict):
            return {k: mean([v[k] for v in values]) for k in values[0] if all(k in v for v in values)}
        if isinstance(values[0], list):
            return np.mean(values, 0).round(4).tolist()
        return float(np.mean(values))

    return mean(list(summaries))


def interactive_table(summary: dict) -> str:
    """What ``summarise_interactive`` or ``mean_interactive`` gave, as Markdown."""
    lines = []
    for protocol, methods in summary.items():
        ks = [k for k in AT if any(str(k) in m["dice"] for m in methods.values())]
        goals = [f"{g:.2f}" for g in NOC]
        head = [f"Dice@{k}" for k in ks]
        if len(ks) > 1:
            head += [f"NoC@{g}" for g in goals] + ["lossy", "s p50", "s p95"]
        lines += [f"### {protocol}", "", "| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
        for name, m in methods.items():
            row = [f"{m['dice'][str(k)]:.3f}" if str(k) in m["dice"] else "" for k in ks]
            if len(ks) > 1 and len(m["dice"]) > 1:
                row += [f"{m['noc_iou'][g]['clicks']:.2f} ({m['noc_iou'][g]['failures']:g})" for g in goals]
                row += [f"{m['lossy']:.1%}", f"{m['seconds_p50']:.3f}", f"{m['seconds_p95']:.3f}"]
            lines.append(f"| {name} | " + " | ".join(row + [""] * (len(head) - len(row))) + " |")
        lines.append("")
    return "\n".join(lines)


def write_interactive(summary: dict, out: Path, title: str) -> None:
    """``interaction.md`` and a figure of the curves."""
    from zeroseg.evaluation.tables import write_text

    write_text(out / "interaction.md", interactive_table(summary))
    for protocol, methods in summary.items():
        long = {name: m for name, m in methods.items() if len(m["curve"]) > 1}
        if long:
            draw_curves(long, out / f"{protocol}.png", f"{title}: {protocol}")
