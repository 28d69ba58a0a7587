"""The promptable head: a small network that reads an image, prompts, its own last answer and the frozen model's maps.

It answers with three nested masks and an estimate of each one's IoU (after Segment Anything, Kirillov et al. 2023), within a window of
the image. A sequence of prompts is answered one after the other, each from the answer before (RITM, Sofiiuk et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 128
"""Side in pixels of what the network sees."""
CANDIDATES = 3
CHANNELS = (
    "red",
    "green",
    "blue",
    "object marks",
    "background marks",
    "box",
    "last mask",
    "has last mask",
    "like object marks",
    "like background marks",
    "reached from object marks",
    "reached from background marks",
    "attends like object marks",
    "attends like background marks",
    "salience",
    "attention edges",
    "has attention",
)
"""What each input channel holds. The last seven come from the frozen model and are 0 without it."""
ATTENTION = slice(10, 17)
REFERENCES = 8
"""Marked pixels of a kind that colours are compared with; strokes are thinned to so many."""


def _groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 8), channels)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with group normalisation around an identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = _groups(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = _groups(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(y)))


class PromptHead(nn.Module):
    """Residual UNet over a window; pixels are folded two by two into channels first, and unfolded last (sub-pixel convolution).

    Args:
        widths: channels per level; each level halves the side, the first works at WINDOW / 2.
        blocks: residual blocks per level on the way down; the way up has one each.
    """

    def __init__(self, widths: Sequence[int] = (32, 48, 64, 96), blocks: Sequence[int] = (1, 2, 2, 2)):
        super().__init__()
        self.widths, self.blocks = tuple(widths), tuple(blocks)
        pairs = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        self.stem = nn.Conv2d(4 * len(CHANNELS), widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.encoders = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(n))) for w, n in zip(widths, blocks, strict=True)
        )
        self.context = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.ReLU(), nn.Linear(widths[-1], widths[-1]))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.decoders = nn.ModuleList(ResidualBlock(w) for w in widths[:-1])
        self.masks = nn.Conv2d(widths[0], 4 * CANDIDATES, 3, padding=1)
        self.quality = nn.Sequential(nn.Linear(widths[0] + widths[-1] + 3, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 17, WINDOW, WINDOW) -> logits (B, 3, WINDOW, WINDOW), smallest mask first, and logits of their IoU (B, 3)."""
        x = self.stem(F.pixel_unshuffle(x, 2))
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x if level == 0 else F.relu(self.down[level - 1](x)))
            skips.append(x)
        pooled = self.context(x.mean((2, 3)))
        x = x + pooled[:, :, None, None]
        for level in reversed(range(len(self.decoders))):
            x = F.interpolate(self.up[level](x), scale_factor=2, mode="bilinear", align_corners=False) + skips[level]
            x = self.decoders[level](x)
        raw = F.pixel_shuffle(self.masks(x), 2)
        # Nested by construction: each further candidate adds a non-negative amount.
        logits = torch.cat([raw[:, :1], raw[:, :1] + F.softplus(raw[:, 1:]).cumsum(1)], 1)
        return logits, self._estimate(logits, x, pooled)

    def _estimate(self, logits: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        inside = F.avg_pool2d(logits, 2).sigmoid()
        area, total = inside.mean((2, 3)), inside.sum((2, 3)) + 1
        mean = torch.einsum("bkhw,bchw->bkc", inside, features) / total[..., None]
        doubt = ((1 - (2 * inside - 1).abs()) * inside).sum((2, 3)) / total
        facts = torch.stack([area, area.sqrt(), doubt], -1)
        whole = pooled[:, None].expand(-1, CANDIDATES, -1)
        return self.quality(torch.cat([mean, whole, facts], -1))[..., 0]


@dataclass(frozen=True)
class Window:
    """A part of an image: rows ``top`` to ``bottom`` and columns ``left`` to ``right``, the ends excluded."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def see(maps: Tensor, window: Window) -> Tensor:
    """(C, H, W) maps over the pixels -> (C, WINDOW, WINDOW): a window of them, averaged where it shrinks."""
    part = maps[(slice(None), *window.slices)]
    return F.interpolate(part[None], (WINDOW, WINDOW), mode="bilinear", antialias=True, align_corners=False)[0]


def see_marks(marks: Tensor, window: Window) -> Tensor:
    """(H, W) uint8 marks (1 object, 2 background) -> (2, WINDOW, WINDOW) float: no mark is lost, each is five pixels wide."""
    part = marks[window.slices]
    kinds = torch.stack([part == 1, part == 2]).float()[None]
    height, width = part.shape
    if height > WINDOW or width > WINDOW:
        kinds = F.adaptive_max_pool2d(kinds, (min(height, WINDOW), min(width, WINDOW)))
    kinds = F.interpolate(kinds, (WINDOW, WINDOW), mode="nearest")
    return F.max_pool2d(kinds, 5, 1, 2)[0]


def see_tokens(maps: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """(C, side, side) maps over the tokens of an (H, W) image -> (C, WINDOW, WINDOW), bilinear."""
    height, width = size
    at = (torch.arange(WINDOW, device=maps.device) + 0.5) / WINDOW
    y = (window.top + at * (window.bottom - window.top)) / height * 2 - 1
    x = (window.left + at * (window.right - window.left)) / width * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1)[None]
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def thin(places: Tensor, count: int = REFERENCES) -> Tensor:
    """At most ``count`` of the rows, evenly spread, the last one always among them."""
    if len(places) <= count:
        return places
    return places[torch.linspace(0, len(places) - 1, count).round().long()]


def assemble(
    image: Tensor,
    marks: Tensor,
    box: tuple[int, int, int, int] | None,
    last: Tensor | None,
    attention: Tensor | None,
    window: Window,
) -> Tensor:
    """The network's input for one window.

    Args:
        image: (3, H, W) in [0, 1].
        marks: (H, W) uint8: 1 object, 2 background, 0 neither.
        box: (top, left, bottom, right) in pixels, the ends excluded, or None.
        last: (H, W) bool or float, the answer before, or None.
        attention: (6, side, side): the four relevances, salience, edges; or None.
        window: what part is seen.

    Returns:
        (17, WINDOW, WINDOW) float32, see ``CHANNELS``.
    """
    out = torch.zeros(len(CHANNELS), WINDOW, WINDOW)
    seen = see(image, window)
    seen = (seen - seen.mean()) / (seen.std() + 0.02)
    out[0:3] = seen
    drawn = see_marks(marks, window)
    out[3:5] = drawn
    if box is not None:
        height, width = window.bottom - window.top, window.right - window.left
        rows = [round((v - window.top) * WINDOW / height) for v in (box[0], box[2])]
        columns = [round((v - window.left) * WINDOW / width) for v in (box[1], box[3])]
        out[5, max(0, rows[0]) : max(0, rows[1]), max(0, columns[0]) : max(0, columns[1])] = 1
    if last is not None:
        out[6] = see(last[None].float(), window)[0]
        out[7] = 1
    smooth = F.avg_pool2d(seen[None], 3, 1, 1, count_include_pad=False)[0]
    for kind in (0, 1):
        places = thin(drawn[kind].nonzero())
        if len(places):
            colours = smooth[:, places[:, 0], places[:, 1]]
            apart = torch.cdist(smooth.flatten(1).T, colours.T).amin(1).view(WINDOW, WINDOW)
            out[8 + kind] = torch.exp(-2 * apart)
    if attention is not None:
        out[10:16] = see_tokens(attention, window, tuple(image.shape[1:]))
        out[16] = 1
    return out
