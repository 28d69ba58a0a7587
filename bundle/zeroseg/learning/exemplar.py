"""One labelled image as the prompt for others, without fitting: every place takes the label of the places it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.encoding import EncodedImage
from zeroseg.attention.refine import Upsampler
from zeroseg.learning.cases import Case, check_labels, labelled_slices
from zeroseg.learning.features import GRID, Reading, find_components, read_encoded, read_prepared
from zeroseg.learning.fitting import shares
from zeroseg.learning.head import Prediction, answer_slices, decide

if TYPE_CHECKING:
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

NEAREST, SHARP = 8, 8.0
"""Places of a label that a place is compared with, and how much a difference of cosine similarity counts."""


class Exemplar:
    """Labels of one image, carried to others by nearest neighbours among the frozen features.

    Args:
        case: the labelled image, or a volume, of which some slices are taken.
        inferer: reads the images.
        labels: name -> value.

    Raises:
        ZeroSegError: the label does not fit the image, or is empty.
    """

    def __init__(self, case: Case, inferer: AttentionSegmentationInferer, labels: Mapping[str, int]):
        self.inferer, self.labels = inferer, check_labels(labels)
        slices = labelled_slices([case], self.labels, inferer.slice_axis)
        self._learn(
            [read_prepared(inferer, part.image) for part in slices],
            [shares(part.classes, len(self.labels) + 1) for part in slices],
        )

    @classmethod
    def of_reading(cls, reading: Reading, classes: Tensor, inferer, labels: Mapping[str, int]) -> Exemplar:
        """Of an image already read; ``classes`` are (L + 1, H, W) shares."""
        exemplar = cls.__new__(cls)
        exemplar.inferer, exemplar.labels = inferer, check_labels(labels)
        exemplar._learn([reading], [classes])
        return exemplar

    def _learn(self, readings: list[Reading], classes: list[Tensor]) -> None:
        self._components = find_components(readings)
        grids = [F.interpolate(c[None], (GRID, GRID), mode="area")[0].flatten(1) for c in classes]
        self._places = torch.cat([self._describe(r) for r in readings])
        self._shares = torch.cat(grids, 1)

    def _describe(self, reading: Reading) -> Tensor:
        """(GRID * GRID, K + 3), of length 1: features and colours."""
        small = F.interpolate(reading.image[None], (GRID, GRID), mode="area")[0]
        colour = (small - small.mean()) / (small.std() + 0.02)
        return F.normalize(torch.cat([self._components(reading), 2 * colour]).flatten(1).T, dim=1)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it; JSON-serialisable."""
        return {"labels": dict(self.labels)}

    def predict(self, image: EncodedImage | Tensor | np.ndarray) -> Prediction:
        """Label an image, as ``LearnedHead.predict`` does.

        Raises:
            ZeroSegError: the image is empty, not finite, or of other dimensions.
        """

        def answer(part: EncodedImage | Tensor) -> np.ndarray:
            if isinstance(part, EncodedImage):
                return self.probabilities(read_encoded(self.inferer, part), part.image)
            return self.probabilities(read_prepared(self.inferer, part), part)

        return decide(answer_slices(self.inferer, image, answer), self.labels)

    @torch.inference_mode()
    def probabilities(self, reading: Reading, guide: Tensor) -> np.ndarray:
        """(L + 1, H, W) float32 of what was read of an image; ``guide`` (3, h, w) says where its edges are."""
        alike = self._describe(reading) @ self._places.T
        scores = []
        for share in self._shares:
            # A place counts for a label as far as it shows it.
            count = min(NEAREST, max(1, int((share > 0.5).sum())))
            near = (alike - (1 - share)).topk(count, dim=1).values.mean(1)
            scores.append(near)
        logits = SHARP * torch.stack(scores).view(-1, GRID, GRID)
        full = Upsampler(guide.cpu(), GRID)(logits.softmax(0)).clamp_min(1e-6)
        full = F.interpolate(full[None], reading.size, mode="bilinear", align_corners=False)[0]
        return (full / full.sum(0, keepdim=True)).numpy()
