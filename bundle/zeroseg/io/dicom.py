"""Reading DICOM: one image, or the slices of a series as one volume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset

from zeroseg.errors import ZeroSegError
from zeroseg.io.decoding import decoding
from zeroseg.io.dicom_header import dicom_header, is_compressed, transfer_syntax
from zeroseg.io.image import LPS_TO_RAS, Image, bits_of, channels_first
from zeroseg.io.limits import check_size

logger = logging.getLogger(__name__)

_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def _dicom_pixels(path: Path, header: Dataset) -> np.ndarray:
    """(H, W) or (H, W, 3) as GDCM decodes them: rescaled, MONOCHROME1 inverted, palette and YBR turned into RGB."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        pixels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        if not is_compressed(header):
            raise
        syntax = transfer_syntax(header)
        raise ZeroSegError(
            f"{path}: no decoder here handles its transfer syntax {syntax.name} ({syntax}), or its data are damaged; "
            "decompress it first, e.g. with gdcmconv --raw"
        ) from error
    return pixels.reshape(pixels.shape[1:]) if pixels.ndim > 2 and pixels.shape[0] == 1 else pixels


def _dicom_modality(header: Dataset) -> str | None:
    modality = str(header.get("Modality") or "") or None
    is_hu = header.get("SOPClassUID") == _CT_STORAGE or "RescaleIntercept" in header
    return "OT" if modality == "CT" and not is_hu else modality  # screen captures of CT hold gray values, not HU


def read_dicom(path: Path) -> Image:
    """One DICOM file as a 2-D image, even if it belongs to a series."""
    header = dicom_header(path)
    pixels = _dicom_pixels(path, header)
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    return Image(
        channels_first(pixels),
        modality=_dicom_modality(header),
        bits=bits_of(pixels.dtype),
        pixel_spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
    )


def read_series(paths: Sequence[Path]) -> Image:
    """One volume from the slices of a series, in the order of their positions along the slice normal."""
    folder = paths[0].parent
    headers = []
    for path in paths:
        with decoding(path):
            headers.append(dicom_header(path))
    for path, header in zip(paths, headers, strict=True):
        if not (header.get("ImagePositionPatient") and header.get("ImageOrientationPatient")):
            raise ZeroSegError(
                f"{path}: a slice without position or orientation in its series; move it out of {folder}"
            )

    def differs(what: str) -> ZeroSegError:
        return ZeroSegError(
            f"{folder}: the slices of series {headers[0].SeriesInstanceUID} differ in {what} "
            "(a scout or several stacks?); keep one stack per folder and give one folder at a time"
        )

    layout = {(header.Rows, header.Columns, int(header.get("SamplesPerPixel") or 1)) for header in headers}
    if len(layout) > 1:
        raise differs("size")
    orientations = np.array([header.ImageOrientationPatient for header in headers], dtype=np.float64)
    if not np.allclose(orientations, orientations[0], atol=1e-3):
        raise differs("orientation")
    pixel_sizes = np.array([header.get("PixelSpacing") or (1.0, 1.0) for header in headers], dtype=np.float64)
    if not np.allclose(pixel_sizes, pixel_sizes[0], rtol=1e-3):
        raise differs("pixel spacing")

    along_row, along_column = orientations[0, :3], orientations[0, 3:]
    positions = np.array([header.ImagePositionPatient for header in headers], dtype=np.float64)
    depth = positions @ np.cross(along_row, along_column)
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    if gaps.min() < 1e-3:
        raise ZeroSegError(
            f"{folder}: several slices of series {headers[0].SeriesInstanceUID} at one position "
            "(phases, echoes or copies?); keep one volume per folder and give one folder at a time"
        )
    notes: tuple[str, ...] = ()
    if gaps.max() - gaps.min() > 0.01 * np.median(gaps):
        notes = (f"uneven slice spacing, {gaps.min():.3g} to {gaps.max():.3g} mm: distances along z are approximate",)
        logger.warning("%s: %s", folder, notes[0])

    rows, columns, channels = layout.pop()
    check_size(folder, (columns, rows, len(paths)), channels)
    sorted_paths = tuple(paths[i] for i in order)
    array, bits = np.empty(0, np.float32), set()
    for k, i in enumerate(order):
        with decoding(paths[i]):
            pixels = _dicom_pixels(paths[i], headers[i])
            slice_ = channels_first(pixels).swapaxes(1, 2)  # (C, rows, columns) -> (C, X, Y)
        if k == 0:
            array = np.empty((*slice_.shape, len(paths)), dtype=np.float32)
        array[..., k] = slice_
        bits.add(bits_of(pixels.dtype))

    affine = np.eye(4)
    affine[:3, 0] = along_row * pixel_sizes[0, 1]
    affine[:3, 1] = along_column * pixel_sizes[0, 0]
    # From first to last, which keeps the shear of a tilted gantry.
    affine[:3, 2] = (positions[order[-1]] - positions[order[0]]) / (len(paths) - 1)
    affine[:3, 3] = positions[order[0]]
    return Image(
        array,
        affine=LPS_TO_RAS @ affine,
        modality=_dicom_modality(headers[0]),
        source=sorted_paths,
        bits=bits.pop() if len(bits) == 1 else None,
        notes=notes,
    )
