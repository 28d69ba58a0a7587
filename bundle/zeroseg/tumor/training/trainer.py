"""Both phases of the training, its checkpoints, and the folder it writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import write_sums
from zeroseg.errors import ZeroSegError
from zeroseg.io import one_line, write_json
from zeroseg.tumor.adapters import AovaAdapters
from zeroseg.tumor.aova import ENTRIES, load_adapters
from zeroseg.tumor.training.cases import CaseSets, counted, phantoms_and_real
from zeroseg.tumor.training.fusion import FusionFitter
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import CaseReader, Example, Sampling, VoxelSamples, calibrate, check_numbers
from zeroseg.tumor.training.terms import volume_terms, voxel_terms

IDENTITY = "training_of.json"
"""File of ``work`` that says what the training is of."""
WEIGHTS = {"dice": 1.0, "voxel": 1.0, "image": 0.3, "align": 0.05}
"""Of the terms, unless the schedule says otherwise."""


@dataclass(frozen=True)
class Schedule:
    """How long, on how much and how fast the adapters learn.

    Attributes:
        steps: of the first phase, on voxels.
        volumes: cases per step of the first phase.
        volume_steps: of the second phase, on whole volumes.
        batch: volumes per step of the second phase.
        questions: asked about each of them.
        lr: highest learning rate; warm-up, then a cosine to zero.
        weights: of the terms, over :data:`WEIGHTS`.
        real_share: of the volumes drawn per step.
        minutes: after which a phase ends this call at the latest, its learning rate fallen; None: by its steps alone.
        save_every: steps between checkpoints.
    """

    steps: int = 4000
    volumes: int = 32
    volume_steps: int = 0
    batch: int = 4
    questions: int = 2
    lr: float = 3e-3
    weights: Mapping[str, float] | None = None
    real_share: float = 0.25
    save_every: int = 200
    minutes: float | None = None

    def rate(self, step: int, done: float) -> float:
        """Factor of the learning rate at a step of a phase, of which a share is done."""
        return float(max(min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * min(done, 1))), 0.01))


class AdapterTrainer:
    """Trains adapters for one frozen backbone and text encoder, and fits the fusion of the residuals.

    Args:
        backbone: frozen; its folder's ``config.json`` is extended when ``out`` is that folder.
        text_encoder: frozen.
        cases: from :func:`gather_cases`, or what gathers them when called.
        out: folder that gets ``adapters.safetensors`` and the config entries ``adapters``, ``fusion`` and ``presence``.
        work: folder of the checkpoint and of the samples; the run resumes from it, where it is of the same cases, models, options of
            the adapters and seed. Schedule and sampling may be others.
        schedule: how long, on how much and how fast.
        sampling: how cases become samples.
        adapters: options of ``AovaAdapters``.
        initial: folder of trained adapters to start from instead of random ones.
        fusion_volumes: phantoms, and as many real volumes at most, per modality that the residuals' fusion is fitted on;
            0: not fitted.
        presence_of: modality -> "image" or "mask", by what it is judged whether there is a tumour at all; else by the image.
        seed: of everything random.
        beside: folder of adapters, or "embedded", that will answer together with these: what is fitted afterwards is fitted for both.

    Raises:
        ZeroSegError: a setting is no number where it must be one, ``sampling.crop`` does not suit the backbone, or the adapters of
            ``initial`` do not suit the texts; whatever ``cases`` raises.
    """

    def __init__(
        self,
        backbone: MaisiBackbone,
        text_encoder: TextEncoder,
        cases: CaseSets | Callable[[], CaseSets],
        out: str | Path,
        work: str | Path,
        schedule: Schedule | None = None,
        sampling: Sampling | None = None,
        adapters: Mapping | None = None,
        initial: str | Path | None = None,
        fusion_volumes: int = 60,
        presence_of: Mapping[str, str] | None = None,
        seed: int = 0,
        beside: str | Path | None = None,
    ):
        self.schedule, self.fusion_volumes, self.seed = schedule or Schedule(), fusion_volumes, seed
        sampling = sampling or Sampling()
        check_numbers(self.schedule)
        check_numbers(sampling)
        self.sets = cases if isinstance(cases, CaseSets) else cases()
        self.cases = self.sets.cases
        self.backbone, self.encoder = backbone.load(), text_encoder.load()
        self.out, self.work = Path(out), Path(work)
        self.weights = {**WEIGHTS, **(self.schedule.weights or {})}
        self.questions = Questions(self.encoder)
        torch.manual_seed(seed)
        options = {"channels": backbone.feature_channels, "text_dim": text_encoder.dim, **(adapters or {})}
        self.adapters = AovaAdapters(**options) if initial is None else load_adapters(initial, text_encoder.dim)
        self.reader = CaseReader(backbone, sampling, seed, self.adapters.whole_mm)
        # What comes out takes its place where it is ``out`` itself.
        own = initial is not None and Path(initial).resolve() == self.out.resolve()
        self._initial = "out" if own else self.adapters.sha256
        # Those of ``initial`` do not fit what comes out; others are set by hand, once the adapters are known.
        for entry in ENTRIES:
            setattr(self.adapters, entry, None)
        self.adapters.presence_of = dict(presence_of or {})
        self._calibrated = initial is not None
        self.adapters.requires_grad_(True).to(backbone.device)
        self.beside = None if beside is None else load_adapters(beside, text_encoder.dim).to(backbone.device)
        self.average = AveragedModel(self.adapters, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
        self.log: list[list] = []
        self.seconds = 0.0

    def run(self) -> dict:
        """Train, measure on what was left out, fit the fusion, write the folder.

        Returns:
            What ``training.json`` records of it.

        Raises:
            ZeroSegError: ``work`` holds another training, or a case cannot be read.
        """
        start = time.monotonic()
        self.train()
        self.adapters.eval().requires_grad_(False)
        self.seconds += time.monotonic() - start
        self.save()
        fitter = FusionFitter(
            self.reader, self.encoder, self.adapters, self.sets.fusion, self.fusion_volumes, self.seed, self.beside
        )
        if self.fusion_volumes:
            self.adapters.fusion = fitter.fit_weights()
            self.adapters.presence = fitter.fit_presence()
        return self.save({case.stem: round(fitter.dice(case), 4) for case in self.sets.left_out})

    def train(self) -> None:
        """Both phases. The second begins with the first one's result and a tenth of its learning rate; alone, with the whole rate. It
        ends with the running average of its weights.

        Raises:
            ZeroSegError: as ``run``.
        """
        self._claim_work()
        checkpoint, schedule = self.work / "adapters.pt", self.schedule
        state = {"voxels": 0, "volumes": 0}
        if checkpoint.is_file():
            saved = torch.load(checkpoint, map_location=self.backbone.device, weights_only=True)
            self.adapters.load_state_dict(saved["adapters"])
            self._calibrated = True
            state, self.log, self.seconds = saved["state"], saved["log"], saved["seconds"]
            self._optimizer_state = saved["optimizer"]
            # A checkpoint of before has none: the average begins with it.
            self.average.load_state_dict(saved.get("average", self.average.state_dict()))
        if state["voxels"] < schedule.steps:
            samples = self.samples()
            rows = [[i for i, case in enumerate(samples.cases) if case.real is real] for real in (False, True)]
            self._phase("voxels", schedule.steps, schedule.lr, state, lambda rng: self._voxel_step(samples, rows, rng))
        if state["volumes"] < schedule.volume_steps:
            self.calibrate()
            pools = phantoms_and_real(self.cases)
            rate = schedule.lr / 10 if schedule.steps else schedule.lr
            steps = Steps(self, pools, state["volumes"], schedule.volume_steps)
            read = iter(DataLoader(steps, batch_size=None, num_workers=self.reader.sampling.readers))
            self._phase("volumes", schedule.volume_steps, rate, state, lambda rng: self._terms(next(read), rng))
        if schedule.volume_steps:
            self.adapters.load_state_dict(self.average.module.state_dict())

    def identity(self) -> dict[str, Any]:
        """What a training is of; what is another one has to begin anew. JSON-serialisable.

        Raises:
            ZeroSegError: a file of a case cannot be read.
        """
        cases = sorted((case.identity() for case in self.cases), key=json.dumps)
        return {
            "cases": cases,
            "organ": sorted({case.organ for case in self.cases}),
            "modality": sorted({case.modality for case in self.cases}),
            "adapters": self.adapters.options,
            "backbone": self.backbone.fingerprint,
            "text_encoder": self.encoder.fingerprint,
            "initial": self._initial,
            "seed": self.seed,
        }

    def _claim_work(self) -> None:
        """Note in ``work`` what is trained there; before anything is read from it.

        Raises:
            ZeroSegError: another training is.
        """
        path, schedule = self.work / IDENTITY, self.schedule
        if path.is_file():
            now = json.loads(json.dumps(self.identity()))
            remedy = "give another folder as work (--work; --output-dir of zeroseg learn), or remove it"
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise ZeroSegError(f"{self.work} holds a damaged {IDENTITY}: {remedy}") from error
            other = [name.replace("_", " ") for name, value in now.items() if before.get(name) != value]
            if other:
                raise ZeroSegError(f"{self.work} holds a training that differs in {', '.join(other)}: {remedy}")
        elif schedule.steps or schedule.volume_steps:
            write_json(path, self.identity())

    def calibrate(self) -> None:
        """Let new adapters know the statistics of what they will see, from some of the cases."""
        if not self._calibrated:
            jobs = self.reader.jobs(self.cases)
            order = np.random.default_rng(self.seed).permutation(len(jobs))[:60]
            calibrate(self.adapters, [self.reader.read_job(jobs[i]) for i in order], self.seed)
            self.average.module.load_state_dict(self.adapters.state_dict())
            self._calibrated = True

    def samples(self) -> VoxelSamples:
        """Voxels of all training cases, kept in ``work`` for the next run."""
        self.calibrate()
        return self.reader.samples(self.cases, self.adapters, self.work / "voxels.pt")

    def _phase(
        self,
        name: str,
        steps: int,
        lr: float,
        state: dict[str, int],
        terms_of: Callable[[np.random.Generator], dict[str, Tensor]],
    ) -> None:
        optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
        if state[name]:
            optimizer.load_state_dict(self._optimizer_state)
        mean: dict[str, float] = {}
        bar = tqdm(range(state[name], steps), initial=state[name], total=steps, desc=name, mininterval=10)
        begin, limit = time.monotonic(), 60 * (self.schedule.minutes or float("inf"))
        narrow = getattr(self.backbone, "dtype", torch.float32) != torch.float32
        for step in bar:
            elapsed = time.monotonic() - begin
            if elapsed > limit:
                self._save_checkpoint(optimizer, state)
                break
            # A generator per step, so that a resumed run draws what a whole one would.
            rng = np.random.default_rng([self.seed, len(name), step])
            for group in optimizer.param_groups:
                group["lr"] = lr * self.schedule.rate(step, max(step / steps, elapsed / limit))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=narrow):
                terms = terms_of(rng)
            sum(self.weights[key] * term for key, term in terms.items()).backward()
            torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
            optimizer.step()
            self.average.update_parameters(self.adapters)
            for key, term in terms.items():
                mean[key] = 0.97 * mean.get(key, term.item()) + 0.03 * term.item()
            state[name] = step + 1
            if (step + 1) % 50 == 0:
                bar.set_postfix({key: f"{value:.3f}" for key, value in mean.items()})
                self.log.append([name, step + 1, {key: round(value, 4) for key, value in mean.items()}])
            if (step + 1) % self.schedule.save_every == 0 or step + 1 == steps:
                self._save_checkpoint(optimizer, state)

    def _save_checkpoint(self, optimizer: torch.optim.Optimizer, state: dict[str, int]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        parts = {"adapters": self.adapters.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
        parts["average"] = self.average.state_dict()
        part = self.work / "adapters.part"
        torch.save({**parts, "log": self.log, "seconds": self.seconds}, part)
        part.replace(self.work / "adapters.pt")

    def _draw(self, pools: list[list], rng: np.random.Generator):
        phantoms, real = pools
        if not real or (phantoms and rng.random() >= self.schedule.real_share):
            return phantoms[rng.integers(len(phantoms))]
        weights = np.array([1.0 if isinstance(entry, int) else entry.weight for entry in real])
        return real[rng.choice(len(real), p=weights / weights.sum())]

    def _voxel_step(self, samples: VoxelSamples, pools: list[list[int]], rng: np.random.Generator) -> dict[str, Tensor]:
        """The terms of random voxels of ``volumes`` cases."""
        rows = [self._draw(pools, rng) for _ in range(self.schedule.volumes)]
        return voxel_terms(self.adapters, self.questions, samples, rows, rng)

    def read_step(self, pools: list[list], rng: np.random.Generator) -> list[Example]:
        """What a step of the second phase looks at: ``batch`` volumes of one shape, read anew and augmented."""
        return self.reader.read_together([self._draw(pools, rng) for _ in range(self.schedule.batch)], rng)

    def _terms(self, examples: Sequence[Example], rng: np.random.Generator) -> dict[str, Tensor]:
        """The mean terms of the questions about volumes of one shape, each of which is adapted once."""
        features = [[f.to(self.backbone.device, torch.float32) for f in example.features] for example in examples]
        total: dict[str, Tensor] = {}
        for example, adapted in zip(examples, self.adapters.adapt_many(features), strict=True):
            for _ in range(self.schedule.questions):
                for name, term in self._answer(example, adapted, rng).items():
                    share = term / (self.schedule.questions * len(examples))
                    total[name] = total.get(name, term.new_zeros(())) + share
        return total

    def _answer(self, example: Example, adapted: Sequence[Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
        """The terms of one question about one volume."""
        device = self.backbone.device
        organ, tumor, fits = self.questions.draw(rng, example.case)
        prompts, roles = self.questions.embed(organ, tumor, example.case.modality)
        target = example.target if fits else torch.zeros_like(example.target)
        output = self.adapters.attend(adapted, prompts.to(device), roles, example.voxel_ml)
        for name in ("margin", "image_logit", "pooled"):
            setattr(output, name, getattr(output, name).float())
        return volume_terms(output, prompts.to(device), roles, target.to(device))

    def save(self, measured: Mapping[str, float] | None = None) -> dict:
        """Write adapters, config entries, record and sums; returns the record.

        Args:
            measured: Dice of the cases left out.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous().cpu() for k, v in self.adapters.state_dict().items()}
        save_file(state, self.out / "adapters.safetensors")
        config = _read_json(self.out / "config.json")
        config["adapters"] = self.adapters.options
        fitted = {name: getattr(self.adapters, name) for name in ("fusion", "presence", "presence_of")}
        config = {k: v for k, v in config.items() if k not in fitted} | {k: v for k, v in fitted.items() if v}
        (self.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        record = {"fusion": self._fusion_record(measured)}
        if self.schedule.steps or self.schedule.volume_steps:
            record["adapters"] = self._training_record()
        known = _read_json(self.out / "training.json")
        (self.out / "training.json").write_text(json.dumps(known | record, indent=1) + "\n")
        write_sums(self.out)
        return record

    def _fusion_record(self, measured: Mapping[str, float] | None) -> dict:
        record = {**counted(self.sets.fusion), "volumes": self.fusion_volumes, "seed": self.seed}
        return record | ({"left_out_dice": dict(measured)} if measured else {})

    def _training_record(self) -> dict:
        schedule, sampling = self.schedule, self.reader.sampling
        return {
            **counted(self.cases),
            "lesion_kinds": sorted({case.kind for case in self.cases if case.kind}),
            "held_out": {k: list(v) for k, v in self.sets.held_out.items()},
            "steps": {"voxels": schedule.steps, "volumes": schedule.volume_steps},
            "volumes": schedule.volumes,
            "voxels": sampling.voxels,
            "batch": schedule.batch,
            "questions": schedule.questions,
            "lr": schedule.lr,
            "weights": self.weights,
            "real_share": schedule.real_share,
            "variants": sampling.variants,
            "crop": sampling.crop,
            "grown": sampling.grown,
            "scales": list(sampling.scales),
            "recoloured": sampling.recoloured,
            "healthy_part": sampling.healthy_part,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.adapters.parameters()),
            "hours": round(self.seconds / 3600, 2),
            "hardware": f"{self.backbone.device.type}, {torch.get_num_threads()} threads",
            "backbone": self.backbone.fingerprint,
            "text_encoder": self.encoder.fingerprint,
            "loss": self.log[:: max(1, len(self.log) // 60)],
        }


class Steps(Dataset):
    """What the steps of the second phase look at, by the step's number less ``first``: the same whoever reads it."""

    def __init__(self, trainer: AdapterTrainer, pools: list[list], first: int, last: int):
        self.trainer, self.pools, self.first, self.last = trainer, pools, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> list[Example]:
        rng = np.random.default_rng([self.trainer.seed, self.first + index])
        return self.trainer.read_step(self.pools, rng)


def run(trainer: Callable[[], AdapterTrainer]) -> None:
    """Make a trainer and run it: the program of ``configs/train_tumor.yaml``.

    Args:
        trainer: makes it.

    Raises:
        SystemExit: 2 when anything the user can mend went wrong, which is one line on stderr.
    """
    try:
        trainer().run()
    except ZeroSegError as error:
        print(f"zeroseg: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
