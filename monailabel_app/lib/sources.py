"""Where an image comes from: a file, a DICOM series, or the DICOM files behind a NIfTI file that was made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zeroseg.attention.prepare import prepare
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image, to_unit_range

CONVERTED = ".converted"
"""Folder in a folder of studies that holds DICOM series as NIfTI, for viewers that download an image."""
FETCHED = ".fetched"
"""File that marks the folder of series fetched from a DICOMweb server."""


@dataclass
class OpenImage:
    """An image as read, and as the inferer takes it: (3, H, W) or (3, X, Y, Z) float32 in [0, 1]."""

    image: Image
    prepared: Tensor

    @property
    def unprepared(self) -> Tensor:
        """(C, H, W) or (C, X, Y, Z) float32, of which ``prepare`` makes ``prepared``."""
        return torch.from_numpy(to_unit_range(self.image))

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory."""
        return self.image.array.nbytes + self.prepared.untyped_storage().nbytes()


def source_of(path: Path) -> Path:
    """What to read for a datastore's path: the DICOM files a NIfTI file was converted from, where they are kept.

    They know the modality and the slices they are, which the NIfTI file does not. MONAI Label keeps ``<uid>.nii.gz`` beside
    the folder ``<uid>/`` of a DICOMweb series, and ``FolderDatastore`` keeps its conversions in a folder of their own. Any other
    folder beside a file may hold anything.
    """
    if not path.name.endswith(".nii.gz"):
        return path
    converted = path.parent.name == CONVERTED
    if not converted and not (path.parent / FETCHED).exists():
        return path
    folder = (path.parent.parent if converted else path.parent) / path.name.removesuffix(".nii.gz")
    return folder if folder.is_dir() and any(folder.iterdir()) else path


def stamp(path: Path) -> tuple:
    """What changes when a file, or one of a folder, does.

    The time of modification alone does not: copying sets it, clocks go wrong, and another patient's image may be as long.
    The inode and the time of its last change cannot be set by a user; stamps are compared for equality only, so that a
    clock that goes backwards does no harm.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(f.name, f.stat()) for f in files]
    return tuple((name, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_size) for name, s in found)


def read_source(path: Path) -> OpenImage:
    """Read an image file, a DICOM file, or a folder that holds one DICOM series.

    Raises:
        ZeroSegError: it cannot be read, or the folder holds several images.
    """
    cases = find_cases(path)
    if len(cases) > 1:
        names = ", ".join(case.stem for case in cases[:5])
        raise ZeroSegError(f"{path.name} holds {len(cases)} images ({names}): give one image or one series at a time")
    image = read_image(cases[0])
    return OpenImage(image, prepare(torch.from_numpy(to_unit_range(image))))
