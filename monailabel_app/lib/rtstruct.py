"""Contours of a label as DICOM RTSTRUCT, by rt-utils, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lib.mends.dicom_seg import names, on_grid
from lib.mends.files import temporary
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases, read_image


def available() -> bool:
    """Whether the libraries that write it are there."""
    return find_spec("rt_utils") is not None and find_spec("cv2") is not None


def write(series: Path, label: Path, label_info: Sequence[dict[str, Any]] = ()) -> str:
    """Write the labels as contours that refer to the slices of their series; they run through the centres of the outermost pixels.

    Args:
        series: folder of the series' files.
        label: the label map's file.
        label_info: names of the labels, as for a DICOM SEG.

    Returns:
        Path of a temporary file.

    Raises:
        ZeroSegError: rt-utils is missing, the label map is empty, the series is no volume, or its pixels are not square, whose sides
            rt-utils 1.2.7 confuses.
    """
    if not available():
        raise ZeroSegError("this server writes no RTSTRUCT: pip install --no-deps rt-utils")
    from rt_utils import RTStructBuilder

    image = read_image(find_cases(series)[0])
    labels = on_grid(read_image(find_cases(label)[0]), image)
    present = [int(v) for v in np.unique(labels) if v]
    if not present:
        raise ZeroSegError("the mask is empty: there are no contours to write")
    if not image.is_volume:
        raise ZeroSegError("contours belong to a series with a place in the patient: save a DICOM SEG alone")
    struct = RTStructBuilder.create_new(dicom_series_path=str(series))
    rows, columns = (float(v) for v in struct.series_data[0].PixelSpacing)
    if not np.isclose(rows, columns, rtol=1e-4):
        raise ZeroSegError("no RTSTRUCT, because the pixels are not square: save a DICOM SEG alone")
    places = {_uid(file): k for k, file in enumerate(image.source)}
    order = [places[str(one.SOPInstanceUID)] for one in struct.series_data]
    named = names(present, label_info)
    for value in present:
        # (X, Y, Z) -> (rows, columns, slices), the slices in the order of rt-utils.
        mask = (labels == value).transpose(1, 0, 2)[..., order]
        # Holes are cut open, because a contour has none.
        struct.add_roi(mask=mask, name=named.get(value, f"Segment {value}"), use_pin_hole=True)
    struct.set_series_description("ZeroSeg contours")
    path = temporary(".dcm")
    struct.save(path)
    return path


def _uid(file: Path) -> str:
    import pydicom

    return str(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
