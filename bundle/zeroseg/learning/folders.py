"""Folders of images and their masks as cases to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zeroseg.errors import ZeroSegError
from zeroseg.io import Case as File
from zeroseg.io import check_same_grid, find_cases, read_image, to_unit_range
from zeroseg.learning.cases import Case


@dataclass(frozen=True)
class Labelled:
    """What was read.

    Attributes:
        cases: to learn from, in the order of their names.
        files: (image, mask) of each.
        labels: name -> value in the cases' labels.
    """

    cases: list[Case]
    files: list[tuple[File, File]]
    labels: dict[str, int]


def read_folders(
    images: Path,
    masks: Path,
    labels: Mapping[str, int] | None = None,
    window: tuple[float, float] | None = None,
) -> Labelled:
    """Read the images of a folder that have a mask of the same name, without extension, in another.

    Args:
        images: folder or file.
        masks: folder or file; two files need not have the same name.
        labels: name -> value in the masks. None: where all masks hold one value beside 0, whatever it is, that is ``object``;
            else every value is a label of its own, named by its number.
        window: (center, width) of intensities, see ``to_unit_range``.

    Raises:
        ZeroSegError: a folder is missing, no mask has the name of an image, or a mask cannot be read or does not lie on its image's
            grid.
    """
    for path, option in ((images, "images"), (masks, "masks")):
        if not path.exists():
            raise ZeroSegError(f"{path}: no such file or folder; give the {option}")
    found, drawn = find_cases(images), find_cases(masks)
    truths = {file.stem: file for file in drawn}
    pairs = [(file, truths[file.stem]) for file in found if file.stem in truths]
    if images.is_file() and masks.is_file():
        pairs = [(found[0], drawn[0])]
    if not pairs:
        raise ZeroSegError(f"no mask in {masks} has the name of an image in {images} (without extension)")
    read = [_read_mask(mask) for _, mask in pairs]
    arrays, affines = [array for array, _ in read], [affine for _, affine in read]
    values = sorted({int(value) for array in arrays for value in np.unique(array)} - {0})
    if labels is None:
        if not values:
            raise ZeroSegError(f"all masks in {masks} are empty: label the object in at least one image")
        if len(values) == 1:
            # Masks are often written with 255.
            arrays, labels = [(array != 0).astype(np.uint8) for array in arrays], {"object": 1}
        else:
            labels = {f"label {value}": value for value in values}
    cases = []
    for (file, mask), array, affine in zip(pairs, arrays, affines, strict=True):
        image = read_image(file)
        check_same_grid(f"the mask {mask.paths[0].name}", array.shape, affine, image.shape, image.affine)
        cases.append(Case(to_unit_range(image, window), array))
    return Labelled(cases, pairs, dict(labels))


def _read_mask(file: File) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) or (X, Y, Z) integers, and the affine of a volume.

    Raises:
        ZeroSegError: it is a colour picture, or holds values that are no labels.
    """
    image = read_image(file)
    array = image.array
    if len(array) > 1 and not all(np.array_equal(array[0], other) for other in array[1:3]):
        raise ZeroSegError(f"{file.paths[0].name}: a mask must hold one value per pixel, and this is a colour picture")
    mask = array[0]
    if not (np.isfinite(mask).all() and (mask == np.rint(mask)).all() and mask.min() >= 0 and mask.max() <= 255):
        raise ZeroSegError(f"{file.paths[0].name}: a mask must hold whole numbers from 0 to 255")
    return mask.astype(np.uint8), image.affine


def parse_labels(given: Sequence[str]) -> dict[str, int] | None:
    """``name=value`` pairs; None without any.

    Raises:
        ZeroSegError: one is no such pair, or a name comes twice.
    """
    labels: dict[str, int] = {}
    for pair in given:
        name, separator, value = pair.partition("=")
        if not separator or not name.strip() or not value.strip().isdigit():
            raise ZeroSegError(f"--label takes NAME=VALUE, such as lesion=1, not {pair!r}")
        if name.strip() in labels:
            raise ZeroSegError(f"--label names {name.strip()} twice")
        labels[name.strip()] = int(value)
    return labels or None
