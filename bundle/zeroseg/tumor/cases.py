"""From a folder of scans to tumour masks and their evidence on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zeroseg.cases import CaseDataset, CaseRunner
from zeroseg.io import Case, Image, slice_affine, write_map
from zeroseg.segmentation import Segmentation
from zeroseg.tumor.inferer import EVIDENCE, TumorSegmentation
from zeroseg.tumor.prompts import DICOM_MODALITIES

TUMOR_PROMPT_KEYS = ("organ", "tumor", "modality", "points", "labels", "box")
"""What a prompts file may hold for a case."""


class TumorCaseRunner(CaseRunner):
    """``CaseRunner`` for ``zeroseg.tumor``: the inferer gets the scan's own values and geometry, and evidence is
    written too.

    Further files per case, as far as their stages ran: ``<stem>_aova``, ``<stem>_healthy``, ``<stem>_pixel_residual``
    and ``<stem>_feature_residual`` (float32: NIfTI, or TIFF for 2-D images). Doubts about a case, such as values that
    do not fit its modality, are printed and noted in the manifest. ``prompts.json`` takes ``organ``, ``tumor``,
    ``modality``, and ``points``, ``labels`` and ``box`` in voxels.

    Args:
        inferer: a ``TumorSegmentationInferer``.
        evidence: write the evidence.
        other arguments: as ``CaseRunner``, without ``text``; ``window`` only concerns the overlay.
    """

    prompt_keys = TUMOR_PROMPT_KEYS
    options = ("text", "window", "dicom_seg", "evidence")
    parts = (*CaseRunner.parts, *EVIDENCE)

    def __init__(
        self,
        inferer: Any,
        dataset: CaseDataset,
        output_dir: str | os.PathLike | None,
        prompts: str | os.PathLike | Mapping[str, dict[str, Any]] | None = None,
        window: tuple[float, float] | None = None,
        dicom_seg: bool = True,
        evidence: bool = True,
    ):
        super().__init__(inferer, dataset, output_dir, prompts, None, window, dicom_seg)
        self.evidence = evidence

    def _prompt(self, image: Image, prompt: dict[str, Any]) -> dict[str, Any]:
        modality = prompt.get("modality") or self.inferer.modality or DICOM_MODALITIES.get(image.modality or "")
        own = {"organ": self.inferer.organ, "tumor": self.inferer.tumor} if "organ" not in prompt else {"tumor": None}
        return {**own, **prompt, "modality": modality}

    def _segment(self, image: Image, unit: np.ndarray, prompt: dict[str, Any]) -> TumorSegmentation:
        if image.is_volume:
            return self.inferer.segment(image.array, affine=image.affine, **prompt)
        affine = None if image.spacing is None else slice_affine(image.spacing)
        result = self.inferer.segment(image.array[..., None], affine=affine, **prompt)
        result.labels, result.confidence = result.labels[..., 0], result.confidence[..., 0]
        result.evidence = {name: values[..., 0] for name, values in result.evidence.items()}
        return result

    def _write(
        self, case: Case, image: Image, unit: np.ndarray, result: Segmentation, prompt: dict, output: Path
    ) -> tuple[list[str], list[str]]:
        files, notes = super()._write(case, image, unit, result, {}, output)
        for name, values in result.evidence.items() if self.evidence and isinstance(result, TumorSegmentation) else ():
            files.append(write_map(image, values, output / f"{case.stem}_{name}").name)
        return files, notes
