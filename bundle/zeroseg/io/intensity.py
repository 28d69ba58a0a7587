"""From stored values to the range [0, 1] a diffusion backbone expects."""

from __future__ import annotations

import numpy as np

from zeroseg.errors import ZeroSegError
from zeroseg.io.image import Image

CT_WINDOW = (40.0, 400.0)
"""Center and width in HU of the soft-tissue window: the usual one for abdominal organs, from -160 to 240 HU."""

PERCENTILES = (0.5, 99.5)
"""Percentiles mapped to 0 and 1 where values have no fixed scale: single hot pixels do not darken the rest."""


def to_unit_range(image: Image, window: tuple[float, float] | None = None) -> np.ndarray:
    """Map an image's values to [0, 1].

    CT (HU) goes through a window. Photographs and gray images of 8 bits are divided by 255: their scale is meant.
    Everything else (MR, X-ray, PET, 16 bits, float, gray volumes of unknown modality) is stretched between its
    :data:`PERCENTILES`, taken over all channels and slices together, so that colours and slices stay comparable.

    Args:
        image: from :func:`zeroseg.io.reading.read_image`.
        window: (center, width) in the image's units, e.g. (-600, 1500) for lungs in CT; given, it applies to any image.

    Returns:
        float32 of the shape of ``image.array``, in [0, 1]; all zero for a constant image that has no fixed scale.

    Raises:
        ZeroSegError: the window is not two finite numbers with a positive width.
    """
    if window is None and image.modality == "CT":
        window = CT_WINDOW
    if window is not None:
        try:
            center, width = (float(value) for value in window)
        except (TypeError, ValueError) as error:
            raise ZeroSegError(f"window {window!r}: give two numbers, center and width, e.g. (40, 400)") from error
        if not (np.isfinite(center) and np.isfinite(width) and width > 0):
            raise ZeroSegError(f"window {window!r}: give a finite center and a positive width, e.g. (40, 400)")
        return _stretch(image.array, center - width / 2, center + width / 2)
    if image.bits == 8 and (not image.is_volume or len(image.array) == 3):
        return np.clip(image.array / np.float32(255), 0, 1)
    low, high = np.percentile(image.array, PERCENTILES)
    if low == high:  # nearly all pixels equal: what differs is the object, not an outlier
        low, high = image.array.min(), image.array.max()
    return _stretch(image.array, float(low), float(high))


def _stretch(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip to low..high and scale to 0..1; zeros when both are equal."""
    if low == high:
        return np.zeros(array.shape, dtype=np.float32)
    # Differences beyond float32's range, or so small that it has few digits left, are taken in float64.
    kind = np.float32 if 1e-30 < high - low < 1e38 else np.float64
    unit: np.ndarray = np.clip(array.astype(kind, copy=False), kind(low), kind(high))
    unit -= kind(low)
    unit /= kind(high) - kind(low) or 1
    return np.clip(unit, 0, 1, out=unit).astype(np.float32, copy=False)  # rounding may leave 1 + 1e-7
