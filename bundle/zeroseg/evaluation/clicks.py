"""Interactive protocols: a simulated annotator corrects an answer again and again, and every answer is scored.

Clicks follow RITM's rule (Sofiiuk et al. 2022), scribbles are drawn by program; the same annotator drives every method. The truth
chooses where the annotator shows an error, as a person would; it never chooses among answers, except in the row ``oracle_best_of_three``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zeroseg.evaluation.annotator import next_click, scribble

AT = (1, 2, 3, 5, 10, 20)
"""Clicks after which Dice and IoU are reported."""
NOC = (0.80, 0.85, 0.90)
"""Overlaps to be reached, by IoU and by Dice, in the number of clicks."""
LOSS = 0.02
"""A further click is lossy where it takes more than this from the Dice."""

Answer = Callable[[list[list[float]], list[int]], np.ndarray]
"""Points (x, y) and labels so far -> (H, W) bool."""


@dataclass
class Curve:
    """One method on one object.

    Attributes:
        dice, iou: (K,) after each of K clicks; once nothing is wrong any more, the last value stays.
        seconds: what each click that was made took.
        clicks: how many were made.
    """

    dice: np.ndarray
    iou: np.ndarray
    seconds: list[float]
    clicks: int


def overlap(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of two bool arrays, the second not empty."""
    common = np.count_nonzero(mask & truth)
    both = np.count_nonzero(mask) + np.count_nonzero(truth)
    return 2 * common / both, common / (both - common)


def click_curve(
    answer: Answer,
    truth: np.ndarray,
    clicks: int = 20,
    rng: np.random.Generator | None = None,
    first: np.ndarray | None = None,
) -> Curve:
    """Click until nothing is wrong, ``clicks`` times at most.

    Args:
        answer: the method.
        truth: (H, W) bool, not empty.
        clicks: K.
        rng: None clicks the deepest pixel of an error, a generator a random one.
        first: (H, W) bool, an answer that is there before the first click and counts as the curve's first; or None.
    """
    mask = np.zeros(truth.shape, bool) if first is None else first
    points: list[list[float]] = []
    labels: list[int] = []
    values, seconds = [] if first is None else [overlap(first, truth)], []
    for _ in range(clicks):
        following = next_click(mask, truth, rng)
        if following is None:
            break
        (row, column), label = following
        points.append([float(column), float(row)])
        labels.append(label)
        start = time.perf_counter()
        mask = answer(points, labels)
        seconds.append(time.perf_counter() - start)
        values.append(overlap(mask, truth))
    values += values[-1:] * (clicks + (first is not None) - len(values))
    dice, iou = np.array(values).T
    return Curve(dice, iou, seconds, len(seconds) + (first is not None))


def generator_of(stem: str) -> np.random.Generator:
    """The chance of one case, the same in every run and for every method."""
    return np.random.default_rng(int(hashlib.sha256(f"clicks {stem}".encode()).hexdigest()[:16], 16))


def scribble_pair(truth: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8: one stroke on the object (1) and one on what surrounds it (2).

    The background's stroke runs in a band around the object, as wide as the object's radius, so that it says where the object ends.
    """
    from scipy import ndimage

    width = max(6.0, 0.5 * float(truth.sum()) ** 0.5)
    away = ndimage.distance_transform_edt(~truth)
    around = (away > 2) & (away <= width)
    out = np.zeros(truth.shape, np.uint8)
    if around.any():
        out[scribble(around, "walk" if kind == "centre" else kind, rng)] = 2
    out[scribble(truth, kind, rng)] = 1
    return out


def summarise_curves(curves: Sequence[Curve]) -> dict:
    """Means over objects of one method.

    Returns:
        ``dice`` and ``iou`` after ``AT`` clicks; ``noc_iou`` and ``noc_dice``: mean number of clicks and how many objects failed, for
        each of ``NOC``, a failure counting as all clicks; ``lossy``: share of further clicks that lose more than ``LOSS`` Dice;
        ``seconds_p50`` and ``seconds_p95`` of a click.
    """
    dice, iou = np.stack([c.dice for c in curves]), np.stack([c.iou for c in curves])
    further = np.concatenate([np.diff(c.dice[: c.clicks]) for c in curves])
    seconds = np.concatenate([c.seconds or [0.0] for c in curves])
    at = [k for k in AT if k <= dice.shape[1]]
    out: dict = {
        "objects": len(curves),
        "dice": {str(k): float(dice[:, k - 1].mean()) for k in at},
        "iou": {str(k): float(iou[:, k - 1].mean()) for k in at},
        "curve": dice.mean(0).round(4).tolist(),
        "lossy": float((further < -LOSS).mean()) if len(further) else 0.0,
        "further_clicks": len(further),
        "seconds_p50": float(np.quantile(seconds, 0.5)),
        "seconds_p95": float(np.quantile(seconds, 0.95)),
    }
    for name, values in (("iou", iou), ("dice", dice)):
        out[f"noc_{name}"] = {
            f"{goal:.2f}": {
                "clicks": float(np.mean([_clicks_to(v, goal) for v in values])),
                "failures": int((values.max(1) < goal).sum()),
            }
            for goal in NOC
        }
    return out


def _clicks_to(values: np.ndarray, goal: float) -> int:
    reached = np.flatnonzero(values >= goal)
    return int(reached[0]) + 1 if len(reached) else len(values)


def draw_curves(methods: dict[str, dict], path, title: str) -> None:
    """Dice against clicks of every method of ``summarise_curves``, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, summary in methods.items():
        axes.plot(range(1, 1 + len(summary["curve"])), summary["curve"], marker="o", markersize=3, label=name)
    axes.set(xlabel="clicks", ylabel="Dice", title=title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
