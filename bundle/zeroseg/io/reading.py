"""Reading pictures, NIfTI, NRRD, MetaImage and DICOM with their geometry.

Values are returned as stored (HU for CT); see :mod:`zeroseg.io.intensity` for the way to [0, 1].
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
from PIL import Image as PILImage
from PIL import ImageOps
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import defragment_data
from pydicom.pixel_data_handlers.util import get_expected_length
from pydicom.uid import UID, ImplicitVRLittleEndian, UncompressedTransferSyntaxes

from zeroseg.errors import MemoryShortage, ZeroSegError, is_out_of_memory
from zeroseg.io.finding import (
    MAX_VOXELS,
    TIFF_MAGIC,
    VOXELS_VARIABLE,
    Case,
    data_file_entry,
    find_cases,
    leaves,
    limit_of,
    max_voxels,
    nifti_class,
    refuse_inflating,
)

__all__ = ["MAX_VOXELS", "Case", "Image", "find_cases", "read_image", "slice_affine"]

logger = logging.getLogger(__name__)

PIXELS_VARIABLE = "ZEROSEG_MAX_PIXELS"
"""Environment variable that moves the limit on pixels of a picture, which is Pillow's: 89 million."""
MAX_EXTENSIONS = 1 << 24
"""Bytes of header extensions a NIfTI file may have; private notes, which nobody here reads."""
_PILLOW_LIMIT = PILImage.MAX_IMAGE_PIXELS
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"

# ITK's C++ warnings go straight to stderr; everything a user has to know is raised or logged from here instead.
sitk.ProcessObject_SetGlobalWarningDisplay(False)


@dataclass
class Image:
    """An image or volume with what is needed to interpret it and to write a mask of the same geometry.

    Attributes:
        array: float32, (C, H, W) for a 2-D image or (C, X, Y, Z) for a volume in the file's own voxel order; values as
            stored after the format's rescaling: HU for CT, 0..255 for 8 bits, 0..65535 for 16 bits. Never NaN or Inf.
        affine: (4, 4) float64, voxel index -> RAS mm; None for 2-D images.
        modality: DICOM modality (CT, MR, CR, DX, US, PT, OT, ...), ``RGB`` for colour pictures, or None when the file
            does not say. CT means that the values are HU.
        source: the files read; for a series in slice order, so that ``source[k]`` is ``array[..., k]``.
        kind: the kind of the case (see :class:`Case`).
        bits: 8 or 16 when the file stores unsigned integers of that size without rescaling, else None.
        pixel_spacing: (row, column) distance in mm of a 2-D image, where known.
        header: NIfTI header of the input, None for other formats.
        file_shape: spatial shape of the array in the NIfTI file, e.g. (X, Y) for a single slice; None for others.
        notes: what was changed or dropped on the way in, one sentence each.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    modality: str | None = None
    source: tuple[Path, ...] = ()
    kind: str = "picture"
    bits: int | None = None
    pixel_spacing: tuple[float, float] | None = None
    header: nib.Nifti1Header | None = None
    file_shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_volume(self) -> bool:
        """True for (C, X, Y, Z), also with a single slice; False for (C, H, W)."""
        return self.array.ndim == 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a mask of this image: (H, W) or (X, Y, Z)."""
        return self.array.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size in mm along each axis of :attr:`shape`; None where the file does not give one."""
        sizes = self.pixel_spacing if self.affine is None else nib.affines.voxel_sizes(self.affine)
        if sizes is None or not all(math.isfinite(size) and size > 0 for size in sizes):
            return None
        return tuple(float(size) for size in sizes)

    @property
    def suffix(self) -> str:
        """Extension of masks of this image: ``.nii.gz`` for volumes, ``.png`` for 2-D images."""
        return ".nii.gz" if self.is_volume else ".png"


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
        ZeroSegError: the file is missing, empty, truncated, damaged, larger than :data:`MAX_VOXELS`, has more
            dimensions than a volume, holds NaN or Inf, is compressed in a way no decoder here handles, or (a series)
            its slices do not form one regular volume. The message names the file and the remedy.
    """
    readers = {"picture": _read_picture, "nifti": _read_nifti, "itk": _read_itk, "dicom": _read_dicom}
    path = case.paths[0]
    with _decoding(path):
        if path.stat().st_size == 0:
            raise ZeroSegError(f"{path}: the file is empty (0 bytes); copy or export it again")
        image = _read_series(case.paths) if case.kind == "dicom_series" else readers[case.kind](path)
        _check_finite(path, image.array)
    image.source = image.source or case.paths
    image.kind = case.kind
    return image


def slice_affine(spacing: Sequence[float]) -> np.ndarray:
    """The affine of a 2-D image taken as one slice, (H, W, 1), shown the radiological way: rows run to the back, columns
    to the patient's left. Nothing in a picture says so; it is how axial slices are usually shown.

    Args:
        spacing: (row, column) distance in mm.

    Returns:
        (4, 4) float64: (row, column, 0) -> RAS mm.
    """
    row, column = spacing
    return np.array([[0, -column, 0, 0], [-row, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one line for the user."""
    try:
        yield
    except ZeroSegError as error:
        raise ZeroSegError(one_line(error)) from error.__cause__
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryShortage(f"{path}: not enough memory to read it; crop or downsample it first") from error
        message = f"{path}: cannot be read, it is truncated, damaged or not an image ({_brief(error)}); export it again"
        raise ZeroSegError(one_line(message)) from error


def one_line(message: object) -> str:
    """A message as one line: what a damaged header puts into it may hold line breaks and control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(message))


def _brief(error: Exception) -> str:
    """The line of an error's text that names the cause, at most 120 characters; ITK (RuntimeError) puts it last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1 if isinstance(error, RuntimeError) else 0] if lines else type(error).__name__
    return re.sub(r"^ITK ERROR: \w+\(0x\w+\): ", "", line)[:120]


def _check_size(path: Path, shape: Sequence[int], channels: int = 1) -> None:
    """Refuse empty and enormous arrays by the header, before any of it is allocated."""
    size = "x".join(str(int(n)) for n in shape)
    if not shape or min(shape) < 1:
        raise ZeroSegError(f"{path}: the header declares an image of zero size ({size}); export it again")
    limit = max_voxels()
    if math.prod(int(n) for n in shape) * channels > limit:
        raise ZeroSegError(
            f"{path}: {size} is more than the {limit / 10**6:g} million voxels accepted; "
            f"crop or downsample it first, or raise the limit by the environment variable {VOXELS_VARIABLE}"
        )


def _check_finite(path: Path, array: np.ndarray) -> None:
    if np.isfinite(array.min()) and np.isfinite(array.max()):  # NaN passes through min: no mask array for sound images
        return
    nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    raise ZeroSegError(
        f"{path}: {nan} NaN and {infinite} infinite values (as float32); replace them first, e.g. with the background "
        "value by numpy.nan_to_num"
    )


def _bits(dtype: np.dtype) -> int | None:
    return {"u1": 8, "u2": 16}.get(np.dtype(dtype).str[1:])


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) -> (C, H, W) float32."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0), dtype=np.float32)


def _color_channels(path: Path, count: int) -> tuple[int, tuple[str, ...]]:
    """How many of ``count`` stored channels carry the image, and a note when alpha is dropped."""
    if count not in (1, 2, 3, 4):
        raise ZeroSegError(f"{path}: {count} channels; give gray or RGB images, one file per channel otherwise")
    return (count, ()) if count % 2 else (count - 1, ("alpha channel dropped",))


def _read_picture(path: Path) -> Image:
    notes = []
    with open(path, "rb") as file:
        is_tiff = file.read(4) in TIFF_MAGIC
    PILImage.MAX_IMAGE_PIXELS = limit_of(PIXELS_VARIABLE, _PILLOW_LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            picture = PILImage.open(path, formats=("PNG", "JPEG", "TIFF", "BMP"))
    except (PILImage.DecompressionBombWarning, PILImage.DecompressionBombError) as error:
        raise ZeroSegError(
            f"{path}: more than the {PILImage.MAX_IMAGE_PIXELS / 10**6:.3g} million pixels accepted; "
            f"crop or downsample it first, or raise the limit by the environment variable {PIXELS_VARIABLE}"
        ) from error
    except PILImage.UnidentifiedImageError:
        if is_tiff:  # sample formats Pillow does not know, e.g. float64 or several 16-bit channels
            return _read_tiff(path)
        raise
    with picture:
        _check_size(path, picture.size[::-1])
        if picture.format == "TIFF":
            _refuse_pages(path, getattr(picture, "n_frames", 1))
            if len(picture.getbands()) > 1 and max(picture.tag_v2.get(258, (8,))) > 8:
                return _read_tiff(path)  # Pillow would cut 16-bit colour down to 8 bits
        if picture.getexif().get(274, 1) not in (0, 1):
            notes.append("EXIF orientation applied: coordinates and mask refer to the upright image")
        upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        notes.append("alpha channel dropped")
    mode = upright.mode
    if mode in ("L", "1", "LA", "La"):
        upright = upright.convert("L")
    elif not mode.startswith(("I", "F")):
        upright = upright.convert("RGBA" if mode in ("PA", "RGBa") else mode).convert("RGB")
    pixels = np.asarray(upright)
    array = _channels_first(pixels)
    modality = "RGB" if len(array) == 3 else None
    return Image(array, modality=modality, bits=_bits(pixels.dtype), notes=tuple(notes))


def _refuse_pages(path: Path, pages: int) -> None:
    if pages > 1:
        raise ZeroSegError(
            f"{path}: a TIFF of {pages} pages; split it into one file per page, "
            "or save a volume as NIfTI with its spacing"
        )


def _read_tiff(path: Path) -> Image:
    """TIFFs whose samples Pillow cannot hold."""
    with tifffile.TiffFile(path) as file:
        _refuse_pages(path, len(file.pages))
        page = file.pages[0]
        _check_size(path, page.shape)
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ZeroSegError(f"{path}: TIFF with axes {page.axes}; save it as a plain gray or RGB image")
        pixels = page.asarray()
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    count, notes = _color_channels(path, 1 if pixels.ndim == 2 else pixels.shape[-1])
    with np.errstate(over="ignore"):  # beyond float32: reported as infinite
        array = _channels_first(pixels)[:count]
    return Image(array, modality="RGB" if count == 3 else None, bits=_bits(pixels.dtype), notes=notes)


def _read_nifti(path: Path) -> Image:
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
        _check_size(path, shape, channels=len(dtype.names or "1"))
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
            channels, notes = _color_channels(path, len(dtype.names))
            volumes = np.stack([raw[name] for name in dtype.names[:channels]])
            bits, modality = 8, "RGB"
        else:
            with np.errstate(over="ignore"):  # float64 values beyond float32: reported as infinite
                volumes = nifti.get_fdata(caching="unchanged", dtype=np.float32)[None]
            scaled = (nifti.dataobj.slope, nifti.dataobj.inter) != (1.0, 0.0)
            bits, modality, notes = None if scaled else _bits(dtype), None, ()
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


def _read_itk(path: Path) -> Image:
    with open(path, "rb") as file:
        is_nrrd = file.read(4) == b"NRRD"
    name = data_file_entry(path)
    # A header may name any file of the machine as its pixels; only one beside it is believed.
    elsewhere = name is not None and (Path(name).name != name or leaves(path.parent / name, path.parent.resolve()))
    if elsewhere or (name is not None and (name.upper().startswith("LIST") or "%" in name)):
        raise ZeroSegError(f"{path}: its pixels are in '{name}', not in one file beside it; save it as .nrrd or .mha")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    _check_size(path, size, channels)
    if len(size) > 3 and math.prod(size[3:]) > 1:
        raise ZeroSegError(
            f"{path}: a {len(size)}-D image; only 2-D and 3-D images can be read: extract a volume first"
        )
    image = reader.Execute()
    if len(size) > 3:
        image = image[(slice(None),) * 3 + (0,) * (len(size) - 3)]
    count, notes = _color_channels(path, channels)
    pixels = sitk.GetArrayViewFromImage(image)
    if np.iscomplexobj(pixels):
        raise ZeroSegError(f"{path}: complex values; save the magnitude as a real image first")
    pixels = pixels[..., None] if channels == 1 else pixels
    order = (3, 2, 1, 0) if len(size) > 2 else (2, 0, 1)  # (Z, Y, X, C) -> (C, X, Y, Z); (Y, X, C) -> (C, H, W)
    with np.errstate(over="ignore"):
        array = np.array(pixels.transpose(order)[:count], dtype=np.float32, order="C")
    modality = "RGB" if count == 3 else None
    if array.ndim == 3:
        column, row = image.GetSpacing()
        return Image(array, modality=modality, bits=_bits(pixels.dtype), pixel_spacing=(row, column), notes=notes)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Image(array, affine=_LPS_TO_RAS @ affine, modality=modality, bits=_bits(pixels.dtype), notes=notes)


def _dicom_header(path: Path) -> Dataset:
    """The header of a DICOM file that holds one image; refuses what holds none or many."""
    refuse_inflating(path)
    header = pydicom.dcmread(path, force=True)
    if "SOPClassUID" not in header and "Rows" not in header:
        raise ZeroSegError(f"{path}: not a DICOM file; export it again")
    if "PixelData" not in header:
        name = UID(header.get("SOPClassUID", "")).name or "of unknown class"
        raise ZeroSegError(f"{path}: DICOM without pixels ({name}); give image objects such as CT, MR, CR, DX or US")
    if header.get("SOPClassUID") == _SEGMENTATION_STORAGE:
        raise ZeroSegError(f"{path}: a DICOM SEG, which is a mask and not an image; give the images it was made from")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ZeroSegError(
            f"{path}: a multi-frame DICOM of {frames} frames; convert it to NIfTI (dcm2niix) or to one file per frame"
        )
    _check_size(path, (header.get("Rows") or 0, header.get("Columns") or 0), int(header.get("SamplesPerPixel") or 1))
    stored, expected = len(header.PixelData), get_expected_length(header)
    if stored < expected and not _is_compressed(header):  # GDCM would fill up with whatever is in memory
        raise ZeroSegError(
            f"{path}: {stored} bytes of pixels where {expected} belong, the file is damaged; export it again"
        )
    _check_coded_size(path, header)
    _check_structure(path, header)
    del header.PixelData  # the decoder reads it again; here it would be kept for every slice of a series
    return header


def _check_coded_size(path: Path, header: Dataset) -> None:
    """Refuse compressed pixels whose own header declares another size: a decoder allocates by that one."""
    if not _is_compressed(header):
        return
    pixels, at = header.PixelData, 0
    while at + 8 <= len(pixels):
        at += 8 + struct.unpack("<I", pixels[at + 4 : at + 8])[0]
    if at > len(pixels):
        raise ZeroSegError(f"{path}: a piece of its compressed pixels is cut off, the file is damaged; export it again")
    size = _coded_size(defragment_data(pixels))
    if size and size != (header.Columns, header.Rows):
        raise ZeroSegError(
            f"{path}: {header.Columns}x{header.Rows} by its header, {size[0]}x{size[1]} by its compressed pixels; "
            "the file is damaged, export it again"
        )


def _coded_size(code: bytes) -> tuple[int, int] | None:
    """(columns, rows) a JPEG, JPEG-LS or JPEG 2000 codestream declares; None for others, such as RLE."""
    begin = -1 if code.startswith(b"\xff\xd8") else code.find(b"\xff\x4f\xff\x51", 0, 4096)  # JP2 boxes may precede
    if begin >= 0 and len(code) >= begin + 24:
        right, bottom, left, top = struct.unpack(">4I", code[begin + 8 : begin + 24])
        return right - left, bottom - top
    at = 2 if code.startswith(b"\xff\xd8") else len(code)
    while at + 9 <= len(code) and code[at] == 0xFF:
        marker, length = code[at + 1], int.from_bytes(code[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack(">2H", code[at + 5 : at + 9])
            return columns, rows
        at += 1 if marker == 0xFF else 2 + length
    return None


def _check_structure(path: Path, header: Dataset, deepest: int = 64) -> None:
    """Refuse what pydicom passes over and GDCM does not survive: elements longer than the file, for which it takes up to
    4 GB, and sequences in sequences without end, on which it overruns its stack and takes the process with it."""

    def walk(dataset: Dataset, depth: int) -> None:
        if depth > deepest:
            raise ZeroSegError(
                f"{path}: sequences nested more than {deepest} deep, the file is damaged; export it again"
            )
        for tag in list(dataset.keys()):  # the elements themselves would be converted, all of them
            size = 0
            try:
                raw = dataset.get_item(tag)
                if isinstance(raw, RawDataElement):
                    size = len(raw.value or b"")
                    if size < raw.length != 0xFFFFFFFF:
                        raise ZeroSegError(
                            f"{path}: element {raw.tag} declares {raw.length} bytes where {size} are left, "
                            "the file is damaged; export it again"
                        )
                if raw.VR not in ("SQ", "UN", None):
                    continue
                element = dataset[tag]
            except (RecursionError, ZeroSegError):
                raise
            except Exception:  # garbled; what is short cannot nest deep enough to harm
                if size < 1 << 14:
                    continue
                raise
            for item in element.value if element.VR == "SQ" else ():
                walk(item, depth + 1)

    walk(getattr(header, "file_meta", Dataset()), 0)
    walk(header, 0)


def _transfer_syntax(header: Dataset) -> UID:
    """How the pixels are coded; files too old to say so are implicit little endian."""
    return UID(getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ImplicitVRLittleEndian)


def _is_compressed(header: Dataset) -> bool:
    return _transfer_syntax(header) not in UncompressedTransferSyntaxes


def _dicom_pixels(path: Path, header: Dataset) -> np.ndarray:
    """(H, W) or (H, W, 3) as GDCM decodes them: rescaled, MONOCHROME1 inverted, palette and YBR turned into RGB."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        pixels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        if not _is_compressed(header):
            raise
        syntax = _transfer_syntax(header)
        raise ZeroSegError(
            f"{path}: no decoder here handles its transfer syntax {syntax.name} ({syntax}), or its data are damaged; "
            "decompress it first, e.g. with gdcmconv --raw"
        ) from error
    return pixels.reshape(pixels.shape[1:]) if pixels.ndim > 2 and pixels.shape[0] == 1 else pixels


def _dicom_modality(header: Dataset) -> str | None:
    modality = str(header.get("Modality") or "") or None
    is_hu = header.get("SOPClassUID") == _CT_STORAGE or "RescaleIntercept" in header
    return "OT" if modality == "CT" and not is_hu else modality  # screen captures of CT hold gray values, not HU


def _read_dicom(path: Path) -> Image:
    header = _dicom_header(path)
    pixels = _dicom_pixels(path, header)
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    return Image(
        _channels_first(pixels),
        modality=_dicom_modality(header),
        bits=_bits(pixels.dtype),
        pixel_spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
    )


def _read_series(paths: Sequence[Path]) -> Image:
    """One volume from the slices of a series, in the order of their positions along the slice normal."""
    folder = paths[0].parent
    headers = []
    for path in paths:
        with _decoding(path):
            headers.append(_dicom_header(path))
    for path, header in zip(paths, headers, strict=True):
        if not (header.get("ImagePositionPatient") and header.get("ImageOrientationPatient")):
            raise ZeroSegError(
                f"{path}: a slice without position or orientation in its series; move it out of {folder}"
            )

    def differs(what: str) -> ZeroSegError:
        return ZeroSegError(
            f"{folder}: the slices of series {headers[0].SeriesInstanceUID} differ in {what} "
            "(a scout or several stacks?); keep one stack per folder and give one folder at a time"
        )

    layout = {(header.Rows, header.Columns, int(header.get("SamplesPerPixel") or 1)) for header in headers}
    if len(layout) > 1:
        raise differs("size")
    orientations = np.array([header.ImageOrientationPatient for header in headers], dtype=np.float64)
    if not np.allclose(orientations, orientations[0], atol=1e-3):
        raise differs("orientation")
    pixel_sizes = np.array([header.get("PixelSpacing") or (1.0, 1.0) for header in headers], dtype=np.float64)
    if not np.allclose(pixel_sizes, pixel_sizes[0], rtol=1e-3):
        raise differs("pixel spacing")

    along_row, along_column = orientations[0, :3], orientations[0, 3:]
    positions = np.array([header.ImagePositionPatient for header in headers], dtype=np.float64)
    depth = positions @ np.cross(along_row, along_column)
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    if gaps.min() < 1e-3:
        raise ZeroSegError(
            f"{folder}: several slices of series {headers[0].SeriesInstanceUID} at one position "
            "(phases, echoes or copies?); keep one volume per folder and give one folder at a time"
        )
    notes = ()
    if gaps.max() - gaps.min() > 0.01 * np.median(gaps):
        notes = (f"uneven slice spacing, {gaps.min():.3g} to {gaps.max():.3g} mm: distances along z are approximate",)
        logger.warning("%s: %s", folder, notes[0])

    rows, columns, channels = layout.pop()
    _check_size(folder, (columns, rows, len(paths)), channels)
    sorted_paths = tuple(paths[i] for i in order)
    array, bits = None, set()
    for k, i in enumerate(order):
        with _decoding(paths[i]):
            pixels = _dicom_pixels(paths[i], headers[i])
            slice_ = _channels_first(pixels).swapaxes(1, 2)  # (C, rows, columns) -> (C, X, Y)
        if array is None:
            array = np.empty((*slice_.shape, len(paths)), dtype=np.float32)
        array[..., k] = slice_
        bits.add(_bits(pixels.dtype))

    affine = np.eye(4)
    affine[:3, 0] = along_row * pixel_sizes[0, 1]
    affine[:3, 1] = along_column * pixel_sizes[0, 0]
    affine[:3, 2] = (positions[order[-1]] - positions[order[0]]) / (
        len(paths) - 1
    )  # keeps the shear of a tilted gantry
    affine[:3, 3] = positions[order[0]]
    return Image(
        array,
        affine=_LPS_TO_RAS @ affine,
        modality=_dicom_modality(headers[0]),
        source=sorted_paths,
        bits=bits.pop() if len(bits) == 1 else None,
        notes=notes,
    )
