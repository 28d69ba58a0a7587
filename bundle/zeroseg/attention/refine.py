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


def guided_filter(guide: Tensor, maps: Tensor, radius: int, eps: float = 1e-3, subsample: int = 1) -> Tensor:
    """Smooth maps so that their edges follow those of a colour image (He, Sun and Tang 2013, colour guide, eq. 19-21).

    Within every window a map is modelled as an affine function of the three colours, so it can only change where the
    image does. The models vary slowly, so they may be found on a subsampled grid and applied at full size (the fast
    guided filter, He and Sun 2015).

    Args:
        guide: (3, H, W) in [0, 1].
        maps: (K, H, W), any range; a constant map is returned unchanged.
        radius: half window in pixels, >= 1.
        eps: variance, in squared guide units, below which the guide counts as flat.
        subsample: pixels per position of the grid the models are found on, >= 1.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: the guide and the maps differ in size, or the radius or the subsampling is below 1.
    """
    if guide.ndim != 3 or guide.shape[0] != 3 or guide.shape[1:] != maps.shape[1:]:
        msg = f"guide must be (3, H, W) of the maps' size; got {tuple(guide.shape)} and {tuple(maps.shape)}"
        raise ValueError(msg)
    if radius < 1 or subsample < 1:
        msg = f"radius and subsample must be at least 1 pixel, not {radius} and {subsample}"
        raise ValueError(msg)
    full_guide, full_size = guide.float(), guide.shape[1:]
    guide, maps = full_guide, maps.float()
    if subsample > 1:
        small = [max(1, s // subsample) for s in full_size]
        guide, maps = (F.adaptive_avg_pool2d(x[None], small)[0] for x in (guide, maps))
    height, width = guide.shape[1:]
    radius = min(max(1, round(radius / subsample)), max(1, min(height, width) // 2))
    mean = _box(guide, radius)
    products = (guide[:, None] * guide[None]).flatten(0, 1)
    covariance = (_box(products, radius) - (mean[:, None] * mean[None]).flatten(0, 1)).view(3, 3, height, width)
    covariance = covariance.permute(2, 3, 0, 1) + eps * torch.eye(3, device=guide.device)
    precision = torch.linalg.inv(covariance)
    out = torch.empty((len(maps), *full_size), dtype=torch.float32, device=guide.device)
    for k, values in enumerate(maps):
        mean_value = _box(values[None], radius)
        cross = _box(guide * values, radius) - mean * mean_value
        slope = torch.einsum("hwij,jhw->ihw", precision, cross)
        offset = mean_value[0] - (slope * mean).sum(0)
        smooth = _box(torch.cat([slope, offset[None]]), radius)
        if subsample > 1:
            smooth = F.interpolate(smooth[None], size=full_size, mode="bilinear", align_corners=False)[0]
        out[k] = (smooth[:3] * full_guide).sum(0) + smooth[3]
    return out


def upsample(maps: Tensor, image: Tensor, refine: str = "guided", eps: float = 1e-3) -> Tensor:
    """Bring maps on the token grid to the image grid.

    Args:
        maps: (K, side, side).
        image: (3, H, W) in [0, 1], the guide.
        refine: ``guided`` for edges that follow the image, ``none`` for plain bilinear.
        eps: see ``guided_filter``.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: ``refine`` is unknown.
    """
    if refine not in ("guided", "none"):
        msg = f"unknown refine {refine!r}: use guided or none"
        raise ValueError(msg)
    size = image.shape[1:]
    full = F.interpolate(maps[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    if refine == "none":
        return full
    radius = max(
        1, round(1.5 * max(size) / maps.shape[-1])
    )  # a token and a half: as far as the grid may have misplaced an edge
    return guided_filter(image, full, radius, eps, subsample=max(1, radius // 3))
