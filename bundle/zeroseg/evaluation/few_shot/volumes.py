"""Learning from a few labelled volumes as a whole, beside what needs no learning or no network of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.backbones.convolution import use_onednn
from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.few_shot.neighbours import Neighbours
from zeroseg.evaluation.few_shot.plan import Answer, Plan, budget, decided, mask_alone, trained_unet
from zeroseg.evaluation.volume_baselines import otsu
from zeroseg.io import Case, check_same_grid, read_image, to_unit_range
from zeroseg.learning.cases import Case as LabelledCase
from zeroseg.learning.cases import labelled_volumes
from zeroseg.learning.fitting import BATCH, fit_volumes
from zeroseg.learning.volumes import change, is_volume


@dataclass(frozen=True)
class ReadVolume:
    """A labelled volume as it is learned from.

    Attributes:
        stem: name of the case.
        scan: (1, X', Y', Z') in [0, 1], squeezed.
        classes: (2, X', Y', Z') shares of background and object.
        truth: (X, Y, Z) bool.
        otsu: (X, Y, Z) bool, Otsu's threshold by the border rule.
    """

    stem: str
    scan: Tensor
    classes: Tensor
    truth: np.ndarray
    otsu: np.ndarray

    def enlarged(self, shares: Tensor) -> np.ndarray:
        """(classes, X', Y', Z') -> (classes, X, Y, Z)."""
        return F.interpolate(shares[None], self.truth.shape, mode="trilinear", align_corners=False)[0].numpy()


def read_volume(pair: tuple[Case, Case]) -> ReadVolume:
    """Read a pair of files.

    Raises:
        ZeroSegError: a file cannot be read, is no deep volume, or they do not fit.
    """
    image, mask = (read_image(case) for case in pair)
    check_same_grid(f"the mask {pair[1].paths[0]}", mask.shape, mask.affine, image.shape, image.affine)
    truth = (mask.array != 0).any(axis=0)
    if not is_volume(truth.shape):
        raise ZeroSegError(f"{pair[0].paths[0]}: too flat to be learned from as a whole")
    if not truth.any():
        raise ZeroSegError(f"{pair[1].paths[0]}: the mask is empty, so there is nothing to score against")
    unit = to_unit_range(image)
    ((scan, classes),) = labelled_volumes([LabelledCase(unit, truth.astype(np.uint8))], {"object": 1})
    return ReadVolume(pair[0].stem, scan, classes, truth, otsu(unit.mean(0)))


class ValueNeighbours:
    """Every voxel takes the label that most of the voxels of nearest value, in 256 steps, have in the given volumes."""

    def __init__(self, given: Sequence[ReadVolume], seed: int):
        labels = [(volume.classes[1] > 0.5).flatten().numpy() for volume in given]
        self._known = Neighbours([self._values(volume) for volume in given], labels, seed)

    @staticmethod
    def _values(volume: ReadVolume) -> np.ndarray:
        return 255 * volume.scan.flatten()[:, None].numpy()

    def __call__(self, volume: ReadVolume) -> np.ndarray:
        """(X, Y, Z) bool."""
        found = self._known(self._values(volume)).reshape(volume.scan.shape)
        return volume.enlarged(torch.from_numpy(found.astype(np.float32)))[0] > 0.5


class ScratchUNet3d:
    """MONAI's ``BasicUNet`` as it comes, from random weights: the same squeezed volumes, changes, loss and processor time as the head."""

    def __init__(self, given: Sequence[ReadVolume], seconds: float, seed: int):
        def look(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            one = given[int(torch.randint(len(given), (), generator=generator))]
            scan, classes = (values.expand(BATCH, *values.shape) for values in (one.scan, one.classes))
            return change(scan, classes, generator)

        self._network = trained_unet(3, 1, look, seconds, seed)

    @torch.inference_mode()
    def __call__(self, volume: ReadVolume) -> np.ndarray:
        """(X, Y, Z) bool."""
        # A batch of one goes to torch's slow kernel for small volumes.
        pair = volume.scan.expand(2, *volume.scan.shape)
        return volume.enlarged(self._network(pair)[0].softmax(0)).argmax(0) == 1


def volume_methods(given: Sequence[ReadVolume], plan: Plan, seed: int) -> Iterator[tuple[str, Answer[ReadVolume]]]:
    """One method after the other, fitted to the given volumes."""
    network, _ = fit_volumes([(v.scan, v.classes) for v in given], left=budget(plan.seconds), seed=seed)
    network = use_onednn(network).eval()
    yield "learned", lambda volume: decided(volume.enlarged(network.probabilities(volume.scan)))
    yield "Otsu", mask_alone(lambda volume: volume.otsu)
    yield "value neighbours", mask_alone(ValueNeighbours(given, seed))
    for name, seconds in plan.unets(len(given)).items():
        yield name, mask_alone(ScratchUNet3d(given, seconds, seed))
