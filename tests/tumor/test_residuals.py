"""Residuals, their fusion, and the filtering of parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.tumor.adapters import ROLES, AovaAdapters
from zeroseg.tumor.residuals import (
    LOGIT_LIMIT,
    dilate,
    feature_residual,
    fit_fusion,
    fit_fusions,
    fuse,
    keep_components,
    pixel_residual,
    reach,
    voxels_of,
)


@pytest.fixture(scope="module")
def volume():
    return torch.rand(1, 1, 12, 10, 8, generator=torch.Generator().manual_seed(0))


def test_residuals_are_zero_where_input_equals_pseudo_healthy(volume):
    healthy = volume.clone()
    healthy[..., 2:5, 2:5, 2:5] += 0.3
    residual = pixel_residual(volume, healthy)
    touched = torch.zeros(12, 10, 8, dtype=torch.bool)
    touched[2:5, 2:5, 2:5] = True
    assert not residual[~touched].any()
    torch.testing.assert_close(residual[touched], torch.full((27,), 0.3) / volume.std())
    assert not pixel_residual(volume, volume).any()


def test_the_pixel_residual_ignores_scale_and_padding(volume):
    healthy = volume.roll(1, 2)
    torch.testing.assert_close(
        pixel_residual(5 * volume + 2, 5 * healthy + 2), pixel_residual(volume, healthy), rtol=1e-4, atol=1e-5
    )
    inside = torch.zeros(12, 10, 8, dtype=torch.bool)
    inside[2:10] = True
    padded = volume.clone()
    padded[:, :, ~inside] = 50
    torch.testing.assert_close(
        pixel_residual(padded, healthy, inside)[inside],
        (volume - healthy)[0, 0][inside].abs() / volume[0, 0][inside].std(),
    )


def test_the_feature_residual_is_the_change_of_the_margin():
    torch.manual_seed(0)
    net = AovaAdapters((4, 6, 8), 10, hidden=2, context=((), (), ()))
    features = [torch.randn(1, c, 8 >> n, 8 >> n, 8 >> n) for n, c in enumerate((4, 6, 8))]
    other = [f.clone() for f in features]
    other[0][..., :4] += torch.randn(1, 4, 1, 1, 1)
    prompts = torch.nn.functional.normalize(torch.randn(3, 10), dim=1)
    with torch.no_grad():
        a, b = net.adapt(features), net.adapt(other)
        residual = feature_residual(net, a, b, prompts, ROLES)
        torch.testing.assert_close(
            residual, net(features, prompts).margin - net(other, prompts).margin, rtol=1e-3, atol=1e-5
        )
        assert not feature_residual(net, a, a, prompts, ROLES).any()
    assert not residual[..., 4:].any() and residual[..., :4].any(), "zero where nothing changed"


def maps_of(shape=(12, 12, 12)):
    """A cube of tumour in a larger region: AOVA unsure, residuals clear."""
    rng = np.random.default_rng(0)
    tumour, region = np.zeros(shape, bool), np.zeros(shape, bool)
    tumour[4:8, 4:8, 4:8] = True
    region[2:10, 2:10, 2:10] = True
    maps = {
        "aova": rng.normal(0, 1, shape) + tumour,
        "pixel": np.abs(rng.normal(0, 0.4, shape) + 2 * tumour),
        "feature": rng.normal(0, 0.5, shape) + 2 * tumour,
    }
    return {k: v.astype(np.float32) for k, v in maps.items()}, region, tumour


def dice(a, b) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def test_otsu_fusion_separates_and_keeps_to_the_region():
    maps, region, tumour = maps_of()
    logits, used = fuse(maps, region)
    assert (logits[~region] == -LOGIT_LIMIT).all() and logits.dtype == np.float32
    assert dice(logits > 0, tumour) > 0.85
    assert used["pixel"] == used["feature"] == 0.5 and "otsu" in used
    single, used = fuse({k: maps[k] for k in ("aova", "pixel")}, region)
    assert used["pixel"] == 1 and dice(single > 0, tumour) > 0.8


def test_aova_alone_is_its_margin():
    maps, region, _ = maps_of()
    logits, _ = fuse({"aova": maps["aova"]}, region)
    np.testing.assert_allclose(logits[region], maps["aova"][region])


def test_learned_fusion_beats_its_parts():
    maps, region, tumour = maps_of()
    columns = {name: values[region] for name, values in maps.items()}
    weights = {"aova": fit_fusion({"aova": columns["aova"]}, tumour[region])}
    weights["aova+feature+pixel"] = fit_fusion(columns, tumour[region])
    assert all(weights["aova+feature+pixel"][name] > 0 for name in maps)
    alone = dice(fuse({"aova": maps["aova"]}, region, weights["aova"])[0] > 0, tumour)
    together, used = fuse(maps, region, weights["aova+feature+pixel"])
    assert dice(together > 0, tumour) > max(0.9, alone)
    assert used == pytest.approx(weights["aova+feature+pixel"])
    fallback = fuse({k: maps[k] for k in ("aova", "pixel")}, region)[1]
    assert "otsu" in fallback, "no weights for this choice of maps"


def test_a_map_of_weight_zero_need_not_be_there():
    maps, region, _ = maps_of()
    weights = {"bias": -0.5, "aova": 1.0, "pixel": 0.0, "feature": 0.0}
    whole, used = fuse(maps, region, weights)
    np.testing.assert_array_equal(whole, fuse({"aova": maps["aova"]}, region, weights)[0])
    assert used == weights


def test_every_choice_of_stages_gets_its_weights():
    maps, region, tumour = maps_of()
    weights = fit_fusions({name: values[region] for name, values in maps.items()}, tumour[region])
    assert set(weights) == {"aova", "aova+pixel", "aova+feature", "aova+feature+pixel"}
    reached = []
    for names in ("aova", "aova+pixel", "aova+feature+pixel"):
        logits, used = fuse({n: maps[n] for n in names.split("+")}, region, weights[names])
        assert used == pytest.approx(weights[names]) and set(used) == {"bias", *names.split("+")}
        reached.append(dice(logits > 0, tumour))
    assert reached == sorted(reached) and reached[-1] > 0.9


def test_the_cut_is_the_best_for_dice():
    maps, region, tumour = maps_of()
    weights = fit_fusion({"aova": maps["aova"][region]}, tumour[region])
    scores = weights["bias"] + weights["aova"] * maps["aova"][region]
    best = dice(scores > 0, tumour[region])
    assert best >= max(dice(scores > shift, tumour[region]) for shift in np.linspace(-2, 2, 41)) - 1e-9


def test_fitting_needs_both_classes():
    with pytest.raises(ValueError, match="inside and outside"):
        fit_fusion({"aova": np.ones(5)}, np.ones(5, bool))


def test_an_empty_region_and_a_flat_one():
    maps, region, _ = maps_of()
    logits, used = fuse(maps, np.zeros_like(region))
    assert (logits == -LOGIT_LIMIT).all() and used == {}
    flat = {name: np.zeros_like(values) for name, values in maps.items()}
    assert not (fuse(flat, region)[0] > 0).any()


def test_dilation_is_by_cubes():
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    assert dilate(mask, 2).sum() == 125 and dilate(mask, 0).sum() == 1
    assert not dilate(np.zeros_like(mask), 3).any()
    assert dilate(mask, reach(6.0, (3, 3, 1.5))).sum() == 5 * 5 * 9, "a length is as far along every axis"
    corner = np.zeros_like(mask)
    corner[0, 0, 0] = True
    assert dilate(corner, 1).sum() == 8


def test_components():
    mask = np.zeros((10, 10, 10), bool)
    mask[:3, :3, :3] = mask[5:7, 5:7, 5:7] = mask[9, 9, 9] = True
    assert keep_components(mask, 1).sum() == 36
    assert keep_components(mask, 2).sum() == 35
    assert keep_components(mask, 1, most=1).sum() == 27
    assert keep_components(mask, 100).sum() == 0 == keep_components(np.zeros_like(mask), 1).sum()
    assert voxels_of(0.3, (3, 3, 3)) == 12
