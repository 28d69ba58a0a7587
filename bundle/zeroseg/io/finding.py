"""Finding the images of a folder and naming them.

What a file holds is decided by its first bytes; the extension only says whether a file is worth opening, so a PNG named
``.jpg`` is a picture, and a text named ``.png`` is a case that will be reported as unreadable.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import pydicom
from pydicom.dataset import Dataset

from zeroseg.errors import ZeroSegError

logger = logging.getLogger(__name__)

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_KIND_OF_SUFFIX = {
    **dict.fromkeys(_PICTURE_SUFFIXES, "picture"),
    **dict.fromkeys((".nii", ".nii.gz"), "nifti"),
    **dict.fromkeys(_ITK_SUFFIXES, "itk"),
    **dict.fromkeys(_DICOM_SUFFIXES, "dicom"),
}
_DATA_SUFFIXES = (".raw", ".zraw")  # pixel files of detached headers (.mhd, .nhdr): no case of their own
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", *TIFF_MAGIC)
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
MAX_VOXELS = 512_000_000
"""Voxels (pixels times channels) a header may declare before the file is refused: 2 GB as float32."""
VOXELS_VARIABLE = "ZEROSEG_MAX_VOXELS"


@dataclass(frozen=True)
class Case:
    """One image to segment.

    Attributes:
        stem: name of the case, unique (also without regard to case) within one listing; output files start with it.
        paths: the files; one, a header with its pixel file, or the files of a DICOM series sorted by name.
        kind: ``picture`` (PNG, JPEG, TIFF, BMP), ``nifti``, ``itk`` (NRRD, MetaImage), ``dicom`` (one file) or
            ``dicom_series`` (slices of one volume).
    """

    stem: str
    paths: tuple[Path, ...]
    kind: str


def find_cases(dataset_dir: str | os.PathLike, exclude: str | os.PathLike | None = None) -> list[Case]:
    """List the images of a folder, or the one image a path names.

    Folders are searched recursively; hidden files, and symbolic links that leave the folder, are skipped. DICOM files
    are grouped by SeriesInstanceUID: a series whose files have positions in space is one volume, other series
    (X-ray views, ultrasound stills, secondary captures) are one 2-D case per file. Files of unknown extension that are
    not DICOM are left out with a logged warning.

    Args:
        dataset_dir: a folder, or one file (a DICOM file named alone is a 2-D image even if it belongs to a series).
        exclude: a folder inside ``dataset_dir`` to leave out, e.g. the folder results are written to.

    Returns:
        The cases in order of their paths. A stem two cases would share is made unique, for all of them, by the
        extension, the parent folder or the series number, so that it does not depend on the order of the files.

    Raises:
        ZeroSegError: the path does not exist, is a file of no known format, or is a folder without any image.
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise ZeroSegError(f"{root}: no such file or folder; check the path given as dataset_dir")
    if root.is_file():
        kind = _kind(root)
        if kind is None:
            raise ZeroSegError(f"{root}: not a known image format; give {_known_formats()}")
        return [Case(_safe(_stem(root, kind)), (root, *_detached_data(root, kind)), kind)]

    found: list[tuple[list[str], tuple[Path, ...], str]] = []  # names from plain to specific, files, kind
    dicom, unknown = [], []
    for path in _walk(root, Path(exclude) if exclude is not None else None):
        kind = _kind(path)
        if kind is None:
            if not path.name.lower().endswith(_DATA_SUFFIXES):
                unknown.append(path)
        elif kind == "dicom":
            dicom.append(path)
        else:
            found.append((_file_names(path, kind, root), (path, *_detached_data(path, kind)), kind))
    found += _group_dicom(dicom, root)
    if unknown:
        shown = ", ".join(str(path.relative_to(root)) for path in unknown[:5])
        logger.warning("ignored %d files of unknown format in %s: %s", len(unknown), root, shown)
    if not found:
        raise ZeroSegError(f"{root}: no image found in this folder; give {_known_formats()}")
    found.sort(key=lambda entry: entry[1][0])
    stems = _unique([[_safe(name) for name in names] for names, _, _ in found])
    return [Case(stem, paths, kind) for stem, (_, paths, kind) in zip(stems, found, strict=True)]


def _known_formats() -> str:
    return "PNG, JPEG, TIFF, BMP, NIfTI, NRRD, MHA/MHD or DICOM"


def _walk(root: Path, exclude: Path | None) -> Iterator[Path]:
    """Regular files below root in a fixed order, without hidden ones and without links that leave the folder."""
    inside = root.resolve()
    excluded = exclude.resolve() if exclude is not None else None

    def report(error: OSError) -> None:
        logger.warning("cannot list %s: %s", error.filename, error.strerror)

    for folder, subfolders, files in os.walk(root, onerror=report):  # does not follow links to folders
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != "." and Path(folder, name).resolve() != excluded
        )
        for name in sorted(files):
            path = Path(folder, name)
            if name[0] == ".":
                continue
            if leaves(path, inside):
                logger.warning("skipped %s: a symbolic link that leaves the folder", path)
            elif path.is_file():
                yield path


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


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _stem(path: Path, kind: str) -> str:
    """File name without its extension; DICOM files are often named by a UID, whose last part is no extension."""
    suffix = _suffix(path)
    known = suffix in (_DICOM_SUFFIXES if kind == "dicom" else _KIND_OF_SUFFIX)
    return path.name[: -len(suffix)] if suffix and known else path.name


def _kind(path: Path) -> str | None:
    """The kind of a file by content, else by extension; None: not an image as far as one can see."""
    try:
        content = sniff(path)
    except OSError:  # no permission, or gone: the extension stands, reading will report it
        content = None
    suffix = _suffix(path)
    if suffix in _KIND_OF_SUFFIX:
        return content or _KIND_OF_SUFFIX[suffix]
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


def _safe(name: str) -> str:
    """A name that is no path, no hidden file and one line: parts of it may come out of a DICOM header.

    Names of files are made of the same letters as before, unless they hold control characters or are no UTF-8.
    """
    kept = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    return "_" + kept[1:] if kept[:1] == "." else kept


def _file_names(path: Path, kind: str, root: Path) -> list[str]:
    stem, extension = _stem(path, kind), _suffix(path).replace(".", "")
    folders = path.parent.relative_to(root).parts or (root.resolve().name,)
    return [
        stem,
        f"{stem}_{extension}",
        f"{folders[-1]}_{stem}",
        "_".join((*folders, stem)),
        "_".join((*folders, stem, extension)),
    ]


def _unique(candidates: list[list[str]]) -> list[str]:
    """One name per list, unique without regard to case; whoever clashes moves on to a more specific name."""
    level = [0] * len(candidates)
    while True:
        names = [options[k] for options, k in zip(candidates, level, strict=True)]
        count = Counter(name.casefold() for name in names)
        movable = [
            i for i, name in enumerate(names) if count[name.casefold()] > 1 and level[i] + 1 < len(candidates[i])
        ]
        if not movable:
            break
        for i in movable:
            level[i] += 1
    taken: set[str] = set()
    for i, name in enumerate(names):  # what even the full path cannot tell apart (A_b.png beside A/b.png) is numbered
        number = 1
        while names[i].casefold() in taken or (number > 1 and names[i].casefold() in count):
            number += 1
            names[i] = f"{name}_{number}"
        taken.add(names[i].casefold())
    return names


def _detached_data(path: Path, kind: str) -> tuple[Path, ...]:
    """The pixel file a text header (.mhd, .nhdr) names, where it exists; it belongs to the case."""
    try:
        name = data_file_entry(path) if kind == "itk" else None
    except (OSError, ZeroSegError):
        return ()
    data = path.parent / name if name and Path(name).name == name else None
    try:
        inside = data is not None and not leaves(data, path.parent.resolve()) and data.is_file()
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
        whole = end or entry or path.stat().st_size <= 64 * 1024
    else:  # MetaIO takes either sign
        entry = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", head, re.MULTILINE)
        whole = entry
    if not whole:
        raise ZeroSegError(f"{path}: its header does not end within 64 KiB, or names no pixels; export it again")
    name = entry.group(1).decode("utf-8", "replace") if entry else ""
    return name if name and name.upper() != "LOCAL" else None


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


def _element(header: Dataset, keyword: str) -> object:
    """An element's value; None where it is missing or garbled."""
    try:
        return header.get(keyword)
    except Exception:  # pydicom converts on access, and raises whatever the value calls for
        return None


def _is_slice(header: Dataset) -> bool:
    placed = _element(header, "ImagePositionPatient") and _element(header, "ImageOrientationPatient")
    return bool(placed) and str(_element(header, "NumberOfFrames") or 1) == "1"


def _group_dicom(paths: Sequence[Path], root: Path) -> list[tuple[list[str], tuple[Path, ...], str]]:
    """Sort DICOM files into volumes (series of slices) and single images."""
    tags = ["SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "NumberOfFrames"]
    tags += ["ImagePositionPatient", "ImageOrientationPatient"]
    series: dict[str, list[tuple[Path, Dataset]]] = {}
    for path in paths:
        try:
            refuse_inflating(path)
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
            uid = str(header.get("SeriesInstanceUID") or path)
            if header.file_meta.get("MediaStorageSOPClassUID") == _DICOMDIR:
                continue
        except Exception:  # a damaged header: listed as a case of its own, so that reading can say what is wrong
            header, uid = Dataset(), str(path)
        series.setdefault(uid, []).append((path, header))

    entries = []
    for uid, members in series.items():
        slices = sum(_is_slice(header) for _, header in members)
        if slices < 2:
            entries += [(_file_names(path, "dicom", root), (path,), "dicom") for path, _ in members]
            continue
        files = tuple(sorted(path for path, _ in members))
        folder = Path(os.path.commonpath([path.parent for path in files]))
        parts = folder.relative_to(root).parts or (root.resolve().name or "series",)
        number = _element(members[0][1], "SeriesNumber")
        names = [parts[-1], f"{parts[-1]}_series{number}", "_".join(parts), f"{parts[-1]}_{uid}"]
        entries.append((names, files, "dicom_series"))
    return entries
