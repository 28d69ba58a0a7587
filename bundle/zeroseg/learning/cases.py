"""Labelled images as they are given, and the slices and volumes that are learned from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zeroseg.attention.prepare import prepare
from zeroseg.errors import ZeroSegError
from zeroseg.learning.volumes import is_volume, seen_size, squeeze_volume

MOST_SLICES = 24
"""Slices read of all volumes together: each takes a pass of the frozen model."""
WITHOUT = 0.25
"""Share of a volume's slices that show no label, where it has such."""
SPAN = 3
"""Slices along each axis that the label of a volume spans at least; less is the label of a slice."""


@dataclass(frozen=True)
class Case:
    """A labelled image or volume.

    Attributes:
        image: (C, H, W) or (C, X, Y, Z), any channel count and value range, as the inferer takes it.
        label: integers of the same spatial shape; 0 is background.
    """

    image: Tensor | np.ndarray
    label: np.ndarray | Tensor


@dataclass(frozen=True)
class LabelledSlice:
    """A 2-D image to learn from.

    Attributes:
        image: (3, H, W) in [0, 1].
        classes: (H, W) int64; 0 background, k the k-th label by value.
    """

    image: Tensor
    classes: Tensor


def check_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """Names and values, ordered by value.

    Raises:
        ZeroSegError: there is none, a value is not a whole number of 1 to 255, or two names share one.
    """
    values = list(labels.values())
    if not values:
        raise ZeroSegError("no labels: name at least one, such as lesion=1")
    for name, value in labels.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= 255:
            raise ZeroSegError(
                f"label {name} has the value {value!r}: use whole numbers from 1 to 255 (0 is background)"
            )
    if len(set(values)) < len(values):
        raise ZeroSegError("two labels have the same value: give each its own")
    return {name: int(value) for name, value in sorted(labels.items(), key=lambda item: item[1])}


def to_tensor(image: Tensor | np.ndarray) -> Tensor:
    """A plain tensor, without what MONAI's carries along.

    Raises:
        ZeroSegError: it is neither (C, H, W) nor (C, X, Y, Z).
    """
    tensor = image.as_subclass(Tensor) if isinstance(image, Tensor) else torch.as_tensor(np.asarray(image))
    if tensor.ndim not in (3, 4):
        raise ZeroSegError(f"an image must be (C, H, W), a volume (C, X, Y, Z), not {tuple(tensor.shape)}")
    return tensor


def check_label(case: Case, labels: Mapping[str, int], which: str = "a case") -> np.ndarray:
    """The label of a case as integers.

    Raises:
        ZeroSegError: it has another shape than its image, holds no integers, or a value that no label has.
    """
    label = np.asarray(case.label)
    shape = tuple(to_tensor(case.image).shape[1:])
    if label.shape != shape:
        raise ZeroSegError(f"{which}: the label has shape {label.shape}, its image {shape}: they must be equal")
    if label.dtype.kind not in "bui" and not (np.isfinite(label).all() and (label == np.rint(label)).all()):
        raise ZeroSegError(f"{which}: the label must hold whole numbers")
    # Bool too, which would select instead of index.
    label = label.astype(np.int64)
    unknown = sorted({int(value) for value in np.unique(label)} - {0, *labels.values()})
    if unknown:
        known = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise ZeroSegError(f"{which}: the label holds the value {unknown[0]}, which is none of {known}")
    return label


def labelled_slices(cases: Sequence[Case], labels: Mapping[str, int], slice_axis: int) -> list[LabelledSlice]:
    """The 2-D images to learn from: images as they are, of volumes a number of slices.

    Args:
        cases: at least one.
        labels: from ``check_labels``.
        slice_axis: of volumes.

    Raises:
        ZeroSegError: there is no case, a label does not fit, or all are empty.
    """
    arrays = _classes(cases, labels)
    volumes = sum(array.ndim == 3 for array in arrays)
    share = max(2, MOST_SLICES // max(1, volumes))
    found = []
    for case, array in zip(cases, arrays, strict=True):
        image, classes = prepare(to_tensor(case.image)), torch.from_numpy(array)
        if array.ndim == 2:
            found.append(LabelledSlice(image, classes.long()))
            continue
        axis = slice_axis % 3
        for k in chosen_slices(np.moveaxis(array, axis, 0) > 0, share):
            # Copies: a view would keep the whole volume.
            found.append(LabelledSlice(image.select(axis + 1, k).clone(), classes.select(axis, k).long()))
    return found


def as_volumes(cases: Sequence[Case]) -> bool:
    """Whether all of them are volumes that are learned from as a whole: deep ones, and labelled in more than a slice or two, for what is
    labelled in those alone says nothing of the others."""
    return all(is_volume(tuple(case.label.shape)) and _is_deep(np.asarray(case.label) != 0) for case in cases)


def _is_deep(mask: np.ndarray) -> bool:
    """Whether (X, Y, Z) bool spans ``SPAN`` slices along each axis, or is empty."""
    spans = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return all(not len(at) or at[-1] - at[0] + 1 >= SPAN for at in spans)


def labelled_volumes(cases: Sequence[Case], labels: Mapping[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Volumes to learn from as a whole, squeezed to what is seen of them, one after the other, for they may be large.

    Args:
        cases: of which ``as_volumes`` holds.
        labels: as ``labelled_slices``.

    Yields:
        (1, X, Y, Z) float32 in [0, 1], and (L + 1, X, Y, Z) float32 shares of the classes, the background first.

    Raises:
        ZeroSegError: as ``labelled_slices``.
    """
    for case, classes in zip(cases, _classes(cases, labels), strict=True):
        size = seen_size(classes.shape)
        scan = squeeze_volume(prepare(to_tensor(case.image)).mean(0, keepdim=True), size)
        parts = [squeeze_volume(torch.from_numpy(classes == k)[None], size) for k in range(len(labels) + 1)]
        yield scan, torch.cat(parts)


def _classes(cases: Sequence[Case], labels: Mapping[str, int]) -> list[np.ndarray]:
    """Per case the number of every pixel's label, by value, as uint8.

    Raises:
        ZeroSegError: there is no case, a label does not fit, or all are empty.
    """
    if not cases:
        raise ZeroSegError("nothing to learn from: give at least one image with its label")
    table = np.zeros(256, np.uint8)
    table[list(labels.values())] = np.arange(1, len(labels) + 1)
    arrays = [table[check_label(case, labels, f"case {k + 1}")] for k, case in enumerate(cases)]
    if not any(array.any() for array in arrays):
        raise ZeroSegError("all labels are empty: label the object in at least one image")
    return arrays


def chosen_slices(label: np.ndarray, count: int) -> list[int]:
    """At most ``count`` slices of (slices, rows, columns) bool, evenly spread over those with a label and those without."""
    shown = label.any((1, 2))

    def spread(places: np.ndarray, most: int) -> list[int]:
        return places[np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))].tolist()

    without = spread(np.flatnonzero(~shown), max(1, round(WITHOUT * count)))
    return sorted([*without, *spread(np.flatnonzero(shown), count - len(without))])
