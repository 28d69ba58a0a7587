"""What is read of a file: an array with what is needed to interpret it, and to write a mask of the same geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from zeroseg.errors import ZeroSegError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the patient space of DICOM and ITK to that of NIfTI, which every affine here is in."""


@dataclass
class Image:
    """An image or volume with what is needed to interpret it and to write a mask of the same geometry.

    Attributes:
        array: float32, (C, H, W) for a 2-D image or (C, X, Y, Z) for a volume in the file's own voxel order; values as
            stored after the format's rescaling: HU for CT, 0..255 for 8 bits, 0..65535 for 16 bits. Never NaN or Inf.
        affine: (4, 4) float64, voxel index -> RAS mm; None for 2-D images.
        modality: DICOM modality (CT, MR, CR, DX, US, PT, OT, ...), ``RGB`` for colour pictures, or None when the file
            does not say. CT means that the values are HU.
        source: the files read; for a series in slice order, so that ``source[k]`` is ``array[..., k]``.
        kind: the kind of the case (see :class:`zeroseg.io.finding.Case`).
        bits: 8 or 16 when the file stores unsigned integers of that size without rescaling, else None.
        pixel_spacing: (row, column) distance in mm of a 2-D image, where known.
        header: NIfTI header of the input, None for other formats.
        file_shape: spatial shape of the array in the NIfTI file, e.g. (X, Y) for a single slice; None for others.
        notes: what was changed or dropped on the way in, one sentence each.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    modality: str | None = None
    source: tuple[Path, ...] = ()
    kind: str = "picture"
    bits: int | None = None
    pixel_spacing: tuple[float, float] | None = None
    header: nib.Nifti1Header | None = None
    file_shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_volume(self) -> bool:
        """True for (C, X, Y, Z), also with a single slice; False for (C, H, W)."""
        return self.array.ndim == 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a mask of this image: (H, W) or (X, Y, Z)."""
        return self.array.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size in mm along each axis of :attr:`shape`; None where the file does not give one."""
        sizes = self.pixel_spacing if self.affine is None else voxel_sizes(self.affine)
        if sizes is None or not all(math.isfinite(size) and size > 0 for size in sizes):
            return None
        return tuple(float(size) for size in sizes)

    @property
    def suffix(self) -> str:
        """Extension of masks of this image: ``.nii.gz`` for volumes, ``.png`` for 2-D images."""
        return ".nii.gz" if self.is_volume else ".png"


def without_shear(affine: np.ndarray) -> np.ndarray:
    """The affine with its third axis along the slice normal: what a qform, and readers built on ITK, can hold.

    Only series of a tilted gantry change by it: their slices appear stacked straight. The sform keeps the exact
    geometry.
    """
    x, y, z = affine[:3, :3].T
    normal = np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    straight = affine.copy()
    straight[:3, 2] = np.copysign(np.linalg.norm(z), normal @ z) * normal
    return straight


def same_place(affine: np.ndarray, image_affine: np.ndarray) -> bool:
    """Whether the affine of a mask is that of its image, to 0.01 mm; or that of its slices stacked straight, as programs built on ITK
    have it of a series of a tilted gantry."""
    return any(np.allclose(affine, one, atol=1e-2) for one in (image_affine, without_shear(image_affine)))


def check_same_grid(
    what: str,
    shape: Sequence[int],
    affine: np.ndarray | None,
    image_shape: Sequence[int],
    image_affine: np.ndarray | None,
) -> None:
    """Make sure that a mask lies on the grid of its image.

    Args:
        what: the mask, as the message names it.
        shape, affine: of the mask; shape without channels, affine (4, 4), voxel index -> RAS mm, or None where the file has none.
        image_shape, image_affine: of the image, likewise.

    Raises:
        ZeroSegError: the shapes differ, or both have an affine and these are not of the ``same_place``.
    """
    if tuple(shape) != tuple(image_shape):
        raise ZeroSegError(
            f"{what} has the shape {tuple(shape)}, the image {tuple(image_shape)}: they must be equal, save it on the image's own grid"
        )
    if affine is not None and image_affine is not None and not same_place(affine, image_affine):
        raise ZeroSegError(
            f"{what} has another affine than the image, so it lies elsewhere or is stored in another orientation: "
            "save it in the image's own geometry"
        )


def slice_affine(spacing: Sequence[float]) -> np.ndarray:
    """The affine of a 2-D image taken as one slice, (H, W, 1), shown the radiological way: rows run to the back, columns
    to the patient's left. Nothing in a picture says so; it is how axial slices are usually shown.

    Args:
        spacing: (row, column) distance in mm.

    Returns:
        (4, 4) float64: (row, column, 0) -> RAS mm.
    """
    row, column = spacing
    return np.array([[0, -column, 0, 0], [-row, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)


def bits_of(dtype: np.dtype) -> int | None:
    """8 or 16 for unsigned integers of that size, else None."""
    return {"u1": 8, "u2": 16}.get(np.dtype(dtype).str[1:])


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) -> (C, H, W) float32."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=np.float32)


def color_channels(path: Path, count: int) -> tuple[int, tuple[str, ...]]:
    """How many of ``count`` stored channels carry the image, and a note when alpha is dropped."""
    if count not in (1, 2, 3, 4):
        raise ZeroSegError(f"{path}: {count} channels; give gray or RGB images, one file per channel otherwise")
    return (count, ()) if count % 2 else (count - 1, ("alpha channel dropped",))
