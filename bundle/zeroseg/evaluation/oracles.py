"""Upper bounds: the mask itself chooses among the segments. What they give is never what a user gets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment


def _overlaps(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels present except 0, their sizes in pixels, and how many of these lie in the mask."""
    sizes, inside = np.bincount(labels.ravel()), np.bincount(labels[truth], minlength=int(labels.max()) + 1)
    present = np.flatnonzero(sizes)
    present = present[present > 0]
    return present, sizes[present], inside[present]


def oracle_union(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Union of the segments of which more than half of the pixels lie in the mask."""
    present, sizes, inside = _overlaps(labels, truth)
    return np.isin(labels, present[2 * inside > sizes])


def oracle_single(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The segment of best Dice."""
    present, sizes, inside = _overlaps(labels, truth)
    return labels == present[np.argmax(2 * inside / (sizes + truth.sum()))]


def hungarian(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The segment that the Hungarian assignment of segments to {background, foreground} by IoU gives the foreground.

    Empty when there is one segment only and it fits the background better.
    """
    present, sizes, inside = _overlaps(labels, truth)
    outside = sizes - inside
    iou = np.stack([outside / (inside + (~truth).sum()), inside / (outside + truth.sum())], axis=1)
    for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
        if column == 1:
            return labels == present[row]
    return np.zeros_like(truth)


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "oracle_union": oracle_union,
    "oracle_single": oracle_single,
    "hungarian": hungarian,
}
"""Protocol -> function of a label map (H, W) and a bool mask (H, W) that returns the chosen bool mask."""
