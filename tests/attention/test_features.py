"""Decoder features as an affinity."""

from __future__ import annotations

import pytest
import torch

from zeroseg.attention.features import feature_affinity


def blocks(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, c, s, s, generator=generator) for c, s in ((12, 2), (8, 4), (6, 8))]


def test_rows_are_distributions():
    affinity = feature_affinity(blocks(), side=8)
    assert affinity.shape == (64, 64) and affinity.dtype == torch.float32
    assert affinity.min() >= 0
    torch.testing.assert_close(affinity.sum(-1), torch.ones(64))


def test_a_token_is_most_like_itself():
    affinity = feature_affinity(blocks(), side=8)
    assert torch.equal(affinity.argmax(-1), torch.arange(64))


def test_two_regions_do_not_see_each_other():
    features = torch.zeros(1, 4, 8, 8)
    features[:, :2, :, :4], features[:, 2:, :, 4:] = 1, 1
    features += 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    affinity = feature_affinity([features], side=8).view(8, 8, 8, 8)
    assert affinity[:, :4, :, :4].sum((2, 3)).min() > 0.999
    assert affinity[:, :4, :, 4:].max() < 1e-6


def test_scale_and_offset_of_a_channel_do_not_matter():
    plain = blocks()
    scaled = [plain[0], plain[1] * 50 - 3, plain[2]]
    torch.testing.assert_close(feature_affinity(scaled, 8), feature_affinity(plain, 8), atol=1e-5, rtol=1e-3)


def test_a_higher_power_is_sharper():
    soft, sharp = (feature_affinity(blocks(), 8, power) for power in (1, 10))
    assert (sharp.diagonal() > soft.diagonal()).all()


def test_constant_features_give_finite_numbers():
    assert torch.isfinite(feature_affinity([torch.ones(1, 3, 4, 4), *blocks()], 8)).all()


def test_no_features():
    with pytest.raises(ValueError, match="no features"):
        feature_affinity([], 8)


def test_of_a_real_decoder(tiny_backbone):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    record = tiny_backbone.read(latents, 300, tiny_backbone.embed_text([""]), self_attention=False, features=True)
    affinity = feature_affinity(record.features, 8)
    torch.testing.assert_close(affinity.sum(-1), torch.ones(64))
    assert affinity.std() > 0
