"""The rules that choose a mask, on attention made by hand where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from zeroseg.attention import rules
from zeroseg.attention.geodesic import TokenPaths
from zeroseg.attention.merge import KLDistance

SIDE = 16


def two_region_attention(inside: np.ndarray, contrast: float = 4.0) -> KLDistance:
    """Tokens of one region attend to their own region ``contrast`` times as much as to the other."""
    label = torch.from_numpy(inside.flatten().astype(np.int64))
    maps = torch.where(label[:, None] == label[None], contrast, 1.0)
    return KLDistance(maps / maps.sum(-1, keepdim=True))


@pytest.fixture
def square() -> np.ndarray:
    inside = np.zeros((SIDE, SIDE), bool)
    inside[5:11, 6:12] = True
    return inside


def frame_relevance(inside: np.ndarray) -> np.ndarray:
    distance = two_region_attention(inside)
    return rules.frame_relevance(distance, rules.border_tokens(SIDE), TokenPaths(distance)).view(SIDE, SIDE).numpy()


def enlarge(relevance: torch.Tensor, factor: int = 8) -> np.ndarray:
    grid = relevance.view(1, 1, SIDE, SIDE)
    return torch.nn.functional.interpolate(grid, scale_factor=factor, mode="bilinear")[0, 0].numpy()


def test_token_under_a_pixel():
    assert rules.token_at(0, 0, (100, 200), 10) == 0
    assert rules.token_at(199, 99, (100, 200), 10) == 99
    assert rules.token_at(25, 10, (100, 200), 10) == 10 + 1, "x is the column, y the row"


@pytest.mark.parametrize("contrast", [1.01, 4.0, 50.0])
def test_click_relevance_is_one_in_the_clicked_region_whatever_the_scale(square, contrast):
    relevance = (
        rules.click_relevance(TokenPaths(two_region_attention(square, contrast)), [7 * SIDE + 8])
        .view(SIDE, SIDE)
        .numpy()
    )
    assert relevance[square].min() > 0.95
    assert relevance[~square].max() < 0.6


def test_more_clicks_add_their_regions():
    left, right = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    left[4:8, 2:5], right[9:13, 10:14] = True, True
    label = torch.from_numpy((left + 2 * right).flatten().astype(np.int64))
    maps = torch.where(label[:, None] == label[None], 5.0, 1.0)
    distance = KLDistance(maps / maps.sum(-1, keepdim=True))
    both = rules.click_relevance(TokenPaths(distance), [5 * SIDE + 3, 10 * SIDE + 11]).view(SIDE, SIDE).numpy()
    assert both[left | right].min() > both[~(left | right)].max()


def test_frame_relevance_finds_what_the_frame_does_not_show(square):
    relevance = frame_relevance(square)
    assert relevance[square].min() > 0.99
    assert relevance[~square].max() < 0.01


def test_an_object_may_touch_part_of_the_frame():
    inside = np.zeros((SIDE, SIDE), bool)
    inside[:6, 3:9] = True
    relevance = frame_relevance(inside)
    assert relevance[inside].min() > relevance[~inside].max()


def test_border_tokens():
    frame = rules.border_tokens(5).view(5, 5)
    assert frame.sum() == 16
    assert not frame[1:4, 1:4].any()
    assert rules.border_tokens(5, 2).view(5, 5).sum() == 24


def test_cut_finds_the_edge_of_the_clicked_object_only(square):
    other = square.copy()
    other[13:15, 1:4] = True  # a second object that looks the same
    relevance = enlarge(rules.click_relevance(TokenPaths(two_region_attention(other)), [7 * SIDE + 8]))
    truth = np.kron(square, np.ones((8, 8), bool))
    mask, threshold = rules.cut(relevance, [(60, 70)])
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert dice > 0.95
    assert relevance.min() < threshold < relevance.max()


def test_cut_stays_where_it_is_allowed(square):
    relevance = enlarge(rules.click_relevance(TokenPaths(two_region_attention(square)), [7 * SIDE + 8]))
    allowed = np.zeros(relevance.shape, bool)
    allowed[:, :72] = True
    mask, _ = rules.cut(relevance, [(60, 60)], allowed)
    assert mask.any()
    assert not (mask & ~allowed).any()


def test_cut_without_anything_to_find_returns_the_click():
    mask, _ = rules.cut(np.ones((40, 40), np.float32), [(7, 9)])
    assert mask.sum() == 1 and mask[7, 9]


def test_cut_of_a_large_image_is_at_full_size(square):
    relevance = enlarge(rules.click_relevance(TokenPaths(two_region_attention(square)), [7 * SIDE + 8]), 40)
    mask, _ = rules.cut(relevance, [(300, 340)])
    truth = np.kron(square, np.ones((40, 40), bool))
    assert mask.shape == (640, 640)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.93


@pytest.mark.parametrize("seeds", [[(40, 50)], [(3, 3), (70, 20)]])
def test_cut_searches_as_if_it_saw_the_whole_image_at_every_threshold(seeds):
    relevance = ndimage.gaussian_filter(np.random.default_rng(7).random((90, 80)), 5)
    for seed in seeds:
        relevance += 0.2 * np.exp(-((np.indices((90, 80)) - np.reshape(seed, (2, 1, 1))) ** 2).sum(0) / 300)
    mask, threshold = rules.cut(relevance, seeds)
    steepness = ndimage.gaussian_gradient_magnitude(relevance, rules.EDGE_SCALE * 90)

    def worth(level):
        inside = rules.keep_seeded(relevance >= level, seeds)
        contour = inside & ~ndimage.binary_erosion(inside, border_value=1)
        edges = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        return steepness[contour].mean() * (1 - edges.mean())

    assert np.array_equal(mask, rules.keep_seeded(relevance >= threshold, seeds))
    levels = np.linspace(np.quantile(relevance, 0.02), min(relevance[s] for s in seeds), 34)[1:-1]
    assert worth(threshold) >= max(worth(level) for level in levels) - 1e-9


def test_split_separates_two_classes_and_survives_a_constant():
    relevance = np.r_[np.full(50, 0.1), np.full(14, 0.9)].reshape(8, 8)
    mask, threshold = rules.split(relevance)
    assert mask.sum() == 14 and 0.1 <= threshold < 0.9
    assert not rules.split(np.full((8, 8), 0.5))[0].any()
    allowed = np.zeros((8, 8), bool)
    assert not rules.split(relevance, allowed)[0].any()


def test_keep_seeded_keeps_only_parts_with_a_seed():
    mask = np.zeros((6, 6), bool)
    mask[0, :2] = mask[3, 3:5] = True
    assert rules.keep_seeded(mask, [(3, 4)]).sum() == 2
    assert rules.keep_seeded(mask, [(0, 0), (3, 3)]).sum() == 4
    assert not rules.keep_seeded(mask, [(5, 5)]).any()
