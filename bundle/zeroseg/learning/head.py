"""A head learned from a few labelled images: what it says of others, and how it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from zeroseg import __version__
from zeroseg.attention.encoding import EncodedImage
from zeroseg.attention.prepare import prepare
from zeroseg.backbones.convolution import use_onednn
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.learning.cases import to_tensor
from zeroseg.learning.inputs import Shown, show_encoded
from zeroseg.learning.network import FewShotNet
from zeroseg.learning.store import read_folder, write_folder
from zeroseg.learning.volumes import VolumeNet

if TYPE_CHECKING:
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

SMOOTH = 0.7
"""Deviation, in slices, by which probabilities are smoothed from slice to slice."""


@dataclass(frozen=True)
class Prediction:
    """What a head says of an image.

    Attributes:
        label_map: (H, W) or (X, Y, Z) uint8, the labels' values; 0 background.
        probabilities: (L + 1, H, W) or (L + 1, X, Y, Z) float32; the background, then the labels by value; sums to 1.
        confidence: in [0, 1], the Dice that the probabilities themselves expect; for choosing which image to label next.
    """

    label_map: np.ndarray
    probabilities: np.ndarray
    confidence: float

    @property
    def certainty(self) -> np.ndarray:
        """float32 of the label map's shape, in [0, 1]: how far the label given to a pixel beats the runner-up."""
        top = np.partition(self.probabilities, -2, axis=0)[-2:]
        return top[1] - top[0]


def expected_dice(probabilities: np.ndarray) -> float:
    """The Dice of the most probable label map, were every pixel's label drawn by its probabilities.

    Where nothing is found: how surely there is nothing at any one place.
    """
    chosen = probabilities.argmax(0)
    scores = []
    for k in range(1, len(probabilities)):
        mask = chosen == k
        if mask.any():
            scores.append(2 * float(probabilities[k][mask].sum()) / float(probabilities[k].sum() + mask.sum()))
    return float(np.mean(scores)) if scores else 1 - float(probabilities[1:].sum(0).max())


def answer_slices(
    inferer: AttentionSegmentationInferer,
    image: EncodedImage | Tensor | np.ndarray,
    answer: Callable[[EncodedImage | Tensor], np.ndarray],
) -> np.ndarray:
    """Probabilities of an encoding, of an image, or of a volume, whose slices are answered one by one and smoothed along their axis.

    Args:
        inferer: reads the images.
        image: an encoding, (C, H, W) or (C, X, Y, Z).
        answer: an encoding, or (3, H, W) in [0, 1] -> (L + 1, H, W).

    Raises:
        ZeroSegError: the image is empty, not finite, or of other dimensions.
    """
    if isinstance(image, EncodedImage):
        return answer(image)
    full = prepare(to_tensor(image))
    if full.ndim == 3:
        return answer(full)
    axis = inferer.slice_axis % 3 + 1
    parts = full.unbind(axis)
    answers: list[np.ndarray] = []
    for part in tqdm(parts, desc="slices", leave=False, disable=not inferer.progress):
        inferer.pause(len(answers), len(parts))
        answers.append(answer(part))
    stack = np.stack(answers, axis)
    return stack if stack.shape[axis] == 1 else ndimage.gaussian_filter1d(stack, SMOOTH, axis, mode="nearest")


def decide(probabilities: np.ndarray, labels: Mapping[str, int]) -> Prediction:
    """The most probable label of every pixel."""
    values = np.array([0, *labels.values()], np.uint8)
    return Prediction(values[probabilities.argmax(0)], probabilities, expected_dice(probabilities))


class LearnedHead:
    """A network fitted to a few labelled images over one frozen backbone, read with certain settings; or to volumes, which it sees as
    a whole and without the backbone.

    Args:
        inferer: reads the images.
        network: fitted.
        labels: name -> value, ordered by value.
        facts: what a record says beside: shots, slices, steps, seconds, metric, seed; ``window`` where ``settle_window`` is to know it.
    """

    def __init__(
        self,
        inferer: AttentionSegmentationInferer,
        network: FewShotNet | VolumeNet,
        labels: dict[str, int],
        facts: dict[str, Any],
    ):
        self.inferer, self.labels, self.facts = inferer, labels, facts
        self.network = use_onednn(network).eval().requires_grad_(False)

    @property
    def of_volumes(self) -> bool:
        """Whether it was learned from volumes as a whole, and labels such."""
        return isinstance(self.network, VolumeNet)

    @property
    def found(self) -> float:
        """Dice of what the frozen model finds without a label with what was labelled; 0 where it was not asked."""
        return float(self.network.found) if isinstance(self.network, FewShotNet) else 0.0

    def predict(self, image: EncodedImage | Tensor | np.ndarray) -> Prediction:
        """Label an image or a volume.

        Args:
            image: an encoding of the same inferer, or (C, H, W), or (C, X, Y, Z), which is read slice by slice, or at once where the
                head was learned from volumes.

        Raises:
            ZeroSegError: the image is empty, not finite, or of other dimensions, or an image is given to a head of volumes.
        """
        if isinstance(self.network, VolumeNet):
            scan = None if isinstance(image, EncodedImage) else prepare(to_tensor(image))
            if scan is None or scan.ndim == 3:
                raise ZeroSegError("this head was learned from volumes: give it a volume, or learn one from images")
            return decide(self.network.probabilities(scan.mean(0, keepdim=True)).numpy(), self.labels)

        def answer(part: EncodedImage | Tensor) -> np.ndarray:
            encoded = part if isinstance(part, EncodedImage) else self.inferer.encode_prepared(part)
            return self.probabilities(show_encoded(self.inferer, encoded))

        return decide(answer_slices(self.inferer, image, answer), self.labels)

    def probabilities(self, shown: Shown) -> np.ndarray:
        """(L + 1, H, W) float32 of what is shown of an image."""
        shares = self.network.probabilities(shown.image, shown.foreground)
        return F.interpolate(shares[None], shown.size, mode="bilinear", align_corners=False)[0].numpy()

    def settle_window(self, window: tuple[float, float] | None) -> tuple[float, float] | None:
        """The (center, width) by which images have to be read, see ``to_unit_range``: that of the images it was learned from.

        Args:
            window: what was asked for; None: nothing. It holds where the head does not know its own, as those of before.

        Raises:
            ZeroSegError: another one than the head's was asked for.
        """
        if "window" not in self.facts:
            return window
        own = self.facts["window"]
        if window is not None and not np.array_equal(window, own):
            said = "without --window" if own is None else f"with --window {own[0]:g},{own[1]:g}"
            raise ZeroSegError(
                f"the head was learned {said} and is asked with another: leave --window out, or learn again"
            )
        return None if own is None else (own[0], own[1])

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the head; JSON-serialisable."""
        return {"labels": dict(self.labels), **self.facts}

    def save(self, folder: str | Path) -> None:
        """Write the head into a folder, where it takes the place of another; see ``store.write_folder``.

        Raises:
            ZeroSegError: the folder cannot be written to.
        """
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        config = {
            "zeroseg": __version__,
            "labels": self.labels,
            "labels_sha256": _labels_sha256(self.labels),
            "belongs_to": {} if self.of_volumes else _belongs_to(self.inferer),
            "network": {"classes": self.network.classes, "of_volumes": self.of_volumes},
            "facts": self.facts,
        }
        write_folder(Path(folder), tensors, config)

    @classmethod
    def load(cls, folder: str | Path, inferer: AttentionSegmentationInferer) -> LearnedHead:
        """Read a head.

        Args:
            folder: that ``save`` wrote.
            inferer: of the backbone and encoding settings it was learned with.

        Raises:
            WeightsError: there is none, it is damaged, or it belongs to another backbone or to other encoding settings.
        """
        folder = Path(folder)
        tensors, config = read_folder(folder)
        try:
            labels, described = dict(config["labels"]), config["network"]
            of_volumes, wanted = described.get("of_volumes", False), config["belongs_to"]
            own = {} if of_volumes else _belongs_to(inferer)
            if config["labels_sha256"] != _labels_sha256(labels):
                raise WeightsError(f"the labels of {folder.name} were changed after it was learned: learn it again")
            for name, value in own.items():
                if wanted[name] != value:
                    raise WeightsError(
                        f"the head in {folder.name} was learned with another {name.replace('_', ' ')} "
                        f"({_short(wanted[name])}, here {_short(value)}): use that one, or learn again"
                    )
            if described["classes"] != len(labels) + 1:
                raise WeightsError(f"the head in {folder.name} has not the classes of its labels: learn it again")
            # What it begins at is loaded with the weights.
            classes = described["classes"]
            shares = torch.ones(2, classes)
            network = VolumeNet(shares[0]) if of_volumes else FewShotNet(shares, float(tensors["network.found"]))
            network.load_state_dict({name.removeprefix("network."): value for name, value in tensors.items()})
        except WeightsError:
            raise
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise WeightsError(f"the head in {folder.name} is not one of this version: learn it again") from error
        return cls(inferer, network, labels, dict(config["facts"]))


def _belongs_to(inferer: AttentionSegmentationInferer) -> dict[str, Any]:
    """What a head can only be used with: SHA-256 of the backbone's weights, and every setting that shapes what is shown."""
    inferer.check()
    shaping = {**dict(inferer.encoding_key), "refine": inferer.refine, "refiner": inferer.refiner}
    settings = json.loads(json.dumps(shaping))
    return {"backbone": inferer.backbone.describe()["sha256"], **settings}


def _labels_sha256(labels: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else repr(value)
