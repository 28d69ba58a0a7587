"""Reading PNG, JPEG, TIFF and BMP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from zeroseg.errors import ZeroSegError
from zeroseg.io.image import Image, bits_of, channels_first, color_channels
from zeroseg.io.limits import PIXELS_VARIABLE, check_size, limit_of
from zeroseg.io.sniffing import TIFF_MAGIC

# Pillow's own number where another package has lifted it already.
_PILLOW_LIMIT = PILImage.MAX_IMAGE_PIXELS or 2**28 // 3

ORIENTATION = 274
"""TIFF and EXIF tag: 1 upright, 2 to 8 mirrored or turned."""
TURNED = "EXIF orientation applied: coordinates and mask refer to the upright image"
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def read_picture(path: Path) -> Image:
    """A picture, upright, as gray or RGB."""
    notes = []
    with open(path, "rb") as file:
        is_tiff = file.read(4) in TIFF_MAGIC
    PILImage.MAX_IMAGE_PIXELS = limit_of(PIXELS_VARIABLE, _PILLOW_LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            picture = PILImage.open(path, formats=("PNG", "JPEG", "TIFF", "BMP"))
    except (PILImage.DecompressionBombWarning, PILImage.DecompressionBombError) as error:
        raise ZeroSegError(
            f"{path}: more than the {PILImage.MAX_IMAGE_PIXELS / 10**6:.3g} million pixels accepted; "
            f"crop or downsample it first, or raise the limit by the environment variable {PIXELS_VARIABLE}"
        ) from error
    except PILImage.UnidentifiedImageError:
        # Sample formats Pillow does not know, e.g. float64 or several 16-bit channels.
        if is_tiff:
            return _read_tiff(path)
        raise
    with picture:
        check_size(path, picture.size[::-1])
        if isinstance(picture, TiffImageFile):
            _refuse_pages(path, getattr(picture, "n_frames", 1))
            if len(picture.getbands()) > 1 and max(picture.tag_v2.get(258, (8,))) > 8:
                return _read_tiff(path)  # Pillow would cut 16-bit colour down to 8 bits
        if picture.getexif().get(ORIENTATION, 1) not in (0, 1):
            notes.append(TURNED)
        upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        notes.append("alpha channel dropped")
    mode = upright.mode
    if mode in ("L", "1", "LA", "La"):
        upright = upright.convert("L")
    elif not mode.startswith(("I", "F")):
        upright = upright.convert("RGBA" if mode in ("PA", "RGBa") else mode).convert("RGB")
    pixels = np.asarray(upright)
    array = channels_first(pixels)
    modality = "RGB" if len(array) == 3 else None
    return Image(array, modality=modality, bits=bits_of(pixels.dtype), notes=tuple(notes))


def _refuse_pages(path: Path, pages: int) -> None:
    if pages > 1:
        raise ZeroSegError(
            f"{path}: a TIFF of {pages} pages; split it into one file per page, "
            "or save a volume as NIfTI with its spacing"
        )


def _read_tiff(path: Path) -> Image:
    """TIFFs whose samples Pillow cannot hold."""
    with tifffile.TiffFile(path) as file:
        _refuse_pages(path, len(file.pages))
        page = file.pages[0]
        check_size(path, page.shape)
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ZeroSegError(f"{path}: TIFF with axes {page.axes}; save it as a plain gray or RGB image")
        pixels, tag = page.asarray(), page.tags.get(ORIENTATION)
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    turn = _UPRIGHT.get(0 if tag is None else int(tag.value))
    count, notes = color_channels(path, 1 if pixels.ndim == 2 else pixels.shape[-1])
    if turn is not None:
        pixels, notes = np.ascontiguousarray(turn(pixels)), (TURNED, *notes)
    with np.errstate(over="ignore"):  # beyond float32: reported as infinite
        array = channels_first(pixels)[:count]
    return Image(array, modality="RGB" if count == 3 else None, bits=bits_of(pixels.dtype), notes=notes)
