"""Reading NIfTI-1 and NIfTI-2."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from zeroseg.errors import ZeroSegError
from zeroseg.io.image import Image, bits_of, color_channels
from zeroseg.io.limits import MAX_EXTENSIONS, check_size
from zeroseg.io.sniffing import nifti_class


def read_nifti(path: Path) -> Image:
    """A NIfTI file, zipped or not, as a volume; a 2-D one as a volume of one slice."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open  # by content: .nii may be zipped, .nii.gz plain
    with opener(path, "rb") as stream:
        head = stream.read(544)
        image_class = nifti_class(head[:352])
        if image_class is None:
            raise ZeroSegError(f"{path}: not a NIfTI file (wrong header); export it again")
        _check_extensions(path, image_class, head)
        stream.seek(0)
        nifti = image_class.from_stream(stream)
        shape, dtype = nifti.shape, nifti.get_data_dtype()
        check_size(path, shape, channels=len(dtype.names or "1"))
        if len(shape) == 4 and shape[3] > 1:
            raise ZeroSegError(
                f"{path}: 4-D NIfTI with {shape[3]} volumes (time series?); split it into one file per volume first"
            )
        if len(shape) not in (2, 3, 4):
            raise ZeroSegError(
                f"{path}: {len(shape)}-D NIfTI; only 2-D and 3-D images can be read: extract a volume first"
            )
        if not np.isfinite(nifti.affine).all():
            raise ZeroSegError(f"{path}: the NIfTI header's affine is not finite; set its qform or sform")
        if dtype.kind == "c":
            raise ZeroSegError(f"{path}: complex values; save the magnitude as a real image first")
        if dtype.names:  # RGB24, RGBA32
            raw = np.asanyarray(nifti.dataobj)
            channels, notes = color_channels(path, len(dtype.names))
            volumes = np.stack([raw[name] for name in dtype.names[:channels]])
            bits: int | None = 8
            modality = "RGB"
        else:
            with np.errstate(over="ignore"):  # float64 values beyond float32: reported as infinite
                volumes = nifti.get_fdata(caching="unchanged", dtype=np.float32)[None]
            scaled = (nifti.dataobj.slope, nifti.dataobj.inter) != (1.0, 0.0)
            bits, modality, notes = None if scaled else bits_of(dtype), None, ()
        spatial = shape[:3] + (1,) * (3 - len(shape))
        array = np.array(volumes.reshape(len(volumes), *spatial), dtype=np.float32, order="C")
    return Image(
        array,
        affine=nifti.affine,
        modality=modality,
        bits=bits,
        header=nifti.header.copy(),
        file_shape=shape,
        notes=notes,
    )


def _check_extensions(path: Path, image_class: type[nib.Nifti1Image], head: bytes) -> None:
    """Refuse header extensions too large to be read: their size is declared, and a .gz makes it up from nothing."""
    size = image_class.header_class.template_dtype.itemsize
    header = image_class.header_class(head[:size], check=False)
    begin = float(header["vox_offset"])
    extended = head[size : size + 1] not in (b"", b"\0")
    first = np.frombuffer(head[size + 4 : size + 8], header.endianness + "i4") if extended else ()
    if not -1 < begin <= MAX_EXTENSIONS or any(n > MAX_EXTENSIONS for n in first):
        raise ZeroSegError(f"{path}: the header declares extensions of more than 16 MB; export it again without them")
