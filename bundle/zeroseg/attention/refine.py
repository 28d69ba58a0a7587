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


def guided_filter(guide: Tensor, maps: Tensor, radius: int, eps: float = 1e-3) -> Tensor:
    """Smooth maps so that their edges follow those of a colour image (He, Sun and Tang 2013, colour guide, eq. 19-21).

    Within every window a map is modelled as an affine function of the three colours, so it can only change where the
    image does.

    Args:
        guide: (3, H, W) in [0, 1].
        maps: (K, H, W), any range; a constant map is returned unchanged.
        radius: half window in pixels, >= 1.
        eps: variance, in squared guide units, below which the guide counts as flat.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: the guide and the maps differ in size, or the radius is below 1.
    """
    if guide.shape[1:] != maps.shape[1:] or guide.shape[0] != 3:
        msg = f"guide must be (3, H, W) of the maps' size; got {tuple(guide.shape)} and {tuple(maps.shape)}"
        raise ValueError(msg)
    if radius < 1:
        msg = f"radius must be at least 1 pixel, not {radius}"
        raise ValueError(msg)
    radius = min(radius, min(guide.shape[1:]) // 2 or 1)
    guide, maps = guide.float(), maps.float()
    height, width = guide.shape[1:]
    mean = _box(guide, radius)
    products = (guide[:, None] * guide[None]).flatten(0, 1)
    covariance = (_box(products, radius) - (mean[:, None] * mean[None]).flatten(0, 1)).view(3, 3, height, width)
    covariance = covariance.permute(2, 3, 0, 1) + eps * torch.eye(3, device=guide.device)
    precision = torch.linalg.inv(covariance)
    out = torch.empty_like(maps)
    for k, values in enumerate(maps):
        mean_value = _box(values[None], radius)
        cross = _box(guide * values, radius) - mean * mean_value
        slope = torch.einsum("hwij,jhw->ihw", precision, cross)
        offset = mean_value[0] - (slope * mean).sum(0)
        smooth = _box(torch.cat([slope, offset[None]]), radius)
        out[k] = (smooth[:3] * guide).sum(0) + smooth[3]
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
    pixels_per_token = max(size) / maps.shape[-1]
    return guided_filter(image, full, radius=max(1, round(1.5 * pixels_per_token)), eps=eps)
