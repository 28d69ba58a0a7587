"""DICOM studies for the tests with a DICOM server: what is where in them is known in patient millimetres."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)
from scipy import ndimage

from phantoms import make_phantom
from phantoms3d import make_volume

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


def ct(folder: Path, size: int = 128, slices: int = 8) -> Series:
    """An oblique CT of a drawn abdomen that narrows along z, with a bright round mass from slice 2 on that ends before the last.

    Instance numbers and file names run against the order in space.
    """
    flat = make_phantom(1, size, "ct_abdomen").image[..., 0] / 255.0
    rng = np.random.default_rng(0)
    volume = np.empty((size, size, slices))
    for k in range(slices):
        scale = 1 + 0.02 * k  # of the sampling, so that the body shrinks
        centre = (size - 1) / 2
        volume[..., k] = ndimage.affine_transform(flat.T, np.eye(2) * scale, centre * (1 - scale), order=1, cval=0.02)
    i, j, k = np.ogrid[:size, :size, :slices]
    radius = np.sqrt(np.clip(1 - ((k - 4) / 2.6) ** 2, 0, 1)) * 0.1 * size
    mass = np.hypot(i - 0.33 * size, j - 0.47 * size) < radius
    volume[mass] = 0.75
    volume += rng.normal(0, 0.01, volume.shape)
    hounsfield = np.rint(volume * 400 - 160)  # the soft-tissue window of 40 +- 200 HU shows it as it was drawn
    affine = oblique((1.5, 1.2, 4.0), (20, -15), (60, 90, -30))
    return write(folder, "CT", hounsfield, affine, numbers=range(slices, 0, -1), object=mass)


def mr(folder: Path) -> Series:
    """The real brain MR inside nibabel, (33, 41, 25), with instance numbers in no order."""
    image = nib.load(Path(nib.__file__).parent / "tests" / "data" / "anatomical.nii")
    volume, affine = np.rint(image.get_fdata())[..., ::-1], image.affine.copy()  # right-handed, as DICOM is
    affine[:3, 3] += affine[:3, 2] * (volume.shape[2] - 1)
    affine[:3, 2] *= -1
    numbers = np.random.default_rng(0).permutation(volume.shape[2]) + 1
    return write(folder, "MR", volume, affine, numbers=numbers)


def cr(folder: Path) -> Series:
    """A drawn chest X-ray, 160 columns by 128 rows of 12 bits, stored MONOCHROME1: white is air."""
    flat = make_phantom(2, 160, "chest_xray").image[16:144, :, 0]
    volume = np.rint(flat.T[:, :, None] / 255.0 * 4095)
    return write(folder, "CR", volume, np.diag([-0.8, -0.6, 1.0, 1.0]))


def limb(folder: Path) -> Series:
    """A drawn CT of a limb with a solid soft tissue sarcoma, 3 mm voxels."""
    drawn = make_volume(10_000_003, ("solid",), "ct", "limb", True, 48)  # a seed that training never saw
    affine = np.array([[-3.0, 0, 0, 40], [0, -3.0, 0, 25], [0, 0, 3.0, -90], [0, 0, 0, 1]])
    values = np.rint(drawn.image).astype(np.int32)
    return write(folder, "CT", values, affine, range(1, values.shape[2] + 1), drawn.mask)


def write(folder: Path, modality: str, volume: np.ndarray, affine: np.ndarray, numbers=(1,), object=None) -> Series:
    """Write (X, Y, Z) integers as one file a slice.

    Args:
        folder: made.
        modality: CT (values are HU), MR, or CR (one slice, no place in the patient).
        volume: values.
        affine: voxel index -> RAS mm, right-handed; for a CR it only gives the pixel spacing.
        numbers: instance number of every slice, which is its file's name as well.
        object: see :class:`Series`.
    """
    folder.mkdir(parents=True)
    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    if modality != "CR" and not np.allclose(np.cross(axes[:, 0], axes[:, 1]), axes[:, 2]):
        raise ValueError("DICOM slices are stacked along the cross product of rows and columns: flip the volume")
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    instances = []
    for k, number in enumerate(numbers):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CLASSES[modality], generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{number:03}.dcm"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.Modality, ds.PatientID, ds.PatientName = modality, "zeroseg-test", f"{modality}^Phantom"
        ds.PatientBirthDate = ds.PatientSex = ds.AccessionNumber = ds.ReferringPhysicianName = ""
        ds.StudyID, ds.StudyDate, ds.StudyTime = "1", "20260102", "030405"
        ds.StudyDescription = ds.SeriesDescription = f"Test {modality}"
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


def _number(value: float) -> float:
    """A value whose decimal string has the 16 characters DICOM allows."""
    return float(f"{value:.8g}")
