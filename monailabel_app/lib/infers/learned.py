"""Segmentation as the submitted labels taught it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.engine import Engine
from lib.heads import Heads
from lib.infers.base import ZeroSegTask, only_slice
from lib.sources import OpenImage
from zeroseg.segmentation import Segmentation


class Learned(ZeroSegTask):
    """The labels of the head that is served, on any image; shown once there is one.

    Args:
        engine: as for ``ZeroSegTask``.
        heads: where the head comes from.
        rest: as ``ZeroSegTask``, without labels: they are the head's.
    """

    def __init__(self, engine: Engine, heads: Heads, **rest: Any):
        self.heads = heads
        super().__init__(engine, labels={}, **rest)

    @property
    def labels(self) -> dict[str, int]:
        """Name -> value, of the head that is served now."""
        return (self.heads.record() or {}).get("labels", {})

    @labels.setter
    def labels(self, value: Any) -> None:
        """MONAI Label's constructor sets what it is told."""

    def is_valid(self) -> bool:
        """Whether there is a head to serve."""
        return self.heads.record() is not None

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        head = self.heads.head()
        result = self.engine.learned(entry, head, only_slice(entry, options))
        result.details["head"] = head.describe()
        return result

    def fit_labels(self, result: Segmentation) -> dict[int, int]:
        """They stay as they are: a value is the name that was learned, whether or not the others are there."""
        return {value: value for value in result.details["head"]["labels"].values()}

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """Of the head that answered; another one may be served by now."""
        present = {int(v) for v in np.unique(result.labels)}
        return {name: value for name, value in result.details["head"]["labels"].items() if value in present}
