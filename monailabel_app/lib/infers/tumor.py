"""Tumour segmentation by text in CT and MR volumes (DiffuGTS), where the bundle has its weights."""

from __future__ import annotations

from typing import Any

from lib.engine import Engine, OpenImage
from lib.infers.base import ZeroSegTask
from lib.responsive import stop_if_abandoned
from zeroseg.attention import Segmentation
from zeroseg.cases import MODALITIES
from zeroseg.errors import ZeroSegError


class Tumor(ZeroSegTask):
    """``organ`` says where to look, ``text`` what for; without a text the organ's usual tumour.

    Args:
        engine: shared by all tasks; reads the images.
        inferer: ``zeroseg.tumor.TumorSegmentationInferer``; frozen models of its own.
        rest: as ``ZeroSegTask``.
    """

    def __init__(self, engine: Engine, inferer: Any, **rest: Any):
        super().__init__(engine, **rest)
        self.inferer = inferer
        self._encoded: tuple[OpenImage, str | None, Any] | None = None  # the last volume; other words need no new pass

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        image = entry.image
        if not image.is_volume:
            raise ZeroSegError("tumour segmentation needs a CT or MR volume; for a single image use points or text")
        if image.modality not in (None, *MODALITIES):
            raise ZeroSegError(f"tumour segmentation knows CT, MR and PET, not {image.modality}")
        stop_if_abandoned()
        modality = options["modality"] if options["modality"] != "auto" else MODALITIES.get(image.modality)
        tumor = options["text"].strip() or None
        known = self._encoded
        if known is None or known[0] is not entry or known[1] != modality:
            self._encoded = None  # two encodings at once may be too much
            self._encoded = entry, modality, self.inferer.encode(image.array, image.affine, modality)
            return self.inferer.predict(self._encoded[2], options["organ"], tumor)
        result = self.inferer.predict(known[2], options["organ"], tumor)
        result.seconds = {stage: spent for stage, spent in result.seconds.items() if stage not in known[2].seconds}
        return result

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The words themselves name the segment."""
        return {result.details["tumor"]: 1} if result.labels.any() else {}

    def describe_backbone(self) -> dict[str, Any]:
        return self.inferer.backbone.describe()
