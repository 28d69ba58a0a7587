"""Latent inpainting: what must stay, what must go, and the arithmetic of both noise paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from tumor_model import tiny_config
from zeroseg.backbones.maisi import MAISI_DDPM, MAISI_RFLOW, MaisiBackbone, make_scheduler
from zeroseg.tumor.inpainting import (
    CONTEXT,
    DdpmPath,
    RectifiedFlowPath,
    crop_around,
    noise_path,
    pseudo_healthy,
    repaint,
    surroundings_fill,
)

PATHS = {
    "rflow": lambda: noise_path(make_scheduler(tiny_config())),
    "rflow_maisi": lambda: noise_path(make_scheduler(MAISI_RFLOW)),
    "ddpm": lambda: noise_path(make_scheduler(MAISI_DDPM)),
}
CONDITIONS = {"spacing_mm": (3, 3, 3), "modality": "ct", "steps": 4}


@pytest.fixture(scope="module", params=["rflow", "ddpm"])
def backbone(request, tiny_tumor_model):
    """The tiny model as either kind; its random UNet reads the same."""
    if request.param == "rflow":
        return MaisiBackbone(tiny_tumor_model, device="cpu").load()
    return MaisiBackbone(tiny_tumor_model, device="cpu", overrides={"scheduler": MAISI_DDPM["scheduler"]}).load()


@pytest.fixture
def latent():
    return torch.randn(1, 4, 8, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    mask = torch.zeros(8, 8, 6, dtype=torch.bool)
    mask[2:5, 3:6, 1:4] = True
    return mask


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("resample", [1, 3])
def test_outside_the_mask_the_latent_is_the_inputs(backbone, latent, mask, strength, resample):
    healthy = pseudo_healthy(backbone, latent, mask, strength=strength, resample=resample, **CONDITIONS)
    outside = (~mask).expand_as(latent)
    assert torch.equal(healthy[outside], latent[outside])
    assert not torch.isclose(healthy[~outside], latent[~outside]).any()
    assert healthy.isfinite().all()


def test_an_empty_mask_returns_the_latent_and_so_the_reconstruction(backbone, latent, mask):
    healthy = pseudo_healthy(backbone, latent, torch.zeros_like(mask), **CONDITIONS)
    assert torch.equal(healthy, latent) and healthy is not latent
    torch.testing.assert_close(backbone.decode(healthy), backbone.decode(latent))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_full_mask_ignores_the_input(backbone, latent, mask, strength):
    full = torch.ones_like(mask)
    a = pseudo_healthy(backbone, latent, full, strength=strength, **CONDITIONS)
    b = pseudo_healthy(backbone, -3 * latent + 1, full, strength=strength, **CONDITIONS)
    assert torch.equal(a, b)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_was_inside_the_mask_does_not_leak(backbone, latent, mask, strength):
    other = torch.where(mask, torch.full_like(latent, 5.0), latent)
    a = pseudo_healthy(backbone, latent, mask, strength=strength, **CONDITIONS)
    assert torch.equal(a, pseudo_healthy(backbone, other, mask, strength=strength, **CONDITIONS))


def test_the_surroundings_do_matter(backbone, latent, mask):
    other = torch.where(mask, latent, latent + 1)
    a, b = (pseudo_healthy(backbone, z, mask, **CONDITIONS) for z in (latent, other))
    assert not torch.allclose(a[mask.expand_as(a)], b[mask.expand_as(b)])


def test_the_seed_decides(backbone, latent, mask):
    a, b, c = (pseudo_healthy(backbone, latent, mask, seed=s, **CONDITIONS) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("kind", PATHS)
def test_a_perfect_model_gets_back_to_the_clean_latent(kind, latent, mask):
    """With the true x0 behind every prediction, the region ends at x0, at any strength and with resampling."""
    path = PATHS[kind]()

    def predict(z, timestep):
        if isinstance(path, RectifiedFlowPath):
            t = timestep / path.total
            return (latent - z) / t  # v = x0 - noise with z = (1 - t) x0 + t noise
        alpha = path.alphas[round(timestep)]
        return (z - alpha**0.5 * latent) / (1 - alpha) ** 0.5

    for strength, resample in itertools.product((0.4, 1.0), (1, 2)):
        result = repaint(predict, path, latent, mask, steps=6, strength=strength, resample=resample)
        torch.testing.assert_close(result, latent, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PATHS)
def test_strength_counts_steps_and_the_model_sees_the_schedulers_timesteps(kind, latent, mask):
    path, seen = PATHS[kind](), []

    def predict(z, timestep):
        seen.append(timestep)
        return torch.zeros_like(z)

    repaint(predict, path, latent, mask, steps=10, strength=0.4)
    levels = path.levels(10, latent.shape[2:])
    assert len(levels) == 10 and levels == sorted(levels, reverse=True) and levels[-1] > 0
    assert seen == [path.timestep(level) for level in levels[6:]]
    repaint(predict, path, latent, mask, steps=10, strength=0.01)
    assert len(seen) == 5, "one step at least"


def test_large_latents_shift_the_levels():
    """The trap: with MAISI's transform a level is no linear timestep."""
    small, large = (PATHS["rflow_maisi"]().levels(30, [n] * 3) for n in (32, 128))
    assert small[-1] < 40 < 100 < large[-1]


def test_rectified_flow_agrees_with_monai_where_monai_is_exact(latent):
    scheduler = RFlowScheduler(use_discrete_timesteps=False)
    path, noise, v = RectifiedFlowPath(scheduler), torch.randn_like(latent), torch.randn_like(latent)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(
        path.noised(latent, 300.0, noise), scheduler.add_noise(latent, noise, torch.tensor([300.0]))
    )
    torch.testing.assert_close(path.step(v, latent, 300.0, 200.0, noise), scheduler.step(v, 300, latent, 200)[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_agrees_with_monai_for_neighbouring_timesteps(latent, prediction):
    options = {k: v for k, v in MAISI_DDPM["scheduler"].items() if k != "kind"}
    scheduler = DDPMScheduler(**options, prediction_type=prediction)
    path, output = DdpmPath(scheduler), torch.randn_like(latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(path.noised(latent, 501, noise), scheduler.add_noise(latent, noise, torch.tensor([500])))
    mine = path.step(output, latent, 501, 500, noise)
    theirs = scheduler.step(output, 500, latent, generator=torch.Generator().manual_seed(5))[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PATHS)
def test_going_back_up_gives_the_levels_own_spread(kind):
    path = PATHS[kind]()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 4, 24, 24, 24, generator=generator) for _ in range(2))
    clean = torch.ones_like(first)
    lower, level = 300.0, 700.0
    up = path.back(path.noised(clean, lower, first), lower, level, second)
    direct = path.noised(clean, level, first)
    assert float(up.mean()) == pytest.approx(float(direct.mean()), abs=0.02)
    assert float(up.std()) == pytest.approx(float(direct.std()), rel=0.02)


def test_the_fill_continues_the_surroundings(mask):
    flat = torch.full((1, 4, 8, 8, 6), 2.5)
    spoiled = torch.where(mask, torch.full_like(flat, -9.0), flat)
    torch.testing.assert_close(surroundings_fill(spoiled, mask), flat, rtol=1e-3, atol=1e-3)
    assert not surroundings_fill(flat, torch.ones_like(mask)).any(), "nothing around: the latents' mean"


def test_crops_hold_the_mask_and_its_context():
    mask = torch.zeros(64, 40, 10, dtype=torch.bool)
    mask[50:60, 5:7, 4] = True
    place = crop_around(mask, (16, 16, 16), 4)
    assert place[2] == slice(0, 10)
    for axis, (low, high) in enumerate([(50, 60), (5, 7)]):
        assert (
            place[axis].start <= max(0, low - CONTEXT) + 2
            and place[axis].stop >= min(mask.shape[axis], high + CONTEXT) - 2
        )
        assert (place[axis].stop - place[axis].start) % 4 == 0


def test_large_volumes_are_regenerated_in_a_crop(tiny_maisi, monkeypatch):
    latent = torch.randn(1, 4, 48, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(48, 8, 8, dtype=torch.bool)
    mask[3:5, 2:4, 2:4] = True
    shapes = []
    original = MaisiBackbone.predict
    monkeypatch.setattr(
        MaisiBackbone, "predict", lambda self, z, *a: (shapes.append(z.shape), original(self, z, *a))[1]
    )
    healthy = pseudo_healthy(tiny_maisi, latent, mask, **CONDITIONS)
    assert {s[2] for s in shapes} < set(range(16, 32))
    outside = (~mask).expand_as(latent)
    assert torch.equal(healthy[outside], latent[outside]) and not torch.equal(healthy, latent)
