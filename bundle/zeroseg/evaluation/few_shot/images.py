"""Learning from a few labelled images, beside what needs no frozen model: colour neighbours and a UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from torch import Tensor

from zeroseg.attention.prepare import prepare
from zeroseg.evaluation.few_shot.neighbours import Neighbours
from zeroseg.evaluation.few_shot.plan import Answer, Plan, budget, decided, mask_alone, trained_unet
from zeroseg.evaluation.protocols import load_sample
from zeroseg.hashing import file_sha256
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import Case, atomic_path
from zeroseg.learning.augmentation import augment
from zeroseg.learning.exemplar import Exemplar
from zeroseg.learning.features import Reading, read_encoded
from zeroseg.learning.fitting import BATCH, fit_shown, shares
from zeroseg.learning.head import LearnedHead
from zeroseg.learning.inputs import Shown, squeeze
from zeroseg.learning.network import mirrored


@dataclass(frozen=True)
class ReadSample:
    """A labelled image with what all methods need of it.

    Attributes:
        stem: name of the case.
        guide: (3, H, W) in [0, 1].
        truth: (H, W) bool.
        reading: of the frozen model.
        auto: (H, W) bool, the label-free mask.
    """

    stem: str
    guide: Tensor
    truth: np.ndarray
    reading: Reading
    auto: np.ndarray

    @property
    def shown(self) -> Shown:
        """What the network that learns is shown of it."""
        return Shown(self.reading.image, squeeze(torch.from_numpy(self.auto)[None]), self.reading.size)

    @property
    def classes(self) -> Tensor:
        """(2, H, W) shares of background and object."""
        return shares(torch.from_numpy(self.truth).long(), 2)


def read_sample(inferer: AttentionSegmentationInferer, pair: tuple[Case, Case], cache: Path | None) -> ReadSample:
    """Read a pair of files, encode the image, and keep what the frozen model gave.

    Raises:
        ZeroSegError: a file cannot be read, or they do not fit.
    """
    sample = load_sample(*pair)
    guide = prepare(torch.as_tensor(sample.image))
    size = (guide.shape[1], guide.shape[2])
    kept = None
    if cache is not None:
        name = "-".join((file_sha256(pair[0].paths[0])[:16], inferer.backbone.fingerprint[:8], f"{inferer.timestep}"))
        kept = cache / f"{name}.safetensors"
        if kept.is_file():
            found = safetensors.torch.load_file(kept)
            reading = Reading(found["image"], found["features"], tuple(found["blocks"].tolist()), size)
            return ReadSample(sample.stem, guide, sample.truth, reading, found["auto"].bool().numpy())
    encoded = inferer.encode_prepared(guide)
    auto = inferer.predict(encoded, "auto").labels > 0
    reading = read_encoded(inferer, encoded)
    if kept is not None:
        content = {
            "image": reading.image,
            "features": reading.features,
            "blocks": torch.tensor(reading.blocks),
            "auto": torch.from_numpy(auto).to(torch.uint8),
        }
        with atomic_path(kept) as part:
            safetensors.torch.save_file(content, part)
    return ReadSample(sample.stem, guide, sample.truth, reading, auto)


def by_head(inferer, given: Sequence[ReadSample], seconds: float, seed: int) -> LearnedHead:
    """The head that ``learning.fit`` would give for these images."""
    network, facts = fit_shown([s.shown for s in given], [s.classes for s in given], left=budget(seconds), seed=seed)
    return LearnedHead(inferer, network, {"object": 1}, facts)


class ColourNeighbours:
    """Every pixel takes the label that most of the pixels of nearest colour (CIE Lab) have in the given images."""

    def __init__(self, given: Sequence[ReadSample], seed: int):
        self._known = Neighbours([self._lab(s) for s in given], [s.truth.ravel() for s in given], seed)

    @staticmethod
    def _lab(sample: ReadSample) -> np.ndarray:
        return rgb2lab(sample.guide.permute(1, 2, 0).numpy()).reshape(-1, 3)

    def __call__(self, sample: ReadSample) -> np.ndarray:
        """(H, W) bool."""
        return self._known(self._lab(sample)).reshape(sample.truth.shape)


class ScratchUNet:
    """MONAI's ``BasicUNet`` from random weights: the same images, size, changes, loss and processor time as the head."""

    def __init__(self, given: Sequence[ReadSample], seconds: float, seed: int):
        images = torch.stack([s.reading.image for s in given])
        truths = torch.stack([squeeze(s.classes) for s in given])

        def look(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            batch = torch.randint(len(images), (BATCH,), generator=generator)
            return augment(images[batch], truths[batch], generator)

        self._network = trained_unet(2, 3, look, seconds, seed)

    @torch.inference_mode()
    def __call__(self, sample: ReadSample) -> np.ndarray:
        """(H, W) bool; the mean over mirror images."""
        shares = mirrored(self._network, sample.reading.image)
        full = F.interpolate(shares[None], sample.truth.shape, mode="bilinear", align_corners=False)[0]
        return (full[1] > full[0]).numpy()


class ImageMethods:
    """All methods for images.

    Args:
        inferer: with its weights loaded.
    """

    def __init__(self, inferer: AttentionSegmentationInferer):
        self._inferer = inferer

    def __call__(self, given: Sequence[ReadSample], plan: Plan, seed: int) -> Iterator[tuple[str, Answer[ReadSample]]]:
        """One method after the other, fitted to the given images."""
        head = by_head(self._inferer, given, plan.seconds, seed)
        yield "learned", lambda sample: decided(head.probabilities(sample.shown))
        yield "auto", mask_alone(lambda sample: sample.auto)
        if len(given) == 1:
            exemplar = Exemplar.of_reading(given[0].reading, given[0].classes, self._inferer, {"object": 1})
            yield "exemplar", lambda sample: decided(exemplar.probabilities(sample.reading, sample.guide))
        yield "colour neighbours", mask_alone(ColourNeighbours(given, seed))
        for name, seconds in plan.unets(len(given)).items():
            yield name, mask_alone(ScratchUNet(given, seconds, seed))
