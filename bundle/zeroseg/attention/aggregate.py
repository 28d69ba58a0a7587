"""Step 1 of ADZUS: self-attention of several resolutions becomes one map per token of the finest grid."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_side(tokens: int) -> int:
    """Side of the square grid that holds ``tokens`` tokens.

    Raises:
        ValueError: the number is not a positive square.
    """
    side = isqrt(tokens)
    if tokens < 1 or side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square grid")
    return side


def aggregate_self_attention(maps: Sequence[Tensor], resolution: int | None = None) -> Tensor:
    """Aggregate self-attention maps of several resolutions (DiffSeg, Tian et al. 2024, section 3.2; ADZUS step 1).

    Maps of one resolution are averaged over heads and layers. Each resolution's keys (what a token attends to) are
    resized bilinearly to the target grid and renormalised, its queries (which token attends) repeated, and the
    resolutions are summed with weights proportional to their side length, so that fine grids count most.

    Args:
        maps: self-attention probabilities, each (heads, n, n) or (n, n), n a square number of tokens; rows sum to 1.
        resolution: side R of the target grid; by default that of the largest map. A map finer than R is averaged down.

    Returns:
        (N, N) float32, N = R * R: row i is the distribution over the grid that token i attends to; rows sum to 1.

    Raises:
        ValueError: no maps, a map that is not square, or a resolution below 1.
    """
    if not maps:
        raise ValueError("no attention maps were given")
    by_side: dict[int, list[Tensor]] = {}
    for attention in maps:
        if attention.ndim not in (2, 3) or attention.shape[-1] != attention.shape[-2]:
            raise ValueError(f"an attention map must be (heads, n, n) or (n, n), not {tuple(attention.shape)}")
        mean = attention.float() if attention.ndim == 2 else attention.mean(0, dtype=torch.float32)
        by_side.setdefault(grid_side(attention.shape[-1]), []).append(mean)
    target = max(by_side) if resolution is None else int(resolution)
    if target < 1:
        raise ValueError(f"resolution must be a positive grid side, not {resolution}")

    device = maps[0].device
    total = torch.zeros(target**2, target**2, dtype=torch.float32, device=device)
    for side, layers in by_side.items():
        attention = layers[0] if len(layers) == 1 else torch.stack(layers).mean(0)
        weight = side / sum(by_side)
        if side == target:
            total.addcdiv_(attention, attention.sum(-1, keepdim=True), value=weight)
            continue
        keys = _resize(attention.view(-1, 1, side, side), target).flatten(1)
        keys = keys * (weight / keys.sum(-1, keepdim=True))
        if target % side == 0:  # every query serves a square of target tokens: add it there without a copy of its row
            repeat = target // side
            total.view(side, repeat, side, repeat, -1).add_(keys.view(side, 1, side, 1, -1))
        elif target < side:
            total.add_(_resize(keys.T.reshape(-1, 1, side, side), target).flatten(1).T)
        else:
            nearest = ((torch.arange(target, device=device) + 0.5) * side / target).long()
            total.add_(keys[(nearest[:, None] * side + nearest[None, :]).flatten()])
    return total


def _resize(grids: Tensor, side: int) -> Tensor:
    """(B, 1, s, s) -> (B, 1, side, side): bilinear with half-pixel centres upwards, area average downwards."""
    if side < grids.shape[-1]:
        return F.adaptive_avg_pool2d(grids, side)
    return F.interpolate(grids, size=(side, side), mode="bilinear", align_corners=False)
