"""Where studies come from: a folder that may hold DICOM series, or a DICOMweb server."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.datastore.utils.convert import binary_to_image, dicom_to_nifti
from monailabel.datastore.utils.dicom import dicom_web_upload_dcm
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom import dcmread
from pydicom.dataset import Dataset

from lib import rtstruct
from lib.mends import dicom_seg, fetching
from lib.mends.errors import Refused, hide, is_name
from lib.mends.storing import Storing, copy, is_listed
from lib.sources import CONVERTED, FETCHED, stamp
from zeroseg.errors import ZeroSegError
from zeroseg.io import atomic_path, find_cases, read_image, staged, to_nifti
from zeroseg.io.limits import leaves
from zeroseg.io.sniffing import sniff

logger = logging.getLogger(__name__)

EXTENSIONS = ("*.nii.gz", "*.nii", "*.nrrd", "*.mha", "*.png", "*.jpg", "*.jpeg", "*.bmp", "*.tif", "*.tiff", "*.dcm")

HEADERS = ".dicom"
"""Folder in a folder of studies for single slices of series, whose headers 3D Slicer sends beside a volume."""

TWIN = 2
"""Of the way twins are written: those that were written in another one are written anew."""

SHOWN_MODALITIES = ("CT", "MR", "CR", "DX", "US")
"""Shown of a DICOMweb server unless MONAI_LABEL_DICOMWEB_SEARCH_FILTER says otherwise; MONAI Label's default is CT alone."""
LIST_SECONDS = 10
"""A list of series is asked for again after so long; MONAI Label's two hours hide what was just stored."""


def holds_dicom(folder: Path) -> bool:
    """Whether the first file of a folder, by name, is DICOM; not where it may not be read (lost+found), or is gone."""
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        return bool(files) and sniff(files[0]) == "dicom"
    except OSError as error:
        logger.info("%s is left out: %s", folder.name, error.strerror)
        return False


def is_slice(file: Path) -> bool:
    """Whether a file is one DICOM slice of a series that has a place in the patient, and so no image by itself."""
    if sniff(file) != "dicom":
        return False
    header = dcmread(
        file, force=True, stop_before_pixels=True, specific_tags=["ImagePositionPatient", "NumberOfFrames"]
    )
    return "ImagePositionPatient" in header and int(header.get("NumberOfFrames") or 1) == 1


class FolderDatastore(Storing):
    """MONAI Label's folder datastore; a subfolder that holds a DICOM series is an image as well, named after the folder.

    It serves and writes images and masks inside its folder only: no links that leave it, no files of other kinds, which
    could be pages that run scripts in a viewer, or the datastore's own table.
    """

    def __init__(self, folder: str, auto_reload: bool = True, read_only: bool = False):
        self._converting = threading.Lock()
        self._seen: dict[str, int] | None = None
        hide(folder)
        super().__init__(folder, extensions=EXTENSIONS, auto_reload=auto_reload, read_only=read_only)

    def _list_files(self, path, patterns):
        suffixes = tuple(pattern.removeprefix("*") for pattern in patterns)
        names = [name for name in os.listdir(path) if is_listed(name)]
        found = {name: name for name in names if name.lower().endswith(suffixes)}
        if Path(path).resolve() == Path(self._datastore.image_path()).resolve():
            # Before they are looked into: what changes meanwhile is looked into again.
            self._seen = self._subfolders()
            folders = [p for p in (Path(path) / name for name in names) if p.is_dir() and p.name != "labels"]
            found |= {p.name: p.name for p in folders if not self._leaves(str(p)) and holds_dicom(p)}
        return {name: file for name, file in found.items() if not self._leaves(os.path.join(path, file))}

    def _subfolders(self) -> dict[str, int] | None:
        """Subfolder -> when files were added to it or removed last; what was seen before where the folder cannot be read now."""
        try:
            with os.scandir(self._datastore.image_path()) as entries:
                return {e.name: e.stat().st_mtime_ns for e in entries if e.is_dir() and not e.name.startswith(".")}
        except OSError:
            return self._seen

    def _look(self) -> None:
        """See DICOM folders that came or went: MONAI Label watches for files alone."""
        if self._auto_reload and self._seen is not None and self._subfolders() != self._seen:
            self.refresh()

    def list_images(self) -> list[str]:
        """As MONAI Label's, with the DICOM folders that are there now."""
        self._look()
        return super().list_images()

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """As ``list_images``, those without a label."""
        self._look()
        return super().get_unlabeled_images(label_tag, labels)

    def remove_image(self, image_id: str) -> None:
        """As MONAI Label's; with a DICOM folder goes its twin."""
        with self._converting:
            super().remove_image(image_id)
            for path in self._twin(image_id):
                path.unlink(missing_ok=True)
        self.refresh()

    def _leaves(self, path: str) -> bool:
        return leaves(Path(path), Path(self._datastore_path).resolve())

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """As MONAI Label's; one slice of a series is kept in ``HEADERS``, and is no image.

        3D Slicer sends such a slice beside a volume, for its header, where "Include DICOM files" is chosen.

        Raises:
            Refused: the file is of no image format, or its name would lead out of the folder.
        """
        self._check_new(image_id, image_filename, Path(self._datastore.image_path()))
        if is_slice(Path(image_filename)):
            folder = Path(self._datastore_path) / HEADERS
            folder.mkdir(exist_ok=True)
            copy(image_filename, folder / f"{image_id}.dcm")
            return image_id
        return super().add_image(image_id, image_filename, image_info)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As MONAI Label's.

        Raises:
            Refused: as for ``add_image``.
        """
        self._check_new(image_id, label_filename, Path(self._datastore.label_path(label_tag)))
        return super().save_label(image_id, label_filename, label_tag, label_info)

    def _check_new(self, name: str, file: str, folder: Path) -> None:
        formats = tuple(pattern[1:] for pattern in EXTENSIONS)
        if not file.lower().endswith(formats):
            raise Refused(f"a file named like that is no image: use one of {', '.join(formats)}")
        target = folder / self._filename(name, self._to_id(os.path.basename(file))[1])
        if not is_name(target.name) or not is_name(name) or self._leaves(str(target)):
            raise Refused(f"{name[:80]!r} is no valid name for a new file")

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """Path of a label; empty where there is none, or a link that leaves the folder in its place."""
        path = super().get_label_uri(label_id, label_tag)
        return "" if path and self._leaves(path) else path

    def get_image_uri(self, image_id: str) -> str:
        """Path of the image; of a DICOM folder the path of its NIfTI twin, because viewers download one file."""
        path = super().get_image_uri(image_id)
        if not path or self._leaves(path):
            return ""
        if not os.path.isdir(path):
            return path
        twin, made_of = self._twin(image_id)
        with self._converting:
            current = hashlib.sha256(repr((TWIN, stamp(Path(path)))).encode()).hexdigest()
            if not twin.is_file() or not made_of.is_file() or made_of.read_text() != current:
                write_twin(Path(path), twin)
                with atomic_path(made_of) as part:
                    part.write_text(current)
        return str(twin)

    def _twin(self, image_id: str) -> tuple[Path, Path]:
        """The NIfTI twin of a DICOM folder, and the stamp of what it was made of."""
        folder = Path(self._datastore_path) / CONVERTED
        return folder / f"{image_id}.nii.gz", folder / f"{image_id}.stamp"

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """As MONAI Label's; of a DICOM folder the path and the name of its twin, which ``get_image_uri`` makes."""
        info = super().get_image_info(image_id)
        if os.path.isdir(info.get("path", "")):
            twin = self._twin(image_id)[0]
            info |= {"path": str(twin), "name": twin.name}
        return info

    def _to_id(self, file):
        if os.path.isdir(os.path.join(self._datastore.image_path(), file)):
            return file, ""
        # MONAI Label knows extensions in small letters only.
        end = len(file) - len(super()._to_id(file.lower())[1])
        return file[:end], file[end:]


def write_twin(folder: Path, twin: Path) -> None:
    """Write a DICOM series, or one DICOM image, as NIfTI on the same voxel grid; see ``to_nifti`` for a tilted gantry.

    Raises:
        ZeroSegError: the folder cannot be read as one image, or the disk cannot be written to.
    """
    cases = find_cases(folder)
    if len(cases) > 1:
        raise ZeroSegError(f"{folder.name} holds {len(cases)} images: give every series a folder of its own")
    image = read_image(cases[0])
    rows, columns = image.pixel_spacing or (1.0, 1.0)
    affine = image.affine if image.is_volume else np.diag([-columns, -rows, 1.0, 1.0])
    array = image.array[0] if image.is_volume else image.array[0].T[:, :, None]
    whole = np.abs(array).max() < 2**15 and (array == np.rint(array)).all()
    with atomic_path(twin) as part:
        nib.save(to_nifti(array.astype(np.int16 if whole else np.float32), affine), part)


def search_filter() -> dict[str, Any]:
    """The filter the user set, else one that shows ``SHOWN_MODALITIES``."""
    if "MONAI_LABEL_DICOMWEB_SEARCH_FILTER" in os.environ:
        return settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER
    return {"Modality": list(SHOWN_MODALITIES)}


class StudyDatastore(DICOMWebDatastore, Storing):
    """MONAI Label's DICOMweb datastore with several modalities, a fresh list of series, and errors that say what is wrong.

    Args:
        client: of the DICOMweb server.
        search_filter: attribute -> value; a list under ``Modality`` is asked for one by one, because servers differ in how
            they take several at once.
        rest: as MONAI Label's.
    """

    def __init__(self, client, search_filter: dict[str, Any], **rest: Any):
        fetching.install()
        self._listed: tuple[float, list[str]] = (float("-inf"), [])
        # DICOM SEG -> the series it refers to.
        self._labelled: tuple[float, dict[str, str | None]] = (float("-inf"), {})
        super().__init__(client=client, search_filter=search_filter, **rest)
        (Path(self._datastore_path) / FETCHED).touch()
        hide(self._datastore_path)

    def list_images(self) -> list[str]:
        """Series instance UIDs that match the filter."""
        if time.monotonic() - self._listed[0] > LIST_SECONDS:
            chosen = self._search_filter.get("Modality")
            each = [{"Modality": m} for m in chosen] if isinstance(chosen, list) else [{}]
            found = [
                s for one in each for s in self._client.search_for_series(search_filters={**self._search_filter, **one})
            ]
            series = [str(Dataset.from_json(s)["SeriesInstanceUID"].value) for s in found]
            self._listed = time.monotonic(), list(dict.fromkeys(series))
        return self._listed[1]

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series whose label was submitted here, or that a DICOM SEG on the server refers to; MONAI Label's own list is two hours old."""
        if time.monotonic() - self._labelled[0] > LIST_SECONDS:
            known, of_seg = self._labelled[1], {}
            for one in self._client.search_for_series(search_filters={"Modality": "SEG"}):
                study, series = (one[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
                if series in known:
                    of_seg[series] = known[series]
                # None of a SEG that is just being stored, or removed: it is asked for again.
                elif metadata := self._client.retrieve_series_metadata(study, series):
                    referred = Dataset.from_json(metadata[0]).get("ReferencedSeriesSequence") or ()
                    of_seg[series] = str(referred[0].SeriesInstanceUID) if referred else None
            self._labelled = time.monotonic(), of_seg
        labelled = {*Storing.get_labeled_images(self), *self._labelled[1].values()}
        return [image for image in self.list_images() if image in labelled]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """The others."""
        labelled = set(self.get_labeled_images())
        return [image for image in self.list_images() if image not in labelled]

    def get_image_uri(self, image_id: str) -> str:
        """Path of the series as NIfTI; its DICOM files lie beside it.

        Raises:
            NotFound: the server has no such series.
            ZeroSegError: the series cannot be converted.
        """
        folder = Path(self._datastore.image_path()).resolve() / image_id
        nifti = folder.with_name(f"{image_id}.nii.gz")
        if not (fetching.is_whole(folder) and nifti.is_file()):
            with fetching.alone(folder.parent):
                fetching.fetch(image_id, folder, self._client, self._fetch_by_frame)
                if not nifti.is_file():
                    self._convert(image_id, folder, nifti)
        return str(nifti)

    def _convert(self, image_id: str, folder: Path, nifti: Path) -> None:
        try:
            made = dicom_to_nifti(str(folder))
        except RuntimeError as error:  # of ITK, whose last line names the cause
            cause = str(error).strip().splitlines()[-1]
            raise ZeroSegError(f"series {image_id} cannot be read: {cause}") from error
        info = {"ts": int(time.time()), "name": nifti.name, **self._dicom_info(image_id)}
        with staged(nifti.parent) as stage:
            shutil.move(made, stage / nifti.name)
        with self.turn:
            self._init_from_datastore_file()
            self._datastore.objects[image_id] = ImageLabelModel(image=DataModel(info=info, ext=".nii.gz"))
            self._update_datastore_file()

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """As MONAI Label's, which fetches a final label by the series of its DICOM SEG; by its image one that was submitted here.

        Raises:
            NotFound: the server has no such series.
        """
        if self._datastore.label(label_id, label_tag):
            return Storing.get_label_uri(self, label_id, label_tag)
        if label_tag == DefaultLabelTag.FINAL:
            folder = Path(self._datastore.label_path(label_tag)).resolve() / label_id
            with fetching.alone(folder.parent):
                fetching.fetch(label_id, folder, self._client, self._fetch_by_frame)
        return super().get_label_uri(label_id, label_tag, image_id)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Store a label, a final one as DICOM SEG as well, and as RTSTRUCT where ``label_info`` asks for it by ``rtstruct``.

        A task's own answer, saved by a batch, comes with ``params``.

        Raises:
            ZeroSegError: the label is empty, or cannot be written in that form; nothing is stored then.
        """
        dicom_seg.remember(label_info.get("params"))
        contours = None
        if label_tag == DefaultLabelTag.FINAL and label_info.get("rtstruct"):
            # MONAI Label takes OHIF's raw voxels apart only below.
            image = self.get_image_uri(image_id)
            mask = binary_to_image(image, label_filename) if label_filename.endswith(".bin") else label_filename
            series = Path(self._datastore.image_path()) / image_id
            contours = rtstruct.write(series, Path(mask), label_info.get("label_info") or ())
        saved = super().save_label(image_id, label_filename, label_tag, label_info, label_id)
        if contours is not None:
            dicom_web_upload_dcm(contours, self._client)
        return saved
