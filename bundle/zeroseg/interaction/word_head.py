"""A head that says which known things an image shows, and about where, from the frozen backbone's decoder features.

The embedded backbone's own words say next to nothing about place and miss most things in real images (docs/results.md). The head reads what
the backbone sees instead and knows a closed list of concepts. It was trained on drawn phantoms, whose places are exact, and on real
unlabelled images, of which only the kind and what such images show was said (scripts/training/train_words.py); no human mask was read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.backbones.weights import MODELS, verify_sums
from zeroseg.errors import WeightsError, first_line
from zeroseg.interaction.text import TextEvidence

WORD_HEAD = MODELS / "words"
RESOLUTION, TIMESTEP = 128, 300
"""Side in pixels at which an image is read, an eighth of the cost of 256, and the noise level the backbone is told."""
SIDE = 16
"""Cells along a side of what the head reads and says."""


def word_features(features: Sequence[Tensor], square: Tensor) -> Tensor:
    """What the head reads of an image.

    Args:
        features: outputs of the decoder's blocks, each (B, C, h, w), of the image at the size the head was trained at.
        square: (B, 3, h, w) the image in [0, 1].

    Returns:
        (B, F, SIDE, SIDE): the features, then mean and spread of each colour.
    """
    blocks = [
        F.adaptive_avg_pool2d(block.float(), SIDE)
        if block.shape[-1] >= SIDE
        else F.interpolate(block.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        for block in features
    ]
    mean = F.adaptive_avg_pool2d(square, SIDE)
    spread = (F.adaptive_avg_pool2d(square.square(), SIDE) - mean.square()).clamp_min(0).sqrt()
    return torch.cat([*blocks, mean, spread], 1)


@torch.inference_mode()
def read_features(backbone: StableDiffusionBackbone, square: Tensor) -> Tensor:
    """``word_features`` of images (B, 3, RESOLUTION, RESOLUTION) in [0, 1], by one pass of the backbone without words."""
    latents, context = backbone.encode_image(square), backbone.embed_text([""]).expand(len(square), -1, -1)
    read = backbone.read(latents, TIMESTEP, context, self_attention=False, features=True)
    return word_features(read.features, square.clamp(0, 1))


class WordReader(nn.Module):
    """One network of a :class:`WordHead`.

    Args:
        concepts: number of the outputs.
        channels: of what it reads.
        width: of the hidden layers.
        blocks: residual blocks of two 3 x 3 convolutions.
    """

    def __init__(self, concepts: int, channels: int, width: int, blocks: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.place = nn.Conv2d(width, concepts, 1)
        self.present = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Dropout(0.3), nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(0.3),
            nn.Linear(width, concepts),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, SIDE, SIDE), standardised -> logits (B, C) of presence and (B, C, SIDE, SIDE) of place."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return self.present(pooled), self.place(F.gelu(x))


class WordHead(nn.Module):
    """Concepts in an image and in its cells, by one network or by the mean of several that were trained alone. On kinds of image that were
    never seen they differ; the mean spares choosing among them (docs/experiments.md).

    Args:
        concepts: names, in the order of the outputs.
        kinds: those of them of which an image is exactly one, such as chest x-ray.
        channels: of ``word_features``.
        width, blocks: of each network, see :class:`WordReader`.
        offset: added to the log-odds of presence: what was trained on phantoms is unsure of real images.
        members: networks.
    """

    def __init__(
        self,
        concepts: Sequence[str],
        kinds: Sequence[str],
        channels: int,
        width: int = 96,
        blocks: int = 1,
        offset: float = 0.0,
        members: int = 1,
    ):
        super().__init__()
        self.concepts, self.kinds, self.channels, self.width = tuple(concepts), tuple(kinds), channels, width
        self.offset = offset
        # Which concepts are seen in which kinds of image.
        self.register_buffer("seen_in", torch.ones(len(self.concepts), len(self.kinds), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        self.members = nn.ModuleList(WordReader(len(concepts), channels, width, blocks) for _ in range(members))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, SIDE, SIDE) -> logits (B, C) of presence and (B, C, SIDE, SIDE) of place, means of the members'."""
        x = (x - self.mean[:, None, None]) / self.spread[:, None, None]
        present, place = zip(*(member(x) for member in self.members), strict=True)
        return torch.stack(present).mean(0), torch.stack(place).mean(0)

    def certainty(self, present: Tensor) -> Tensor:
        """(B, C) log-odds that a concept is in the image: its own, but no more than those of the kinds of image that it is seen in."""
        shares = present[:, [self.concepts.index(kind) for kind in self.kinds]].softmax(1)
        fitting = (shares @ self.seen_in.T.float()).clamp(1e-6, 1 - 1e-6)
        return torch.minimum(present, fitting.logit()) + self.offset


@cache
def load_word_head(folder: Path = WORD_HEAD) -> tuple[WordHead, frozenset[str]]:
    """The trained head of a folder, and which of its concepts have no place, for they say of what kind an image is; checked and loaded once.

    Args:
        folder: with ``config.json``, ``head.safetensors`` and their SHA256SUMS.

    Raises:
        WeightsError: the folder is not there, does not match its SHA256SUMS, or holds another network's weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        verify_sums(folder)
        shape = (config[k] for k in ("concepts", "kinds", "channels", "width", "blocks", "offset", "members"))
        head = WordHead(*shape)
        head.load_state_dict(load_file(str(folder / "head.safetensors")))
        placeless = frozenset(config["placeless"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"cannot load the word head in {folder.name}: {first_line(error)}; or use words backbone"
        ) from error
    return head.eval().requires_grad_(False), placeless


@dataclass
class ShownEvidence(TextEvidence):
    """What the head says about words.

    Attributes:
        relevance: (N,) on the attention's grid, in [-0.5, 0.5], above 0 where the thing is likelier than not; all -0.5 for a kind of image,
            which is nowhere in particular.
        gain: probability that all of it is in the image, in [0, 1].
        certainty: its log-odds.
    """

    absent_because: ClassVar[str] = "the image does not look like one that shows it"

    def record(self) -> dict[str, float]:
        return {"probability": round(self.gain, 4), "certainty": round(self.certainty, 3)}

    def doubt(self, least: float) -> float:
        return 1 - self.gain


class WordProbe:
    """An image made ready for any number of words: one short pass of the backbone, and the head's word about all it knows.

    Args:
        backbone: the embedded one.
        image: (3, h, w) in [0, 1].
        side: tokens along a side of the attention's grid.
        folder: of the head.

    Raises:
        WeightsError: the head cannot be loaded.
    """

    @torch.inference_mode()
    def __init__(self, backbone: StableDiffusionBackbone, image: Tensor, side: int, folder: Path = WORD_HEAD):
        head, self._placeless = load_word_head(folder)
        square = F.interpolate(image[None].float(), (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        present, place = head(read_features(backbone, square).cpu())
        self._index = {concept: k for k, concept in enumerate(head.concepts)}
        self._present, self._place, self._side = head.certainty(present)[0], place[0], side

    def knows(self, things: Sequence[Sequence[str]]) -> bool:
        """Whether there is a concept for each of what ``Vocabulary.things`` gives."""
        return bool(things) and all(any(c in self._index for c in each) for each in things)

    def __call__(self, things: Sequence[Sequence[str]]) -> ShownEvidence:
        """Whether all of several things are in the image, and where.

        Args:
            things: of each the concepts it may be; ``knows`` them.
        """
        certainty, maps = [], []
        for each in things:
            rows = [self._index[c] for c in each if c in self._index]
            certainty.append(float(self._present[rows].amax()))
            placed = [self._index[c] for c in each if c in self._index and c not in self._placeless]
            if placed:
                cells = self._place[placed].amax(0)[None, None]
                size = (self._side, self._side)
                maps.append(F.interpolate(cells, size, mode="bilinear", align_corners=False).flatten())
        # What is beyond doubt either way counts alike.
        logits = torch.stack(maps).amax(0) if maps else torch.full((self._side**2,), -torch.inf)
        relevance = (logits / 2).sigmoid() - 0.5
        least = min(certainty)
        return ShownEvidence(relevance, float(torch.tensor(least).sigmoid()), least)
