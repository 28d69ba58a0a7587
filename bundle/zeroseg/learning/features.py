"""What is read of an image to compare it with others: the image itself, and the frozen decoder's features, in a few components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.encoding import EncodedImage
from zeroseg.interaction.head import WINDOW
from zeroseg.learning.inputs import squeeze

if TYPE_CHECKING:
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

GRID = WINDOW // 2
"""Side of the maps the features are brought to."""
COMPONENTS = 32
"""Principal components kept of the features."""
SAMPLES = 1024
"""Positions per image from which the components are found."""


@dataclass(frozen=True)
class Reading:
    """What is read of one image.

    Attributes:
        image: (3, WINDOW, WINDOW) in [0, 1], the whole image squeezed to a square.
        features: (C, GRID, GRID) float16, outputs of the decoder's blocks, one after the other.
        blocks: channels of each block.
        size: (H, W) of the image.
    """

    image: Tensor
    features: Tensor
    blocks: tuple[int, ...]
    size: tuple[int, int]


def read_latents(
    inferer: AttentionSegmentationInferer, image: Tensor, latents: Tensor, size: tuple[int, int]
) -> Reading:
    """One pass of the UNet without its attention maps.

    Args:
        inferer: whose settings say how an image is read.
        image: (3, h, w) in [0, 1].
        latents: of the image.
        size: (H, W) of the original.
    """
    record = inferer.backbone.read(
        latents,
        inferer.timestep,
        inferer.backbone.embed_text([inferer.condition or ""]),
        self_attention=False,
        features=True,
        noise_draws=inferer.noise_draws,
        seed=inferer.seed,
    )
    maps = [F.interpolate(f, (GRID, GRID), mode="bilinear", align_corners=False)[0] for f in record.features]
    return Reading(squeeze(image).cpu(), torch.cat(maps).half().cpu().clone(), tuple(len(m) for m in maps), size)


def read_prepared(inferer: AttentionSegmentationInferer, full: Tensor) -> Reading:
    """Read (3, H, W) in [0, 1], as ``encode_prepared`` takes it; cheaper than an encoding, for no attention map is kept."""
    inferer.check()
    side = inferer.resolution or inferer.backbone.image_size
    square = F.interpolate(full[None].float(), (side, side), mode="bilinear", antialias=True)
    latents = inferer.backbone.encode_image(square)
    return read_latents(inferer, full, latents, (full.shape[1], full.shape[2]))


def read_encoded(inferer: AttentionSegmentationInferer, encoded: EncodedImage) -> Reading:
    """Read an encoded image; the autoencoder does not run again."""
    return read_latents(inferer, encoded.image, encoded.latents, encoded.size)


@dataclass(frozen=True)
class Components:
    """The leading principal components of features, found once and then fixed.

    Attributes:
        mean: (C,) of the features.
        basis: (C, K), which also scales each component to a deviation of 1.
    """

    mean: Tensor
    basis: Tensor

    def __call__(self, reading: Reading) -> Tensor:
        """(K, GRID, GRID) float32."""
        flat = reading.features.float().flatten(1).T - self.mean
        return (flat @ self.basis).T.reshape(-1, GRID, GRID)


def find_components(readings: Sequence[Reading], count: int = COMPONENTS, seed: int = 0) -> Components:
    """Components of the features of some images; every block of the decoder has equal weight, however many channels it has."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(GRID * GRID, generator=generator)[:SAMPLES]
    samples = torch.cat([r.features.flatten(1).T[picked].float() for r in readings])
    mean, spread = samples.mean(0), samples.std(0).clamp_min(1e-6)
    weight = torch.cat([torch.full((c,), c**-0.5) for c in readings[0].blocks]) / spread
    scaled = (samples - mean) * weight
    count = min(count, scaled.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, sizes, axes = torch.svd_lowrank(scaled, q=min(count + 8, *scaled.shape), niter=4)
    sizes = sizes[:count] / len(scaled) ** 0.5
    basis = weight[:, None] * axes[:, :count] / sizes.clamp_min(1e-6)
    return Components(mean, basis)
