"""A simulated annotator: the clicks and the box a person would give, drawn from the mask of the object asked for."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy import ndimage


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a bool mask (H, W); of equal ones, the first in row-major order."""
    parts, _ = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def innermost_point(component: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel furthest from the boundary, the image's edge included; ties: first in row-major order."""
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return int(x), int(y)


def any_point(component: np.ndarray, stem: str) -> tuple[int, int]:
    """(x, y) of a pixel drawn evenly by a hash of the case's name; two pixels or more from the boundary where there are such."""
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    candidates = np.argwhere(depth >= min(2.0, float(depth.max())))
    y, x = candidates[int(hashlib.sha256(f"click {stem}".encode()).hexdigest(), 16) % len(candidates)]
    return int(x), int(y)


def bounding_box(component: np.ndarray) -> list[int]:
    """[x0, y0, x1, y1] of the outermost pixels, both included; two pixels wide at least, as a box must be."""
    corners = []
    for axis in (0, 1):  # columns give x, rows y
        line = component.any(axis=axis)
        low, high = np.flatnonzero(line)[[0, -1]].tolist()
        if low == high:
            low, high = (low, high + 1) if high + 1 < len(line) else (max(low - 1, 0), high)
        corners.append((low, high))
    (x0, x1), (y0, y1) = corners
    return [x0, y0, x1, y1]
