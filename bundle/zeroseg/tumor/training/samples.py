"""From cases to what a training step sees: volumes through the frozen encoder, and voxels of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

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
PICTURE_WINDOW = 0.7
"""Share of pictures of CT that are shown through another window."""
OTHER_SEQUENCE = 0.25
"""Share of MR readings whose tissues change places in brightness."""


@dataclass
class Example:
    """A case on the working grid: the encoder's features, the (X, Y, Z) bool mask, and the millilitres of a voxel."""

    features: tuple[Tensor, ...]
    target: Tensor
    case: TrainingCase
    voxel_ml: float = VOXEL_ML


@dataclass
class _Shown:
    """A case as it is shown to the encoder: (1, 1, X, Y, Z) volume; else as ``Example``."""

    volume: Tensor
    target: Tensor
    case: TrainingCase
    voxel_ml: float

    def turned_as(self, sides: Sequence[int]) -> _Shown:
        """Its axes in such an order that they are as long, one against another, as ``sides`` are."""
        order = np.empty(3, int)
        order[np.argsort(sides, kind="stable")] = np.argsort(self.target.shape, kind="stable")
        volume = self.volume.permute(0, 1, *(2 + order).tolist())
        return replace(self, volume=volume, target=self.target.permute(*order.tolist()))

    def cropped(self, rng: np.random.Generator, sides: Sequence[int]) -> _Shown:
        volume, target = cropped(self.volume, self.target, rng, sides)
        return replace(self, volume=volume, target=target)


@dataclass
class VoxelSamples:
    """V voxels of each of S readings of cases.

    Attributes:
        inputs: per stage (S, V, inputs of T) float16: what that stage's adapter sees at the coarse voxel around each.
        target: (S, V) bool.
        weight: (S, V) how many voxels of the volume each stands for, as a share; adds up to 1 over V.
        cases: S cases.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    weight: Tensor
    cases: list[TrainingCase]


def augmented(
    volume: Tensor, target: Tensor, rng: np.random.Generator, modality: str, recoloured: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A (1, 1, X, Y, Z) volume and its target turned, mirrored, and changed in gain, gamma, offset and noise; the highest value
    stays the bound, 1 or that of MR which is not clipped. One MR in four gets another sequence's look: its values pass through a random
    curve from zero on, which may fall. A share ``recoloured`` of all, whatever the modality, pass through any curve."""
    most = max(1.0, float(volume.max()))
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    flips = [axis for axis in range(3) if rng.random() < 0.5]
    volume = volume[0, 0].permute(*order).flip(flips)
    target = target.permute(*order).flip(flips)
    strength = 0.5 if modality == "ct" else 1.0  # HU are what they are, but for the scanner's calibration
    gamma = float(np.exp(strength * rng.uniform(-0.3, 0.3)))
    gain, offset = 1 + strength * rng.uniform(-0.12, 0.12), strength * rng.uniform(-0.04, 0.04)
    noise = torch.from_numpy(rng.standard_normal(volume.shape).astype(np.float32)) * float(rng.uniform(0, 0.025))
    if modality == "mr" and rng.random() < OTHER_SEQUENCE:
        falls = rng.random() < 0.5
        curve = np.concatenate([[0], rng.uniform(0.1, 1, 5)])
        if not falls:
            curve = curve.cumsum() / curve.sum()
        volume = _through(curve * most, volume, most)
    if rng.random() < recoloured:
        curve = rng.uniform(0, 1, rng.integers(2, 7))
        spread = max(float(np.ptp(curve)), 1e-3)
        volume = _through((curve - curve.min()) / spread * most, volume, most)
    changed = (volume.clamp_min(0) ** gamma * gain + offset + noise).clamp(0, most)
    return changed[None, None].contiguous(), target.contiguous()


def _through(curve: np.ndarray, volume: Tensor, most: float) -> Tensor:
    """Values from 0 to ``most`` mapped by a curve of evenly spaced points."""
    places = np.linspace(0, 1, len(curve))
    return torch.from_numpy(np.interp(volume.numpy() / most, places, curve).astype(np.float32))


def cropped(volume: Tensor, target: Tensor, rng: np.random.Generator, longest: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A random part of a (1, 1, X, Y, Z) volume and its target with sides of at most ``longest`` voxels.

    Where there is a lesion, the part holds the middle of a random piece of it: training costs less, and fields of view vary.
    """
    hits = target.nonzero()
    anchor = hits[int(rng.integers(len(hits)))].tolist() if len(hits) else [int(rng.integers(n)) for n in target.shape]
    place = []
    for n, a, most in zip(target.shape, anchor, longest, strict=True):
        length = min(n, most)
        start = int(np.clip(a - rng.uniform(0.2, 0.8) * length, 0, n - length))
        place.append(slice(start, start + length))
    return volume[(..., *place)].contiguous(), target[tuple(place)].contiguous()


def beside(target: Tensor, rng: np.random.Generator, multiple: int) -> tuple[slice, ...] | None:
    """The part of a scan that lies on one side of its lesions along an axis: healthy tissue of the same scanner.

    Args:
        target: (X, Y, Z) bool, not empty, with sides that are multiples of ``multiple``.
        multiple: what the sides of a part have to be multiples of.

    Returns:
        The place of one such part; None where there is none.
    """
    found = []
    for axis, size in enumerate(target.shape):
        lines = target.any(dim=tuple(a for a in range(3) if a != axis)).nonzero().flatten().tolist()
        for start, room in ((0, lines[0]), (size, size - 1 - lines[-1])):
            side = room - room % multiple
            part = slice(start, side) if start == 0 else slice(size - side, size)
            if side:
                found.append(tuple(part if a == axis else slice(None) for a in range(3)))
    return found[rng.integers(len(found))] if found else None


def as_picture(
    volume: Tensor, target: Tensor, rng: np.random.Generator, modality: str, multiple: int
) -> tuple[Tensor, Tensor]:
    """One slice of a (1, 1, X, Y, Z) volume across its last axis, as deep as the model needs it; of CT, through another window.

    So pictures are read (:func:`zeroseg.tumor.prepare.prepare`): a single slice, repeated. A picture of CT shows soft tissue as somebody
    chose to, mostly with fat in black.
    """
    hits = target.any(0).any(0).nonzero().flatten()
    at = int(hits[rng.integers(len(hits))]) if len(hits) else int(rng.integers(target.shape[2]))
    flat = volume[..., at : at + 1]
    if modality == "ct" and rng.random() < PICTURE_WINDOW:
        low, high = rng.uniform(0, 0.55), rng.uniform(0.7, 1.0)
        flat = ((flat - low) / (high - low)).clamp(0, 1)
    return flat.repeat(1, 1, 1, 1, multiple), target[..., at : at + 1].repeat(1, 1, multiple)


@dataclass(frozen=True)
class Sampling:
    """How cases become samples.

    Attributes:
        voxels: kept of every case for the first phase.
        variants: augmented readings of every real volume; phantoms get one each.
        crop: longest side, in working voxels, of what is trained on at once; a multiple of the backbone's
            ``size_multiple``. None: that which is nearest to 144 mm.
        grown: chance that a lesion is grown into a real volume, see :mod:`lesions`.
        healthy_part: chance that of a real volume only what lies beside its lesions is shown; without that, real would mean ill.
        scales: between which the working spacing is drawn, as shares of the backbone's.
        recoloured: chance that a volume's values pass through a random curve, so that no modality's greys are learned by heart.
        pictures: chance that a single slice of the volume is shown, see :func:`as_picture`.
        readers: processes that read volumes beside this one; 0: this one does, as a GPU needs it.
    """

    voxels: int = 500
    variants: int = 8
    crop: int | None = None
    readers: int = 0
    grown: float = 0.0
    scales: tuple[float, float] = (0.8, 1.2)
    recoloured: float = 0.0
    healthy_part: float = 0.0
    pictures: float = 0.0


def check_numbers(options: Any) -> None:
    """Make sure that the fields of a dataclass that are annotated as numbers hold such: a config gives what it was told.

    Raises:
        ZeroSegError: one does not.
    """
    for field in fields(options):
        value, kind = getattr(options, field.name), str(field.type).removesuffix(" | None")
        optional = value is None and str(field.type) != kind
        if kind == "int" and not optional and not isinstance(value, Integral):
            raise ZeroSegError(f"{field.name} must be a whole number, not {value!r}")
        if kind == "float" and not optional and not isinstance(value, Real):
            raise ZeroSegError(f"{field.name} must be a number, not {value!r}")


class CaseReader:
    """Reads cases through the frozen encoder.

    Args:
        backbone: frozen, loaded.
        sampling: how.
        seed: of everything random.
        whole_mm: side of a voxel, where the adapters do not read the backbone's own grid.

    Raises:
        ZeroSegError: ``crop`` does not suit the backbone.
    """

    def __init__(self, backbone: MaisiBackbone, sampling: Sampling, seed: int = 0, whole_mm: float | None = None):
        step = backbone.size_multiple
        self.spacing = backbone.spacing if whole_mm is None else (whole_mm,) * 3
        crop = sampling.crop
        if crop is None:
            crop = max(1, round(CROP_MM / max(self.spacing) / step)) * step
        if crop < 1 or crop % step:
            raise ZeroSegError(f"crop must be a multiple of {step}, not {crop}")
        self.backbone, self.sampling, self.seed = backbone, replace(sampling, crop=crop), seed
        self.crop = crop
        self._loaded: dict[Path, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def read(self, case: TrainingCase, rng: np.random.Generator | None = None) -> Example:
        """One case through the frozen encoder; with a generator, augmented."""
        shown = self._show(case, rng)
        if rng is not None and rng.random() < self.sampling.pictures:
            shown = self._picture(shown, rng)
        return self._encoded(shown)

    def read_together(self, cases: Sequence[TrainingCase], rng: np.random.Generator) -> list[Example]:
        """Several cases, augmented and cropped to one shape: a CPU trains on volumes of one shape in a third of the time, see
        ``AovaAdapters.adapt_many``. They are pictures all or none."""
        shown = [self._show(case, rng) for case in cases]
        pictures = rng.random() < self.sampling.pictures
        # Thin ones are laid upon each other, or next to nothing would be left.
        shown = [one.turned_as(shown[0].target.shape) for one in shown]
        sides = [min(each) for each in zip(*(one.target.shape for one in shown), strict=True)]
        shown = [one.cropped(rng, sides) for one in shown]
        if pictures:
            shown = [self._picture(one, rng) for one in shown]
        return [self._encoded(one) for one in shown]

    def _show(self, case: TrainingCase, rng: np.random.Generator | None) -> _Shown:
        """A case on the working grid; with a generator, augmented."""
        values, affine, mask = self._load(case)
        backbone = self.backbone
        low, high = self.sampling.scales
        scale = float(np.exp(rng.uniform(np.log(low), np.log(high)))) if rng is not None else 1.0
        prepared = prepare(
            values,
            affine,
            case.modality,
            [mm * scale for mm in self.spacing],
            backbone.size_multiple,
            backbone.ct_window,
            mr_clip=backbone.mr_clip,
        )
        shown = _Shown(prepared.volume, prepared.from_input(mask), case, math.prod(prepared.spacing) / 1000)
        if rng is None:
            return shown
        volume, target = shown.volume, shown.target
        if case.real and target.any() and rng.random() < self.sampling.healthy_part:
            place = beside(target, rng, backbone.size_multiple)
            if place is not None:
                volume, target = volume[(..., *place)], target[place]
        volume, target = augmented(volume, target, rng, case.modality, self.sampling.recoloured)
        volume, target = cropped(volume, target, rng, [self.crop] * 3)
        if case.real and rng.random() < self.sampling.grown:
            found = grow_lesion(volume[0, 0].numpy(), prepared.spacing, rng, case.modality)
            if found is not None:
                volume, target = torch.from_numpy(found[0])[None, None], target | torch.from_numpy(found[1])
        return replace(shown, volume=volume, target=target)

    def _picture(self, shown: _Shown, rng: np.random.Generator) -> _Shown:
        """One slice of it, seen from its broad side: of a slice, that slice."""
        flat = shown.turned_as((3, 2, 1))
        volume, target = as_picture(flat.volume, flat.target, rng, flat.case.modality, self.backbone.size_multiple)
        return replace(flat, volume=volume, target=target)

    def _encoded(self, shown: _Shown) -> Example:
        features = self.backbone.read(shown.volume).features
        return Example(tuple(f.cpu() for f in features), shown.target, shown.case, shown.voxel_ml)

    def _load(self, case: TrainingCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._loaded.get(case.image)
        if found is None:
            found = case.load()
            if sum(parts[0].nbytes for parts in self._loaded.values()) + found[0].nbytes < KEPT_BYTES:
                self._loaded[case.image] = found
        return found

    def jobs(self, cases: Sequence[TrainingCase]) -> list[tuple[TrainingCase, int, int]]:
        """(case, its number, number of the variant) for every reading."""
        variants = self.sampling.variants
        return [(case, i, n) for i, case in enumerate(cases) for n in range(variants if case.real else 1)]

    def read_job(self, job: tuple[TrainingCase, int, int]) -> Example:
        """One reading, augmented; the same whenever it is read."""
        case, i, n = job
        return self.read(case, np.random.default_rng([self.seed, i, n]))

    def draw(self, example: Example, adapters: AovaAdapters, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Some voxels of a case: two fifths of them of the lesion where there is one, the others from anywhere.

        Returns:
            Target, weight and the inputs of every stage, as a row of ``VoxelSamples``.
        """
        voxels = self.sampling.voxels
        flat = example.target.flatten().numpy()
        inside = np.flatnonzero(flat)
        count = voxels * 2 // 5 if len(inside) else 0
        outside = np.flatnonzero(~flat)
        chosen = np.concatenate([rng.choice(inside, count), rng.choice(outside, voxels - count)]).astype(np.int64)
        shares = [len(inside) / max(count, 1), len(outside) / (voxels - count)]
        weight = np.repeat(shares, [count, voxels - count])
        place = np.stack(np.unravel_index(chosen, example.target.shape))
        inputs = []
        for level, (stage, features) in enumerate(zip(adapters.stages, example.features, strict=True)):
            seen = stage.surroundings(stage.standardise(features.to(self.backbone.device, torch.float32)))[0].cpu()
            inputs.append(seen[(slice(None), *torch.from_numpy(place >> level))].T.half())
        return torch.from_numpy(flat[chosen]), torch.from_numpy(weight / flat.size).float(), *inputs

    def samples(self, cases: Sequence[TrainingCase], adapters: AovaAdapters, kept: Path) -> VoxelSamples:
        """Voxels of all cases; of real ones several times, augmented anew.

        Args:
            cases: trained on.
            adapters: calibrated; they say what is seen of a voxel.
            kept: file the samples are kept in for the next run.
        """
        jobs = self.jobs(cases)
        rows, key = [case for case, _, _ in jobs], self._key(jobs, adapters)
        if kept.is_file():
            saved = torch.load(kept, weights_only=True, mmap=True)
            if saved["key"] == key:
                target, weight, *inputs = saved["columns"]
                return VoxelSamples(tuple(inputs), target, weight, rows)
        columns: list[Tensor] = []
        loader = DataLoader(_Readings(self, jobs, adapters), batch_size=None, num_workers=self.sampling.readers)
        for row, parts in enumerate(tqdm(loader, desc="reading", mininterval=10)):
            columns = columns or [torch.empty((len(jobs), *part.shape), dtype=part.dtype) for part in parts]
            for column, part in zip(columns, parts, strict=True):
                column[row] = part
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"key": key, "columns": columns}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        return VoxelSamples(tuple(columns[2:]), columns[0], columns[1], rows)

    def _key(self, jobs: Sequence[tuple[TrainingCase, int, int]], adapters: AovaAdapters) -> str:
        """Of all that decides what ``samples`` reads."""
        stems = [f"{case.image.parent.parent.name}/{case.stem}/{n}" for case, _, n in jobs]
        # How many variants a case has, its stems say; who reads them is all one.
        read_by = {name: v for name, v in asdict(self.sampling).items() if name not in ("variants", "readers")}
        decisive = [stems, self.seed, read_by, adapters.options]
        digest = hashlib.sha256(json.dumps(decisive).encode())
        digest.update(self.backbone.fingerprint.encode())
        for stage in adapters.stages:
            digest.update(stage.center.cpu().numpy().tobytes() + stage.spread.cpu().numpy().tobytes())
        return digest.hexdigest()


class _Readings(Dataset):
    """Rows of ``VoxelSamples``, one per job."""

    def __init__(self, reader: CaseReader, jobs: Sequence[tuple[TrainingCase, int, int]], adapters: AovaAdapters):
        self.reader, self.jobs, self.adapters = reader, jobs, adapters

    def __len__(self) -> int:
        return len(self.jobs)

    @torch.inference_mode()
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        job = self.jobs[index]
        rng = np.random.default_rng([self.reader.seed, *job[1:], 1])
        return self.reader.draw(self.reader.read_job(job), self.adapters, rng)


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
