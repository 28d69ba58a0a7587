"""Automatic segmentation: everything, or what differs from the image's frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.infers.base import ZeroSegTask, keep_largest, only_slice
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.segmentation import Segmentation


class Segments(ZeroSegTask):
    """``select`` segments or auto; ``threshold`` auto or DiffSeg's KL threshold in nats; ``text``: nouns, with commas between, that
    name the segments."""

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
        nouns = options["text"].strip()
        if nouns and options["select"] != "segments":
            raise ZeroSegError("nouns in the option text name segments: choose select segments, or empty the text")
        prompt = {"text": nouns} if nouns else {}
        result = self.engine.segment(entry, options["select"], only_slice(entry, options), settings, **prompt)
        return _without_gaps(result, len(self.labels)) if nouns else result

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The nouns, and for segments without one the names declared."""
        named = result.details.get("labels", {})
        rest = {n: v for n, v in super().label_names(result, options).items() if v not in named.values()}
        return dict(sorted({**rest, **named}.items(), key=lambda item: item[1]))


def _without_gaps(result: Segmentation, most: int) -> Segmentation:
    """The ``most`` largest labels numbered 1..K, as viewers want them, and their names along with them."""
    before = result.labels.copy()
    dropped = keep_largest(result.labels, most)
    moved = {int(before[result.labels == k][0]): int(k) for k in np.unique(result.labels) if k}
    named = result.details["labels"]
    result.details["labels"] = {name: moved[value] for name, value in named.items() if value in moved}
    for part in (result.details, *result.details.get("slices", ())):
        for entry in part.get("nouns", ()):
            entry["label"] = moved.get(entry["label"])
    result.scores = [result.scores[old - 1] for old in moved]
    if dropped:
        result.notes.append(f"{dropped} smaller segments left out")
    return result
