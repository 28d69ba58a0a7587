"""What is fitted once the adapters stand: how residuals weigh, and when the answer is "absent"."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.tumor.adapters import AovaAdapters, AovaOutput
from zeroseg.tumor.inferer import TumorSegmentationInferer
from zeroseg.tumor.prompts import default_tumor
from zeroseg.tumor.residuals import fit_fusions
from zeroseg.tumor.training.cases import TrainingCase, phantoms_and_real
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import CaseReader, Example


class FusionFitter:
    """Fits what the adapters need beside themselves, on volumes with a lesion, and measures the whole.

    Args:
        reader: of cases.
        text_encoder: frozen.
        adapters: trained.
        cases: that it is fitted on; those without a lesion are left out.
        volumes: phantoms, and as many real volumes at most, per modality.
        seed: of everything random.
        beside: adapters that will answer together with these, or None.
    """

    def __init__(
        self,
        reader: CaseReader,
        text_encoder: TextEncoder,
        adapters: AovaAdapters,
        cases: Sequence[TrainingCase],
        volumes: int,
        seed: int = 0,
        beside: AovaAdapters | None = None,
    ):
        self.beside = beside
        self.reader, self.backbone, self.encoder, self.adapters = reader, reader.backbone, text_encoder, adapters
        self.cases, self.volumes, self.seed = cases, volumes, seed
        self.questions = Questions(text_encoder)

    @cached_property
    def inferer(self) -> TumorSegmentationInferer:
        """What the adapters will be used by, with the shipped settings."""
        inferer = TumorSegmentationInferer(self.backbone, self.encoder, self.adapters, seed=self.seed)
        inferer._beside = self.beside
        return inferer

    @cached_property
    def lesions(self) -> list[TrainingCase]:
        """The cases with a lesion."""
        return [case for case in self.cases if case.load_mask().any()]

    def dice(self, case: TrainingCase) -> float:
        """Dice of the refined mask against a case's, asked by the organ's default words."""
        values, affine, mask = case.load()
        mask = mask > 0
        found = self.inferer.segment(values, affine, case.modality, case.organ).labels > 0
        total = int(found.sum() + mask.sum())
        return 2 * int((found & mask).sum()) / total if total else 1.0

    def fit_weights(self, voxels: int = 2000) -> dict[str, dict]:
        """Per modality the weights of AOVA margin and residuals, by logistic regression on voxels of volumes with a lesion.

        A residual means something else in every modality: an uptake that inpainting takes away is a lesion, a grey value
        that it changes may be noise. Modalities whose volumes give no region with voxels both of lesions and of others are
        missing: there is nothing to learn from.
        """
        found = {}
        for modality in sorted({case.modality for case in self.lesions}):
            rng = np.random.default_rng(self.seed)
            cases = [case for case in self.lesions if case.modality == modality]
            chosen = []
            for pool in phantoms_and_real(cases):
                chosen += [pool[i] for i in rng.permutation(len(pool))[: self.volumes]]
            maps: dict[str, list[np.ndarray]] = {}
            targets = []
            for case in tqdm(chosen, desc=f"fusion {modality}", mininterval=10):
                values, target = self._voxels(case, rng, voxels)
                targets.append(target)
                for name, part in values.items():
                    maps.setdefault(name, []).append(part)
            target = np.concatenate(targets)
            if target.any() and not target.all():
                found[modality] = fit_fusions({name: np.concatenate(parts) for name, parts in maps.items()}, target)
        return found

    def fit_presence(self, missed: float = 0.1, least: int = 10) -> dict[str, float]:
        """Per modality the log-odds below which "absent" is answered: that share of the fusion's phantoms with a lesion lies there,
        phantoms because their lesions are of all sizes. Of the image, or where ``presence_of`` of the adapters says so of the masks
        that are found, by the weights of their fusion.

        A choice for whoever relies on "absent": it seldom hides a tumour, at the price of more alarms in healthy volumes;
        ``presence`` of the inferer asks for more. Modalities with fewer than ``least`` volumes with a lesion are missing.
        """
        found: dict[str, list[float]] = {}
        phantoms, _ = phantoms_and_real(self.lesions)
        for case in tqdm(phantoms, desc="presence", mininterval=10):
            known = found.setdefault(case.modality, [])
            if len(known) < 3 * self.volumes:
                known += self._presence(case)
        return {m: float(np.quantile(known, missed)) for m, known in sorted(found.items()) if len(known) >= least}

    def _presence(self, case: TrainingCase) -> list[float]:
        """The log-odds that speak for a lesion in a case, in a list; an empty one where no mask is found."""
        if (self.adapters.presence_of or {}).get(case.modality) != "mask":
            return [float(self._answer(self.reader.read(case)).image_logit)]
        stages = [stage for stage in self.inferer.stages if stage not in ("lungs", "head")]
        values, affine, _ = case.load()
        asked = self.inferer.replace(stages=stages).segment(values, affine, case.modality, case.organ)
        found = asked.details["presence_log_odds"]
        return [] if found is None else [found]

    @torch.inference_mode()
    def _answer(self, example: Example) -> AovaOutput:
        """Of the adapters, asked by the organ's default words."""
        case, device = example.case, self.backbone.device
        prompts, roles = self.questions.embed(case.organ, default_tumor(case.organ), case.modality)
        features = [f.to(device, torch.float32) for f in example.features]
        return self.adapters(features, prompts.to(device), roles, example.voxel_ml)

    def _voxels(
        self, case: TrainingCase, rng: np.random.Generator, voxels: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(n,) values of every map at random voxels of a case's region, and whether they are tumour."""
        values, affine, mask = case.load()
        encoded = self.inferer.encode(values, affine, case.modality)
        maps = self.inferer.maps(encoded, case.organ, default_tumor(case.organ))
        inside = np.flatnonzero(maps.region)
        chosen = rng.choice(inside, min(voxels, len(inside)), replace=False)
        target = encoded.prepared.from_input(mask).numpy()
        return {name: values.ravel()[chosen] for name, values in maps.fusion_inputs.items()}, target.ravel()[chosen]
