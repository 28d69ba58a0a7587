"""The result every 2-D and 3-D segmentation of the package returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Segmentation:
    """A label map with the evidence a reader needs to trust or reject it.

    Attributes:
        labels: (H, W) or (X, Y, Z) uint8. Rule ``segments``: every pixel carries its segment 1..K, 1 ranked first; named by N
            nouns, the k-th noun is k in every image, and segments that no noun fits carry N+1..K; rules ``learned`` and ``exemplar``: the values of their labels; every other rule: 1 is the object, 0 the rest.
        confidence: float32 of the same shape, in [0, 1]: how far the label given to a pixel beats the runner-up.
        scores: one number in [0, 1] per label 1..K: mean confidence over the pixels of that label, 0 where it has none.
        rule: what chose the mask: segments, auto, points, box, text, tumor, learned or exemplar.
        absent: True when the prompt's object was judged not to be in the image; ``labels`` is then all zero.
        seconds: seconds spent per stage (encode, merge, select, refine).
        details: what the rule saw: thresholds taken, segments kept, text evidence; JSON-serialisable.
        name: what the prompt calls the object, or None where it was shown, not named.
        reason: why the object was called absent, or None.
        notes: doubts about the image or the prompt a reader should know of, one sentence each.
    """

    labels: np.ndarray
    confidence: np.ndarray
    scores: list[float]
    rule: str
    absent: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    name: str | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)


def scores_of(labels: np.ndarray, confidence: np.ndarray) -> list[float]:
    """Mean confidence of every label 1..K, 0 where it has no pixel.

    Args:
        labels: of any shape, uint8.
        confidence: float of the same shape.
    """
    areas = np.bincount(labels.ravel())
    sums = np.bincount(labels.ravel(), confidence.ravel())
    return (sums / np.maximum(areas, 1))[1:].tolist()
