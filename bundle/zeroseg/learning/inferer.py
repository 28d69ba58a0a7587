"""A learned head, or an exemplar, in the form that folders of cases are segmented with."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.learning.head import Prediction
from zeroseg.segmentation import Segmentation, scores_of
from zeroseg.timing import timed


class Labeller(Protocol):
    """What labels images: ``LearnedHead`` or ``Exemplar``."""

    inferer: AttentionSegmentationInferer
    labels: dict[str, int]

    def predict(self, image: Any) -> Prediction:
        """The labels of an image."""

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""


class LearnedInferer:
    """Segments with what was learned; for ``zeroseg.cases.CaseRunner``.

    Args:
        labeller: what labels the images.
        rule: what the manifest calls it: ``learned`` or ``exemplar``.
    """

    def __init__(self, labeller: Labeller, rule: str = "learned"):
        self.labeller, self.rule = labeller, rule
        self.backbone, self.slice_axis = labeller.inferer.backbone, labeller.inferer.slice_axis

    def check(self) -> None:
        """Load the weights.

        Raises:
            WeightsError: they cannot be loaded.
        """
        self.labeller.inferer.check()

    def settings(self) -> dict[str, Any]:
        """What a manifest records: the settings by which images are read, and what was learned."""
        return {**dict(self.labeller.inferer.encoding_key), self.rule: self.labeller.describe()}

    def segment(self, image: Tensor | np.ndarray, *, affine: np.ndarray | None = None) -> Segmentation:
        """Labels of (C, H, W) or (C, X, Y, Z); ``details`` hold their names and the head's confidence.

        Args:
            image: the image or volume.
            affine: of a volume, as every inferer of ``CaseRunner`` is given it; slices are labelled whatever their spacing.

        Raises:
            ZeroSegError: the image is empty or not finite.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "predict"):
            found = self.labeller.predict(image)
        certainty = found.certainty
        scores = scores_of(found.label_map, certainty)
        details = {"labels": dict(self.labeller.labels), "expected_dice": round(found.confidence, 4)}
        return Segmentation(found.label_map, certainty, scores, self.rule, seconds=seconds, details=details)
