"""What learns from a few labelled images: MONAI's ``BasicUNet`` twice, of which one begins at what the frozen model finds without a label."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

WIDTHS = (16, 16, 32, 64, 128, 16)
"""Channels of the guided network's levels, half of ``BasicUNet``'s own: a step of it takes almost a third of the other's time."""
LEAST = 0.0067
"""Share of the pixels at least that every class is believed to have, e^-5: a few images do not rule a class out."""
HARDLY = 1 / 3
"""Of two networks the one that finds less than this share of the other's pixels of a label is not asked about it."""
FOUND = 0.1
"""Dice of the frozen model's foreground with what is labelled, on the labelled images, below which it is not shown: it is noise."""
TRUSTED, APART = 0.6, 0.8
"""That Dice from which on the foreground is taken where the networks contradict each other, and the share of it that their own Dice
with each other is below then. Chosen on phantoms."""
SURE = 0.01
"""By how much an answer taken from the foreground is surer than not at least."""
MIRRORS: tuple[tuple[int, ...], ...] = ((), (-2, -1))
"""Axes of the mirror images over which an answer is the mean; of all four it is no better."""


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


def foreground_dice(foreground: Tensor, truths: Tensor) -> float:
    """Dice of the frozen model's foreground with everything that is labelled; takes what ``class_shares`` does."""
    wanted = 1 - truths[:, :1]
    return 2 * float((foreground * wanted).sum()) / max(1.0, float(foreground.sum() + wanted.sum()))


class FewShotNet(nn.Module):
    """Logits of every label from an image, by two networks: one that is shown the frozen model's foreground, and one that is not.

    The last layer of the first starts at zero: at first every pixel has the class that is met most where the foreground is, or is not,
    on the labelled images. So where the frozen model finds the object the network begins there, and steps are spent on the difference.
    Where the frozen model looks elsewhere the second network does better; and two that were fitted to the same few images err apart.
    On an image of which they say quite different things neither has learned enough: where the foreground was good on the labelled
    images, it is the answer there.

    Args:
        shares: (2, classes), of ``class_shares``.
        found: of ``foreground_dice``; below ``FOUND`` there is no first network, and the second answers alone.
    """

    prior: Tensor
    found: Tensor

    def __init__(self, shares: Tensor, found: float):
        super().__init__()
        self.classes = shares.shape[1]
        guided = found >= FOUND
        self.guided = BasicUNet(2, 4, self.classes, features=WIDTHS) if guided else None
        if self.guided is not None:
            nn.init.zeros_(self.guided.final_conv.weight)
            nn.init.zeros_(self.guided.final_conv.bias)
        self.plain = BasicUNet(2, 3, self.classes)
        self.register_buffer("prior", shares.log())
        self.register_buffer("found", torch.tensor(found))

    def forward(self, image: Tensor, foreground: Tensor) -> Tensor:
        """Of the guided network: (B, 3, S, S) and (B, 1, S, S), both in [0, 1] -> logits (B, classes, S, S).

        Raises:
            RuntimeError: there is none.
        """
        return self._guided(torch.cat([image, foreground], 1))

    def _guided(self, both: Tensor) -> Tensor:
        if self.guided is None:
            raise RuntimeError("this network has no guided part")
        outside, inside = self.prior[:, None, :, None, None]
        return self.guided(both) + outside.lerp(inside, both[:, -1:])

    @torch.inference_mode()
    def probabilities(self, image: Tensor, foreground: Tensor) -> Tensor:
        """(3, S, S) and (1, S, S) -> (classes, S, S): of both networks together, each the mean over the mirror images."""
        plain = mirrored(self.plain, image)
        if self.guided is None:
            return plain
        guided = mirrored(self._guided, torch.cat([image, foreground]))
        if self._apart(guided, plain):
            return self._as_found(foreground)
        return joined(guided, plain)

    def _apart(self, one: Tensor, other: Tensor) -> bool:
        """Whether the two contradict each other so much that the foreground is the better answer; asked where there is one label."""
        if self.classes != 2 or self.found < TRUSTED:
            return False
        masks = one.argmax(0) > 0, other.argmax(0) > 0
        common, total = int((masks[0] & masks[1]).sum()), sum(int(mask.sum()) for mask in masks)
        return 2 * common < APART * float(self.found) * total

    def _as_found(self, foreground: Tensor) -> Tensor:
        """(1, S, S) -> (2, S, S): the foreground as the answer, as sure as it was right on the labelled images."""
        outside, inside = self.prior.exp()[:, 1]
        label = outside.clamp_max(0.5 - SURE).lerp(inside.clamp_min(0.5 + SURE), foreground)
        return torch.cat([1 - label, label])


def joined(one: Tensor, other: Tensor) -> Tensor:
    """What two networks say together of each label: their mean, or what the one says where the other finds hardly any of it.

    A network that finds little of a thing is as a rule sure that there is none, and the mean would then be below a half everywhere.

    Args:
        one, other: (classes, S, S) probabilities, the background first.

    Returns:
        (classes, S, S), sums to 1.
    """
    classes = len(one)
    areas = [values.argmax(0).flatten().bincount(minlength=classes)[1:] for values in (one, other)]
    share = torch.full((classes - 1,), 0.5)
    share[areas[0] < HARDLY * areas[1]] = 0
    share[areas[1] < HARDLY * areas[0]] = 1
    found = other[1:].lerp(one[1:], share[:, None, None])
    both = torch.cat([(1 - found.sum(0, keepdim=True)).clamp_min(0), found])
    return both / both.sum(0)


def mirrored(network: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    """The mean of the probabilities that a network's logits give in mirror images, each turned back.

    Args:
        network: (B, C, S, S) -> logits (B, classes, S, S).
        maps: (C, S, S).

    Returns:
        (classes, S, S).
    """
    shares = network(torch.stack([maps.flip(axes) for axes in MIRRORS])).softmax(1)
    return torch.stack([share.flip(axes) for share, axes in zip(shares, MIRRORS, strict=True)]).mean(0)
