"""Volumes written as DICOM studies, for samples and tests: what is where in them is known in patient millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "CR": ComputedRadiographyImageStorage}
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class Series:
    """What was written.

    Attributes:
        folder: of its files.
        modality: CT, MR or CR.
        study: study instance UID.
        uid: series instance UID.
        instances: SOP instance UIDs in the order of the slices in space.
        affine: voxel index -> RAS mm; for a CR, which has no place in the patient, of the image as viewers load it.
        object: (X, Y, Z) bool, an object that a click finds; all False where none is known.
        volume: (X, Y, Z), the values a viewer shows.
    """

    folder: Path
    modality: str
    study: str
    uid: str
    instances: list[str]
    affine: np.ndarray
    volume: np.ndarray
    object: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def click(self) -> list[int]:
        """Voxel (i, j, k) of the object closest to its centre."""
        inside = np.argwhere(self.object)
        return inside[np.linalg.norm(inside - inside.mean(0), axis=1).argmin()].tolist()


def oblique(spacing: tuple[float, float, float], degrees: tuple[float, float], origin: tuple[float, float, float]):
    """A right-handed affine turned about two axes: (4, 4), voxel index -> RAS mm, with axes near those of LPS."""
    a, b = np.radians(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([-1, -1, 1]) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def write(
    folder: Path,
    modality: str,
    volume: np.ndarray,
    affine: np.ndarray,
    numbers: Sequence[int] = (1,),
    object: np.ndarray | None = None,
    name: str | None = None,
) -> Series:
    """Write (X, Y, Z) integers as one file a slice.

    Args:
        folder: made.
        modality: CT (values are HU), MR, or CR (one slice, no place in the patient).
        volume: values.
        affine: voxel index -> RAS mm, right-handed; for a CR it only gives the pixel spacing.
        numbers: instance number of every slice, which is its file's name as well.
        object: see :class:`Series`.
        name: of the study; its identifiers follow from it, so that the same study may be stored twice. None: they are new.
    """
    folder.mkdir(parents=True)
    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    if modality != "CR" and not np.allclose(np.cross(axes[:, 0], axes[:, 1]), axes[:, 2]):
        raise ValueError("DICOM slices are stacked along the cross product of rows and columns: flip the volume")
    study, series, frame = (uid_of(name, part) for part in ("study", "series", "frame"))
    instances = []
    for k, number in enumerate(numbers):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
            CLASSES[modality],
            uid_of(name, f"image {number}"),
        )
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{number:03}.dcm"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.Modality, ds.PatientID = modality, name or "zeroseg-test"
        ds.PatientName = name or f"{modality}^Phantom"
        ds.PatientBirthDate = ds.PatientSex = ds.AccessionNumber = ds.ReferringPhysicianName = ""
        ds.StudyID, ds.StudyDate, ds.StudyTime = "1", "20260102", "030405"
        ds.StudyDescription = ds.SeriesDescription = name or f"Test {modality}"
        ds.SeriesNumber, ds.InstanceNumber = 1, int(number)
        ds.Columns, ds.Rows = volume.shape[:2]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        pixels = volume[:, :, k].T
        if modality == "CR":
            ds.PhotometricInterpretation = "MONOCHROME1"
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
            ds.ImagerPixelSpacing = [_number(spacing[1]), _number(spacing[0])]
            ds.WindowCenter, ds.WindowWidth, pixels = 2048, 4096, 4095 - pixels
        else:
            ds.FrameOfReferenceUID, ds.SliceThickness = frame, _number(spacing[2])
            ds.ImageOrientationPatient = [_number(v) for v in (*axes[:, 0], *axes[:, 1])]
            ds.ImagePositionPatient = [_number(v) for v in (lps @ [0, 0, k, 1])[:3]]
            ds.PixelSpacing = [_number(spacing[1]), _number(spacing[0])]
            low, high = np.percentile(volume, [1, 99.5])
            ds.WindowCenter, ds.WindowWidth = round((low + high) / 2), round(high - low)
        if modality == "CT":
            ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType, pixels = -1024, 1, "HU", pixels + 1024
        ds.PixelData = pixels.astype("<u2" if modality == "CR" else "<i2").tobytes()
        ds.save_as(path, write_like_original=False)
        instances.append(str(ds.SOPInstanceUID))
    mass = np.zeros(volume.shape, bool) if object is None else object
    return Series(folder, modality, study, series, instances, affine, volume, mass)


def uid_of(name: str | None, part: str) -> str:
    """A DICOM identifier: that of a part of a named study, or a new one."""
    return generate_uid() if name is None else generate_uid(entropy_srcs=["zeroseg", name, part])


def _number(value: float) -> float:
    """A value whose decimal string has the 16 characters DICOM allows."""
    return float(f"{value:.8g}")
