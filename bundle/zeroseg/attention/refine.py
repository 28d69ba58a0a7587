"""From the token grid to the image grid with edges where the image has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _box(x: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1) window, cut off at the image's border; (K, H, W) -> (K, H, W)."""
    for dims in ((2 * radius + 1, 1), (1, 2 * radius + 1)):  # separable: cost grows with the radius, not its square
        pad = (dims[0] // 2, dims[1] // 2)
        x = F.avg_pool2d(x[None], dims, stride=1, padding=pad, count_include_pad=False)[0]
    return x


class GuidedFilter:
    """Smooths maps so that their edges follow those of a colour image (He, Sun and Tang 2013, colour guide, eq. 19-21).

    Within every window a map is modelled as an affine function of the three colours, so it can only change where the
    image does. The models vary slowly, so they may be found on a subsampled grid and applied at full size (the fast
    guided filter, He and Sun 2015). What depends on the image alone is computed once.

    Args:
        guide: (3, H, W) in [0, 1].
        radius: half window in pixels, >= 1.
        eps: variance, in squared guide units, below which the guide counts as flat.
        subsample: pixels per position of the grid the models are found on, >= 1.

    Raises:
        ValueError: the guide has not three channels, or the radius or the subsampling is below 1.
    """

    def __init__(self, guide: Tensor, radius: int, eps: float = 1e-3, subsample: int = 1):
        if guide.ndim != 3 or guide.shape[0] != 3:
            raise ValueError(f"guide must be (3, H, W), not {tuple(guide.shape)}")
        if radius < 1 or subsample < 1:
            raise ValueError(f"radius and subsample must be at least 1 pixel, not {radius} and {subsample}")
        self._guide = guide.float()
        self._grid = [max(1, s // subsample) for s in guide.shape[1:]]
        self._small = self._resized(self._guide)
        height, width = self._grid
        self._radius = min(max(1, round(radius / subsample)), max(1, min(height, width) // 2))
        self._mean = _box(self._small, self._radius)
        products = (self._small[:, None] * self._small[None]).flatten(0, 1)
        own = (self._mean[:, None] * self._mean[None]).flatten(0, 1)
        covariance = (_box(products, self._radius) - own).view(3, 3, height, width).permute(2, 3, 0, 1)
        self._precision = torch.linalg.inv(covariance + eps * torch.eye(3, device=guide.device))

    def _resized(self, maps: Tensor) -> Tensor:
        return maps if list(maps.shape[1:]) == self._grid else F.adaptive_avg_pool2d(maps[None], self._grid)[0]

    def __call__(self, maps: Tensor) -> Tensor:
        """Filter maps one after the other.

        Args:
            maps: (K, H, W), any range; a constant map is returned unchanged.

        Returns:
            (K, H, W) float32.

        Raises:
            ValueError: the maps are not of the guide's size.
        """
        size = self._guide.shape[1:]
        if maps.shape[1:] != size:
            raise ValueError(f"maps must be of the guide's size {tuple(size)}, not {tuple(maps.shape[1:])}")
        out = torch.empty(maps.shape, dtype=torch.float32, device=self._guide.device)
        for k, values in enumerate(self._resized(maps.float())):
            means = _box(torch.cat([values[None], self._small * values]), self._radius)
            cross = means[1:] - self._mean * means[0]
            slope = torch.einsum("hwij,jhw->ihw", self._precision, cross)
            offset = means[0] - (slope * self._mean).sum(0)
            smooth = _box(torch.cat([slope, offset[None]]), self._radius)
            if smooth.shape[1:] != size:
                smooth = F.interpolate(smooth[None], size=size, mode="bilinear", align_corners=False)[0]
            out[k] = (smooth[:3] * self._guide).sum(0) + smooth[3]
        return out


class Upsampler:
    """Brings maps on an image's token grid to its pixels.

    Args:
        image: (3, H, W) in [0, 1], the guide.
        side: tokens along a side of the grid.
        refine: ``guided`` for edges that follow the image, ``none`` for plain bilinear.
        eps: see ``GuidedFilter``.

    Raises:
        ValueError: ``refine`` is unknown.
    """

    def __init__(self, image: Tensor, side: int, refine: str = "guided", eps: float = 1e-3):
        if refine not in ("guided", "none"):
            raise ValueError(f"unknown refine {refine!r}: use guided or none")
        self._size = image.shape[1:]
        # A token and a half: as far as the grid may have misplaced an edge.
        radius = max(1, round(1.5 * max(self._size) / side))
        self._filter = GuidedFilter(image, radius, eps, max(1, radius // 3)) if refine == "guided" else None

    def __call__(self, maps: Tensor) -> Tensor:
        """(K, side, side) -> (K, H, W) float32."""
        full = F.interpolate(maps[None].float(), size=self._size, mode="bilinear", align_corners=False)[0]
        return full if self._filter is None else self._filter(full)
