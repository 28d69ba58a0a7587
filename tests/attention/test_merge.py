"""Merging against a slow transcription of the published algorithm, and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_maps import structured_attention
from zeroseg.attention import aggregate_self_attention, label_map, merge_attention, symmetric_kl
from zeroseg.attention.merge import KLDistance, anchor_indices, merge_to

# A slow transcription in float64, broadcasting where the package uses matrix products -----------------------------------


def slow_bilinear(grid: np.ndarray, size: int) -> np.ndarray:
    """Half-pixel bilinear resizing of the last two axes, written out."""
    side = grid.shape[-1]
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, side - 1)
    part = at - low
    rows = grid[..., low, :] * (1 - part)[:, None] + grid[..., high, :] * part[:, None]
    return rows[..., low] * (1 - part) + rows[..., high] * part


def slow_aggregate(maps: list[np.ndarray]) -> np.ndarray:
    sides = [int(np.sqrt(m.shape[-1])) for m in maps]
    target, total = max(sides), 0
    for attention, side in zip(maps, sides, strict=True):
        up = slow_bilinear(attention.mean(0).reshape(side, side, side, side), target)
        up = up / up.sum((2, 3), keepdims=True)
        up = up.repeat(target // side, 0).repeat(target // side, 1)
        total = total + up * side / sum(sides)
    return total.reshape(target**2, target**2)


def slow_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    ratio = np.log(p) - np.log(q)
    return ((p * ratio).sum(-1) - (q * ratio).sum(-1)) / 2


def slow_merge(attention: np.ndarray, thresholds: list[float], grid: int) -> np.ndarray:
    side = int(np.sqrt(len(attention)))
    spacing = (side - 1) // (grid - 1)
    start = (side - 1 - spacing * (grid - 1)) // 2
    line = [start + spacing * i for i in range(grid)]
    maps = []
    for anchor in (r * side + c for r in line for c in line):
        near = slow_kl(attention[anchor][None], attention) < thresholds[0]
        maps.append(attention[near].mean(0))
    for threshold in thresholds[1:]:
        matched, merged = set(), []
        for i in range(len(maps)):
            if i in matched:
                continue
            near = np.flatnonzero(slow_kl(maps[i][None], np.array(maps)) < threshold)
            matched |= {i, *near}
            merged.append(np.array(maps)[near].mean(0))
        maps = merged
    return np.array(maps)


def slow_labels(proposals: np.ndarray, size: int) -> np.ndarray:
    side = int(np.sqrt(proposals.shape[1]))
    return slow_bilinear(proposals.reshape(-1, side, side), size).argmax(0)


@pytest.mark.parametrize(
    ("sides", "thresholds", "grid"),
    [((24, 12, 6, 3), [0.5] * 3, 12), ((20, 10, 5), [0.3] * 3, 8), ((16, 8), [0.2, 0.3], 8), ((16,), [0.4] * 4, 4)],
)
def test_parity_with_slow_transcription(sides, thresholds, grid):
    maps = [structured_attention(side, 3, seed) for seed, side in enumerate(sides)]
    ours = aggregate_self_attention(maps)
    theirs = slow_aggregate([m.double().numpy() for m in maps])
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9)
    merged, slow = merge_attention(ours, thresholds, grid), slow_merge(theirs, thresholds, grid)
    assert 1 < len(merged) < grid**2, "the case must be one where merging does something"
    assert len(merged) == len(slow)
    size = 8 * sides[0]
    agree = (label_map(merged, size).numpy() == slow_labels(slow, size)).mean()
    assert agree >= 0.999


def test_symmetric_kl_is_exact_symmetric_and_zero_on_itself():
    generator = torch.Generator().manual_seed(0)
    p = (4 * torch.randn(7, 100, generator=generator)).softmax(-1)
    q = (4 * torch.randn(5, 100, generator=generator)).softmax(-1)
    exact = slow_kl(p.double().numpy()[:, None], q.double().numpy()[None])
    np.testing.assert_allclose(symmetric_kl(p, q), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(symmetric_kl(q, p), symmetric_kl(p, q).T, atol=1e-4)
    assert symmetric_kl(p, p).diagonal().max() < 1e-5


def test_symmetric_kl_survives_zeros():
    p = torch.eye(4)
    distance = symmetric_kl(p, p)
    assert torch.isfinite(distance).all()
    assert distance.diagonal().max() == 0
    assert distance[0, 1] > 10


def test_anchor_positions_are_those_of_the_reference():
    assert anchor_indices(64, 16).view(16, 16)[0].tolist() == [64 + c for c in range(1, 62, 4)]
    assert anchor_indices(64, 8).view(8, 8)[0].tolist() == list(range(0, 64, 9))
    assert anchor_indices(4, 16).tolist() == list(range(16)), "a denser grid than the tokens takes every token"
    assert anchor_indices(5, 1).tolist() == [12]


def test_thresholds_decide_how_much_merges():
    attention = aggregate_self_attention([structured_attention(16, 2, 0, noise=0.1)])
    assert len(merge_attention(attention, [1e-9] * 3, 8)) == 64
    assert len(merge_attention(attention, [100.0] * 3, 8)) == 1
    proposals = merge_attention(attention, [0.5] * 3, 8)
    assert torch.allclose(proposals.sum(-1), torch.ones(len(proposals)), atol=1e-4)


@pytest.mark.parametrize("contrast", [1.0, 1e-2])
@pytest.mark.parametrize("most", [1, 4, 12])
def test_thresholds_found_per_image_leave_at_most_so_many(contrast, most):
    attention = aggregate_self_attention([structured_attention(16, 2, 0)])
    attention = (1 - contrast) / len(attention) + contrast * attention  # nearly uniform maps lie much closer together
    proposals, thresholds = merge_to(KLDistance(attention), most, 8)
    assert 1 <= len(proposals) <= most
    assert len(thresholds) == 2 and min(thresholds) > 0
    assert len(proposals) >= most // 2, "and not many fewer"
    assert torch.allclose(proposals.sum(-1), torch.ones(len(proposals)), atol=1e-4)


def test_label_map_sizes_ties_and_many_proposals():
    proposals = torch.zeros(3, 16)
    assert (label_map(proposals, 8) == 0).all(), "ties go to the lower label"
    proposals[2, :8] = 1
    labels = label_map(proposals, (12, 20))
    assert labels.shape == (12, 20)
    assert (labels[:5] == 2).all()
    many = torch.eye(64)
    assert torch.equal(label_map(many, 8), torch.arange(64).view(8, 8)), "chunks over proposals keep their numbers"


@pytest.mark.parametrize(
    ("attention", "thresholds", "grid"),
    [
        (torch.ones(4, 5), [1], 2),
        (torch.ones(5, 5), [1], 2),
        (torch.ones(4, 4), [], 2),
        (torch.ones(4, 4), [0], 2),
        (torch.ones(4, 4), [1], 0),
    ],
)
def test_merge_refuses(attention, thresholds, grid):
    with pytest.raises(ValueError):
        merge_attention(attention, thresholds, grid)


def test_label_map_refuses():
    with pytest.raises(ValueError):
        label_map(torch.zeros(0, 16), 8)
    with pytest.raises(ValueError):
        label_map(torch.zeros(2, 15), 8)
