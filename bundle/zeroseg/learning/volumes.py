"""Learning from labelled volumes: a small 3-D UNet that sees a whole scan at once.

Slice by slice the frozen 2-D model would have to read every slice of every scan, most of a second each. A scan squeezed to some 64^3
voxels takes a fifth of a second as a whole, and what lies above and below says what a slice alone does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from zeroseg.interaction.volume_head import fold, unfold
from zeroseg.learning.augmentation import GAIN, GAMMA, OFFSET
from zeroseg.learning.network import LEAST

VOXELS = 64**3
"""Of a scan as it is seen, about; its sides keep their proportions in voxels."""
STEP = 32
"""Its sides are multiples of this: folded once, halved four times."""
MOST_SIDE = 8 * STEP
DEPTH = 8
"""Least side, in voxels, of what is learned from as a volume; flatter ones are slices."""
WIDTHS = (16, 16, 32, 64, 64, 16)
"""Channels of MONAI's ``BasicUNet``, whose finest level has two voxels of the squeezed scan a side."""
PLACE = 10.0
"""How much faster than other weights those of a class's place are learned."""
TURN, ZOOM, SHIFT = 0.25, 0.2, 0.12
"""Largest rotation about each axis in radians, log-scale, and shift in half volumes. No mirror: left stays left."""


def is_volume(shape: Sequence[int]) -> bool:
    """Whether (X, Y, Z) is deep enough to be learned from as a whole."""
    return len(shape) == 3 and min(shape) >= DEPTH


def seen_size(shape: Sequence[int]) -> tuple[int, int, int]:
    """(X, Y, Z) of a scan -> the sides it is squeezed to."""
    voxels = float(shape[0]) * shape[1] * shape[2]
    step = (voxels / VOXELS) ** (1 / 3) * STEP
    x, y, z = (min(MOST_SIDE, max(1, round(n / step)) * STEP) for n in shape)
    return x, y, z


def squeeze_volume(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(C, X, Y, Z) -> (C, *size) float32: means where it shrinks, linear in between."""
    cells = [max(1, int(n / m + 0.5)) for n, m in zip(maps.shape[1:], size, strict=True)]
    maps = F.avg_pool3d(maps[None].float(), cells, ceil_mode=True, count_include_pad=False)
    return F.interpolate(maps, tuple(size), mode="trilinear", align_corners=False)[0]


class VolumeNet(nn.Module):
    """Logits of every class from a scan; the last layer starts at how often each class is met.

    Args:
        shares: (classes,) of the voxels; they sum to 1.
    """

    def __init__(self, shares: Tensor):
        super().__init__()
        self.classes = len(shares)
        self.unet = BasicUNet(3, 8, 8 * self.classes, features=WIDTHS)
        nn.init.zeros_(self.unet.final_conv.weight)
        with torch.no_grad():
            self.unet.final_conv.bias.copy_(shares.clamp_min(LEAST).log().repeat_interleave(8))
        self.place = nn.Parameter(torch.zeros(self.classes, 6))

    def forward(self, scan: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) in [0, 1] -> logits (B, classes, X, Y, Z); sides are multiples of ``STEP``."""
        logits = unfold(self.unet(fold(scan).contiguous()))
        where = PLACE * torch.einsum("kf,fxyz->kxyz", self.place, places(scan.shape[2:]))
        return logits + where

    @torch.inference_mode()
    def probabilities(self, scan: Tensor) -> Tensor:
        """(1, X, Y, Z) in [0, 1] of any size -> (classes, X, Y, Z) float32; they sum to 1 over the classes."""
        seen = squeeze_volume(scan, seen_size(scan.shape[1:]))
        shares = self(seen[None]).softmax(1)
        return F.interpolate(shares, scan.shape[1:], mode="trilinear", align_corners=False)[0]


def places(size: Sequence[int]) -> Tensor:
    """(6, X, Y, Z): where each voxel lies along each axis, from -1 to 1, and the squares of that."""
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij"))
    return torch.cat([axes, axes.square()])


def change(scans: Tensor, truths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random warp for scans and their truths; other brightness for the scans alone.

    Args:
        scans: (B, 1, X, Y, Z) in [0, 1].
        truths: (B, classes, X, Y, Z) shares of the classes.
        generator: of the random numbers.
    """
    count = len(scans)

    def uniform(most: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * most

    turn = torch.eye(3).expand(count, 3, 3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        angle, about = uniform(TURN), torch.eye(3).repeat(count, 1, 1)
        about[:, a, a] = about[:, b, b] = angle.cos()
        about[:, a, b], about[:, b, a] = -angle.sin(), angle.sin()
        turn = turn @ about
    warp = torch.cat([turn * uniform(ZOOM, 1, 1).exp(), uniform(SHIFT, 3, 1)], 2)
    grid = F.affine_grid(warp, [count, 1, *scans.shape[2:]], align_corners=False)
    scans, truths = (
        F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
        for values in (scans, truths)
    )
    scans = scans.clamp(0, 1) ** uniform(GAMMA, 1, 1, 1, 1).exp()
    return (scans - 0.5) * uniform(GAIN, 1, 1, 1, 1).exp() + 0.5 + uniform(OFFSET, 1, 1, 1, 1), truths
