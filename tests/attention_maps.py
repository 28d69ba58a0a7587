"""Self-attention as a model would give it, drawn without one."""

from __future__ import annotations

import numpy as np
import torch

from zeroseg.attention import EncodedImage


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


def three_squares() -> EncodedImage:
    """(64, 64) image with three bright squares on 16 x 16 tokens, attention and image alike: two touch, one stands alone."""
    regions = np.zeros((16, 16), np.int64)
    regions[2:7, 2:6], regions[2:7, 6:10], regions[10:14, 10:14] = 1, 2, 3
    label = torch.from_numpy(regions.flatten())
    maps = torch.where(label[:, None] == label[None], 6.0, 1.0)
    image = torch.from_numpy(np.kron(regions, np.ones((4, 4))).astype(np.float32)).expand(3, -1, -1) / 3
    return EncodedImage(image.contiguous(), (64, 64), torch.zeros(1, 4, 8, 8), maps / maps.sum(-1, keepdim=True))
