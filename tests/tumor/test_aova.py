"""AOVA maps of whole volumes: windows, blending, loading adapters."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.errors import WeightsError
from zeroseg.tumor import aova
from zeroseg.tumor.adapters import AovaAdapters
from zeroseg.tumor.aova import aova_map, blend, encode_features, healthy_margin_loss, load_adapters, window_slices
from zeroseg.tumor.prompts import prompt_set


@pytest.fixture(scope="module")
def adapters(tiny_tumor_model):
    return load_adapters(tiny_tumor_model)


@pytest.fixture(scope="module")
def asked(tiny_tumor_model):
    pairs = prompt_set("liver", "liver tumour", "ct")
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")
    return encoder.embed([text for _, text in pairs]), [role for role, _ in pairs]


@pytest.mark.parametrize("shape", [(16, 16, 16), (32, 40, 96), (24, 104, 8), (200, 16, 64), (56, 48, 320)])
def test_windows_cover_every_voxel_at_whole_positions(shape):
    covered = np.zeros(shape, int)
    for place in window_slices(shape, (32, 32, 32), 8):
        assert all(s.start % 8 == 0 and (s.stop - s.start) % 8 == 0 and 0 < s.stop - s.start <= 32 for s in place)
        covered[place] += 1
    assert covered.min() >= 1
    assert len(window_slices((32, 24, 8), (32, 32, 32), 8)) == 1


def test_windows_are_no_longer_than_their_number_asks():
    lengths = {s.stop - s.start for place in window_slices((128, 96, 96), (96, 96, 96), 16) for s in place[:1]}
    assert lengths == {80}


def test_blending_pieces_of_a_whole_gives_the_whole():
    whole = torch.rand(2, 40, 48, 16, generator=torch.Generator().manual_seed(0))
    pieces = [(p, whole[(slice(None), *p)].clone()) for p in window_slices((40, 48, 16), (24, 24, 24), 8)]
    assert len(pieces) > 1
    torch.testing.assert_close(blend(iter(pieces), (40, 48, 16)), whole)


def test_one_window_is_the_plain_pass(tiny_maisi, adapters, asked):
    volume = torch.rand(1, 1, 32, 16, 24, generator=torch.Generator().manual_seed(0))
    encoded = encode_features(tiny_maisi, adapters, volume)
    result = aova_map(tiny_maisi, adapters, encoded, *asked)
    with torch.inference_mode():
        expected = adapters(tiny_maisi.features(volume), *asked)
    torch.testing.assert_close(result.margin, expected.margin)
    assert result.image_logit == pytest.approx(float(expected.image_logit), abs=1e-4)
    assert result.null_contrast == pytest.approx(float(expected.null_contrast), abs=1e-4)
    torch.testing.assert_close(encoded.latent, tiny_maisi.encode(volume))


def test_many_windows_with_and_without_kept_features(tiny_maisi, adapters, asked, monkeypatch):
    volume = torch.rand(1, 1, 48, 32, 40, generator=torch.Generator().manual_seed(0))
    kept = encode_features(tiny_maisi, adapters, volume)
    assert len(kept.pieces) == 4 and all(f is not None for _, f in kept.pieces)
    assert kept.latent.shape == (1, 4, 12, 8, 10)
    monkeypatch.setattr(aova, "FEATURE_BYTES", 0)
    fresh = encode_features(tiny_maisi, adapters, volume)
    assert all(f is None for _, f in fresh.pieces)
    a, b = (aova_map(tiny_maisi, adapters, e, *asked) for e in (kept, fresh))
    torch.testing.assert_close(a.margin, b.margin)
    assert a.margin.shape == (48, 32, 40) and a.image_logit == pytest.approx(b.image_logit)


def test_a_scan_read_as_a_whole_is_read_once_on_a_grid_of_its_own(tiny_maisi, adapters, asked):
    options = {**adapters.options, "deeper": (8, 8), "whole_mm": 6.0}
    torch.manual_seed(0)
    whole = AovaAdapters(**options).eval().requires_grad_(False)
    volume = torch.rand(1, 1, 48, 32, 80, generator=torch.Generator().manual_seed(0))
    encoded = encode_features(tiny_maisi, whole, volume)
    (place, adapted), *others = encoded.pieces
    assert not others and [s.stop for s in place] == [48, 32, 80] and adapted[0].shape[:3] == (24, 16, 40)
    found = aova_map(tiny_maisi, whole, encoded, *asked)
    seen = F.interpolate(volume, (24, 16, 40), mode="area")
    with torch.inference_mode():
        expected = whole(tiny_maisi.features(seen), *asked, voxel_ml=0.027 * 8)
    enlarged = F.interpolate(expected.margin[None, None], (48, 32, 80), mode="trilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(found.margin, enlarged)
    assert found.image_logit == pytest.approx(float(expected.image_logit), abs=1e-4)
    # The latent is that of the model's own grid, window by window.
    latent = encode_features(tiny_maisi, adapters, volume).latent
    torch.testing.assert_close(encoded.latent, latent)
    assert encode_features(tiny_maisi, whole, volume, latent=latent).latent is latent
    region = np.zeros((48, 32, 80), bool)
    region[10:20, 10:20, 10:20] = True
    unchanged = healthy_margin_loss(tiny_maisi, whole, encoded, torch.zeros_like(volume), region, *asked)
    assert unchanged.shape == region.shape and np.abs(unchanged).max() < 1e-4


def test_adapters_carry_the_fusion_and_their_sum(tiny_tumor_model, tmp_path):
    assert load_adapters(tiny_tumor_model).fusion is None
    folder = shutil.copytree(tiny_tumor_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    weights = {"aova": {"bias": 0.5, "aova": 2.0}}
    (folder / "config.json").write_text(json.dumps({**config, "fusion": weights}))
    adapters = load_adapters(folder / "adapters.safetensors")
    assert adapters.fusion == weights and len(adapters.sha256) == 64
    assert not any(p.requires_grad for p in adapters.parameters())


def test_adapters_that_cannot_be_used(tiny_tumor_model, tmp_path):
    def refuses(message, source, **options):
        with pytest.raises(WeightsError, match=message) as error:
            load_adapters(source, **options)
        assert "\n" not in str(error.value)

    refuses("no config.json with an entry adapters", tmp_path)
    refuses("read text vectors of 16 numbers, the text encoder gives 768", tiny_tumor_model, text_dim=768)
    folder = shutil.copytree(tiny_tumor_model, tmp_path / "model")
    (folder / "adapters.safetensors").write_bytes(b"nothing")
    refuses("cannot be loaded", folder)
    (folder / "adapters.safetensors").unlink()
    refuses("lacks adapters.safetensors", folder)


def test_the_backbone_is_not_asked_twice(tiny_tumor_model, adapters, asked, monkeypatch):
    backbone = MaisiBackbone(tiny_tumor_model, device="cpu").load()
    passes = []
    original = MaisiBackbone.read
    monkeypatch.setattr(MaisiBackbone, "read", lambda self, v: (passes.append(1), original(self, v))[1])
    encoded = encode_features(backbone, adapters, torch.rand(1, 1, 16, 16, 16))
    for _ in range(3):
        aova_map(backbone, adapters, encoded, *asked)
    assert len(passes) == 1
