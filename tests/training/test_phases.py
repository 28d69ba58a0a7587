"""Training phases against the loops written out by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import encode_scenes
import train_backbone
import train_head
import train_tumor_backbone
import train_volume_head
import train_words
from phases import Phases, Schedule, averaged

STEPS, LR, SEED = 12, 1e-2, 3
SCHEDULE = Schedule(warm_up=3, decay=0.5, floor=0.05)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 2)


def phases(net, average, work, save_every=100) -> Phases:
    networks = {"net": net, "average": average}
    return Phases(networks, work, SCHEDULE, SEED, save_every, log_every=2, smoothing=0.9, device=torch.device("cpu"))


def loss_of(net):
    return lambda rng: net(torch.from_numpy(rng.normal(size=(5, 4)).astype(np.float32))).square().mean()


def by_hand(net) -> tuple[torch.Tensor, torch.Tensor]:
    """AdamW, warm-up and linear decay, an exponential average whose decay grows; weights and their average at the end."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-2)
    average, rng, loss = net.weight.detach().clone(), np.random.default_rng([SEED, 0, len("one")]), loss_of(net)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 3, max(0.05, (STEPS - step) / (0.5 * STEPS)))
        optimizer.zero_grad()
        loss(rng).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.lerp_(net.weight.detach(), 1 - min(0.9, (step + 1) / (step + 10)))
    return net.weight.detach(), average


def test_a_phase_is_the_loop_written_by_hand(tmp_path):
    net = network()
    average = averaged(net, 0.9)
    phases(net, average, tmp_path).run("one", STEPS, net.parameters(), LR, loss_of(net), [(average, net)], bf16=False)
    weights, mean = by_hand(network())
    assert torch.allclose(net.weight, weights, atol=1e-7)
    assert torch.allclose(average.module.weight, mean, atol=1e-7)
    assert not torch.allclose(weights, mean, atol=1e-4)


def test_a_phase_goes_on_with_its_optimizer_and_average(tmp_path):
    net = network()
    average = averaged(net, 0.9)
    first = phases(net, average, tmp_path)
    first.run("one", 5, net.parameters(), LR, loss_of(net), [(average, net)], bf16=False)
    assert first.steps("one") == 5 and len(first.state["log"]) == 2
    again, mean = network(), averaged(network(), 0.9)
    second = phases(again, mean, tmp_path)
    assert torch.equal(again.weight, net.weight) and int(mean.n_averaged) == 6
    second.run("one", 8, again.parameters(), LR, loss_of(again), [(mean, again)], bf16=False)
    assert second.steps("one") == 8 and second.steps("two") == 0
    assert second.state["seconds"] > 0
    second.run("one", 8, again.parameters(), LR, lambda rng: pytest.fail("nothing is left to do"))


@pytest.mark.parametrize("program", [train_backbone, train_tumor_backbone])
def test_what_was_never_trained_is_not_exported(program, tmp_path):
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"--work .*work holds no checkpoint to export: train first"):
        program.main([*folders, "--export-only"])
    assert not list(tmp_path.iterdir())


def test_a_head_that_was_never_trained_is_not_exported(tmp_path, monkeypatch):
    asked = ["train_volume_head.py", "--work", str(tmp_path / "work"), "--export", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit, match=r"--work .*work holds no checkpoint to export: train first"):
        train_volume_head.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [True, False])
def test_a_training_without_shards_is_one_line(made, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    if made:
        folder.mkdir()
    monkeypatch.setattr("sys.argv", ["train_head.py", "--shards", str(folder), "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match=r"--shards .*shards holds no encoded scenes: give the --work folder of"):
        train_head.main()
    with pytest.raises(SystemExit, match=r"--work .*shards holds no encoded images: call with --encode first"):
        train_words.main(["--work", str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def test_the_shards_that_are_read_are_those_that_are_written():
    written = re.findall(r"--work (\S+)", encode_scenes.__doc__)
    read = re.findall(r"--shards (\S+)", train_head.__doc__)
    assert set(written) == set(read) == {"runs/interaction/shards"}
