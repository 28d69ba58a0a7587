"""Small studies for the app's tests: an object that no flip, transposition or shift leaves in its place."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from zeroseg.evaluation.annotator import next_click_3d

SHAPE = (48, 40, 6)
OBJECT = (slice(8, 20), slice(22, 34), slice(2, 5))
"""Voxels (i, j, k) of the object, off every centre."""
CLICK = [14, 28, 3]
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def phantom() -> np.ndarray:
    """(48, 40, 6) HU: a bright block, a darker one elsewhere, on soft tissue with a little noise."""
    volume = np.random.default_rng(0).normal(0, 4, SHAPE)
    volume[OBJECT] += 180
    volume[30:42, 6:14, 1:5] -= 120
    return np.rint(volume)


ORGANS = ("layered", "touching")
ORGANS_AFFINE = np.diag([1.2, 1.2, 1.5, 1.0])


def organs() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[int]]]:
    """Two organs of which one click cannot say where they end: one in two layers, one beside another that is as bright.

    Returns:
        (64, 48, 24) HU; name -> (64, 48, 24) bool; name -> the voxel of a first click, in the inner layer and in the lower organ.
    """
    volume = np.random.default_rng(0).normal(0, 4, (64, 48, 24))

    def ellipsoid(centre, radii) -> np.ndarray:
        grid = np.ogrid[tuple(slice(n) for n in volume.shape)]
        return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1

    layered, inner = ellipsoid((20, 22, 11), (13, 14, 8)), ellipsoid((18, 24, 10), (6, 7, 4))
    lower, upper = ellipsoid((48, 24, 7), (9, 10, 6)), ellipsoid((48, 24, 16), (9, 10, 6))
    volume[layered] += 126
    volume[inner] += 54
    volume[lower | upper] += 150
    masks = {"layered": layered, "touching": lower & ~upper}
    return np.rint(volume), masks, {"layered": [18, 24, 10], "touching": [48, 24, 6]}


def correction(mask: np.ndarray, truth: np.ndarray, clicked: int) -> tuple[list[int], int]:
    """The next click of an annotator who looks at other slices than the one clicked: voxel, and 1 (object) or 0."""
    elsewhere = np.arange(truth.shape[2]) != clicked
    following = next_click_3d(mask & elsewhere, truth & elsewhere)
    assert following is not None, "nothing is wrong in other slices"
    return [int(v) for v in following[0]], following[1]


def oblique() -> np.ndarray:
    """A right-handed affine that is no permutation of the axes."""
    a, b = np.radians(25), np.radians(-15)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([1.5, 1.2, 3.0])
    affine[:3, 3] = [-40, 12, 77]
    return affine


def write_series(folder: Path, volume: np.ndarray) -> None:
    """Write (X, Y, Z) HU as a CT series whose file names and instance numbers say nothing about the order in space."""
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    order = np.random.default_rng(1).permutation(volume.shape[2])
    for k in range(volume.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_STORAGE, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{order[k]}.dcm"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.SOPClassUID, ds.SOPInstanceUID = CT_STORAGE, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.Modality, ds.PatientID, ds.PatientName = "CT", "phantom", "Phantom"
        ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.StudyID = ""
        ds.ReferringPhysicianName = ""
        ds.SeriesNumber, ds.InstanceNumber = 1, int(order[k]) + 1
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-30.0, -20.0, 5.0 + 3.0 * k]
        ds.PixelSpacing, ds.SliceThickness = [1.2, 1.5], 3.0
        ds.Rows, ds.Columns = volume.shape[1], volume.shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
        ds.PixelData = (volume[:, :, k].T + 1024).astype("<i2").tobytes()
        ds.save_as(path, write_like_original=False)


def picture() -> np.ndarray:
    """(40, 48, 3) uint8, the phantom's middle slice in pink."""
    gray = np.clip((phantom()[:, :, 3].T + 160) / 400, 0, 1)
    return np.rint(gray[..., None] * np.array([255, 190, 200])).astype(np.uint8)


def write_studies(folder: Path) -> Path:
    """A folder of studies: flipped and oblique NIfTI, NRRD, a DICOM series, PNG and JPEG, and a long volume."""
    import nrrd

    folder.mkdir(parents=True)
    volume = phantom().astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-1.5, 1.2, 3.0, 1.0])), folder / "flipped.nii.gz")
    nib.save(nib.Nifti1Image(volume, oblique()), folder / "oblique.nii.gz")
    nib.save(nib.Nifti1Image(np.tile(volume, (1, 1, 8)), np.eye(4)), folder / "long.nii.gz")
    nrrd.write(
        str(folder / "scan.nrrd"),
        volume,
        {"space": "left-posterior-superior", "space directions": np.diag([1.5, 1.2, 3.0])},
    )
    write_series(folder / "series", phantom())
    Image.fromarray(picture()).save(folder / "photo.png")
    Image.fromarray(picture()).resize((96, 80)).save(folder / "picture.jpg", quality=95)
    return folder
