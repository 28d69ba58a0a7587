"""Files that must be refused, and odd ones that must be read, made by code.

``BAD`` and ``ODD`` map a name to how its file is made; ``write_bad`` and ``write_odd`` write one into a folder. Every
bad input comes with a pattern its error message must match.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
from nibabel.testing import data_path
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import generate_uid

OBLIQUE = nib.affines.from_matvec(
    np.array([[-0.9, 0.1, 0.3], [0.2, 1.1, -0.2], [-0.25, 0.2, 2.4]]) + 1 / 3e5, [11.1, -7.3, 3.7]
)


def bundled(name: str) -> Path:
    """A test file that comes inside pydicom's or nibabel's wheel."""
    path = data_path / name
    return path if path.is_file() else Path(get_testdata_file(name, download=False))


def gray(height: int = 40, width: int = 60) -> np.ndarray:
    """(height, width) uint8: a bright disc on a dark ramp."""
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(height, width) / 3) ** 2
    return (x * 60 // width + 150 * disc).astype(np.uint8)


def color(height: int = 40, width: int = 60) -> np.ndarray:
    """(height, width, 3) uint8 with three different channels."""
    plain = gray(height, width)
    return np.stack([plain, plain[::-1] // 2, 255 - plain], axis=-1)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> None:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def _nifti_with_dims(path: Path, *dims: int) -> None:
    """A small NIfTI whose header lies about its size."""
    write_nifti(path, np.zeros((4, 5, 6), dtype=np.int16))
    data = bytearray(path.read_bytes())
    struct.pack_into("<8h", data, 40, len(dims), *dims, *[1] * (7 - len(dims)))
    path.write_bytes(data)


def _cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _with_value(value: float, dtype: type) -> np.ndarray:
    volume = np.linspace(0, 1, 4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    volume[1, 2, 3] = value
    return volume


def _itk(path: Path, share: float = 1.0) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(1000, dtype=np.int16).reshape(10, 10, 10)), str(path))
    _cut(path, share)


def dicom(name: str = "MR_small.dcm", **attributes: object) -> FileDataset:
    """A bundled DICOM file with attributes changed; None deletes one."""
    dataset = pydicom.dcmread(bundled(name))
    for keyword, value in attributes.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)
    return dataset


def _dicom_without_decoder(path: Path) -> None:
    dataset = dicom(PixelData=encapsulate([bytes(100)]))
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    dataset.save_as(path)


def ct_series(
    folder: Path,
    count: int = 6,
    seed: int = 0,
    step: tuple[float, float, float] = (0.0, 0.0, 2.5),
    **attributes: object,
) -> list[Path]:
    """A CT series of real headers in files of shuffled names; slice k has the value k * 10 HU in its upper left corner.

    Args:
        folder: where to write; made if needed.
        count: number of slices.
        seed: of the shuffling.
        step: mm from one slice to the next, LPS.
        attributes: changes to every file.

    Returns:
        The files in spatial order, first slice first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = (generate_uid(entropy_srcs=[str(seed), name]) for name in ("series", "study", "frame"))
    names = np.random.default_rng(seed).permutation(count)
    paths = []
    for k in range(count):
        dataset = dicom("CT_small.dcm", SeriesInstanceUID=series, StudyInstanceUID=study, FrameOfReferenceUID=frame)
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(seed), str(k)])
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.ImagePositionPatient = [-20.0 + k * step[0], -30.0 + k * step[1], 40.0 + k * step[2]]
        dataset.InstanceNumber = int(names[k]) + 1  # as misleading as the file name
        pixels = dataset.pixel_array.copy()
        pixels[0, 0] = k * 10 - int(dataset.RescaleIntercept)
        dataset.PixelData = pixels.tobytes()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        paths.append(folder / f"IM{names[k]:04d}")
        dataset.save_as(paths[-1])
    return paths


@dataclass(frozen=True)
class Input:
    """A file made by code.

    Attributes:
        file: its name.
        make: writes it to a path.
        error: for bad inputs, a regular expression the message must match.
    """

    file: str
    make: Callable[[Path], object]
    error: str = ""


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _picture(array: np.ndarray, mode: str | None = None, **options: object) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        picture = Image.fromarray(array)
        (picture.convert(mode) if mode else picture).save(path, **options)

    return make


def _truncated(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        make(path)
        _cut(path)

    return cut


def _garbled_gz(path: Path) -> None:
    write_nifti(path, _with_value(1, "f4"))
    data = bytearray(path.read_bytes())
    data[20:60] = bytes(range(200, 240))
    path.write_bytes(data)


def _pages(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((5, 8, 9), np.uint8), photometric="minisblack")


_NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)

BAD: dict[str, Input] = {
    "empty_png": Input("empty.png", _bytes(b""), r"empty \(0 bytes\)"),
    "text_named_png": Input("text.png", _bytes(b"this is no picture"), "cannot identify"),
    "truncated_png": Input("cut.png", _truncated(_picture(_NOISE)), "image file is truncated"),
    "truncated_jpeg": Input("cut.jpg", _truncated(_picture(_NOISE)), "image file is truncated"),
    "zero_size_png": Input("zero.png", _bytes(png_header(0, 7)), "cannot identify"),
    "bomb_png": Input("bomb.png", _bytes(png_header(60000, 60000)), "million pixels"),
    "large_png": Input("large.png", _bytes(png_header(11000, 11000)), "million pixels"),
    "pages_tiff": Input("pages.tif", _pages, "5 pages"),
    "nan_tiff": Input("nan.tif", lambda path: tifffile.imwrite(path, _with_value(np.nan, np.float32)[0:2, 2]), "1 NaN"),
    "empty_nifti": Input("empty.nii.gz", _bytes(b""), r"empty \(0 bytes\)"),
    "text_named_nifti": Input("text.nii", _bytes(b"this is no volume"), "not a NIfTI"),
    "truncated_nifti": Input(
        "cut.nii", _truncated(lambda path: write_nifti(path, _with_value(1, "f4"))), "Expected .* bytes"
    ),
    "truncated_nifti_gz": Input(
        "cut.nii.gz", _truncated(lambda path: write_nifti(path, _with_value(1, "f4"))), "Compressed file ended"
    ),
    "garbled_nifti_gz": Input("garbled.nii.gz", _garbled_gz, "decompressing"),
    "zero_size_nifti": Input("zero.nii", lambda path: _nifti_with_dims(path, 4, 0, 6), "zero size"),
    "negative_size_nifti": Input("negative.nii", lambda path: _nifti_with_dims(path, 4, -5, 6), "zero size"),
    "huge_nifti": Input("huge.nii", lambda path: _nifti_with_dims(path, 4000, 4000, 4000), "million voxels"),
    "series_nifti": Input("fmri.nii", lambda path: write_nifti(path, np.zeros((4, 5, 6, 7), "i2")), "split it"),
    "5d_nifti": Input("vectors.nii", lambda path: write_nifti(path, np.zeros((4, 5, 6, 1, 3), "f4")), "5-D"),
    "nan_nifti": Input("nan.nii.gz", lambda path: write_nifti(path, _with_value(np.nan, "f4")), "1 NaN and 0 inf"),
    "inf_nifti": Input("inf.nii.gz", lambda path: write_nifti(path, _with_value(np.inf, "f4")), "0 NaN and 1 inf"),
    "overflow_nifti": Input("over.nii.gz", lambda path: write_nifti(path, _with_value(1e300, "f8")), "1 infinite"),
    "complex_nifti": Input("complex.nii", lambda path: write_nifti(path, np.ones((4, 5, 6), "c8")), "magnitude"),
    "truncated_nrrd": Input("cut.nrrd", lambda path: _itk(path, 0.6), "fread got only"),
    "truncated_mha": Input("cut.mha", lambda path: _itk(path, 0.6), "cannot be read"),
    "huge_nrrd": Input(
        "huge.nrrd",
        _bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9000 9000 9000\nencoding: raw\nendian: little\n\n"),
        "million voxels",
    ),
    "mhd_without_data": Input(
        "lonely.mhd",
        _bytes(
            b"ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementDataFile = lonely.raw\n"
        ),
        "No such file",
    ),
    "mhd_of_other_folder": Input(
        "foreign.mhd",
        _bytes(
            b"ObjectType = Image\nNDims = 2\nDimSize = 4 5\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n"
        ),
        "not in one file beside it",
    ),
    "text_named_dcm": Input("text.dcm", _bytes(b"this is no dicom"), "not a DICOM file"),
    "dicom_without_pixels": Input("report.dcm", lambda path: dicom("test-SR.dcm").save_as(path), "without pixels"),
    "dicom_without_decoder": Input("video.dcm", _dicom_without_decoder, r"MPEG2 .*1\.2\.840\.10008\.1\.2\.4\.100"),
    "truncated_dicom": Input(
        "cut.dcm", _truncated(lambda path: dicom("CT_small.dcm").save_as(path)), "17223 bytes of pixels where 32768"
    ),
    "zero_size_dicom": Input("zero.dcm", lambda path: dicom(Rows=0).save_as(path), "zero size"),
    "multiframe_dicom": Input(
        "frames.dcm", lambda path: path.write_bytes(bundled("SC_rgb_rle_2frame.dcm").read_bytes()), "multi-frame"
    ),
    "dicom_seg": Input("seg.dcm", lambda path: path.write_bytes(bundled("liver_1frame.dcm").read_bytes()), "DICOM SEG"),
}
"""Inputs ``read_image`` must refuse."""


def _palette(path: Path) -> None:
    Image.fromarray(color()).quantize(16).save(path)


def _rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(gray()).save(path, quality=95, exif=exif)


def _rgb_nifti(path: Path) -> None:
    volume = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    volume["R"], volume["B"] = 200, np.arange(6)
    write_nifti(path, volume)


def _zipped_nifti_without_gz(path: Path) -> None:
    plain = path.with_suffix(".tmp.nii")
    write_nifti(plain, np.arange(120, dtype=np.int16).reshape(4, 5, 6))
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


ODD: dict[str, Input] = {
    "constant": Input("constant.png", _picture(np.full((30, 20), 77, np.uint8))),
    "one_pixel": Input("one.png", _picture(np.full((1, 1), 9, np.uint8))),
    "16_bit_png": Input("deep.png", _picture(gray().astype(np.uint16) * 257)),
    "16_bit_tiff": Input("deep.tif", lambda path: tifffile.imwrite(path, gray().astype(np.uint16) * 257)),
    "16_bit_rgb_tiff": Input("deepcolor.tif", lambda path: tifffile.imwrite(path, color().astype(np.uint16) * 257)),
    "float_tiff": Input("float.tif", lambda path: tifffile.imwrite(path, gray() / 7)),
    "alpha": Input("alpha.png", _picture(np.dstack([color(), gray()]))),
    "gray_alpha": Input("grayalpha.png", _picture(gray(), mode="LA")),
    "palette": Input("palette.png", _palette),
    "1_bit": Input("bit.png", _picture(gray() > 100)),
    "cmyk": Input("cmyk.jpg", _picture(color(), mode="CMYK", quality=95)),
    "bmp": Input("plain.bmp", _picture(color())),
    "rotated": Input("rotated.jpg", _rotated),
    "png_named_jpg": Input("liar.jpg", _picture(color(), format="PNG")),
    "zipped_nifti_named_nii": Input("liar.nii", _zipped_nifti_without_gz),
    "rgb_nifti": Input("color.nii.gz", _rgb_nifti),
    "4d_nifti_of_one": Input("single.nii.gz", lambda path: write_nifti(path, np.ones((4, 5, 6, 1), "i2"))),
    "2d_nifti": Input("flat.nii.gz", lambda path: write_nifti(path, np.arange(20, dtype="i2").reshape(4, 5))),
    "dicom_without_preamble": Input(
        "old.dcm", lambda path: path.write_bytes(bundled("MR_small.dcm").read_bytes()[132:])
    ),
}
"""Inputs ``read_image`` must accept."""


def write_bad(name: str, folder: Path) -> Path:
    """Write the bad input of that name into a folder and return its path."""
    path = folder / BAD[name].file
    BAD[name].make(path)
    return path


def write_odd(name: str, folder: Path) -> Path:
    """Write the odd but readable input of that name into a folder and return its path."""
    path = folder / ODD[name].file
    ODD[name].make(path)
    return path
