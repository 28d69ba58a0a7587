"""Random changes of what was read, so that a few images stand for many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TURN, ZOOM, STRETCH, SHIFT = 0.35, 0.25, 0.1, 0.15
"""Largest rotation in radians, log-scale, log-aspect, and shift in half images."""
GAIN, OFFSET, GAMMA, TINT = 0.2, 0.1, 0.25, 0.04
"""Largest change of the image's contrast (log), brightness, gamma (log), and of each colour."""
DROP, NOISE = 0.1, 0.1
"""Share of features that are left out, and the deviation of what is added to them."""


def augment(
    images: Tensor, features: Tensor, classes: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same random warp for an image, its features and its classes; other colours for the image alone.

    Features are warped as they are, though the frozen model would see a turned image a little differently.

    Args:
        images: (B, 3, S, S) in [0, 1].
        features: (B, K, s, s).
        classes: (B, L + 1, S, S) shares of the classes.
        generator: of the random numbers.
    """
    count = len(images)

    def uniform(most: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * most

    turn, zoom, stretch = uniform(TURN), uniform(ZOOM).exp(), uniform(STRETCH).exp()
    mirror = torch.where(torch.rand(2, count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = turn.cos() * zoom, turn.sin() * zoom
    rows = (
        torch.stack([cosine * stretch * mirror[0], -sine * mirror[1], uniform(SHIFT)], -1),
        torch.stack([sine * mirror[0], cosine / stretch * mirror[1], uniform(SHIFT)], -1),
    )
    affine = torch.stack(rows, 1)

    def warp(maps: Tensor) -> Tensor:
        grid = F.affine_grid(affine, [count, 1, *maps.shape[-2:]], align_corners=False)
        return F.grid_sample(maps, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    images, features, classes = warp(images), warp(features), warp(classes)
    images = images.clamp(0, 1) ** uniform(GAMMA, 1, 1, 1).exp()
    images = (images - 0.5) * uniform(GAIN, 1, 1, 1).exp() + 0.5 + uniform(OFFSET, 1, 1, 1) + uniform(TINT, 3, 1, 1)
    kept = torch.rand(count, features.shape[1], 1, 1, generator=generator) > DROP
    return images, features * kept + NOISE * torch.randn(features.shape, generator=generator), classes
