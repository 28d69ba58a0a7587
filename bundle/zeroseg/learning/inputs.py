"""What the network that learns is shown of an image: the image itself, and the mask that is found in it without a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.encoding import EncodedImage
from zeroseg.interaction.head import WINDOW

if TYPE_CHECKING:
    from zeroseg.interaction.inferer import AttentionSegmentationInferer


@dataclass(frozen=True)
class Shown:
    """What the network is shown of one image, squeezed to a square.

    Attributes:
        image: (3, WINDOW, WINDOW) in [0, 1].
        foreground: (1, WINDOW, WINDOW) in [0, 1], the mask of the rule ``auto``.
        size: (H, W) of the image.
    """

    image: Tensor
    foreground: Tensor
    size: tuple[int, int]


def squeeze(maps: Tensor) -> Tensor:
    """(C, H, W) -> (C, WINDOW, WINDOW)."""
    return F.interpolate(maps[None].float(), (WINDOW, WINDOW), mode="bilinear", antialias=True)[0]


def show_encoded(inferer: AttentionSegmentationInferer, encoded: EncodedImage) -> Shown:
    """Of an encoded image; the backbone does not run again."""
    found = inferer.predict(encoded, "auto").labels > 0
    return Shown(squeeze(encoded.image).cpu(), squeeze(torch.from_numpy(found)[None]), encoded.size)
