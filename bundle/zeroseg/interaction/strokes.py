"""What strokes say of all other pixels: a forest of decision trees that learns from the pixels drawn on, as ilastik does.

A stroke shows dozens of pixels of the object or of the background, from which a classifier can tell the rest by grey value, texture
and attention (Berg et al. 2019, ilastik: interactive machine learning for (bio)image analysis). It finds borders poorly, but says well
which of several masks is meant.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.ensemble import ExtraTreesClassifier
from torch import Tensor

from zeroseg.attention.readout import Readout

BLURS, EDGES, TEXTURE = (1, 2, 4, 8), (1, 2, 4), 9
"""Standard deviations in pixels of the smoothed image and of its gradient, and side of the window of the local deviation."""
TREES, LEAF = 60, 2
"""Trees, and fewest pixels in a leaf."""
SMOOTH = 1.5
"""Standard deviation in pixels by which the probabilities are smoothed."""
SUREST = 0.98
"""Largest probability that is believed of either label."""


def stroke_odds(image: Tensor, readout: Readout | None, marks: np.ndarray) -> np.ndarray | None:
    """Log-odds of the object at every pixel, learned from the marked ones.

    Args:
        image: (3, H, W) float32 in [0, 1], in the processor's memory.
        readout: the frozen model's maps of it, or None to go without.
        marks: (H, W) uint8: 1 object, 2 background, 0 neither.

    Returns:
        (H, W) float32; None where only one of the two is marked, which tells nothing.
    """
    drawn = np.flatnonzero(marks)
    labels = marks.ravel()[drawn]
    if len(np.unique(labels)) < 2:
        return None
    values = np.stack([*_appearance(image), *_coordinates(readout, marks.shape)], -1).reshape(marks.size, -1)
    forest = ExtraTreesClassifier(
        TREES, min_samples_leaf=LEAF, max_features="sqrt", class_weight="balanced", random_state=0
    )
    forest.fit(values[drawn], labels)
    probability = forest.predict_proba(values)[:, 0].reshape(marks.shape).astype(np.float32)
    probability = ndimage.gaussian_filter(probability, SMOOTH).clip(1 - SUREST, SUREST)
    return np.log(probability / (1 - probability))


def _appearance(image: Tensor) -> list[np.ndarray]:
    """Maps (H, W): every colour as it is and smoothed, its gradient and its local deviation; of a grey image one colour."""
    colours = image.numpy()
    if (np.ptp(colours, axis=0) < 2e-3).all():
        colours = colours[:1]
    maps = []
    for colour in colours:
        maps += [colour, *(ndimage.gaussian_filter(colour, blur) for blur in BLURS)]
        maps += [ndimage.gaussian_gradient_magnitude(colour, blur) for blur in EDGES]
        mean, square = (ndimage.uniform_filter(values, TEXTURE) for values in (colour, colour**2))
        maps.append(np.sqrt(np.maximum(0, square - mean**2)))
    return maps


def _coordinates(readout: Readout | None, size: tuple[int, ...]) -> list[np.ndarray]:
    """Maps (H, W): the leading coordinates of the tokens' attention."""
    if readout is None:
        return []
    maps = torch.from_numpy(readout.coordinates).view(1, -1, readout.side, readout.side)
    return list(F.interpolate(maps, size, mode="bilinear", align_corners=False)[0].numpy())
