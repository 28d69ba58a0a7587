"""Shortest paths over the token grid, on attention made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.attention.geodesic import TokenPaths
from zeroseg.attention.merge import KLDistance, symmetric_kl

SIDE = 8


def attention(label: np.ndarray) -> torch.Tensor:
    """Tokens attend to tokens of their own label five times as much as to others."""
    label = torch.from_numpy(label.flatten())
    maps = torch.where(label[:, None] == label[None], 5.0, 1.0)
    return maps / maps.sum(-1, keepdim=True)


def test_divergence_of_neighbours_is_that_of_all_pairs():
    maps = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)).softmax(-1)
    everything = symmetric_kl(maps, maps)
    for offset in (1, 9, 64):
        expected = everything.diagonal(offset)
        assert torch.allclose(KLDistance(maps).apart(offset), expected, atol=1e-7, rtol=1e-3)


def test_like_tokens_behind_an_edge_are_far_and_those_reached_without_one_near():
    label = np.zeros((SIDE, SIDE), np.int64)
    label[:, 3:5] = 1  # a wall between two halves that look alike
    away = TokenPaths(KLDistance(attention(label)))([0])[0].view(SIDE, SIDE)
    assert away[:, :3].max() < 0.1 * away[:, 3:].min()
    assert away[:, 5:].min() > 1.9 * away[:, 3:5].min(), "in through the wall, and out again"


def test_the_grid_does_not_wrap_around():
    label = np.zeros((SIDE, SIDE), np.int64)
    label[:, 1:-1] = 1
    away = TokenPaths(KLDistance(attention(label)))([0])[0].view(SIDE, SIDE)
    assert away[:, 0].max() < 0.1 * away[:, -1].min()


def test_distances_are_symmetric_and_zero_to_themselves_only():
    paths = TokenPaths(KLDistance(torch.rand(SIDE**2, SIDE**2, generator=torch.Generator().manual_seed(1)).softmax(-1)))
    every = paths(list(range(SIDE**2)))
    assert torch.allclose(every, every.T, atol=1e-5)
    assert (every.diagonal() == 0).all() and (every > 0).sum() == SIDE**4 - SIDE**2


@pytest.mark.parametrize("side", [1, 2])
def test_tiny_grids_and_flat_attention(side):
    paths = TokenPaths(KLDistance(torch.full((side**2, side**2), 1 / side**2)))
    assert paths([0]).shape == (1, side**2)
    assert torch.isfinite(paths([0])).all()
