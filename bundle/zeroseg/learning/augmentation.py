"""Random changes of labelled images, so that a few stand for many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TURN, ZOOM, STRETCH, SHIFT = 0.35, 0.25, 0.1, 0.15
"""Largest rotation in radians, log-scale, log-aspect, and shift in half images."""
BEND = {4: 0.06, 8: 0.03}
"""Points a side of a grid -> how far each is drawn aside at random, at most, in half images; both grids together bend the image."""
GAIN, OFFSET, GAMMA, TINT = 0.2, 0.1, 0.25, 0.04
"""Largest change of the image's contrast (log), brightness, gamma (log), and of each colour."""


def augment(images: Tensor, maps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random warp for an image and its maps; other colours for the image alone.

    Args:
        images: (B, 3, S, S) in [0, 1].
        maps: (B, K, S, S), such as shares of classes and the foreground, which is warped as it is, though the frozen model would
            find a little another one in a turned image.
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
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, *images.shape[-2:]], align_corners=False)
    for points, most in BEND.items():
        aside = F.interpolate(uniform(most, 2, points, points), images.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + aside.permute(0, 2, 3, 1)
    images, maps = (
        F.grid_sample(values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        for values in (images, maps)
    )
    images = images.clamp(0, 1) ** uniform(GAMMA, 1, 1, 1).exp()
    images = (images - 0.5) * uniform(GAIN, 1, 1, 1).exp() + 0.5 + uniform(OFFSET, 1, 1, 1) + uniform(TINT, 3, 1, 1)
    return images, maps
