"""Volume segmentation without a model: what every tumour result is compared with.

All functions take a volume (X, Y, Z) of finite values in the scan's own units and return a bool mask of that shape. A
single slice, a side of 1, is treated as the 2-D image it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import random_walker
from sklearn.cluster import KMeans


def otsu_bright(volume: np.ndarray) -> np.ndarray:
    """Voxels above Otsu's threshold; none in a constant volume."""
    return volume > threshold_otsu(volume.ravel())  # flat: three slices are no RGB picture


def kmeans2_bright(volume: np.ndarray, seed: int = 0) -> np.ndarray:
    """The brighter of two k-means clusters of the values; none in a constant volume."""
    if np.ptp(volume) == 0:
        return np.zeros(volume.shape, dtype=bool)
    model = KMeans(2, n_init=3, random_state=seed).fit(volume.reshape(-1, 1))
    return (model.labels_ == np.argmax(model.cluster_centers_[:, 0])).reshape(volume.shape)


def border_rule(mask: np.ndarray) -> np.ndarray:
    """Of a mask and its complement, the one that covers less of the volume's faces: objects are rarely cut off."""
    border = np.ones(mask.shape, dtype=bool)
    border[tuple(slice(1, -1) if side > 1 else slice(None) for side in mask.shape)] = False
    return ~mask if mask[border].mean() > 0.5 else mask


def otsu(volume: np.ndarray) -> np.ndarray:
    """Otsu's threshold; the class that covers more of the faces is background."""
    return border_rule(otsu_bright(volume))


def kmeans2(volume: np.ndarray, seed: int = 0) -> np.ndarray:
    """2-means; the class that covers more of the faces is background."""
    return border_rule(kmeans2_bright(volume, seed))


def all_foreground(volume: np.ndarray) -> np.ndarray:
    """Everything: what a score is worth that knows nothing."""
    return np.ones(volume.shape, dtype=bool)


def suv40(volume: np.ndarray) -> np.ndarray:
    """PET: voxels of at least 40 % of the volume's highest uptake, the fixed relative threshold used in nuclear medicine.

    There it is applied to the surroundings of a lesion that somebody pointed out; here nobody did, so that a hotter
    organ in the field of view wins.
    """
    return (volume >= 0.4 * volume.max()) & (volume > 0)


WALKED = 120_000
"""Voxels the random walker is run on at most: a finer volume is thinned first."""


def region_growing_marks(volume: np.ndarray, marks: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Threshold region growing: voxels as bright as the object's marks, connected to one, nearer to them than to the background's.

    How far a voxel may differ is Otsu's threshold on the difference itself; near is measured in mm.
    """
    smooth = ndimage.uniform_filter(volume.astype(np.float32), [3 if n > 1 else 1 for n in volume.shape])
    apart = np.min([np.abs(smooth - smooth[tuple(at)]) for at in np.argwhere(marks == 1)], 0)
    alike = apart <= threshold_otsu(apart.ravel())
    if (marks == 2).any():
        away = [ndimage.distance_transform_edt(marks != kind, sampling=spacing) for kind in (1, 2)]
        alike &= away[0] < away[1]
    return _held(alike, marks)


def random_walker_marks(volume: np.ndarray, marks: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Random walker (Grady 2006) in 3-D from all marks; the volume's faces are background until the user has marked some."""
    step = max(1, int(np.ceil((volume.size / WALKED) ** (1 / 3))))
    values = volume.astype(np.float32)
    if step > 1:
        values = ndimage.uniform_filter(values, [min(step, n) for n in volume.shape])
    steps = [min(step, n) for n in volume.shape]
    values = values[tuple(slice(None, None, s) for s in steps)]
    low, high = np.percentile(values, (0.5, 99.5))
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    seeds = np.zeros(values.shape, np.uint8)
    for kind in (1, 2):
        for at in np.argwhere(marks == kind):
            around = [slice(max(0, v // s - 1), v // s + 2) for v, s in zip(at, steps, strict=True)]
            seeds[tuple(around)] = kind
    if not (seeds == 2).any():
        faces = np.ones(seeds.shape, bool)
        faces[tuple(slice(1, -1) if n > 2 else slice(None) for n in seeds.shape)] = False
        seeds[faces & (seeds == 0)] = 2
    if np.ptp(values) == 0 or not (seeds == 0).any():
        return marks == 1
    sides = [float(v) * s for v, s in zip(spacing, steps, strict=True)]
    found = random_walker(values, seeds, beta=1000, mode="cg_j", prob_tol=np.inf, spacing=sides) == 1
    for axis, s in enumerate(steps):
        found = np.repeat(found, s, axis)
    return _held(found[tuple(slice(0, n) for n in volume.shape)], marks)


def _held(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The connected parts that hold a mark of the object, all marks as the user set them."""
    mask = (mask | (marks == 1)) & (marks != 2)
    parts, _ = ndimage.label(mask)
    return np.isin(parts, np.setdiff1d(np.unique(parts[marks == 1]), [0]))


CLICKED = {"region growing": region_growing_marks, "random walker": random_walker_marks}
"""Name -> function of a volume, marks (X, Y, Z; 1 object, 2 background) and the voxel size in mm."""

AUTOMATIC = {"otsu": otsu, "kmeans2": kmeans2, "all_foreground": all_foreground}
"""Name -> function of a volume."""

PET = {"suv40": suv40}
"""Those that only make sense in PET."""

BRIGHT = {"otsu": otsu_bright, "kmeans2": kmeans2_bright}
"""Name -> function that gives the bright class, for the oracle over the polarity of a set."""
