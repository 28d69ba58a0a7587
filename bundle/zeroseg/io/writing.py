"""Writing results whole or not at all, in the geometry of the input."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image as PILImage

from zeroseg.errors import ZeroSegError
from zeroseg.io.image import Image, without_shear

if sys.platform != "win32":
    import fcntl

UNFINISHED = ".zeroseg-" + "[0-9a-f]" * 16 + "*"
"""Pattern of the names of files and folders that are not finished."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    The temporary file is hidden, keeps the extension (writers choose the format by it), is flushed to disk before it is
    renamed, and is removed on any exception, KeyboardInterrupt included. Missing folders are made. Only write in the
    block: an OSError raised there is reported as one of writing.

    Args:
        path: where the file shall be; an existing file is replaced.

    Yields:
        The temporary path to write to.

    Raises:
        ZeroSegError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    extension = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    temporary = path.parent / f".zeroseg-{secrets.token_hex(8)}{extension}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        folder = path.parent.parent if path.parent.match(UNFINISHED) else path.parent
        raise _cannot_write(path.name, folder, error) from error
    finally:
        with suppress(OSError):  # already renamed, or its folder never came to be
            temporary.unlink()


def _cannot_write(name: str, folder: Path, error: OSError) -> ZeroSegError:
    return ZeroSegError(
        f"cannot write {name} into the folder {folder} ({error.strerror or error}); "
        "check its permissions and the space left on the disk"
    )


@contextmanager
def staged(folder: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder inside another one, whose files move there together when the block ends without an exception.

    So files that belong to each other appear all or none; files of the same names are replaced. Only a process killed
    between two renamings can leave some of them, each whole.

    Args:
        folder: existing.

    Yields:
        The hidden folder; it is removed in the end, whatever happens.

    Raises:
        ZeroSegError: the folder cannot be written to.
    """
    folder = Path(folder)
    stage = folder / f".zeroseg-{secrets.token_hex(8)}"
    try:
        try:
            stage.mkdir()
        except OSError as error:
            raise _cannot_write("results", folder, error) from error
        yield stage
        for path in sorted(stage.iterdir()):
            try:
                os.replace(path, folder / path.name)
            except OSError as error:
                raise _cannot_write(path.name, folder, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def sole_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder for one run, and clear what killed runs left unfinished there.

    The hold is a lock on the folder itself, so it leaves no file and ends with the process however that ends. Where the
    file system knows no such locks (NFS, Windows) nothing is held or cleared; files still appear whole.

    Args:
        folder: existing.

    Raises:
        ZeroSegError: another run holds it.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ZeroSegError(f"another run writes into {folder}: wait for it, or give another output folder") from None
    except OSError:
        yield
        return
    try:
        remove_unfinished(folder)
        yield
    finally:
        os.close(handle)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what processes that were killed left unfinished; only for who holds the folder alone."""
    for path in Path(folder).glob(UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def write_mask(image: Image, labels: np.ndarray, path: str | os.PathLike) -> Path:
    """Write a label map: volumes as NIfTI uint8 with the affine and shape of the input, 2-D images as 8-bit PNG.

    For NIfTI input the header's qform, sform and pixel sizes are taken over bit for bit.

    Args:
        image: the image the labels belong to.
        labels: (H, W) or (X, Y, Z) integers or bool in 0..255, of shape ``image.shape``.
        path: target, ending in ``image.suffix`` (``.nii.gz`` or ``.png``).

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
        ValueError: shape, values or extension do not fit.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "bui" or (labels.size and (labels.min() < 0 or labels.max() > 255)):
        raise ValueError(f"labels must be integers in 0..255, not {labels.dtype}")
    return _write(image, labels.astype(np.uint8), path, intent="label")


def write_confidence(image: Image, confidence: np.ndarray, path: str | os.PathLike) -> Path:
    """Write a confidence map: volumes as NIfTI float32 in the input's geometry, 2-D images as 16-bit gray PNG.

    In the PNG, 0..65535 stands for 0..1; 16 bits keep steps of 1.5e-5, where 8 bits would merge close calls.

    Args:
        image: the image the map belongs to.
        confidence: (H, W) or (X, Y, Z) float in [0, 1], of shape ``image.shape``; values outside are clipped.
        path: target, ending in ``image.suffix`` (``.nii.gz`` or ``.png``).

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
        ValueError: shape or extension do not fit, or a value is not finite.
    """
    confidence = np.asarray(confidence, dtype=np.float32)
    if not np.isfinite(confidence).all():
        raise ValueError("confidence holds values that are not finite")
    confidence = confidence.clip(0, 1)
    if not image.is_volume:
        confidence = np.rint(confidence * 65535).astype(np.uint16)
    return _write(image, confidence, path, intent="none")


def write_map(image: Image, values: np.ndarray, stem: str | os.PathLike) -> Path:
    """Write a map of any range: volumes as NIfTI float32 in the input's geometry, 2-D images as float32 TIFF.

    Args:
        image: the image the map belongs to.
        values: (H, W) or (X, Y, Z) float, of shape ``image.shape``.
        stem: target without its extension, which is added: ``.nii.gz`` or ``.tif``.

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
        ValueError: the shape does not fit, or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the map holds values that are not finite")
    suffix = image.suffix if image.is_volume else ".tif"
    return _write(image, values, f"{stem}{suffix}", intent="none", suffix=suffix)


def _write(image: Image, data: np.ndarray, path: str | os.PathLike, intent: str, suffix: str | None = None) -> Path:
    path, suffix = Path(path), suffix or image.suffix
    if data.shape != image.shape:
        raise ValueError(f"the map has shape {data.shape}, its image {image.shape}")
    if not path.name.endswith(suffix):
        raise ValueError(f"{path.name}: must end in {suffix}")
    with atomic_path(path) as temporary:
        if image.is_volume:
            nib.save(_nifti(image, data, intent), temporary)
        else:
            PILImage.fromarray(data).save(temporary)
    return path


def to_nifti(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """A volume as NIfTI that readers built on ITK open too; the sform keeps the exact geometry of a tilted gantry.

    Args:
        data: (X, Y, Z).
        affine: (4, 4), voxel index -> RAS mm.
    """
    nifti = nib.Nifti1Image(data, affine)
    nifti.set_sform(affine, code="scanner")
    nifti.set_qform(without_shear(affine), code="scanner")
    nifti.header.set_xyzt_units("mm")
    return nifti


def _nifti(image: Image, data: np.ndarray, intent: str) -> nib.Nifti1Image:
    if image.affine is None:
        raise ValueError("a NIfTI file needs an affine, and the image has none")
    if image.header is None:
        nifti = to_nifti(data, image.affine)
    else:
        header = image.header.copy()
        header.extensions.clear()  # private notes of the input: not about the mask
        header.set_data_dtype(data.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0  # the display range of the image would hide the labels
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        nifti = image_class(data.reshape(image.file_shape or data.shape), image.affine, header)
    nifti.header.set_intent(intent)
    nifti.header["descrip"] = b"ZeroSeg"
    return nifti
