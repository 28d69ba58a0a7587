"""From cases to what a training step sees: parts of volumes, changed at random, through the frozen encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.errors import ZeroSegError
from zeroseg.tumor.adapters import VOXEL_ML, AovaAdapters
from zeroseg.tumor.prepare import prepare
from zeroseg.tumor.training.cases import TrainingCase
from zeroseg.tumor.training.lesions import grow_lesion

CROP_MM = 144.0
"""Side of what is trained on at once: 48 voxels of the embedded model."""
KEPT_BYTES = 2**31
"""Of volumes that are read once and kept."""


@dataclass
class Example:
    """A case on the working grid: the encoder's features, the (X, Y, Z) bool mask, and the millilitres of a voxel."""

    features: tuple[Tensor, ...]
    target: Tensor
    case: TrainingCase
    voxel_ml: float = VOXEL_ML


def augmented(volume: Tensor, target: Tensor, rng: np.random.Generator, modality: str) -> tuple[Tensor, Tensor]:
    """A (1, 1, X, Y, Z) volume and its target turned, mirrored, and changed in gain, gamma, offset and noise; the highest value
    stays the bound, 1 or that of MR which is not clipped."""
    most = max(1.0, float(volume.max()))
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    flips = [axis for axis in range(3) if rng.random() < 0.5]
    volume = volume[0, 0].permute(*order).flip(flips)
    target = target.permute(*order).flip(flips)
    strength = 0.5 if modality == "ct" else 1.0  # HU are what they are, but for the scanner's calibration
    gamma = float(np.exp(strength * rng.uniform(-0.3, 0.3)))
    gain, offset = 1 + strength * rng.uniform(-0.12, 0.12), strength * rng.uniform(-0.04, 0.04)
    noise = torch.from_numpy(rng.standard_normal(volume.shape).astype(np.float32)) * float(rng.uniform(0, 0.025))
    changed = (volume.clamp_min(0) ** gamma * gain + offset + noise).clamp(0, most)
    return changed[None, None].contiguous(), target.contiguous()


def cropped(volume: Tensor, target: Tensor, rng: np.random.Generator, longest: int) -> tuple[Tensor, Tensor]:
    """A random part of a (1, 1, X, Y, Z) volume and its target with sides of at most ``longest`` voxels.

    Where there is a lesion, the part holds the middle of a random piece of it: training costs less, and fields of view vary.
    """
    hits = target.nonzero()
    anchor = hits[int(rng.integers(len(hits)))].tolist() if len(hits) else [int(rng.integers(n)) for n in target.shape]
    place = []
    for n, a in zip(target.shape, anchor, strict=True):
        length = min(n, longest)
        start = int(np.clip(a - rng.uniform(0.2, 0.8) * length, 0, n - length))
        place.append(slice(start, start + length))
    return volume[(..., *place)].contiguous(), target[tuple(place)].contiguous()


@dataclass(frozen=True)
class Sampling:
    """How cases become samples.

    Attributes:
        crop: longest side, in working voxels, of what is trained on at once; a multiple of the backbone's
            ``size_multiple``. None: that which is nearest to 144 mm.
        grown: chance that a lesion is grown into a real volume, see :mod:`lesions`.
        scales: between which the working spacing is drawn, as shares of the backbone's.
        readers: processes that read and encode beside the one that trains; 0: that one does it, as a GPU needs it.
    """

    crop: int | None = None
    grown: float = 0.0
    scales: tuple[float, float] = (0.8, 1.2)
    readers: int = 0


class CaseReader:
    """Reads cases through the frozen encoder.

    Args:
        backbone: frozen, loaded.
        sampling: how.
        seed: of everything random.

    Raises:
        ZeroSegError: ``crop`` does not suit the backbone.
    """

    def __init__(self, backbone: MaisiBackbone, sampling: Sampling, seed: int = 0):
        step = backbone.size_multiple
        crop = sampling.crop
        if crop is None:
            crop = max(1, round(CROP_MM / max(backbone.spacing) / step)) * step
        if crop < 1 or crop % step:
            raise ZeroSegError(f"crop must be a multiple of {step}, not {crop}")
        self.backbone, self.sampling, self.seed = backbone, replace(sampling, crop=crop), seed
        self.crop = crop
        self._loaded: dict[Path, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def read(self, case: TrainingCase, rng: np.random.Generator | None = None) -> Example:
        """One case through the frozen encoder; with a generator, augmented."""
        values, affine, mask = self._load(case)
        backbone = self.backbone
        low, high = self.sampling.scales
        scale = float(np.exp(rng.uniform(np.log(low), np.log(high)))) if rng is not None else 1.0
        prepared = prepare(
            values,
            affine,
            case.modality,
            [mm * scale for mm in backbone.spacing],
            backbone.size_multiple,
            backbone.ct_window,
            mr_clip=backbone.mr_clip,
        )
        volume, target = prepared.volume, prepared.from_input(mask)
        if rng is not None:
            volume, target = cropped(*augmented(volume, target, rng, case.modality), rng, self.crop)
            if case.real and rng.random() < self.sampling.grown:
                found = grow_lesion(volume[0, 0].numpy(), prepared.spacing, rng, case.modality)
                if found is not None:
                    volume, target = torch.from_numpy(found[0])[None, None], target | torch.from_numpy(found[1])
        features = self.backbone.read(volume).features
        return Example(tuple(f.cpu() for f in features), target, case, math.prod(prepared.spacing) / 1000)

    def _load(self, case: TrainingCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._loaded.get(case.image)
        if found is None:
            found = case.load()
            if sum(parts[0].nbytes for parts in self._loaded.values()) + found[0].nbytes < KEPT_BYTES:
                self._loaded[case.image] = found
        return found


def calibrate(adapters: AovaAdapters, examples: Sequence[Example], seed: int) -> None:
    """Let the adapters' stages know the mean and spread of what they will see, from 500 voxels of 120 examples at most."""
    rng = np.random.default_rng(seed)
    chosen = [examples[i] for i in rng.permutation(len(examples))[:120]]
    samples = []
    for level in range(len(adapters.stages)):
        columns = []
        for example in chosen:
            flat = example.features[level][0].flatten(1).float()
            columns.append(flat[:, torch.from_numpy(rng.integers(0, flat.shape[1], 500))])
        samples.append(torch.cat(columns, 1))
    adapters.calibrate(samples)
