"""The network that learns from a few labelled images: MONAI's ``BasicUNet``, which begins at what the frozen model finds without a label."""

from __future__ import annotations

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

WIDTHS = (16, 16, 32, 64, 128, 16)
"""Channels of the levels, half of ``BasicUNet``'s own: in the same time it makes almost three times as many steps."""
LEAST = 0.0067
"""Share of the pixels at least that every class is believed to have, e^-5: a few images do not rule a class out."""


def class_shares(foreground: Tensor, truths: Tensor) -> Tensor:
    """How often each class is met outside and inside of the frozen model's foreground.

    Args:
        foreground: (B, 1, S, S) in [0, 1].
        truths: (B, classes, S, S) shares of the classes.

    Returns:
        (2, classes), rows sum to 1; first outside. Evenly spread where one of the two is nowhere.
    """
    counts = torch.stack([((1 - foreground) * truths).sum((0, 2, 3)), (foreground * truths).sum((0, 2, 3))])
    counts = counts + LEAST
    shares = (counts / counts.sum(1, keepdim=True)).clamp_min(LEAST)
    return shares / shares.sum(1, keepdim=True)


class FewShotNet(nn.Module):
    """Logits of every label from an image and the frozen model's foreground.

    The last layer starts at zero: at first every pixel has the class that is met most where the foreground is, or is not, on the
    labelled images. So where the frozen model finds the object the network begins there, and where it does not, at what the labels
    say of any pixel; steps are spent on the difference.

    Args:
        shares: (2, classes), of ``class_shares``.
    """

    prior: Tensor

    def __init__(self, shares: Tensor):
        super().__init__()
        self.classes = shares.shape[1]
        self.unet = BasicUNet(2, 4, self.classes, features=WIDTHS)
        nn.init.zeros_(self.unet.final_conv.weight)
        nn.init.zeros_(self.unet.final_conv.bias)
        self.register_buffer("prior", shares.log())

    def forward(self, image: Tensor, foreground: Tensor) -> Tensor:
        """(B, 3, S, S) and (B, 1, S, S), both in [0, 1] -> logits (B, classes, S, S)."""
        outside, inside = self.prior[:, None, :, None, None]
        return self.unet(torch.cat([image, foreground], 1)) + outside.lerp(inside, foreground)
