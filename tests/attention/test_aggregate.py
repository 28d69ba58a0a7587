"""Aggregation of self-attention over grids of any size."""

from __future__ import annotations

import pytest
import torch

from attention_maps import structured_attention
from zeroseg.attention import aggregate_self_attention


@pytest.mark.parametrize("sides", [(16,), (16, 8, 4), (12, 8, 5), (8, 16)])
@pytest.mark.parametrize("resolution", [None, 6, 16, 20])
def test_rows_are_distributions_at_any_resolution(sides, resolution):
    maps = [structured_attention(side, 2, side) for side in sides]
    total = aggregate_self_attention(maps, resolution)
    side = resolution or max(sides)
    assert total.shape == (side**2, side**2)
    assert total.min() >= 0
    assert torch.allclose(total.sum(-1), torch.ones(side**2), atol=1e-4)


def test_one_map_at_its_own_resolution_is_its_head_mean():
    attention = structured_attention(8, 3, 0)
    assert torch.allclose(aggregate_self_attention([attention]), attention.mean(0), atol=1e-6)
    assert torch.allclose(aggregate_self_attention([attention.mean(0)]), attention.mean(0), atol=1e-6)


def test_weights_are_proportional_to_the_side():
    fine, coarse = torch.eye(16), torch.full((4, 4), 0.25)
    total = aggregate_self_attention([fine, coarse])
    assert total[0, 0] == pytest.approx(4 / 6 + 2 / 6 / 16, abs=1e-6)
    assert total[0, 15] == pytest.approx(2 / 6 / 16, abs=1e-6)


def test_layers_of_one_resolution_are_averaged_before_weighting():
    a, b, coarse = structured_attention(8, 2, 0), structured_attention(8, 2, 1), structured_attention(4, 2, 2)
    together = aggregate_self_attention([a, b, coarse])
    averaged = aggregate_self_attention([(a.mean(0) + b.mean(0)) / 2, coarse])
    assert torch.allclose(together, averaged, atol=1e-6)


def test_inputs_are_left_alone_and_half_precision_is_taken():
    attention = structured_attention(8, 2, 0)
    before = attention.clone()
    aggregate_self_attention([attention])
    assert torch.equal(attention, before)
    assert aggregate_self_attention([attention.half()]).dtype == torch.float32


@pytest.mark.parametrize("maps", [[], [torch.ones(4, 5)], [torch.ones(5, 5)], [torch.ones(4)]])
def test_refuses_what_is_no_attention(maps):
    with pytest.raises(ValueError):
        aggregate_self_attention(maps)
    with pytest.raises(ValueError):
        aggregate_self_attention([torch.ones(4, 4)], 0)
