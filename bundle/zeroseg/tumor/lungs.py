"""What stands out in the lungs of a CT scan: a rule beside the words, not of the paper.

A lung is air, and what is solid in it is vessels, which are thin, or something else. So the lungs are closed over what lies in them and
on their wall, as software for chest CT has long done (Armato and Sensakovic 2004), and of what is solid there, the part that is
thickest and most surrounded by air is looked at. HU mean the same in every scanner, so nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.ndimage import distance_transform_edt

from zeroseg.regions import depth_inside

AIR, SOLID = -500.0, -400.0
"""HU below which a voxel is air, and above which it is tissue."""
GAS = -950.0
"""Median in HU below which air is none of the lungs': around the body, in the bowel, in the trachea."""
SMOOTH, VESSEL, AIRWAY, CLOSED = 1.0, 4.0, 9.0, 15.0
"""mm: deviation of the smoothing before; vessels up to this radius are filled; tubes of air up to this radius are taken away; and
the radius of the ball that a lung is closed by."""
RIM, CORE, SHELL = 2.0, 3.0, 2.5
"""mm: what air is thinned by before its median is taken; depth of a solid part from which on it is looked at; and what is looked at around
it for air, at least the next voxels."""
LEAST_ML, LEAST_SHARE, OTHER = 10.0, 0.05, 0.15
"""A lung's core has this volume at least, this share of the larger one's, and of the whole lung this share to count as a second one."""
LIKELY = 2.2
"""Log-odds of a nodule's voxels, and less it of those around: a probability of .9, so that its edge stays where it is."""
SURE = 5.0
"""mm: depth times contact with air from which on a part is shown. Chosen on drawn chests, healthy and not."""


@dataclass(frozen=True)
class Nodule:
    """The part that stands out most.

    Attributes:
        mask: (X, Y, Z) bool.
        score: its depth in mm times the share of its surface that touches air.
    """

    mask: np.ndarray
    score: float

    def joined(self, logits: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words' log-odds and mask (X, Y, Z) with the nodule: of the mask, parts stay that touch it or are larger."""
        near = ndimage.binary_dilation(self.mask, np.ones((3, 3, 3)))
        logits = np.where(self.mask, np.maximum(logits, LIKELY), np.where(near, np.maximum(logits, -LIKELY), logits))
        parts, _ = ndimage.label(mask | self.mask)
        sizes = np.bincount(parts.ravel())
        sizes[0], sizes[parts[self.mask]] = 0, parts.size
        return logits, (sizes >= np.count_nonzero(self.mask))[parts]

    def describe(self, spacing: Sequence[float]) -> dict[str, float]:
        """What a manifest records."""
        millilitres = np.count_nonzero(self.mask) * float(np.prod(spacing)) / 1000
        return {"score_mm": round(self.score, 2), "millilitres": round(millilitres, 2)}


def find_nodule(hu: np.ndarray, spacing: Sequence[float]) -> Nodule | None:
    """The solid part of the lungs that looks least like a vessel.

    Args:
        hu: (X, Y, Z) in HU, in RAS order.
        spacing: mm along each axis.

    Returns:
        None where there is no lung, or nothing solid in it that is thicker than ``CORE`` each way.
    """
    air, field = lung_field(hu, spacing)
    solid = field & (hu > SOLID)
    depths = depth_inside(solid, spacing)
    parts, _ = ndimage.label(depths > CORE)
    reach = [int(np.ceil((CORE + max(spacing)) / s)) + 2 for s in spacing]
    best, best_score = None, 0.0
    for number, found in enumerate(ndimage.find_objects(parts), 1):
        around = tuple(slice(max(0, s.start - r), s.stop + r) for s, r in zip(found, reach, strict=True))
        core = parts[around] == number
        part = _within(core, CORE + 1, spacing) & solid[around]
        shell = _within(part, max(SHELL, 1.01 * max(spacing)), spacing) & ~part
        contact = np.count_nonzero(shell & air[around]) / max(1, np.count_nonzero(shell))
        score = float(depths[around][core].max()) * contact
        if score > best_score:
            best, best_score = (around, part), score
    if best is None:
        return None
    mask = np.zeros(hu.shape, bool)
    mask[best[0]] = best[1]
    return Nodule(mask, best_score)


def lung_field(hu: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where the lungs are, with what lies in them and on their outer wall.

    Args:
        hu: (X, Y, Z) in HU, in RAS order; lungs may be cut off by the scan's border.
        spacing: mm along each axis.

    Returns:
        (X, Y, Z) bool each: air that may be lung; and the lungs, closed. The second is empty where there are none.
    """
    air = ndimage.gaussian_filter(hu, SMOOTH / np.asarray(spacing)) < AIR
    thin, count = ndimage.label(_deeper(air, RIM, spacing))
    numbers = np.arange(1, count + 1)
    medians = np.atleast_1d(ndimage.median(hu, thin, numbers)) if count else np.zeros(0)
    air &= ~_within(np.isin(thin, numbers[medians < GAS]), RIM + 1, spacing)
    filled = _closed(air, VESSEL, spacing)
    cores, count = ndimage.label(_deeper(filled, AIRWAY, spacing))
    millilitres = np.bincount(cores.ravel(), minlength=1)[1:] * np.prod(spacing) / 1000
    kept = 1 + np.flatnonzero(millilitres >= max(LEAST_ML, LEAST_SHARE * millilitres.max(initial=0)))
    field = np.zeros_like(air)
    if not len(kept):
        return air, field
    away, nearest = distance_transform_edt(~np.isin(cores, kept), sampling=spacing, return_indices=True)
    owner = np.where(filled & (away <= AIRWAY), cores[tuple(nearest)], 0)
    lungs = [owner == number for number in kept]
    sizes = np.array([np.count_nonzero(lung) for lung in lungs])
    large = [lung for lung, size in zip(lungs, sizes, strict=True) if size >= OTHER * sizes.max()]
    # The midline is known where both lungs are seen.
    middle = np.mean([np.argwhere(lung)[:, 0].mean() for lung in large]) if len(large) == 2 else None
    for lung in lungs:
        field |= _closed(lung, CLOSED, spacing)
        if middle is not None:
            field |= _on_the_wall(lung, float(middle))
    return air, field


def _on_the_wall(lung: np.ndarray, middle: float) -> np.ndarray:
    """What a lung's hull in each axial slice adds on its outer side: where lung lies towards the midline, and below.

    So a mass on the chest wall belongs to it, and neither heart nor liver does, however far they bulge into it.
    """
    from skimage.morphology import convex_hull_image

    hull = np.zeros_like(lung)
    for z in np.flatnonzero(lung.any((0, 1))):
        hull[..., z] = convex_hull_image(lung[..., z])
    right = np.argwhere(lung)[:, 0].mean() > middle
    inward = np.maximum.accumulate(lung, 0) if right else np.maximum.accumulate(lung[::-1], 0)[::-1]
    return hull & inward & np.maximum.accumulate(lung, 2)


def _within(mask: np.ndarray, mm: float, spacing: Sequence[float]) -> np.ndarray:
    """Voxels at most so far from a mask."""
    return distance_transform_edt(~mask, sampling=spacing) <= mm if mask.any() else mask


def _deeper(mask: np.ndarray, mm: float, spacing: Sequence[float]) -> np.ndarray:
    """Voxels deeper in a mask than so far; beyond the scan's border it goes on."""
    if mask.all():
        return mask
    return distance_transform_edt(np.pad(mask, 1, mode="edge"), sampling=spacing)[1:-1, 1:-1, 1:-1] > mm


def _closed(mask: np.ndarray, mm: float, spacing: Sequence[float]) -> np.ndarray:
    """Morphological closing by a ball; beyond the scan's border the mask goes on."""
    margin = [int(np.ceil(mm / s)) + 1 for s in spacing]
    wide = np.pad(mask, [(m, m) for m in margin], mode="edge")
    wide = _deeper(_within(wide, mm, spacing), mm, spacing)
    return wide[tuple(slice(m, -m) for m in margin)] | mask
