"""Give segments of neighbouring slices one identity, so that a volume's label means one thing from slice to slice."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

MAX_LABEL = 255  # label maps are uint8, the only type every viewer takes


def link_slices(slices: list[np.ndarray], min_iou: float = 0.3) -> list[np.ndarray]:
    """Relabel per-slice segments so that a segment keeps its label from one slice to the next.

    Consecutive slices are matched one to one by the Hungarian method on the IoU of their segments; a segment without a
    partner of at least ``min_iou`` gets a new label. Labels are finally ranked by volume, largest first; of more
    than 255, the smallest become background.

    Args:
        slices: label maps of one shape, 0 is background and is never linked.
        min_iou: least IoU, in (0, 1], at which two segments are the same object.

    Returns:
        uint8 label maps of the same shapes, labels 1..K without gaps, K <= 255.
    """
    linked, previous, used = [], None, 0
    for current in slices:
        out = np.zeros(current.shape, np.int64)
        names = [v for v in np.unique(current) if v]
        partners: dict[int, int] = {}
        if previous is not None and names:
            before = [v for v in np.unique(previous) if v]
            if before:
                iou = np.array([[_iou(current == a, previous == b) for b in before] for a in names])
                rows, columns = linear_sum_assignment(-iou)
                partners = {names[r]: before[c] for r, c in zip(rows, columns, strict=True) if iou[r, c] >= min_iou}
        for name in names:
            if name not in partners:
                used += 1
                partners[name] = used
            out[current == name] = partners[name]
        linked.append(out)
        previous = out
    sizes = sum((np.bincount(s.ravel(), minlength=used + 1) for s in linked), np.zeros(used + 1, np.int64))
    sizes[0] = 0
    order = [v for v in np.argsort(-sizes, kind="stable") if sizes[v]][:MAX_LABEL]
    table = np.zeros(used + 1, np.uint8)
    table[order] = np.arange(1, len(order) + 1)
    return [table[s] for s in linked]


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / max(1, np.count_nonzero(a | b))
