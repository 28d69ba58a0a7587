"""One phase of a training, resumable: what the trainers of both embedded models have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How fast a phase learns over its steps, as a share of the learning rate.

    Attributes:
        warm_up: steps of linear rise.
        decay: share of the steps, at the end, of linear fall.
        floor: what the fall stops at.
    """

    warm_up: int
    decay: float
    floor: float

    def scale(self, step: int, steps: int) -> float:
        """The share at a step, counted from 0, of ``steps``."""
        return min(1, (step + 1) / self.warm_up, max(self.floor, (steps - step) / (self.decay * steps)))


def averaged(network: torch.nn.Module, most: float) -> AveragedModel:
    """A running average of a network's weights, with decay min(most, n / (n + 9)) at update n: quick to forget the start."""

    def blend(average: torch.Tensor, new: torch.Tensor, update: torch.Tensor | int) -> torch.Tensor:
        decay = min(most, int(update) / (int(update) + 9))
        return average.lerp(new, 1 - decay)

    average = AveragedModel(network, avg_fn=blend)
    average.n_averaged.fill_(1)  # torch's first update would copy the weights; here they count from the start
    return average


def require_checkpoint(work: Path) -> None:
    """Refuse to export from a folder without a checkpoint: what is written there would be random weights.

    Args:
        work: folder of a training.
    """
    if not (work / "state.pt").is_file():
        raise SystemExit(f"--work {work} holds no checkpoint to export: train first")


class Phases:
    """Runs the phases of a training one after another; each goes on where the last call of the program ended.

    The networks, their optimizer and ``state`` are kept in ``work/state.pt``, written whole or not at all.

    Args:
        networks: name -> network, all that a checkpoint holds.
        work: folder of the checkpoint; made when missing.
        schedule: of every phase.
        seed: of batches and noise.
        save_every: steps between checkpoints.
        log_every: steps between entries of ``state["log"]``.
        smoothing: of the logged loss, a running mean.
        device: where the networks are.
    """

    def __init__(
        self,
        networks: dict[str, torch.nn.Module],
        work: Path,
        schedule: Schedule,
        seed: int,
        save_every: int,
        log_every: int,
        smoothing: float,
        device: torch.device,
    ):
        self.networks, self.schedule, self.seed, self.device = networks, schedule, seed, device
        self.save_every, self.log_every, self.smoothing = save_every, log_every, smoothing
        self.state: dict[str, Any] = {"seconds": 0.0, "log": []}
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = work / "state.pt"
        self._optimizer: dict[str, Any] | None = None
        self._optimizer_of: str | None = None
        if self.checkpoint.exists():
            self._load()

    def steps(self, name: str) -> int:
        """How many steps of a phase are done."""
        return self.state.get(f"{name}_step", 0)

    def run(
        self,
        name: str,
        steps: int,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        loss_of: Callable[[np.random.Generator], torch.Tensor],
        averages: Sequence[tuple[AveragedModel, torch.nn.Module]] = (),
        bf16: bool = True,
    ) -> None:
        """Run a phase to ``steps``: AdamW, gradients of norm 1 at most, and the schedule.

        Args:
            name: of the phase.
            steps: to reach, those of earlier calls included.
            parameters: what learns.
            lr: the highest learning rate.
            loss_of: random numbers -> loss of a batch.
            averages: (average, network) to update after every step.
            bf16: autocast to bfloat16.
        """
        start, parameters = self.steps(name), list(parameters)
        if start >= steps:
            return
        optimizer = AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
        if start and self._optimizer_of == name and self._optimizer is not None:
            optimizer.load_state_dict(self._optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
                group.pop("initial_lr", None)  # the scheduler's, of an earlier call with perhaps another rate
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.scale(start + step, steps))
        rng = np.random.default_rng([self.seed, start, len(name)])
        torch.manual_seed(self.seed + start)
        bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
        mean, tick = None, time.monotonic()
        for done in range(start + 1, steps + 1):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            for average, network in averages:
                average.update_parameters(network)
            value = loss.item()
            mean = value if mean is None else self.smoothing * mean + (1 - self.smoothing) * value
            self.state[f"{name}_step"] = done
            now = time.monotonic()
            self.state["seconds"] += now - tick
            tick = now
            if done % self.log_every == 0:
                bar.set_postfix(loss=f"{mean:.4f}")
                self.state["log"].append([name, done, round(mean, 5)])
            bar.update()
            if done % self.save_every == 0 or done == steps:
                self._save(name, optimizer)
        bar.close()

    def _save(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        payload = {
            "state": self.state,
            "networks": {key: network.state_dict() for key, network in self.networks.items()},
            "optimizer": optimizer.state_dict(),
            "optimizer_of": name,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(payload, part)
        part.replace(self.checkpoint)

    def _load(self) -> None:
        payload = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.state = payload["state"]
        for key, network in self.networks.items():
            network.load_state_dict(payload["networks"][key])
        self._optimizer, self._optimizer_of = payload["optimizer"], payload["optimizer_of"]
        done = [f"{key.removesuffix('_step')} step {n}" for key, n in self.state.items() if key.endswith("_step")]
        print("resumed at", ", ".join(done))
