"""Automatic segmentation: everything, or what differs from the image's frame."""

from __future__ import annotations

from typing import Any

from lib.infers.base import ZeroSegTask, only_slice
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
        return self.engine.segment(entry, options["select"], only_slice(entry, options), settings, **prompt)

    def fit_labels(self, result: Segmentation) -> dict[int, int]:
        """As every task; where nouns were given, they go along with their labels."""
        moved = super().fit_labels(result)
        named = result.details.get("labels")
        if named is None:
            return moved
        result.details["labels"] = {name: moved[value] for name, value in named.items() if value in moved}
        for part in (result.details, *result.details.get("slices", ())):
            for entry in part.get("nouns", ()):
                entry["label"] = moved.get(entry["label"])
        return moved

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The nouns, and for segments without one the names declared."""
        named = result.details.get("labels", {})
        rest = {n: v for n, v in super().label_names(result, options).items() if v not in named.values()}
        return dict(sorted({**rest, **named}.items(), key=lambda item: item[1]))
