"""Volume segmentation without a model: what every tumour result is compared with.

All functions take a volume (X, Y, Z) of finite values in the scan's own units and return a bool mask of that shape. A
single slice, a side of 1, is treated as the 2-D image it is.
"""

from __future__ import annotations

import numpy as np
from skimage.filters import threshold_otsu
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


AUTOMATIC = {"otsu": otsu, "kmeans2": kmeans2, "all_foreground": all_foreground}
"""Name -> function of a volume."""

PET = {"suv40": suv40}
"""Those that only make sense in PET."""

BRIGHT = {"otsu": otsu_bright, "kmeans2": kmeans2_bright}
"""Name -> function that gives the bright class, for the oracle over the polarity of a set."""
