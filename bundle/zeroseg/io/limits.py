"""How much a file may hold and where it may lie: checked by its header, before any of it is allocated."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zeroseg.errors import ZeroSegError

MAX_VOXELS = 512_000_000
"""Voxels (pixels times channels) a header may declare before the file is refused: 2 GB as float32."""
VOXELS_VARIABLE = "ZEROSEG_MAX_VOXELS"
"""Environment variable that moves it."""
PIXELS_VARIABLE = "ZEROSEG_MAX_PIXELS"
"""Environment variable that moves the limit on pixels of a picture, which is Pillow's: 89 million."""
MAX_EXTENSIONS = 1 << 24
"""Bytes of header extensions a NIfTI file may have; private notes, which nobody here reads."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def max_voxels() -> int:
    """Voxels (pixels times channels) a header may declare: ``ZEROSEG_MAX_VOXELS``, else :data:`MAX_VOXELS`.

    Raises:
        ZeroSegError: the variable is no positive whole number.
    """
    return limit_of(VOXELS_VARIABLE, MAX_VOXELS)


def limit_of(variable: str, default: int) -> int:
    """A limit that an environment variable can move.

    Raises:
        ZeroSegError: the variable is no positive whole number.
    """
    given = os.environ.get(variable, "").strip()
    if given and not (given.isascii() and given.isdigit() and int(given[:18]) > 0):
        raise ZeroSegError(f"the environment variable {variable} must be a positive whole number, not {given[:40]!r}")
    return int(given[:18]) if given else default


def check_size(path: Path, shape: Sequence[int], channels: int = 1) -> None:
    """Refuse empty and enormous arrays by the header, before any of it is allocated."""
    size = "x".join(str(int(n)) for n in shape)
    if not shape or min(shape) < 1:
        raise ZeroSegError(f"{path}: the header declares an image of zero size ({size}); export it again")
    limit = max_voxels()
    if math.prod(int(n) for n in shape) * channels > limit:
        raise ZeroSegError(
            f"{path}: {size} is more than the {limit / 10**6:g} million voxels accepted; "
            f"crop or downsample it first, or raise the limit by the environment variable {VOXELS_VARIABLE}"
        )


def check_finite(path: Path, array: np.ndarray) -> None:
    """Refuse values that are not finite."""
    # NaN passes through min: no mask array for sound images.
    if np.isfinite(array.min()) and np.isfinite(array.max()):
        return
    nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    raise ZeroSegError(
        f"{path}: {nan} NaN and {infinite} infinite values (as float32); replace them first, e.g. with the background "
        "value by numpy.nan_to_num"
    )


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path is a symbolic link, or lies behind one, that leads out of a folder or in circles.

    Args:
        path: any path.
        folder: resolved.
    """
    try:
        return not path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError, ValueError):  # a circle, before Python 3.13; a NUL in the name
        return True


def refuse_inflating(path: Path) -> None:
    """Refuse a DICOM file of the deflated transfer syntax that grows beyond all measure; pydicom inflates it whole.

    Raises:
        ZeroSegError: it does.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[128:132] != b"DICM" or _DEFLATED not in head:
            return
        file.seek(0)
        limit, grown = max_voxels(), 0
        try:
            file.seek(144 + struct.unpack("<I", head[140:144])[0])  # (0002,0000): the length of the meta group after it
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            while not inflate.eof and (data := inflate.unconsumed_tail or file.read(1 << 16)):
                grown += len(inflate.decompress(data, 1 << 20))
                if grown > limit:
                    raise ZeroSegError(
                        f"{path}: inflates to more than {limit / 10**6:g} MB; decompress it first, or raise the limit "
                        f"by the environment variable {VOXELS_VARIABLE}"
                    )
        except (zlib.error, struct.error):  # damaged: the parser will say so
            return
