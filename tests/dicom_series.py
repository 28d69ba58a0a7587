"""DICOM studies for the tests with a DICOM server."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from dicom_studies import Series, oblique, write
from phantom_studies import ORGANS_AFFINE
from phantom_studies import organs as make_organs
from phantoms import make_phantom
from phantoms3d import make_volume


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


def organs(folder: Path) -> Series:
    """A CT of the two organs of ``phantom_studies.organs``."""
    volume, _, _ = make_organs()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ORGANS_AFFINE
    return write(folder, "CT", volume, affine, range(1, volume.shape[2] + 1))
