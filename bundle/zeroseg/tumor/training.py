"""Training of the adapters, the only part of DiffuGTS that learns from masks (paper section 2.1; ``configs/train_tumor.yaml``).

Everything else is frozen. Training has two phases. First, voxels: every volume goes through the encoder once, what the adapters
see of some of its voxels is kept, and each step draws from dozens of volumes. Then, volumes: whole ones,
encoded anew, which fits what needs them: interpolation between the stages, calibration, the image-level answer. The paper's losses are known from a third-party account: an image-level anomaly term, an alignment of pooled
features with the text, and Dice. ZeroSeg adds cross-entropy per voxel, which is what calibrates the 0.5 of
``AovaOutput.probability``, and trains on absence: healthy volumes, other organs' words and nonsense words must find nothing.
"""

from __future__ import annotations

import hashlib
import json
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.errors import ZeroSegError
from zeroseg.hashing import file_sha256
from zeroseg.tumor.adapters import AovaAdapters, AovaOutput, role_margin
from zeroseg.tumor.aova import load_adapters
from zeroseg.tumor.inferer import TumorSegmentationInferer
from zeroseg.tumor.prepare import prepare
from zeroseg.tumor.prompts import ANY_TUMOUR, ORGANS, default_tumor, prompt_set
from zeroseg.tumor.residuals import fit_fusions

REGIONS = {
    "limb": ("limb", "thigh", "soft tissue"),
    "abdomen": ("abdomen", "liver", "kidney", "spleen", "pancreas", "colon", "hepatic vessel"),
    "chest": ("lung",),
    "head": ("brain",),
}
"""Region -> its organs. Asked for another region's tumour, nothing is to be found; within one, organs are not told apart."""
WORDS_THAT_FIT = {"limb": REGIONS["limb"], "thigh": REGIONS["limb"], "soft tissue": REGIONS["limb"]}
"""Organ -> organs whose words mean it as well; others also answer to the body as a whole."""


@dataclass(frozen=True)
class TrainingCase:
    """A volume and what it shows.

    Attributes:
        image: path of the NIfTI volume.
        mask: path of its mask; empty masks are healthy volumes.
        organ: what is asked for when the question fits.
        modality: ct, mr or pet.
        kind: of lesion, where known.
        real: not a phantom.
    """

    image: Path
    mask: Path
    organ: str
    modality: str
    kind: str | None = None
    real: bool = False

    @property
    def stem(self) -> str:
        return self.image.name.split(".")[0]

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(1, X, Y, Z) float32 values as stored, (4, 4) affine and (X, Y, Z) mask."""
        image = nib.load(self.image)
        return np.asarray(image.dataobj, dtype=np.float32)[None], image.affine, self.load_mask()

    def load_mask(self) -> np.ndarray:
        """(X, Y, Z) mask, not zero where the lesion is."""
        return np.asarray(nib.load(self.mask).dataobj)


@dataclass
class Example:
    """A case on the working grid: the encoder's features and the (X, Y, Z) bool mask."""

    features: tuple[Tensor, ...]
    target: Tensor
    case: TrainingCase


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


def read_cases(folder: str | Path, organ: str | None = None, modality: str | None = None) -> list[TrainingCase]:
    """The cases of a folder with ``images/`` and ``masks/`` of the same names.

    Args:
        folder: with ``cases.json`` (as ``scripts/training/phantoms.py --volumes`` writes it), or of real volumes of one kind.
        organ, modality: of all cases, where there is no ``cases.json``.

    Raises:
        ZeroSegError: there are no images, a mask is missing, or it is not known what the volumes show.
    """
    folder = Path(folder).expanduser()
    images = sorted(p for p in (folder / "images").glob("*") if p.name.endswith((".nii", ".nii.gz")))
    if not images:
        raise ZeroSegError(f"{folder} holds no images/*.nii.gz: give a folder with images and masks")
    index = folder / "cases.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    cases = []
    for image in images:
        mask = folder / "masks" / image.name
        facts = known.get(image.name.split(".")[0], {"organ": organ, "modality": modality})
        if not mask.is_file():
            raise ZeroSegError(f"{folder.name}: masks/{image.name} is missing; a healthy volume needs an empty mask")
        if not facts.get("organ") or not facts.get("modality"):
            raise ZeroSegError(f"{folder.name} has no cases.json entry for {image.name}: give organ and modality")
        cases.append(TrainingCase(image, mask, facts["organ"], facts["modality"], facts.get("kind"), not known))
    return cases


def refuse_held_out(cases: Sequence[TrainingCase], held_out: Mapping[str, Sequence[str]]) -> None:
    """Make sure that nothing held out is trained on.

    Args:
        cases: of the training.
        held_out: ``kinds`` of lesion, ``modalities`` of real volumes and ``folders`` (names) that stay unseen.

    Raises:
        ZeroSegError: a case belongs to one of them.
    """
    for case in cases:
        if case.kind is not None and case.kind in held_out.get("kinds", ()):
            raise ZeroSegError(
                f"{case.stem} shows a held-out kind of lesion, {case.kind}: take it out of the training folder"
            )
        if case.real and case.modality in held_out.get("modalities", ()):
            raise ZeroSegError(f"{case.stem} is a real {case.modality} volume, which is held out: take that folder out")
        if set(case.image.parts) & set(held_out.get("folders", ())):
            raise ZeroSegError(f"{case.stem} lies in a held-out folder: take that folder out")


class Questions:
    """Random prompts for a case, with whether the case holds what they ask for. Embeddings are computed once per question."""

    def __init__(self, encoder: TextEncoder, fitting: float = 0.65, nonsense: float = 0.15):
        self.encoder, self.fitting, self.nonsense = encoder, fitting, nonsense
        self._known: dict[tuple[str, str, str], tuple[Tensor, list[str]]] = {}

    def draw(self, rng: np.random.Generator, case: TrainingCase) -> tuple[str, str, bool]:
        """(organ, tumor, whether the words fit the place) for one step."""
        chance = rng.random()
        if chance < self.fitting:
            organ = str(rng.choice([*WORDS_THAT_FIT.get(case.organ, (case.organ,)) * 2, "body"]))
            names = ORGANS[organ]
            return organ, str(rng.choice(names if rng.random() < 0.7 else ANY_TUMOUR)), True
        if chance < self.fitting + self.nonsense:
            letters = list(string.ascii_lowercase)
            words = ["".join(rng.choice(letters, rng.integers(4, 10))) for _ in range(rng.integers(1, 4))]
            return (case.organ if rng.random() < 0.6 else words[0]), " ".join(words), False
        others = [o for organs in REGIONS.values() if case.organ not in organs for o in organs]
        organ = str(rng.choice(others))
        return organ, str(rng.choice(ORGANS[organ])), False

    def embed(self, organ: str, tumor: str, modality: str) -> tuple[Tensor, list[str]]:
        """(N, d) embeddings of the prompts the inferer would ask, and their roles."""
        key = (organ, tumor, modality)
        if key not in self._known:
            asked = prompt_set(organ, tumor, modality)
            self._known[key] = self.encoder.embed([t for _, t in asked]).clone(), [r for r, _ in asked]
        return self._known[key]


def losses(output: AovaOutput, prompts: Tensor, roles: Sequence[str], target: Tensor) -> dict[str, Tensor]:
    """The training terms of one volume and one question.

    Args:
        output: of the adapters.
        prompts: (N, d) embeddings, unit length.
        roles: one per prompt.
        target: (X, Y, Z) bool; empty where the answer is "absent".

    Returns:
        ``dice`` (zero for an empty target), ``voxel`` cross-entropy, ``image`` cross-entropy, and ``align``: symmetric
        cross-entropy between pooled features and texts, one per role, at temperature 0.07.
    """
    present, wanted = bool(target.any()), target.float()
    probability = output.margin.sigmoid()
    overlap = 2 * (probability * wanted).sum() + 1
    dice = 1 - overlap / (probability.sum() + wanted.sum() + 1)
    voxel = F.binary_cross_entropy_with_logits(output.margin, wanted)
    image = F.binary_cross_entropy_with_logits(output.image_logit, wanted.new_tensor(float(present)))
    names = list(dict.fromkeys(roles))
    members = [[i for i, role in enumerate(roles) if role == name] for name in names]
    pooled = F.normalize(torch.stack([output.pooled[m].mean(0) for m in members]), dim=-1)
    texts = F.normalize(torch.stack([prompts[m].mean(0) for m in members]), dim=-1)
    likeness, own = pooled @ texts.T / 0.07, torch.arange(len(names), device=target.device)
    align = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    return {"dice": dice if present else dice * 0, "voxel": voxel, "image": image, "align": align}


def augmented(volume: Tensor, target: Tensor, rng: np.random.Generator, modality: str) -> tuple[Tensor, Tensor]:
    """A (1, 1, X, Y, Z) volume and its target turned, mirrored, and changed in gain, gamma, offset and noise."""
    order = rng.permutation(3) if rng.random() < 0.5 else np.arange(3)
    flips = [axis for axis in range(3) if rng.random() < 0.5]
    volume = volume[0, 0].permute(*order).flip(flips)
    target = target.permute(*order).flip(flips)
    strength = 0.5 if modality == "ct" else 1.0  # HU are what they are, but for the scanner's calibration
    gamma = float(np.exp(strength * rng.uniform(-0.3, 0.3)))
    gain, offset = 1 + strength * rng.uniform(-0.12, 0.12), strength * rng.uniform(-0.04, 0.04)
    noise = torch.from_numpy(rng.standard_normal(volume.shape).astype(np.float32)) * float(rng.uniform(0, 0.025))
    changed = (volume.clamp(0, 1) ** gamma * gain + offset + noise).clamp(0, 1)
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


class AdapterTrainer:
    """Trains adapters for one frozen backbone and text encoder, and fits the fusion of the residuals.

    Args:
        backbone: frozen; its folder's ``config.json`` is extended when ``out`` is that folder.
        text_encoder: frozen.
        phantoms: folder of ``scripts/training/phantoms.py --volumes``, or several; None: none.
        real: list of {folder, organ, modality}: real volumes with masks.
        out: folder that gets ``adapters.safetensors`` and the config entries ``adapters``, ``fusion`` and ``presence``.
        work: checkpoint; the run resumes from it.
        adapters: options of ``AovaAdapters``.
        initial: folder of trained adapters to start from instead of random ones.
        held_out: see ``refuse_held_out``.
        leave_out: [fold, folds]: of the real cases every ``folds``-th, from ``fold`` on, is left out of training and fusion
            and measured afterwards.
        steps: of the first phase, on voxels.
        volume_steps: of the second phase, on whole volumes.
        volumes: cases per step of the first phase.
        voxels: kept of every case for the first phase.
        batch: volumes per step of the second phase.
        lr: highest learning rate; warm-up, then a cosine to zero.
        weights: of the terms of ``losses``.
        real_share: of the volumes drawn per step.
        variants: augmented readings of every real volume; phantoms get one each.
        crop: longest side, in working voxels, of what is trained on at once; a multiple of the backbone's ``size_multiple``.
        readers: processes that read volumes for the first phase side by side; 0: this one, as a GPU needs it.
        fusion_volumes: phantoms, and as many real volumes at most, per modality that the residuals' fusion is fitted on; 0: not
            fitted.
        fusion_phantoms: folder of phantoms for that, best ones never trained on: what adapters know by heart makes them
            look surer than they are. None: the training's own cases.
        seed: of everything random.
        save_every: steps between checkpoints.
    """

    def __init__(
        self,
        backbone: MaisiBackbone,
        text_encoder: TextEncoder,
        phantoms: str | Path | Sequence[str | Path] | None,
        out: str | Path,
        work: str | Path,
        real: Sequence[Mapping[str, str]] = (),
        adapters: Mapping | None = None,
        initial: str | Path | None = None,
        held_out: Mapping[str, Sequence[str]] | None = None,
        leave_out: Sequence[int] | None = None,
        steps: int = 4000,
        volume_steps: int = 0,
        volumes: int = 32,
        voxels: int = 500,
        batch: int = 4,
        lr: float = 3e-3,
        weights: Mapping[str, float] | None = None,
        real_share: float = 0.25,
        variants: int = 8,
        crop: int = 48,
        readers: int = 0,
        fusion_volumes: int = 60,
        fusion_phantoms: str | Path | None = None,
        seed: int = 0,
        save_every: int = 200,
    ):
        self.backbone, self.encoder = backbone.load(), text_encoder.load()
        self.out, self.work = Path(out), Path(work)
        self.volume_steps, self.volumes, self.voxels = volume_steps, volumes, voxels
        self.steps, self.batch, self.lr, self.seed, self.save_every = steps, batch, lr, seed, save_every
        self.weights = {"dice": 1.0, "voxel": 1.0, "image": 0.3, "align": 0.05, **(weights or {})}
        self.real_share, self.variants, self.readers, self.fusion_volumes = (
            real_share,
            variants,
            readers,
            fusion_volumes,
        )
        if crop < 1 or crop % backbone.size_multiple:
            raise ZeroSegError(f"crop must be a multiple of {backbone.size_multiple}, not {crop}")
        self.crop = crop
        self.held_out = dict(held_out or {})
        folders = [phantoms] if isinstance(phantoms, (str, Path)) else phantoms or []
        cases = [case for folder in folders for case in read_cases(folder)]
        found = [case for entry in real for case in read_cases(entry["folder"], entry["organ"], entry["modality"])]
        fold, folds = leave_out or (0, 0)
        self.left_out = [c for i, c in enumerate(found) if folds and i % folds == fold]
        self.cases = [*cases, *(c for c in found if c not in self.left_out)]
        if not self.cases:
            raise ZeroSegError("there is nothing to train on: give phantoms or real")
        drawn = cases if fusion_phantoms is None else read_cases(fusion_phantoms)
        self.fusion_cases = [*drawn, *(case for case in self.cases if case.real)]
        refuse_held_out([*self.cases, *self.left_out, *self.fusion_cases], self.held_out)
        self.questions = Questions(self.encoder)
        torch.manual_seed(seed)
        options = {"channels": backbone.feature_channels, "text_dim": text_encoder.dim, **(adapters or {})}
        self.adapters = AovaAdapters(**options) if initial is None else load_adapters(initial, text_encoder.dim)
        self.adapters.fusion = self.adapters.presence = None  # those of ``initial`` do not fit what comes out
        self._calibrated = initial is not None
        self.adapters.requires_grad_(True).to(backbone.device)
        self.log: list[list[float]] = []
        self.seconds = 0.0

    def read(self, case: TrainingCase, rng: np.random.Generator | None = None) -> Example:
        """One case through the frozen encoder; with a generator, augmented."""
        values, affine, mask = case.load()
        spacing = np.asarray(self.backbone.spacing)
        if rng is not None and case.real:
            spacing = spacing * rng.uniform(0.8, 1.2)
        prepared = prepare(values, affine, case.modality, spacing, self.backbone.size_multiple, self.backbone.ct_window)
        volume, target = prepared.volume, prepared.from_input(mask)
        if rng is not None:
            volume, target = cropped(*augmented(volume, target, rng, case.modality), rng, self.crop)
        features = self.backbone.read(volume).features
        return Example(tuple(f.cpu() for f in features), target, case)

    def sample(self, example: Example, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """``voxels`` voxels of a case: two fifths of them of the lesion where there is one, the others from anywhere.

        Returns:
            Target, weight and the inputs of every stage, as a row of ``VoxelSamples``.
        """
        flat = example.target.flatten().numpy()
        inside = np.flatnonzero(flat)
        count = self.voxels * 2 // 5 if len(inside) else 0
        outside = np.flatnonzero(~flat)
        chosen = np.concatenate([rng.choice(inside, count), rng.choice(outside, self.voxels - count)]).astype(np.int64)
        weight = np.repeat(
            [len(inside) / max(count, 1), len(outside) / (self.voxels - count)], [count, self.voxels - count]
        )
        place = np.stack(np.unravel_index(chosen, example.target.shape))
        inputs = []
        for level, (stage, features) in enumerate(zip(self.adapters.stages, example.features, strict=True)):
            seen = stage.surroundings(stage.standardise(features.to(self.backbone.device, torch.float32)))[0].cpu()
            inputs.append(seen[(slice(None), *torch.from_numpy(place >> level))].T.half())
        return torch.from_numpy(flat[chosen]), torch.from_numpy(weight / flat.size).float(), *inputs

    def samples(self) -> VoxelSamples:
        """Voxels of all training cases; of real ones ``variants`` times, augmented anew. Kept in ``work`` for the next run."""
        jobs = [(i, n) for i, case in enumerate(self.cases) for n in range(self.variants if case.real else 1)]
        cases = [self.cases[i] for i, _ in jobs]

        def read(i: int, n: int) -> Example:
            return self.read(self.cases[i], np.random.default_rng([self.seed, i, n]))

        if not self._calibrated:
            order = np.random.default_rng(self.seed).permutation(len(jobs))[:60]
            self._calibrate([read(*jobs[j]) for j in order])
            self._calibrated = True
        kept, key = self.work / "voxels.pt", self._samples_key(jobs)
        if kept.is_file():
            saved = torch.load(kept, weights_only=True, mmap=True)
            if saved["key"] == key:
                target, weight, *inputs = saved["columns"]
                return VoxelSamples(tuple(inputs), target, weight, cases)

        class Reading(Dataset):
            def __len__(_) -> int:
                return len(jobs)

            @torch.inference_mode()
            def __getitem__(_, index: int) -> tuple[Tensor, ...]:
                i, n = jobs[index]
                return self.sample(read(i, n), np.random.default_rng([self.seed, i, n, 1]))

        columns: list[Tensor] = []
        readers = DataLoader(Reading(), batch_size=None, num_workers=self.readers)
        for row, parts in enumerate(tqdm(readers, desc="reading", mininterval=10)):
            columns = columns or [torch.empty((len(jobs), *part.shape), dtype=part.dtype) for part in parts]
            for column, part in zip(columns, parts, strict=True):
                column[row] = part
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save({"key": key, "columns": columns}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        return VoxelSamples(tuple(columns[2:]), columns[0], columns[1], cases)

    def _samples_key(self, jobs: list[tuple[int, int]]) -> str:
        """Of all that decides what ``samples`` reads."""
        stems = [f"{self.cases[i].image.parent.parent.name}/{self.cases[i].stem}/{n}" for i, n in jobs]
        digest = hashlib.sha256(json.dumps([stems, self.seed, self.voxels, self.crop, self.adapters.options]).encode())
        digest.update(self.backbone.fingerprint.encode())
        for stage in self.adapters.stages:
            digest.update(stage.center.cpu().numpy().tobytes() + stage.spread.cpu().numpy().tobytes())
        return digest.hexdigest()

    def run(self) -> dict:
        """Train, measure on what was left out, fit the fusion, write the folder.

        Returns:
            What ``training.json`` records of it.
        """
        start = time.monotonic()
        self.train()
        self.adapters.eval().requires_grad_(False)
        self.seconds += time.monotonic() - start
        self.save()
        if self.fusion_volumes:
            self.adapters.fusion, self.adapters.presence = self.fit_fusion(), self.fit_presence()
        return self.save({case.stem: round(self.dice(case), 4) for case in self.left_out})

    def train(self) -> None:
        """Both phases; the second begins with the first one's result and a tenth of its learning rate."""
        checkpoint = self.work / "adapters.pt"
        state = {"voxels": 0, "volumes": 0}
        if checkpoint.is_file():
            saved = torch.load(checkpoint, map_location=self.backbone.device, weights_only=True)
            self.adapters.load_state_dict(saved["adapters"])
            self._calibrated = True
            state, self.log, self.seconds = saved["state"], saved["log"], saved["seconds"]
            self._optimizer_state = saved["optimizer"]
        if state["voxels"] < self.steps:
            samples = self.samples()
            pools = [[i for i, case in enumerate(samples.cases) if case.real is real] for real in (False, True)]
            self._phase("voxels", self.steps, self.lr, state, lambda rng: self._voxel_terms(samples, pools, rng))
        if state["volumes"] < self.volume_steps:
            pools = _phantoms_and_real(self.cases)
            self._phase("volumes", self.volume_steps, self.lr / 10, state, lambda rng: self._volume_terms(pools, rng))

    def _phase(self, name: str, steps: int, lr: float, state: dict[str, int], terms_of) -> None:
        optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
        if state[name]:
            optimizer.load_state_dict(self._optimizer_state)
        mean: dict[str, float] = {}
        bar = tqdm(range(state[name], steps), initial=state[name], total=steps, desc=name, mininterval=10)
        for step in bar:
            rng = np.random.default_rng(
                [self.seed, len(name), step]
            )  # so that a resumed run draws what a whole one would
            rate = min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = float(lr * max(rate, 0.01))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=self.backbone.device.type != "mps"):
                terms = terms_of(rng)
            sum(self.weights[key] * term for key, term in terms.items()).backward()
            torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
            optimizer.step()
            for key, term in terms.items():
                mean[key] = 0.97 * mean.get(key, term.item()) + 0.03 * term.item()
            state[name] = step + 1
            if (step + 1) % 50 == 0:
                bar.set_postfix({key: f"{value:.3f}" for key, value in mean.items()})
                self.log.append([name, step + 1, {key: round(value, 4) for key, value in mean.items()}])
            if (step + 1) % self.save_every == 0 or step + 1 == steps:
                self.work.mkdir(parents=True, exist_ok=True)
                parts = {"adapters": self.adapters.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
                part = (self.work / "adapters.pt").with_suffix(".part")
                torch.save({**parts, "log": self.log, "seconds": self.seconds}, part)
                part.replace(self.work / "adapters.pt")

    def _draw(self, pools: list[list], rng: np.random.Generator):
        phantoms, real = pools
        pool = real if real and (not phantoms or rng.random() < self.real_share) else phantoms
        return pool[rng.integers(len(pool))]

    def _voxel_terms(self, samples: VoxelSamples, pools: list[list[int]], rng) -> dict[str, Tensor]:
        """Dice per volume and cross-entropy over random voxels of ``volumes`` cases, each with a question of its own."""
        device, count = self.backbone.device, min(256, self.voxels)
        rows = [self._draw(pools, rng) for _ in range(self.volumes)]
        fits, prompts, roles = [], [], []
        for case in (samples.cases[row] for row in rows):
            organ, tumor, fit = self.questions.draw(rng, case)
            embedded, roles = self.questions.embed(organ, tumor, case.modality)
            fits.append(fit)
            prompts.append(embedded)
        fits = torch.tensor(fits, device=device)[:, None]
        place = torch.tensor(rows)[:, None], torch.from_numpy(rng.permuted(np.tile(np.arange(self.voxels), (len(rows), 1)), axis=1)[:, :count])  # fmt: skip
        target, weight = samples.target[place].to(device) & fits, samples.weight[place].to(device)
        prompts = torch.stack(prompts).to(device)
        logits = 0
        for level, (stage, temperature) in enumerate(
            zip(self.adapters.stages, self.adapters.log_temperature.exp(), strict=True)
        ):
            seen = samples.inputs[level][place].to(device).float()
            adapted = stage.alpha * stage.adapt(seen) + (1 - stage.alpha) * seen[..., : stage.channels]
            keys = stage.key(stage.text(prompts))
            logits = (
                logits + temperature * torch.einsum("bvc,bnc->nbv", stage.query(adapted), keys) / stage.channels**0.5
            )
        margin = role_margin(logits.float(), roles) + self.adapters.bias
        wanted = target.float()
        share = (weight / weight.mean()).sqrt()  # between true frequencies, which drown lesions, and equal ones
        voxel = F.binary_cross_entropy_with_logits(margin, wanted, share)
        present = target.any(1)
        found, weight = margin[present].sigmoid(), weight[present]
        overlap = 2 * (weight * found * wanted[present]).sum(1) + 1e-3
        dice = 1 - overlap / ((weight * (found + wanted[present])).sum(1) + 1e-3)
        return {"dice": dice.mean() if present.any() else voxel * 0, "voxel": voxel}

    def _volume_terms(self, pools: list[list[TrainingCase]], rng: np.random.Generator) -> dict[str, Tensor]:
        """The mean of ``losses`` over ``batch`` whole volumes, read anew and augmented."""
        total: dict[str, Tensor] = {}
        for _ in range(self.batch):
            terms = self._terms(self.read(self._draw(pools, rng), rng), rng)
            total = {name: total.get(name, 0) + term / self.batch for name, term in terms.items()}
        return total

    def _terms(self, example: Example, rng: np.random.Generator) -> dict[str, Tensor]:
        organ, tumor, fits = self.questions.draw(rng, example.case)
        device = self.backbone.device
        prompts, roles = self.questions.embed(organ, tumor, example.case.modality)
        target = example.target if fits else torch.zeros_like(example.target)
        output = self.adapters([f.to(device, torch.float32) for f in example.features], prompts.to(device), roles)
        for name in ("margin", "image_logit", "pooled"):
            setattr(output, name, getattr(output, name).float())
        return losses(output, prompts.to(device), roles, target.to(device))

    def _calibrate(self, examples: list[Example]) -> None:
        rng = np.random.default_rng(self.seed)
        chosen = [examples[i] for i in rng.permutation(len(examples))[:120]]
        samples = []
        for level in range(len(self.adapters.stages)):
            columns = []
            for example in chosen:
                flat = example.features[level][0].flatten(1).float()
                columns.append(flat[:, torch.from_numpy(rng.integers(0, flat.shape[1], 500))])
            samples.append(torch.cat(columns, 1))
        self.adapters.calibrate(samples)

    def dice(self, case: TrainingCase) -> float:
        """Dice of the refined mask against a case's, asked by the organ's default words."""
        values, affine, mask = case.load()
        mask = mask > 0
        found = self.inferer.segment(values, affine, case.modality, case.organ).labels > 0
        total = int(found.sum() + mask.sum())
        return 2 * int((found & mask).sum()) / total if total else 1.0

    @cached_property
    def inferer(self) -> TumorSegmentationInferer:
        """What the adapters will be used by, with the shipped settings."""
        return TumorSegmentationInferer(self.backbone, self.encoder, self.adapters, seed=self.seed)

    @torch.inference_mode()
    def _answer(self, example: Example) -> AovaOutput:
        """Of the adapters, asked by the organ's default words."""
        case, device = example.case, self.backbone.device
        prompts, roles = self.questions.embed(case.organ, default_tumor(case.organ), case.modality)
        return self.adapters([f.to(device, torch.float32) for f in example.features], prompts.to(device), roles)

    @cached_property
    def _fusion_lesions(self) -> list[TrainingCase]:
        return [case for case in self.fusion_cases if case.load_mask().any()]

    def fit_fusion(self, voxels: int = 2000) -> dict[str, dict]:
        """Per modality the weights of AOVA margin and residuals, by logistic regression on voxels of volumes with a lesion.

        A residual means something else in every modality: an uptake that inpainting takes away is a lesion, a grey value
        that it changes may be noise. Modalities whose volumes give no region with voxels both of lesions and of others are
        missing: there is nothing to learn from.
        """
        found = {}
        for modality in sorted({case.modality for case in self._fusion_lesions}):
            rng = np.random.default_rng(self.seed)
            cases = [case for case in self._fusion_lesions if case.modality == modality]
            chosen = []
            for pool in _phantoms_and_real(cases):
                chosen += [pool[i] for i in rng.permutation(len(pool))[: self.fusion_volumes]]
            maps: dict[str, list[np.ndarray]] = {}
            targets = []
            for case in tqdm(chosen, desc=f"fusion {modality}", mininterval=10):
                values, target = self._fusion_voxels(case, rng, voxels)
                targets.append(target)
                for name, part in values.items():
                    maps.setdefault(name, []).append(part)
            target = np.concatenate(targets)
            if target.any() and not target.all():
                found[modality] = fit_fusions({name: np.concatenate(parts) for name, parts in maps.items()}, target)
        return found

    def fit_presence(self, missed: float = 0.1, least: int = 10) -> dict[str, float]:
        """Per modality the image logit below which "absent" is answered: that share of the fusion's phantoms with a lesion lies
        there, phantoms because their lesions are of all sizes.

        A choice for whoever relies on "absent": it seldom hides a tumour, at the price of more alarms in healthy volumes;
        ``presence`` of the inferer asks for more. Modalities with fewer than ``least`` volumes with a lesion are missing.
        """
        logits: dict[str, list[float]] = {}
        phantoms, _ = _phantoms_and_real(self._fusion_lesions)
        for case in tqdm(phantoms, desc="presence", mininterval=10):
            known = logits.setdefault(case.modality, [])
            if len(known) < 3 * self.fusion_volumes:
                known.append(float(self._answer(self.read(case)).image_logit))
        return {m: float(np.quantile(known, missed)) for m, known in sorted(logits.items()) if len(known) >= least}

    def _fusion_voxels(self, case, rng, voxels) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(n,) values of every map at random voxels of a case's region, and whether they are tumour."""
        values, affine, mask = case.load()
        encoded = self.inferer.encode(values, affine, case.modality)
        maps = self.inferer.maps(encoded, case.organ, default_tumor(case.organ))
        inside = np.flatnonzero(maps.region)
        chosen = rng.choice(inside, min(voxels, len(inside)), replace=False)
        target = encoded.prepared.from_input(mask).numpy()
        return {name: values.ravel()[chosen] for name, values in maps.fusion_inputs.items()}, target.ravel()[chosen]

    def save(self, measured: Mapping[str, float] | None = None) -> dict:
        """Write adapters, config entries, record and sums; returns the record."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous().cpu() for k, v in self.adapters.state_dict().items()}
        save_file(state, self.out / "adapters.safetensors")
        config = _read_json(self.out / "config.json")
        config["adapters"] = self.adapters.options
        fitted = {"fusion": self.adapters.fusion, "presence": self.adapters.presence}
        config = {k: v for k, v in config.items() if k not in fitted} | {k: v for k, v in fitted.items() if v}
        (self.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        record = {"fusion": self._fusion_record(measured)}
        if self.steps or self.volume_steps:
            record["adapters"] = self._training_record()
        (self.out / "training.json").write_text(
            json.dumps(_read_json(self.out / "training.json") | record, indent=1) + "\n"
        )
        write_sums(self.out)
        return record

    def _fusion_record(self, measured: Mapping[str, float] | None) -> dict:
        record = {**_counted(self.fusion_cases), "volumes": self.fusion_volumes, "seed": self.seed}
        return record | ({"left_out_dice": dict(measured)} if measured else {})

    def _training_record(self) -> dict:
        kinds = sorted({c.kind for c in self.cases if c.kind})
        return {
            **_counted(self.cases),
            "lesion_kinds": kinds,
            "held_out": {k: list(v) for k, v in self.held_out.items()},
            "steps": {"voxels": self.steps, "volumes": self.volume_steps},
            "volumes": self.volumes,
            "voxels": self.voxels,
            "batch": self.batch,
            "lr": self.lr,
            "weights": self.weights,
            "real_share": self.real_share,
            "variants": self.variants,
            "crop": self.crop,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.adapters.parameters()),
            "hours": round(self.seconds / 3600, 2),
            "hardware": f"{self.backbone.device.type}, {torch.get_num_threads()} threads",
            "backbone": self.backbone.fingerprint,
            "text_encoder": self.encoder.fingerprint,
            "loss": self.log[:: max(1, len(self.log) // 60)],
        }


def _phantoms_and_real(cases: Sequence[TrainingCase]) -> list[list[TrainingCase]]:
    return [[case for case in cases if case.real is real] for real in (False, True)]


def _counted(cases: Sequence[TrainingCase]) -> dict:
    """What a record says of them."""
    phantoms, real = _phantoms_and_real(cases)
    return {"phantoms": len(phantoms), "real": sorted(case.stem for case in real)}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_sums(folder: Path) -> None:
    """List every file of a model folder but its README in ``SHA256SUMS``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "README.md"))
    sums = (f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    (folder / "SHA256SUMS").write_text("".join(sums))
