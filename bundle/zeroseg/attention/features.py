"""Decoder features as an affinity between tokens, in the form the attention has (DiffCut, Couairon et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_affinity(features: Sequence[Tensor], side: int, power: float = 10.0) -> Tensor:
    """Cosine similarity between tokens' decoder features, sharpened and normalised to distributions.

    Args:
        features: outputs of the decoder's blocks, each (1, C, h, w); all are resized to the grid, standardised per
            channel and concatenated with equal weight per block.
        side: tokens along a side of the grid.
        power: exponent of the similarity, clipped at zero; 10 as in DiffCut.

    Returns:
        (N, N) float32, N = side * side; rows sum to 1.

    Raises:
        ValueError: no features were given.
    """
    if not features:
        raise ValueError("no features were given")
    parts = []
    for block in features:
        grid = F.interpolate(block.float(), size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1)
        grid = (grid - grid.mean(1, keepdim=True)) / grid.std(1, keepdim=True).clamp_min(1e-6)
        parts.append(grid / grid.shape[0] ** 0.5)
    tokens = F.normalize(torch.cat(parts), dim=0)
    affinity = (tokens.T @ tokens).clamp_(0, 1).pow_(power)
    return affinity.div_(affinity.sum(-1, keepdim=True))
