"""Tumour segmentation by text in CT, MR and PET volumes (DiffuGTS), where the bundle has its weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.engine import Engine
from lib.infers.base import ZeroSegTask
from lib.memory import ByteLimitedCache
from lib.mends.responsive import stop_if_abandoned
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image
from zeroseg.segmentation import Segmentation
from zeroseg.tumor.prompts import DICOM_MODALITIES

if TYPE_CHECKING:  # a bundle without a tumour model needs none of it
    from zeroseg.tumor import EncodedVolume


class Tumor(ZeroSegTask):
    """``organ`` says where to look, ``text`` what for; without a text the organ's usual tumour. Of the whole body that is where the text's
    own words say ("liver tumour").

    Args:
        engine: shared by all tasks; reads the images.
        inferer: ``zeroseg.tumor.TumorSegmentationInferer``; frozen models of its own.
        rest: as ``ZeroSegTask``.
    """

    def __init__(self, engine: Engine, inferer: Any, **rest: Any):
        super().__init__(engine, **rest)
        self.inferer = inferer
        self.encodings: ByteLimitedCache[EncodedVolume] = ByteLimitedCache(engine.images.limit, _bytes_of_volume)

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        image = entry.image
        if not image.is_volume:
            raise ZeroSegError(
                "tumour segmentation needs a CT, MR or PET volume; for a single image use points or text"
            )
        if image.modality not in (None, *DICOM_MODALITIES):
            raise ZeroSegError(f"tumour segmentation knows CT, MR and PET, not {image.modality}")
        stop_if_abandoned()
        modality = options["modality"] if options["modality"] != "auto" else DICOM_MODALITIES.get(image.modality)
        tumor = options["text"].strip() or None
        key, encoded = self.encode(image, modality, options["organ"], tumor)
        result = self.inferer.predict(encoded, options["organ"], tumor)
        # Other adapters may have read the volume as well: it is weighed anew.
        self.encodings.put(key, encoded)
        return result

    def encode(
        self, image: Image, modality: str | None, organ: str, tumor: str | None = None
    ) -> tuple[tuple, EncodedVolume]:
        """The volume's key and ``encode`` of the inferer, or its earlier answer: other words for a volume need no second pass."""
        content = hashlib.sha256(np.ascontiguousarray(image.array)).hexdigest()
        key = (content, image.array.shape, image.affine.tobytes(), modality)
        known = self.encodings.get(key)
        if known is not None:
            # This call spends no time on it.
            return key, replace(known, seconds={})
        encoded = self.inferer.encode(image.array, image.affine, modality, organ, tumor)
        self.encodings.put(key, encoded)
        return key, encoded

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The words themselves name the segment."""
        return {result.name: 1} if result.labels.any() else {}

    def describe_backbone(self) -> dict[str, Any]:
        return self.inferer.backbone.describe()


def _bytes_of_volume(encoded: EncodedVolume) -> int:
    adapted = sum(t.nbytes for read in encoded.readers.values() for _, piece in read.pieces for t in piece or ())
    scan = 0 if encoded.scan is None else encoded.scan.nbytes
    # Beside the volume stand its copy on the device and, once a prompt has needed it, its reconstruction.
    return 3 * encoded.prepared.volume.nbytes + scan + encoded.features.latent.nbytes + adapted
