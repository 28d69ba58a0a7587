"""What a file holds, by its first bytes; the extension only says whether a file is worth opening."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from pathlib import Path

import nibabel as nib

from zeroseg.errors import ZeroSegError
from zeroseg.io.limits import leaves

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
KIND_OF_SUFFIX = {
    **dict.fromkeys(_PICTURE_SUFFIXES, "picture"),
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
    **dict.fromkeys(_ITK_SUFFIXES, "itk"),
    **dict.fromkeys(DICOM_SUFFIXES, "dicom"),
}
DATA_SUFFIXES = (".raw", ".zraw")
"""Of the pixel files of detached headers (.mhd, .nhdr): no case of their own."""
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", *TIFF_MAGIC)


def known_formats() -> str:
    """The formats, for messages."""
    return "PNG, JPEG, TIFF, BMP, NIfTI, NRRD, MHA/MHD or DICOM"


def suffix_of(path: Path) -> str:
    """The extension in lower case; ``.nii.gz`` is one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def kind_of(path: Path) -> str | None:
    """The kind of a file by content, else by extension; None: not an image as far as one can see."""
    try:
        content = sniff(path)
    except OSError:  # no permission, or gone: the extension stands, reading will report it
        content = None
    suffix = suffix_of(path)
    if suffix in KIND_OF_SUFFIX:
        return content or KIND_OF_SUFFIX[suffix]
    return "dicom" if content == "dicom" else None


def sniff(path: Path) -> str | None:
    """The kind of a file by its first bytes alone."""
    with open(path, "rb") as file:
        head = file.read(352)
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                head = file.read(352)
        except (OSError, EOFError, zlib.error):
            return None
        return "nifti" if nifti_class(head) else None
    if head[128:132] == b"DICM":
        return "dicom"
    if nifti_class(head):
        return "nifti"
    if head.startswith(b"NRRD") or head.lstrip().startswith((b"ObjectType", b"NDims")):
        return "itk"
    return "picture" if head.startswith(_PICTURE_MAGIC) else None


def nifti_class(head: bytes) -> type[nib.Nifti1Image] | None:
    """Nifti1Image or Nifti2Image by the header's size field and magic string; None: neither."""
    sizes = struct.unpack("<i", head[:4]) + struct.unpack(">i", head[:4]) if len(head) >= 4 else ()
    if 348 in sizes and head[344:348] in (b"n+1\0", b"ni1\0"):
        return nib.Nifti1Image
    if 540 in sizes and head[4:8] in (b"n+2\0", b"ni2\0"):
        return nib.Nifti2Image
    return None


def detached_data(path: Path, kind: str) -> tuple[Path, ...]:
    """The pixel file a text header (.mhd, .nhdr) names, where it exists; it belongs to the case."""
    try:
        name = data_file_entry(path) if kind == "itk" else None
    except (OSError, ZeroSegError):
        return ()
    if not name or Path(name).name != name:
        return ()
    data = path.parent / name
    try:
        inside = not leaves(data, path.parent.resolve()) and data.is_file()
    except OSError:  # a name too long to be one
        inside = False
    return (data,) if inside else ()


def data_file_entry(path: Path) -> str | None:
    """What a NRRD or MetaImage header says about where the pixels are: None for behind the header itself.

    Raises:
        ZeroSegError: the header has no end within its first 64 KiB, so that ITK could see what this function does not.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(64 * 1024)
    if head.startswith(b"NRRD"):
        head, end, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
        entry = re.search(rb"^data ?file:[ \t]*(.*?)[ \t]*$", head, re.MULTILINE | re.IGNORECASE)
        whole = bool(end or entry) or path.stat().st_size <= 64 * 1024
    else:  # MetaIO takes either sign
        entry = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", head, re.MULTILINE)
        whole = entry is not None
    if not whole:
        raise ZeroSegError(f"{path}: its header does not end within 64 KiB, or names no pixels; export it again")
    name = entry.group(1).decode("utf-8", "replace") if entry else ""
    return name if name and name.upper() != "LOCAL" else None
