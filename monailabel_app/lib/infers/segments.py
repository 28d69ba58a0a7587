"""Automatic segmentation: everything, or what differs from the image's frame."""

from __future__ import annotations

from typing import Any

from lib.infers.base import ZeroSegTask, only_slice
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.segmentation import Segmentation


class Segments(ZeroSegTask):
    """``select`` segments or auto; ``threshold`` auto or DiffSeg's KL threshold in nats."""

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        thresholds: Any = options["threshold"].strip().lower() or "auto"
        if thresholds != "auto":
            try:
                thresholds = [float(part) for part in thresholds.strip("[]").split(",")]
            except ValueError:
                raise ZeroSegError(
                    f"threshold must be auto or numbers such as 1.0, not {options['threshold']!r}"
                ) from None
            thresholds = thresholds * 3 if len(thresholds) == 1 else thresholds
        settings = {"refine": options["refine"], "thresholds": thresholds, "max_segments": options["max_segments"]}
        return self.engine.segment(entry, options["select"], only_slice(entry, options), settings)
