"""The promptable head for volumes: a small 3-D network that reads a cube of the scan, the prompts and its own last answer.

It answers as the 2-D head does (``head.py``): three nested masks and an estimate of each one's IoU. A cube is a part of the scan, as wide
in mm along all axes, seen at 24 x 24 x 24 cells; so slices of 5 mm next to pixels of 0.5 mm, and lesions of 5 mm or 300 mm, look
alike to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELLS = 24
"""Cells along a side of what the network sees."""
CANDIDATES = 3
CHANNELS = (
    "image",
    "inside the scan",
    "object marks",
    "background marks",
    "box",
    "last mask",
    "has last mask",
    "like object marks",
    "like background marks",
)
"""What each input channel holds."""
REFERENCES = 8
"""Marked cells of a kind that values are compared with; strokes are thinned to so many."""
SLAB = 1 << 20
"""Voxels for which values are worked out at a time."""


class _Residual(nn.Module):
    """Two 3 x 3 x 3 convolutions with group normalisation around an identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(max(1, channels // 8), channels)
        self.second = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(max(1, channels // 8), channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(y)))


def fold(x: Tensor) -> Tensor:
    """(B, C, 2d, 2h, 2w) -> (B, 8C, d, h, w)."""
    b, c, d, h, w = x.shape
    x = x.view(b, c, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, 8 * c, d // 2, h // 2, w // 2)


def unfold(x: Tensor) -> Tensor:
    """(B, 8C, d, h, w) -> (B, C, 2d, 2h, 2w)."""
    b, c, d, h, w = x.shape
    x = x.view(b, c // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // 8, 2 * d, 2 * h, 2 * w)


class VolumeHead(nn.Module):
    """Residual UNet over a cube; cells are folded two by two by two into channels first, and unfolded last.

    Args:
        widths: channels per level; each level halves the side, the first works at CELLS / 2.
        blocks: residual blocks per level on the way down; the way up has one each.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 80), blocks: Sequence[int] = (1, 1, 2)):
        super().__init__()
        self.widths, self.blocks = tuple(widths), tuple(blocks)
        pairs = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        self.stem = nn.Conv3d(8 * len(CHANNELS), widths[0], 1)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in pairs)
        self.encoders = nn.ModuleList(
            nn.Sequential(*(_Residual(w) for _ in range(n))) for w, n in zip(widths, blocks, strict=True)
        )
        self.context = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.ReLU(), nn.Linear(widths[-1], widths[-1]))
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairs)
        self.decoders = nn.ModuleList(_Residual(w) for w in widths[:-1])
        self.masks = nn.Conv3d(widths[0], 8 * CANDIDATES, 3, padding=1)
        self.quality = nn.Sequential(nn.Linear(widths[0] + widths[-1] + 3, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 9, CELLS, CELLS, CELLS) -> logits (B, 3, CELLS, CELLS, CELLS), smallest mask first, and logits of their IoU (B, 3)."""
        x = self.stem(fold(x).contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x if level == 0 else F.relu(self.down[level - 1](x)))
            skips.append(x)
        pooled = self.context(x.mean((2, 3, 4)))
        x = x + pooled[:, :, None, None, None]
        for level in reversed(range(len(self.decoders))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="nearest") + skips[level]
            x = self.decoders[level](x)
        raw = unfold(self.masks(x).contiguous())
        # Nested by construction: each further candidate adds a non-negative amount.
        logits = torch.cat([raw[:, :1], raw[:, :1] + F.softplus(raw[:, 1:]).cumsum(1)], 1)
        return logits, self._estimate(logits, x, pooled)

    def _estimate(self, logits: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        inside = F.avg_pool3d(logits, 2).sigmoid()
        share, total = inside.mean((2, 3, 4)), inside.sum((2, 3, 4)) + 1
        mean = torch.einsum("bkdhw,bcdhw->bkc", inside, features) / total[..., None]
        doubt = ((1 - (2 * inside - 1).abs()) * inside).sum((2, 3, 4)) / total
        facts = torch.stack([share, share ** (1 / 3), doubt], -1)
        whole = pooled[:, None].expand(-1, CANDIDATES, -1)
        return self.quality(torch.cat([mean, whole, facts], -1))[..., 0]


@dataclass(frozen=True)
class Cube:
    """A part of a scan, as wide in mm along every axis; it may reach out of the scan.

    Attributes:
        low: (3,) where it begins, in voxels; voxel k fills k to k + 1.
        sides: (3,) how wide it is, in voxels.
    """

    low: tuple[float, float, float]
    sides: tuple[float, float, float]

    def part(self, shape: Sequence[int]) -> tuple[slice, slice, slice]:
        """The voxels of a scan that lie in it, in part at least."""
        spans = zip(self.low, self.sides, shape, strict=True)
        x, y, z = (slice(max(0, int(a)), min(n, int(np.ceil(a + s - 1e-6)))) for a, s, n in spans)
        return x, y, z

    def cells(self, places: np.ndarray) -> np.ndarray:
        """(n, 3) voxels -> the cells they lie in; below 0 or above the last where they lie outside."""
        at = (np.asarray(places) + 0.5 - np.array(self.low)) / np.array(self.sides)
        return np.floor(at * CELLS).astype(int)


def cube_around(middle: Sequence[float], side_mm: float, spacing: Sequence[float]) -> Cube:
    """The cube of ``side_mm`` around a place given in voxels (``k + 0.5`` is the middle of voxel k)."""
    sides = [side_mm / s for s in spacing]
    low = [m - side / 2 for m, side in zip(middle, sides, strict=True)]
    return Cube((low[0], low[1], low[2]), (sides[0], sides[1], sides[2]))


def see(volume: Tensor, cube: Cube) -> Tensor:
    """(C, X, Y, Z) -> (C, CELLS, CELLS, CELLS): a cube of it, averaged where it shrinks; beyond the scan its border goes on."""
    part = cube.part(volume.shape[1:])
    crop = volume[(slice(None), *part)]
    steps = [max(1, int(side / CELLS)) for side in cube.sides]
    steps = [min(step, n) for step, n in zip(steps, crop.shape[1:], strict=True)]
    if max(steps) > 1:
        crop = F.avg_pool3d(crop[None], steps, ceil_mode=True, count_include_pad=False)[0]
    axes = []
    for axis in range(3):
        at = cube.low[axis] + (torch.arange(CELLS) + 0.5) / CELLS * cube.sides[axis] - part[axis].start
        axes.append(at / (crop.shape[1 + axis] * steps[axis]) * 2 - 1)
    return F.grid_sample(crop[None], _grid(axes), mode="bilinear", padding_mode="border", align_corners=False)[0]


def unsee(cells: Tensor, cube: Cube, shape: Sequence[int]) -> Tensor:
    """(C, CELLS, CELLS, CELLS) -> (C, x, y, z): values for the voxels of ``cube.part(shape)``."""
    axes = []
    for axis, part in enumerate(cube.part(shape)):
        at = torch.arange(part.start, part.stop) + 0.5
        axes.append((at - cube.low[axis]) / cube.sides[axis] * 2 - 1)
    out = torch.empty(len(cells), *map(len, axes))
    # Slab by slab: the grid of a whole scan would take as much memory as its values.
    thick = max(1, SLAB // max(1, len(axes[1]) * len(axes[2])))
    for start in range(0, len(axes[0]), thick):
        grid = _grid([axes[0][start : start + thick], *axes[1:]])
        slab = F.grid_sample(cells[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
        out[:, start : start + thick] = slab[0]
    return out


def _grid(axes: Sequence[Tensor]) -> Tensor:
    """Places along the three axes, in [-1, 1] -> the grid of ``grid_sample``."""
    x, y, z = torch.meshgrid(*(a.float() for a in axes), indexing="ij")
    return torch.stack([z, y, x], -1)[None]


def see_inside(cube: Cube, shape: Sequence[int]) -> Tensor:
    """(CELLS, CELLS, CELLS) float: 1 where a cell's middle lies in the scan."""
    at = (torch.arange(CELLS) + 0.5) / CELLS
    lines = [(c >= 0) & (c <= n) for c, n in ((cube.low[a] + at * cube.sides[a], shape[a]) for a in range(3))]
    return (lines[0][:, None, None] & lines[1][None, :, None] & lines[2][None, None]).float()


def spots(places: np.ndarray) -> Tensor:
    """(n, 3) cells -> (CELLS, CELLS, CELLS) float: each is three cells wide; those outside are left out."""
    drawn = torch.zeros(1, 1, CELLS, CELLS, CELLS)
    inside = places[((places >= 0) & (places < CELLS)).all(1)]
    if len(inside):
        drawn[(0, 0, *torch.from_numpy(inside).T)] = 1
        drawn = F.max_pool3d(drawn, 3, 1, 1)
    return drawn[0, 0]


def assemble(
    image: Tensor,
    inside: Tensor,
    wanted: np.ndarray,
    unwanted: np.ndarray,
    box: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """The network's input.

    Args:
        image: (CELLS, CELLS, CELLS) values of any range, from ``see``.
        inside: the same shape, from ``see_inside``.
        wanted, unwanted: (n, 3) marked cells of the object and of the background, in order; those outside are left out.
        box: the same shape as image, 1 in the box; or None.
        last: the same shape, the answer before in [0, 1]; or None.

    Returns:
        (9, CELLS, CELLS, CELLS) float32, see ``CHANNELS``.
    """
    out = torch.zeros(len(CHANNELS), CELLS, CELLS, CELLS)
    scan = image[inside > 0] if bool((inside > 0).any()) else image.flatten()
    seen = (image - scan.mean()) / (scan.std(unbiased=False) + 1e-6 + 0.02 * image.abs().max())
    out[0] = seen * inside
    out[1] = inside
    smooth = F.avg_pool3d(seen[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    for kind, places in enumerate((wanted, unwanted)):
        places = places[((places >= 0) & (places < CELLS)).all(1)] if len(places) else places
        if not len(places):
            continue
        out[2 + kind] = spots(places)
        thin = places[np.linspace(0, len(places) - 1, min(len(places), REFERENCES)).round().astype(int)]
        values = smooth[tuple(torch.from_numpy(thin).T)]
        apart = (smooth[..., None] - values).abs().amin(-1)
        out[7 + kind] = torch.exp(-2 * apart)
    if box is not None:
        out[4] = box
    if last is not None:
        out[5], out[6] = last, 1
    return out
