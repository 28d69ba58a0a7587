"""Segmentation by words."""

from __future__ import annotations

from typing import Any

from lib.infers.base import ZeroSegTask, only_slice
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.segmentation import Segmentation


class Text(ZeroSegTask):
    """``text`` names what to look for; ``certainty`` is the least t-value below which it is called absent."""

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        if not options["text"].strip():
            raise ZeroSegError("no text was given: type what to look for into the option text")
        settings = {"refine": options["refine"], "text_certainty": options["certainty"]}
        return self.engine.segment(entry, "text", only_slice(entry, options), settings, text=options["text"])

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The words themselves name the segment."""
        return {options["text"].strip(): 1} if result.labels.any() else {}
