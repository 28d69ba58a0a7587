"""Training phases against the loops written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
