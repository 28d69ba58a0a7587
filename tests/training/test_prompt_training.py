"""The loop that both promptable heads are trained by: turns, checkpoint, resuming, export."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from prompt_training import TURNS, PromptTraining, export
from train_head import widened
from zeroseg.backbones.weights import verify_sums
from zeroseg.interaction.head import CHANNELS, WINDOW, PromptHead


class Net(torch.nn.Module):
    """(B, 1, 4, 4) -> three logits a pixel, and three of the IoU."""

    widths, blocks = (1,), 1

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 3, 1)
        self.quality = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.layer(x), self.quality.expand(len(x), 3)


class Episode:
    def __init__(self, rng: np.random.Generator):
        self.truth = torch.from_numpy((rng.random((4, 4)) > 0.5).astype(np.float32))
        self.answers: list[torch.Tensor] = []

    def answer(self, logits):
        self.answers.append(logits)


def losses(logits, quality, truth, x, first):
    wanted = truth[:, None].expand_as(logits)
    shape = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    iou = ((logits > 0) == (wanted > 0.5)).float().mean((2, 3))
    return {"shape": shape, "obey": shape * 0, "quality": (quality.sigmoid() - iou).square().mean(), "iou": iou}


def see(episodes):
    truth = torch.stack([e.truth for e in episodes])
    return 2 * truth[:, None] - 1, truth


def train(work, until):
    torch.manual_seed(0)
    net = Net()
    training = PromptTraining(net, AveragedModel(net), work, 0.3, {"shapes": 2})
    seen: list[list[Episode]] = []

    def draw():
        seen.append([Episode(np.random.default_rng([training.step, i])) for i in range(2)])
        return seen[-1]

    training.run(
        left=lambda: max(0.0, 1 - training.step / until),
        draw=draw,
        see=see,
        losses=losses,
        warm_up=2,
        decay=0.5,
        log_every=TURNS,
        save_every=TURNS,
    )
    return training, seen


def test_a_head_is_taught_resumed_and_exported(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    first, seen = train(work, 4 * TURNS)
    assert first.step == 4 * TURNS and all(len(e.answers) == TURNS - 1 for episodes in seen for e in episodes)
    again, more = train(work, 10 * TURNS)
    assert again.step == 10 * TURNS and len(more) == 6, "it went on from the checkpoint"
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [TURNS * (i + 1) for i in range(10)]
    assert (
        lines[-1]["shape"] < 0.5 * lines[0]["shape"]
        and lines[-1]["iou_4"] == 1
        and lines[-1]["rate"] < lines[4]["rate"]
    )
    export(AveragedModel(Net()), work, out, lambda stored: {"shapes": stored["shapes"]})
    verify_sums(out)
    about = json.loads((out / "training.json").read_text())
    assert about["steps"] == 10 * TURNS and about["shapes"] == 2 and len(about["log"]) == 10
    mean = again.mean.module.state_dict()
    assert all(torch.equal(v, mean[k]) for k, v in load_file(out / "head.safetensors").items())


def test_a_head_that_is_widened_answers_as_before_and_can_learn_more():
    torch.manual_seed(0)
    narrow = PromptHead((16, 24, 32, 40)).eval()
    wide = PromptHead((24, 32, 40, 56)).eval()
    wide.load_state_dict(widened(narrow.state_dict(), wide))
    x = torch.randn(2, len(CHANNELS), WINDOW, WINDOW)
    for before, after in zip(narrow(x), wide(x), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    sum(values.mean() for values in wide(x)).backward()
    assert wide.stem.weight.grad[:16].any(), "what was there learns"
    assert wide.masks.weight.grad[:, 16:].any(), "and begins to hear the new channels"
