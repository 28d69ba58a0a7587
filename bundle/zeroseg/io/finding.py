"""Finding the images of a folder and naming them.

What a file holds is decided by its first bytes, see :mod:`zeroseg.io.sniffing`: a PNG named ``.jpg`` is a picture, and a
text named ``.png`` is a case that will be reported as unreadable.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from zeroseg.errors import ZeroSegError
from zeroseg.io.limits import leaves, refuse_inflating
from zeroseg.io.sniffing import (
    DATA_SUFFIXES,
    DICOM_SUFFIXES,
    KIND_OF_SUFFIX,
    detached_data,
    kind_of,
    known_formats,
    suffix_of,
)

logger = logging.getLogger(__name__)

_DICOMDIR = "1.2.840.10008.1.3.10"


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
        kind = kind_of(root)
        if kind is None:
            raise ZeroSegError(f"{root}: not a known image format; give {known_formats()}")
        return [Case(_safe(_stem(root, kind)), (root, *detached_data(root, kind)), kind)]

    found: list[tuple[list[str], tuple[Path, ...], str]] = []  # names from plain to specific, files, kind
    dicom, unknown = [], []
    for path in _walk(root, Path(exclude) if exclude is not None else None):
        kind = kind_of(path)
        if kind is None:
            if not path.name.lower().endswith(DATA_SUFFIXES):
                unknown.append(path)
        elif kind == "dicom":
            dicom.append(path)
        else:
            found.append((_file_names(path, kind, root), (path, *detached_data(path, kind)), kind))
    found += _group_dicom(dicom, root)
    if unknown:
        shown = ", ".join(str(path.relative_to(root)) for path in unknown[:5])
        logger.warning("ignored %d files of unknown format in %s: %s", len(unknown), root, shown)
    if not found:
        raise ZeroSegError(f"{root}: no image found in this folder; give {known_formats()}")
    found.sort(key=lambda entry: entry[1][0])
    stems = _unique([[_safe(name) for name in names] for names, _, _ in found])
    return [Case(stem, paths, kind) for stem, (_, paths, kind) in zip(stems, found, strict=True)]


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


def _stem(path: Path, kind: str) -> str:
    """File name without its extension; DICOM files are often named by a UID, whose last part is no extension."""
    suffix = suffix_of(path)
    known = suffix in (DICOM_SUFFIXES if kind == "dicom" else KIND_OF_SUFFIX)
    return path.name[: -len(suffix)] if suffix and known else path.name


def _safe(name: str) -> str:
    """A name that is no path, no hidden file and one line: parts of it may come out of a DICOM header.

    Names of files are made of the same letters as before, unless they hold control characters or are no UTF-8.
    """
    kept = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    return "_" + kept[1:] if kept[:1] == "." else kept


def _file_names(path: Path, kind: str, root: Path) -> list[str]:
    stem, extension = _stem(path, kind), suffix_of(path).replace(".", "")
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

    entries: list[tuple[list[str], tuple[Path, ...], str]] = []
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
