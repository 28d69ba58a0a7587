"""Training a promptable head with a simulated annotator in the loop: what the trainers for images and for volumes have in common."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from phases import require_checkpoint
from zeroseg.backbones.weights import write_sums

TURNS = 4
"""Answers of an episode."""


def add_arguments(parser: argparse.ArgumentParser, minutes: float, fall: str) -> None:
    """What both trainers ask for.

    Args:
        parser: it is added to.
        minutes: of a call, by default.
        fall: when the learning rate falls.
    """
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the checkpoint, from which a run goes on, and of the log")
    add("--minutes", type=float, default=minutes, help=f"of this call; the learning rate falls over {fall}")
    add("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    add("--threads", type=int, default=1)
    add("--start", type=Path, help="folder of a shipped head whose weights a new --work begins with")
    add("--export", type=Path, help="write the averaged weights of --work here, and train no more")
    add("--share", type=float, default=1.0, help="with --export: how far to go from --start to the new weights")


class Episode(Protocol):
    """One object, prompted several times."""

    def answer(self, logits: Tensor) -> None:
        """Keep an answer, and prompt again where it errs."""


class PromptTraining:
    """A head, the moving average of its weights and their optimizer; resumes from ``work/state.pt``, written whole or not at all.

    Args:
        net: the head.
        mean: its average.
        work: folder of the checkpoint and of log.jsonl; made when missing.
        rate: the highest learning rate.
        facts: kept with the checkpoint.
        bf16: the forward pass in bfloat16, where that is possible without harm.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        mean: AveragedModel,
        work: Path,
        rate: float,
        facts: dict[str, Any],
        bf16: bool = False,
    ):
        self.net, self.mean, self.work, self.rate, self.facts, self.bf16 = net, mean, work, rate, facts, bf16
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
        self.step = 0
        work.mkdir(parents=True, exist_ok=True)
        if (work / "state.pt").is_file():
            stored = torch.load(work / "state.pt", weights_only=True)
            net.load_state_dict(stored["net"])
            mean.load_state_dict(stored["mean"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.step = stored["step"]

    def run(
        self,
        left: Callable[[], float],
        draw: Callable[[], list],
        see: Callable[[Sequence[Any]], tuple[Tensor, Tensor]],
        losses: Callable[[Tensor, Tensor, Tensor, Tensor, bool], dict[str, Tensor]],
        warm_up: int,
        decay: float,
        log_every: int,
        save_every: int,
        noted: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Train until nothing is left.

        Args:
            left: the share of the training that is left, 1 to 0.
            draw: episodes of a batch.
            see: episodes -> the network's input and the truth, as it is before this turn's answer.
            losses: logits, logits of the IoU, truth, input, whether it is the first turn -> ``shape``, ``obey``, ``quality``, and ``iou``
                of each candidate.
            warm_up: steps of linear rise of the learning rate.
            decay: share of the training, at its end, of linear fall.
            log_every, save_every: steps between lines of the log, and between checkpoints; multiples of ``TURNS``.
            noted: called for every line of the log, and added to it.
        """
        start, log = time.monotonic(), {}

        def rate() -> float:
            return self.rate * min(1.0, (self.step + 1) / warm_up) * max(0.02, min(1.0, left() / decay))

        while left() > 0:
            episodes = draw()
            for turn in range(TURNS):
                x, target = see(episodes)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate()
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                    logits, quality = (values.float() for values in self.net(x))
                terms = losses(logits, quality, target, x, turn == 0)
                loss = terms["shape"] + 0.5 * terms["obey"] + 0.3 * terms["quality"]
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
                self.mean.update_parameters(self.net)
                self.step += 1
                shown = quality.detach().argmax(1)
                found = {
                    **{name: terms[name] for name in ("shape", "obey", "quality")},
                    f"iou_{turn + 1}": terms["iou"].gather(1, shown[:, None]).mean(),
                    f"best_{turn + 1}": terms["iou"].amax(1).mean(),
                }
                for name, value in found.items():
                    log.setdefault(name, []).append(float(value.detach()))
                if turn < TURNS - 1:
                    for episode, given, k in zip(episodes, logits.detach(), shown, strict=True):
                        episode.answer(given[k])
            if self.step % log_every == 0:
                line = {
                    "step": self.step,
                    "seconds": round(time.monotonic() - start),
                    "rate": round(rate(), 6),
                    **noted(),
                }
                line |= {k: round(float(np.mean(v)), 4) for k, v in log.items()}
                log.clear()
                print(json.dumps(line), flush=True)
                with open(self.work / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
            if self.step % save_every == 0:
                self.save()
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        partial = self.work / "state.part"
        stored = {
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save({**stored, "step": self.step, **self.facts}, partial)
        partial.rename(self.work / "state.pt")


def export(
    mean: AveragedModel,
    work: Path,
    out: Path,
    facts: Callable[[dict[str, Any]], dict[str, Any]],
    start: dict[str, Tensor] | None = None,
    share: float = 1.0,
) -> None:
    """The averaged weights and what made them, as the package loads them.

    Args:
        mean: an average of such a head, whose weights are replaced.
        work: of the training.
        out: folder to write to; made when missing.
        facts: the checkpoint -> what training.json says beside steps, parameters, ``share`` (where there is a ``start``) and the log.
        start: weights the training began with. What it learned anew and what it forgot by it are weighed by going only so far from them
            (Wortsman et al. 2022, Robust fine-tuning of zero-shot models).
        share: how far, 0 to 1.
    """
    require_checkpoint(work)
    out.mkdir(parents=True, exist_ok=True)
    stored = torch.load(work / "state.pt", weights_only=True)
    mean.load_state_dict(stored["mean"])
    head = mean.module
    weights = head.state_dict()
    if start is not None:
        weights = {k: torch.lerp(start[k], v, share) for k, v in weights.items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, str(out / "head.safetensors"))
    # Files of safetensors are made private; these are to be read by everybody.
    (out / "head.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps({"widths": head.widths, "blocks": head.blocks}, indent=2) + "\n")
    with open(work / "log.jsonl") as f:
        log = [json.loads(line) for line in f]
    parameters = sum(p.numel() for p in head.parameters())
    about = {"steps": stored["step"], "parameters": parameters, **facts(stored)}
    about |= ({} if start is None else {"share": share}) | {"log": log}
    (out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    write_sums(out)
