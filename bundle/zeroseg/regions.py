"""Where a bool region is thickest, and which of its parts is largest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from scipy import ndimage

FEW = 8
"""Places to which distances are measured one by one: a distance transform takes longer, and ten times the memory."""


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a bool mask (H, W), not empty; of equal ones, the first in row-major order."""
    parts, _ = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def depth_inside(region: np.ndarray, spacing: Sequence[float] | None = None) -> np.ndarray:
    """Euclidean distance of every pixel or voxel of a bool region to its outside; the image's edge counts as outside.

    Args:
        region: bool, of any number of axes.
        spacing: mm along each; None: distances are in pixels or voxels.
    """
    inner = tuple(slice(1, -1) for _ in region.shape)
    return ndimage.distance_transform_edt(np.pad(region, 1), sampling=spacing)[inner]


def innermost(region: np.ndarray) -> tuple[int, ...]:
    """Index of the deepest pixel; ties: the first in row-major order."""
    depth = depth_inside(region)
    return tuple(int(i) for i in np.unravel_index(int(depth.argmax()), depth.shape))


def distance_to(places: np.ndarray, shape: Sequence[int], spacing: Sequence[float] | None = None) -> np.ndarray:
    """Euclidean distance of every pixel or voxel to the nearest of some; infinite where there are none.

    Args:
        places: (N, D) indices.
        shape: D sides.
        spacing: mm along each; None: distances are in pixels or voxels.
    """
    if len(places) <= FEW:
        nearest = np.full(tuple(shape), np.inf)
        sizes = (1.0,) * len(shape) if spacing is None else spacing
        for place in places:
            squares = [((np.arange(n) - int(p)) * float(s)) ** 2 for n, p, s in zip(shape, place, sizes, strict=True)]
            np.minimum(nearest, reduce(np.add, np.ix_(*squares)), out=nearest)
        return np.sqrt(nearest, out=nearest)
    elsewhere = np.ones(tuple(shape), bool)
    elsewhere[tuple(places.T)] = False
    return ndimage.distance_transform_edt(elsewhere, sampling=spacing)
