"""MONAI Label writes DICOM SEG by dcmqi's tool and has no answer for an empty mask; until test_mends.py::test_dicom_seg.

That tool has to be downloaded and names MONAI Label as the algorithm, and an empty mask becomes a bare 500. Here the bundle's own
writer (highdicom) takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from lib.mends.files import temporary
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image, without_shear, write_dicom_seg

UNAIDED = ("segments", "auto", "tumor")
"""Rules that choose a mask without a person's clicks, box or text, as the bundle's own runs count them."""

_select: ContextVar[str | None] = ContextVar("select", default=None)


def install() -> None:
    """Put ``write`` in the place of MONAI Label's function, for answers (`output=dicom_seg`) and for labels saved."""
    import monailabel.datastore.dicom
    import monailabel.endpoints.infer

    for module in (monailabel.datastore.dicom, monailabel.endpoints.infer):
        module.nifti_to_dicom_seg = write


def remember(params: Mapping[str, Any] | None) -> None:
    """Say how the mask that this request writes next was made, because MONAI Label hands ``write`` the file alone.

    Args:
        params: of a task's answer; None for a mask that a person saves.
    """
    select = params.get("select") if isinstance(params, Mapping) else None
    _select.set(select if isinstance(select, str) else None)


def algorithm_type() -> str:
    """DICOM's word for the part a person had: AUTOMATIC only for a task's answer without a prompt. What a person saves was
    looked at, and perhaps changed, before."""
    return "AUTOMATIC" if _select.get() in UNAIDED else "SEMIAUTOMATIC"


def write(series: str, label: str, label_info: Sequence[dict[str, Any]] | None = None, *_: Any, **__: Any) -> str:
    """Write a mask as DICOM SEG that refers to its series.

    Args:
        series: folder of the series' files.
        label: the mask's file.
        label_info: what the client says of each label: ``name``, and ``idx``, its value in the mask, where given;
            without it the entries stand for the labels present, in order.

    Returns:
        Path of a temporary file.

    Raises:
        ZeroSegError: the mask is empty, or the series cannot carry a SEG.
    """
    folder = Path(series)
    image = read_image(find_cases(folder)[0])
    labels = on_grid(read_image(find_cases(Path(label))[0]), image)
    present = [int(v) for v in np.unique(labels) if v]
    if not present:
        raise ZeroSegError("the mask is empty, and DICOM has no SEG without a segment: ask for the image instead")
    path = temporary(".dcm")
    write_dicom_seg(image, labels, path, label_names=names(present, label_info or ()), algorithm_type=algorithm_type())
    return path


def names(present: Sequence[int], label_info: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Names of labels as the client gave them; DICOM allows 64 characters."""
    entries = [e for e in label_info if isinstance(e, dict)]
    named = {int(e["idx"]): e.get("name") for e in entries if str(e.get("idx", "")).isdigit()}
    if not named:
        named = {label: entry.get("name") for label, entry in zip(present, entries, strict=False)}
    return {label: str(name)[:64] for label, name in named.items() if name}


def on_grid(mask: Image, image: Image) -> np.ndarray:
    """A mask's labels on an image's voxel grid; nearest neighbour where the mask's own grid is another.

    Args:
        mask: as read from its file.
        image: the image it belongs to.

    Returns:
        uint8 labels of shape ``image.shape``.
    """
    labels = np.rint(mask.array[0]).clip(0, 255).astype(np.uint8)
    if not image.is_volume:
        labels = labels[:, :, 0].T if mask.is_volume else labels
        if labels.shape != image.shape:
            raise ZeroSegError(f"the mask has {labels.shape} pixels, its image {image.shape}")
        return labels
    # Viewers built on ITK stack the slices of a tilted gantry straight, and draw on them so.
    grids = (image.affine, without_shear(image.affine))
    if labels.shape == image.shape and any(np.allclose(mask.affine, grid, atol=1e-2) for grid in grids):
        return labels
    if mask.affine is None:
        raise ZeroSegError(f"the mask has {labels.shape} voxels and no geometry, its image {image.shape}")
    to_mask = np.linalg.inv(mask.affine) @ image.affine
    return ndimage.affine_transform(labels, to_mask[:3, :3], to_mask[:3, 3], image.shape, order=0)
