"""Self-attention as a model would give it, drawn without one."""

from __future__ import annotations

import torch


def structured_attention(side: int, heads: int, seed: int, noise: float = 0.4) -> torch.Tensor:
    """(heads, n, n) softmax attention of a scene with a few regions: near and like tokens attend to each other."""
    generator = torch.Generator().manual_seed(seed)
    line = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(line, line, indexing="ij")
    region = ((x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.05).float() * 2 + (y > 0.75).float() * 3 + (x > 0.8).float()
    tokens = torch.stack([x, y, region / 2], -1).flatten(0, 1)
    n = side * side
    scores = -torch.cdist(tokens, tokens).square() * 5
    return (scores + noise * torch.randn(heads, n, n, generator=generator)).softmax(-1)
