"""Reading one case, whatever its format: pictures, NIfTI, NRRD, MetaImage and DICOM, with their geometry.

Values are returned as stored (HU for CT); see :mod:`zeroseg.io.intensity` for the way to [0, 1].
"""

from __future__ import annotations

from zeroseg.errors import ZeroSegError
from zeroseg.io.decoding import decoding
from zeroseg.io.dicom import read_dicom, read_series
from zeroseg.io.finding import Case
from zeroseg.io.image import Image
from zeroseg.io.itk import read_itk
from zeroseg.io.limits import check_finite
from zeroseg.io.nifti import read_nifti
from zeroseg.io.picture import read_picture


def read_image(case: Case) -> Image:
    """Read one case.

    Pictures: palettes, CMYK, 1-bit and others become gray or RGB; alpha is dropped (and noted); EXIF orientation is
    applied, so masks have the upright shape; 16-bit colour PNGs are read with 8 bits a channel; TIFFs of several pages
    are refused, because nothing in them says whether the pages are slices, channels or time.
    DICOM: MONOCHROME1 is inverted, so that more absorption is brighter throughout; palettes and YBR become RGB;
    multi-frame files are refused.

    Args:
        case: from :func:`find_cases`.

    Returns:
        The image; finite values, at least one pixel.

    Raises:
        ZeroSegError: the file is missing, empty, truncated, damaged, larger than :data:`zeroseg.io.limits.MAX_VOXELS`, has more
            dimensions than a volume, holds NaN or Inf, is compressed in a way no decoder here handles, or (a series)
            its slices do not form one regular volume. The message names the file and the remedy.
    """
    readers = {"picture": read_picture, "nifti": read_nifti, "itk": read_itk, "dicom": read_dicom}
    path = case.paths[0]
    with decoding(path):
        if path.stat().st_size == 0:
            raise ZeroSegError(f"{path}: the file is empty (0 bytes); copy or export it again")
        image = read_series(case.paths) if case.kind == "dicom_series" else readers[case.kind](path)
        check_finite(path, image.array)
    image.source = image.source or case.paths
    image.kind = case.kind
    return image
