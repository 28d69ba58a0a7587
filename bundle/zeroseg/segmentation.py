"""The result every 2-D and 3-D segmentation of the package returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Segmentation:
    """A label map with the evidence a reader needs to trust or reject it.

    Attributes:
        labels: (H, W) or (X, Y, Z) uint8. ``select="segments"``: every pixel carries its segment 1..K, 1 ranked first;
            every other ``select``: 1 is the object, 0 the rest.
        confidence: float32 of the same shape, in [0, 1]: how far the label given to a pixel beats the runner-up.
        scores: one number in [0, 1] per label 1..K: mean confidence over the pixels of that label.
        absent: True when the prompt's object was judged not to be in the image; ``labels`` is then all zero.
        select: the rule that chose the mask: segments, auto, points, box or text.
        seconds: seconds spent per stage (encode, merge, select, refine).
        details: what the rule saw: thresholds taken, segments kept, text evidence; JSON-serialisable.
    """

    labels: np.ndarray
    confidence: np.ndarray
    scores: list[float]
    select: str
    absent: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
