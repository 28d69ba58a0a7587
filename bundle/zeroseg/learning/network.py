"""The network that learns from a few labelled images: the promptable head's body, told what the frozen model sees in place of prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroseg.interaction.head import CHANNELS, WINDOW, PromptHead

GRID = WINDOW // 2
"""Side of the maps the frozen model's features are brought to."""
COMPONENTS = 32
"""Principal components kept of the frozen model's features."""


class FewShotNet(nn.Module):
    """Logits of every label from an image and the frozen model's features.

    The body is that of ``PromptHead`` and starts from its weights: it has learned, on images nobody annotated, where things end.

    Args:
        classes: labels and the background.
        components: channels of the features.
        body: a trained head, which is copied.
    """

    def __init__(self, classes: int, components: int = COMPONENTS, body: PromptHead | None = None):
        super().__init__()
        body = body or PromptHead()
        width = body.widths[0]
        self.classes, self.components = classes, components
        self.widths, self.blocks = body.widths, body.blocks
        self.stem = nn.Conv2d(4 * 6, width, 3, padding=1)
        self.features = nn.Conv2d(components, width, 1)
        self.body = PromptHead(body.widths, body.blocks)
        self.body.load_state_dict(body.state_dict())
        with torch.no_grad():
            kept = body.stem.weight.view(width, len(CHANNELS), 4, 3, 3)[:, :3]
            self.stem.weight.zero_()
            self.stem.weight.view(width, 6, 4, 3, 3)[:, :3] = kept
            self.stem.bias.copy_(body.stem.bias)
        # Not of this use: prompts, candidates and their quality.
        del self.body.stem, self.body.masks, self.body.quality
        self.out = nn.Conv2d(width, 4 * classes, 3, padding=1)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] and (B, components, S / 2, S / 2) -> logits (B, classes, S, S)."""
        mean = image.mean((1, 2, 3), keepdim=True)
        spread = image.std((1, 2, 3), keepdim=True)
        seen = torch.cat([(image - mean) / (spread + 0.02), 2 * image - 1], 1)
        x = self.stem(F.pixel_unshuffle(seen, 2)) + self.features(features)
        body, skips = self.body, []
        for level, encoder in enumerate(body.encoders):
            x = encoder(x if level == 0 else F.relu(body.down[level - 1](x)))
            skips.append(x)
        x = x + body.context(x.mean((2, 3)))[:, :, None, None]
        for level in reversed(range(len(body.decoders))):
            x = F.interpolate(body.up[level](x), scale_factor=2, mode="bilinear", align_corners=False) + skips[level]
            x = body.decoders[level](x)
        return F.pixel_shuffle(self.out(x), 2)
