"""Reading NRRD and MetaImage, through ITK."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from zeroseg.errors import ZeroSegError
from zeroseg.io.image import LPS_TO_RAS, Image, bits_of, color_channels
from zeroseg.io.limits import check_size, leaves
from zeroseg.io.sniffing import data_file_entry

# ITK's C++ warnings go straight to stderr; everything a user has to know is raised or logged from here instead. For :mod:`zeroseg.io.dicom` too.
sitk.ProcessObject_SetGlobalWarningDisplay(False)


def read_itk(path: Path) -> Image:
    """A NRRD or MetaImage file, or its header with the pixel file beside it."""
    with open(path, "rb") as file:
        is_nrrd = file.read(4) == b"NRRD"
    name = data_file_entry(path)
    # A header may name any file of the machine as its pixels; only one beside it is believed.
    elsewhere = name is not None and (Path(name).name != name or leaves(path.parent / name, path.parent.resolve()))
    if elsewhere or (name is not None and (name.upper().startswith("LIST") or "%" in name)):
        raise ZeroSegError(f"{path}: its pixels are in '{name}', not in one file beside it; save it as .nrrd or .mha")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    check_size(path, size, channels)
    if len(size) > 3 and math.prod(size[3:]) > 1:
        raise ZeroSegError(
            f"{path}: a {len(size)}-D image; only 2-D and 3-D images can be read: extract a volume first"
        )
    image = reader.Execute()
    if len(size) > 3:
        image = image[(slice(None),) * 3 + (0,) * (len(size) - 3)]
    count, notes = color_channels(path, channels)
    pixels = sitk.GetArrayViewFromImage(image)
    if np.iscomplexobj(pixels):
        raise ZeroSegError(f"{path}: complex values; save the magnitude as a real image first")
    pixels = pixels[..., None] if channels == 1 else pixels
    order = (3, 2, 1, 0) if len(size) > 2 else (2, 0, 1)  # (Z, Y, X, C) -> (C, X, Y, Z); (Y, X, C) -> (C, H, W)
    with np.errstate(over="ignore"):
        array = np.array(pixels.transpose(order)[:count], dtype=np.float32, order="C")
    modality = "RGB" if count == 3 else None
    if array.ndim == 3:
        column, row = image.GetSpacing()
        return Image(array, modality=modality, bits=bits_of(pixels.dtype), pixel_spacing=(row, column), notes=notes)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Image(array, affine=LPS_TO_RAS @ affine, modality=modality, bits=bits_of(pixels.dtype), notes=notes)
