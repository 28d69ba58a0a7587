"""What is measured, and what all methods have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor

from zeroseg.learning.fitting import loss_and_dice
from zeroseg.learning.head import expected_dice

UNET_RATE = 1e-3


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shots: numbers of labelled images.
        choices: of those images, each by a seed.
        seconds: of processor time for each fit.
        rest: most images a choice is scored on.
        unet: how many times these seconds the UNet trains; none leaves it out.
        unet_shots: for which numbers of images it trains longer than once.
    """

    shots: tuple[int, ...] = (1, 3, 5, 10, 20)
    choices: int = 5
    seconds: float = 60
    rest: int = 40
    unet: tuple[float, ...] = (1, 10)
    unet_shots: tuple[int, ...] = (5,)

    def unets(self, shots: int) -> dict[str, float]:
        """Name -> seconds of every UNet that trains on so many images."""
        times = [t for t in self.unet if t == 1 or shots in self.unet_shots]
        return {"BasicUNet" if t == 1 else f"BasicUNet, {t:g} times as long": t * self.seconds for t in times}


class Sample(Protocol):
    """A labelled image or volume: its name, and its mask as a bool array that is not empty."""

    @property
    def stem(self) -> str: ...

    @property
    def truth(self) -> np.ndarray: ...


S = TypeVar("S", bound=Sample)
Answer = Callable[[S], tuple[np.ndarray, float | None]]
"""A sample's mask by some method, and the Dice that the method expects of it, where it says."""
Methods = Callable[[Sequence[S], Plan, int], Iterator[tuple[str, Answer[S]]]]
"""Given samples, a plan and a seed -> name and answer of each method, fitted when it is its turn."""


def mask_alone(mask_of: Callable[[S], np.ndarray]) -> Answer[S]:
    """The answer of a method that expects no Dice."""
    return lambda sample: (mask_of(sample), None)


def decided(probabilities: np.ndarray) -> tuple[np.ndarray, float]:
    """(2, ...) of background and object -> where the object is more probable, and the Dice that is expected of it."""
    return probabilities.argmax(0) == 1, expected_dice(probabilities)


def budget(seconds: float) -> Callable[[], float]:
    """A function that gives the share that is left of some seconds of processor time."""
    began = time.process_time()
    return lambda: 1 - (time.process_time() - began) / seconds


def trained_unet(
    dimensions: int,
    channels: int,
    look: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    seconds: float,
    seed: int,
) -> BasicUNet:
    """MONAI's ``BasicUNet`` from random weights, trained until its time is up, one step at least, by the loss that the learned head has.

    Args:
        dimensions: of an image, 2 or 3.
        channels: of it.
        look: gives what a step looks at: images and truths, both changed at random.
        seconds: of processor time.
        seed: of the weights, and of the generator that ``look`` is given.
    """
    left, generator = budget(seconds), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BasicUNet(dimensions, channels, 2)
    optimizer = torch.optim.AdamW(network.parameters(), UNET_RATE, weight_decay=1e-2)
    steps = 0
    while steps == 0 or left() > 0:
        for group in optimizer.param_groups:
            group["lr"] = UNET_RATE * (1e-2 + max(0.0, left()))
        image, truth = look(generator)
        loss, _ = loss_and_dice(network(image), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return network.eval()
