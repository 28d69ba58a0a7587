"""Any image tensor becomes what the backbone was trained on: three channels in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroseg.errors import ZeroSegError

SAMPLES = 1_000_000
"""Quantiles of so many values are exact enough, and bounded in time."""


def to_three_channels(image: Tensor) -> Tensor:
    """Map (C, ...) to (3, ...) without labels.

    1 channel is repeated; 2 channels get their mean as the third; 3 stay; more are projected on their three principal
    components (signs fixed so that each correlates positively with the mean image), scaled to [0, 1] together.
    """
    channels = image.shape[0]
    if channels == 1:
        return image.expand(3, *image.shape[1:])
    if channels == 2:
        return torch.cat([image, image.mean(0, keepdim=True)])
    if channels == 3:
        return image
    flat = image.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    _, axes = torch.linalg.eigh(flat @ flat.T)
    parts = axes.T.flip(0)[:3] @ flat
    signs = torch.where((parts @ flat.mean(0)) < 0, -1.0, 1.0).to(parts.dtype)
    parts = (parts * signs[:, None]).float().view(3, *image.shape[1:])
    low, high = parts.min(), parts.max()
    return (parts - low) / (high - low).clamp_min(1e-12)


def stretch(image: Tensor, low: float = 0.005, high: float = 0.995) -> Tensor:
    """Scale so that the given quantiles, over all channels together, become 0 and 1; a constant image becomes zeros."""
    values = image.flatten()
    if len(values) >= 2 * SAMPLES:
        # At random, by a fixed seed: every n-th value of a volume may be one slice's alone.
        places = torch.randint(len(values), (SAMPLES,), generator=torch.Generator().manual_seed(0))
        values = values[places.to(image.device)]
    bounds = torch.quantile(values.float(), torch.tensor([low, high], device=image.device))
    if bounds[1] <= bounds[0]:
        bounds = torch.stack([image.min(), image.max()]).float()
    return ((image - bounds[0]) / (bounds[1] - bounds[0]).clamp_min(1e-12)).clamp(0, 1)


def prepare(image: Tensor) -> Tensor:
    """(C, H, W) or (C, X, Y, Z) of any range -> float32 (3, ...) in [0, 1], contrast-stretched.

    Raises:
        ZeroSegError: the image is empty or holds NaN or infinite values.
    """
    if image.numel() == 0:
        raise ZeroSegError(f"the image is empty (shape {tuple(image.shape)})")
    image = image.float()
    bad = image.numel() - int(torch.isfinite(image).sum())
    if bad:
        raise ZeroSegError(
            f"the image holds {bad} NaN or infinite values: replace them (for example with numpy.nan_to_num) and run again"
        )
    # One or two channels are stretched before they are repeated: the same result for a third of the work.
    return to_three_channels(stretch(image)) if len(image) < 3 else stretch(to_three_channels(image))
