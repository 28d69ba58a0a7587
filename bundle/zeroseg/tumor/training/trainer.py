"""The training itself, its checkpoints, and the folder it writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import write_sums
from zeroseg.tumor.adapters import AovaAdapters
from zeroseg.tumor.aova import load_adapters
from zeroseg.tumor.training.cases import CaseSets, TrainingCase, counted, phantoms_and_real
from zeroseg.tumor.training.fusion import FusionFitter
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import CaseReader, Example, Sampling, calibrate
from zeroseg.tumor.training.terms import volume_terms

WEIGHTS = {"dice": 1.0, "voxel": 1.0, "image": 0.3, "align": 0.05}
"""Of the terms, unless the schedule says otherwise."""
QUESTIONS = 2
"""Asked about a volume, which is encoded and adapted once."""
CALIBRATED_ON = 60
"""Cases that new adapters learn the features' statistics from."""


@dataclass(frozen=True)
class Schedule:
    """How long, on what and how fast the adapters learn.

    Attributes:
        steps: of gradient descent.
        minutes: after which this call ends at the latest, its learning rate fallen; None: by its steps alone.
        batch: cases per step.
        lr: highest learning rate; warm-up, then a cosine to zero.
        weights: of the terms, over :data:`WEIGHTS`.
        real_share: of the cases drawn per step.
        save_every: steps between checkpoints.
    """

    steps: int = 4000
    minutes: float | None = None
    batch: int = 1
    lr: float = 1e-3
    weights: Mapping[str, float] | None = None
    real_share: float = 0.65
    save_every: int = 200

    def rate(self, step: int, done: float) -> float:
        """Factor of the learning rate at a step, when that share of the training is done."""
        return float(max(min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * min(done, 1))), 0.01))


class AdapterTrainer:
    """Trains adapters for one frozen backbone and text encoder, and fits the fusion of the residuals.

    Args:
        backbone: frozen; its folder's ``config.json`` is extended when ``out`` is that folder.
        text_encoder: frozen.
        cases: from :func:`gather_cases`.
        out: folder that gets ``adapters.safetensors`` and the config entries ``adapters``, ``fusion`` and ``presence``.
        work: folder of the checkpoint; the run resumes from it.
        schedule: how long, on how much and how fast.
        sampling: how cases become samples.
        adapters: options of ``AovaAdapters``.
        initial: folder of trained adapters to start from instead of random ones.
        fusion_volumes: phantoms, and as many real volumes at most, per modality that the residuals' fusion is fitted on;
            0: not fitted.
        seed: of everything random.

    Raises:
        ZeroSegError: ``sampling.crop`` does not suit the backbone, or the adapters of ``initial`` do not suit the texts.
    """

    def __init__(
        self,
        backbone: MaisiBackbone,
        text_encoder: TextEncoder,
        cases: CaseSets,
        out: str | Path,
        work: str | Path,
        schedule: Schedule | None = None,
        sampling: Sampling | None = None,
        adapters: Mapping | None = None,
        initial: str | Path | None = None,
        fusion_volumes: int = 60,
        seed: int = 0,
    ):
        self.backbone, self.encoder = backbone.load(), text_encoder.load()
        self.sets, self.cases = cases, cases.cases
        self.out, self.work = Path(out), Path(work)
        self.schedule, self.fusion_volumes, self.seed = schedule or Schedule(), fusion_volumes, seed
        self.weights = {**WEIGHTS, **(self.schedule.weights or {})}
        self.reader = CaseReader(backbone, sampling or Sampling(), seed)
        self.questions = Questions(self.encoder)
        torch.manual_seed(seed)
        options = {"channels": backbone.feature_channels, "text_dim": text_encoder.dim, **(adapters or {})}
        self.adapters = AovaAdapters(**options) if initial is None else load_adapters(initial, text_encoder.dim)
        # Those of ``initial`` do not fit what comes out.
        self.adapters.fusion = self.adapters.presence = None
        self._calibrated = initial is not None
        self.adapters.requires_grad_(True).to(backbone.device)
        self.average = AveragedModel(self.adapters, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
        self.log: list[list] = []
        self.seconds = 0.0

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
        fitter = FusionFitter(
            self.reader, self.encoder, self.adapters, self.sets.fusion, self.fusion_volumes, self.seed
        )
        if self.fusion_volumes:
            self.adapters.fusion, self.adapters.presence = fitter.fit_weights(), fitter.fit_presence()
        return self.save({case.stem: round(fitter.dice(case), 4) for case in self.sets.left_out})

    def train(self) -> None:
        """Descend from the last checkpoint on, or from the start; the result is the running average of the weights."""
        schedule, optimizer = self.schedule, AdamW(self.adapters.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
        start = self._resume(optimizer)
        if start >= schedule.steps:
            return
        self.calibrate()
        pools = phantoms_and_real(self.cases)
        begin, limit = time.monotonic(), 60 * (schedule.minutes or math.inf)
        mean: dict[str, float] = {}
        examples = DataLoader(
            _Examples(self, pools),
            batch_size=None,
            sampler=range(start * schedule.batch, schedule.steps * schedule.batch),
            num_workers=self.reader.sampling.readers,
        )
        steps = batched(examples, schedule.batch)
        bar = tqdm(steps, initial=start, total=schedule.steps, desc="training", mininterval=10)
        for step, batch in enumerate(bar, start):
            elapsed = time.monotonic() - begin
            if elapsed > limit:
                self._save_checkpoint(optimizer, step)
                break
            rng = np.random.default_rng([self.seed, step, 1])
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * schedule.rate(step, max(step / schedule.steps, elapsed / limit))
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(
                self.backbone.device.type, self.backbone.dtype, enabled=self.backbone.dtype != torch.float32
            ):
                terms = self._step(batch, rng)
            sum(self.weights[key] * term for key, term in terms.items()).backward()
            torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), 1.0)
            optimizer.step()
            self.average.update_parameters(self.adapters)
            for key, term in terms.items():
                value = float(term.detach())
                mean[key] = 0.97 * mean.get(key, value) + 0.03 * value
            if (step + 1) % 50 == 0:
                bar.set_postfix({key: f"{value:.3f}" for key, value in mean.items()})
                self.log.append([step + 1, {key: round(value, 4) for key, value in mean.items()}])
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                self._save_checkpoint(optimizer, step + 1)
        self.adapters.load_state_dict(self.average.module.state_dict())

    def calibrate(self) -> None:
        """Let new adapters know the statistics of what they will see, from some of the cases."""
        if not self._calibrated:
            rng = np.random.default_rng(self.seed)
            chosen = rng.permutation(len(self.cases))[:CALIBRATED_ON]
            calibrate(self.adapters, [self.reader.read(self.cases[i], rng) for i in chosen], self.seed)
            self.average.module.load_state_dict(self.adapters.state_dict())
            self._calibrated = True

    def _resume(self, optimizer: AdamW) -> int:
        """Load the checkpoint where there is one; returns the steps done."""
        checkpoint = self.work / "adapters.pt"
        if not checkpoint.is_file():
            return 0
        saved = torch.load(checkpoint, map_location=self.backbone.device, weights_only=True)
        self.adapters.load_state_dict(saved["adapters"])
        self.average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        self.log, self.seconds, self._calibrated = saved["log"], saved["seconds"], True
        return saved["steps"]

    def _save_checkpoint(self, optimizer: AdamW, steps: int) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        parts = {"adapters": self.adapters.state_dict(), "average": self.average.state_dict(), "steps": steps}
        parts |= {"optimizer": optimizer.state_dict(), "log": self.log, "seconds": self.seconds}
        part = self.work / "adapters.part"
        torch.save(parts, part)
        part.replace(self.work / "adapters.pt")

    def _step(self, batch: Sequence[Example], rng: np.random.Generator) -> dict[str, Tensor]:
        """The mean terms of some examples."""
        total: dict[str, Tensor] = {}
        for example in batch:
            for name, term in self._terms(example, rng).items():
                total[name] = total.get(name, 0) + term / len(batch)
        return total

    def _terms(self, example: Example, rng: np.random.Generator) -> dict[str, Tensor]:
        """The mean terms of ``QUESTIONS`` about one volume, which is adapted once."""
        device = self.backbone.device
        total: dict[str, Tensor] = {}
        adapted = self.adapters.adapt([f.to(device, torch.float32) for f in example.features])
        for _ in range(QUESTIONS):
            organ, tumor, fits = self.questions.draw(rng, example.case)
            prompts, roles = self.questions.embed(organ, tumor, example.case.modality)
            target = example.target if fits else torch.zeros_like(example.target)
            output = self.adapters.attend(adapted, prompts.to(device), roles, example.voxel_ml)
            for name in ("margin", "image_logit", "pooled"):
                setattr(output, name, getattr(output, name).float())
            for name, term in volume_terms(output, prompts.to(device), roles, target.to(device)).items():
                total[name] = total.get(name, 0) + term / QUESTIONS
        return total

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
        fitted = {"fusion": self.adapters.fusion, "presence": self.adapters.presence}
        config = {k: v for k, v in config.items() if k not in fitted} | {k: v for k, v in fitted.items() if v}
        (self.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        record = {"fusion": self._fusion_record(measured)}
        if self.schedule.steps:
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
            "steps": self.log[-1][0] if self.log else schedule.steps,
            "batch": schedule.batch,
            "lr": schedule.lr,
            "weights": self.weights,
            "real_share": schedule.real_share,
            "crop": sampling.crop,
            "grown": sampling.grown,
            "scales": list(sampling.scales),
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.adapters.parameters()),
            "hours": round(self.seconds / 3600, 2),
            "hardware": f"{self.backbone.device.type}, {torch.get_num_threads()} threads",
            "backbone": self.backbone.fingerprint,
            "text_encoder": self.encoder.fingerprint,
            "loss": self.log[:: max(1, len(self.log) // 60)],
        }


def batched(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of ``size`` of them; a rest is left out."""
    found = iter(examples)
    while len(batch := list(islice(found, size))) == size:
        yield batch


class _Examples(Dataset):
    """Cases drawn at random, read anew and changed at random; a number always gives the same, so that a resumed run sees what a
    whole one would."""

    def __init__(self, trainer: AdapterTrainer, pools: list[list[TrainingCase]]):
        self.reader, self.pools, self.seed = trainer.reader, pools, trainer.seed
        self.real_share = trainer.schedule.real_share
        self.shares = [np.array([case.weight for case in pool]) / sum(case.weight for case in pool) for pool in pools]

    @torch.inference_mode()
    def __getitem__(self, number: int) -> Example:
        rng = np.random.default_rng([self.seed, number])
        phantoms, real = self.pools
        kind = int(bool(real) and (not phantoms or rng.random() < self.real_share))
        case = self.pools[kind][rng.choice(len(self.pools[kind]), p=self.shares[kind])]
        return self.reader.read(case, rng)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
