"""Files that attack who reads them, made by code; ``HOSTILE`` maps a name to how its folder is filled.

tests/bad_inputs.py has the damaged files of everyday life; these are the ones somebody meant.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.filereader import read_file_meta_info
from pydicom.tag import Tag

from bad_inputs import bundled, dicom, png_header, write_nifti

MHD = b"ObjectType = Image\nNDims = 2\n%sDimSize = 4 5\nElementType = MET_UCHAR\nElementDataFile %s\n"
NRRD = b"NRRD0004\n%stype: uchar\ndimension: 2\nsizes: 4 5\nencoding: raw\n%s\n"
COMMENTS = 400


def _secret(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(range(20)))


def _names_a_secret(name: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _secret(folder)
        (folder / name).write_bytes(content)

    return make


def _mhd_link(folder: Path) -> None:
    _secret(folder)
    os.symlink(folder.parent / "secret", folder / "beside.raw")
    (folder / "a.mhd").write_bytes(MHD % (b"", b"= beside.raw"))


def _nifti_header(folder: Path, change: Callable[[bytearray], None], tail: bytes = b"", zeros: int = 0) -> None:
    write_nifti(folder / "plain.nii", np.zeros((4, 5, 6), np.int16))
    data = bytearray((folder / "plain.nii").read_bytes())
    (folder / "plain.nii").unlink()
    change(data)
    with gzip.open(folder / "a.nii.gz", "wb", 1) as file:
        file.write(bytes(data[:352]) + tail + bytes(data[352:]))
        for _ in range(zeros):
            file.write(bytes(1 << 20))


def _offset(value: float) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<f", data, 108, value)


def _extended(size: int) -> Callable[[Path], None]:
    def change(data: bytearray) -> None:
        struct.pack_into("<f", data, 108, 0)
        data[348] = 1

    return lambda folder: _nifti_header(folder, change, struct.pack("<ii", size, 6), zeros=64)


def _dims(*dims: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<8h", data, 40, len(dims), *dims, *[1] * (7 - len(dims)))


def _element(tag: tuple[int, int], value: bytes) -> bytes:
    return struct.pack("<HH", *tag) + b"SQ\0\0" + struct.pack("<I", len(value)) + value


def _nested(depth: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        inner = b""
        for _ in range(depth):
            item = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
            inner = _element((0x0008, 0x1140), item)
        dicom("CT_small.dcm").save_as(folder / "a.dcm")
        raw = (folder / "a.dcm").read_bytes()
        at = raw.index(b"\x10\x00\x10\x00PN")
        (folder / "a.dcm").write_bytes(raw[:at] + _element((0x0009, 0x1140), item) + raw[at:])

    return make


def _long_element(folder: Path) -> None:
    """The element after the pixels says it is larger than any disk allows."""
    dicom("CT_small.dcm").save_as(folder / "a.dcm")
    with open(folder / "a.dcm", "ab") as file:
        file.write(struct.pack("<HH", 0xFFFC, 0xFFFC) + b"OB\0\0" + struct.pack("<I", 0xFFFF0000) + bytes(8))


def _endless(depth: int) -> Callable[[Path], None]:
    """Sequences of undefined length, which are parsed at once."""

    def make(folder: Path) -> None:
        begin = struct.pack("<HH", 0x8, 0x1140) + b"SQ\0\0" + b"\xff" * 4
        begin += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        dicom("CT_small.dcm").save_as(folder / "a.dcm")
        raw = (folder / "a.dcm").read_bytes()
        at = raw.index(b"\x10\x00\x10\x00PN")
        (folder / "a.dcm").write_bytes(raw[:at] + begin * depth + raw[at:])

    return make


def _coded(kind: str, syntax: str, side: int = 6000, **options: object) -> Callable[[Path], None]:
    """A DICOM file of 64 x 64 whose compressed pixels say otherwise."""

    def make(folder: Path) -> None:
        code = io.BytesIO()
        Image.new("L", (side, side)).save(code, kind, **options)
        small = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "Rows": 64, "Columns": 64}
        dataset = dicom("CT_small.dcm", PixelData=encapsulate([code.getvalue()]), **small)
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(folder / "a.dcm")

    return make


def _long_piece(folder: Path) -> None:
    _coded("JPEG", "1.2.840.10008.1.2.4.50", side=64)(folder)
    raw = (folder / "a.dcm").read_bytes()
    at = raw.index(b"\xff\xd8\xff") - 4
    (folder / "a.dcm").write_bytes(raw[:at] + struct.pack("<I", 0xFFFF0000) + raw[at + 4 :])


def _deflated(folder: Path) -> None:
    """A megabyte that inflates to 600."""
    source = bundled("image_dfl.dcm")
    raw, begin = source.read_bytes(), 144 + read_file_meta_info(source).FileMetaInformationGroupLength
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = zlib.decompress(raw[begin:], -15) + struct.pack("<HH", 0xFFFC, 0xFFFC) + b"OB\0\0"
    out = squeeze.compress(body + struct.pack("<I", 600 << 20))
    for _ in range(600):
        out += squeeze.compress(bytes(1 << 20))
    (folder / "a.dcm").write_bytes(raw[:begin] + out + squeeze.flush())


def _garbled(count: int = 1, **values: str) -> Callable[[Path], None]:
    """DICOM files with texts where numbers belong."""

    def make(folder: Path) -> None:
        for k in range(count):
            dataset = dicom("CT_small.dcm", SOPInstanceUID=f"1.2.{k}", ImagePositionPatient=[0, 0, k])
            for keyword, value in values.items():
                tag, vr = Tag(tag_for_keyword(keyword)), pydicom.datadict.dictionary_VR(keyword)
                coded = value.encode() + b" " * (len(value) % 2)
                dataset[tag] = RawDataElement(tag, vr, len(coded), coded, 0, False, True)
            dataset.save_as(folder / f"{k}.dcm")

    return make


def _tiff(shape: tuple[int, ...], **tags: int) -> Callable[[Path], None]:
    """A small TIFF whose header lies: ``width`` and ``length`` replace the values of tags 256 and 257."""

    def make(folder: Path) -> None:
        tifffile.imwrite(folder / "a.tif", np.zeros(shape, np.float64))
        with tifffile.TiffFile(folder / "a.tif", mode="r+") as file:
            for code, value in {256: tags.get("width"), 257: tags.get("length")}.items():
                if value is not None:
                    file.pages[0].tags[code].overwrite(value)

    return make


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_text(folder: Path) -> None:
    """A compressed comment of a kilobyte that unpacks to a hundred million."""
    plain = io.BytesIO()
    Image.new("L", (8, 8)).save(plain, "PNG")
    raw = plain.getvalue()
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9))
    (folder / "a.png").write_bytes(raw[:33] + text + raw[33:])


def _file(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data)


def _circle(folder: Path) -> None:
    os.symlink(folder / "b.png", folder / "a.png")
    os.symlink(folder / "a.png", folder / "b.png")


def _link_out(folder: Path) -> None:
    Image.new("L", (8, 8), 9).save(folder.parent / "outside.png")
    os.symlink(folder.parent / "outside.png", folder / "a.png")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "a.png")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "mhd with a colon names a file outside": (_names_a_secret("a.mhd", MHD % (b"", b": ../secret")), "beside it"),
    "mhd hides the name behind comments": (
        _names_a_secret("a.mhd", MHD % ((b"Comment = " + b"x" * 200 + b"\n") * COMMENTS, b"= ../secret")),
        "64 KiB",
    ),
    "mhd names a link to a file outside": (_mhd_link, "beside it"),
    "mhd names a file with a NUL": (_names_a_secret("a.mhd", MHD % (b"", b"= a\0b.raw")), "beside it"),
    "mhd names a file of 5000 letters": (_names_a_secret("a.mhd", MHD % (b"", b"= " + b"a" * 5000)), ""),
    "mhd names itself by a list": (_names_a_secret("a.mhd", MHD % (b"", b"= LIST")), "beside it"),
    "mhd names a pattern": (_names_a_secret("a.mhd", MHD % (b"", b"= s%d.raw 1 9 1")), "beside it"),
    "nrrd names a file outside": (_names_a_secret("a.nrrd", NRRD % (b"", b"Data File: ../secret")), "beside it"),
    "nrrd hides the name behind comments": (
        _names_a_secret("a.nrrd", NRRD % ((b"# " + b"x" * 200 + b"\n") * COMMENTS, b"data file: ../secret")),
        "64 KiB",
    ),
    "nrrd of 60000 dimensions": (_file("a.nrrd", NRRD.replace(b"dimension: 2", b"dimension: 60000") % (b"", b"")), ""),
    "nrrd of negative size": (_file("a.nrrd", NRRD.replace(b"4 5", b"-4 5") % (b"", b"")), ""),
    "mha of 2^40 pixels": (
        _file("a.mha", MHD.replace(b"4 5", b"1048576 1048576") % (b"", b"= LOCAL")),
        "million voxels",
    ),
    "mha whose size overflows": (
        _file("a.mha", MHD.replace(b"4 5", b"99999999999999999999 5") % (b"", b"= LOCAL")),
        "",
    ),
    "nifti with an extension of 1 GB": (_extended(1 << 30), "extensions"),
    "nifti with a negative extension": (_extended(-64), ""),
    "nifti whose data begin after 1 GB": (
        lambda folder: _nifti_header(folder, _offset(float(1 << 30)), zeros=64),
        "extensions",
    ),
    "nifti whose data begin nowhere": (lambda folder: _nifti_header(folder, _offset(np.nan)), "extensions"),
    "nifti whose data begin before it": (lambda folder: _nifti_header(folder, _offset(-1e9)), "extensions"),
    "nifti.gz of 2^42 voxels": (
        lambda folder: _nifti_header(folder, _dims(16384, 16384, 16384), zeros=8),
        "million voxels",
    ),
    "nifti.gz of eight dimensions": (
        lambda folder: _nifti_header(folder, lambda data: struct.pack_into("<h", data, 40, 8)),
        "",
    ),
    "dicom nested 900 deep": (_nested(900), "64 deep"),
    "dicom nested 20000 deep": (_nested(20_000), "64 deep"),
    "dicom nested without lengths": (_endless(20_000), "recursion"),
    "dicom with an element of 4 GB": (_long_element, "declares 4294901760 bytes"),
    "dicom with a piece of 4 GB": (_long_piece, "cut off"),
    "dicom with a JPEG of another size": (_coded("JPEG", "1.2.840.10008.1.2.4.50"), "64x64 by its header, 6000x6000"),
    "dicom with a JPEG 2000 of another size": (
        _coded("JPEG2000", "1.2.840.10008.1.2.4.90", no_jp2=True),
        "64x64 by its header, 6000x6000",
    ),
    "dicom that inflates to 600 MB": (_deflated, "inflates to more than 512 MB"),
    "dicom of 65535 x 65535": (
        lambda folder: dicom("CT_small.dcm", Rows=65535, Columns=65535).save_as(folder / "a.dcm"),
        "million voxels",
    ),
    "dicom of 1e99 frames": (_garbled(NumberOfFrames="1e99"), "multi-frame"),
    "dicom of x frames, twice": (_garbled(2, NumberOfFrames="x"), "invalid literal"),
    "dicom with two numbers of frames": (_garbled(2, NumberOfFrames="1\\2"), ""),
    "dicom at a position of words": (_garbled(2, ImagePositionPatient="here\\and\\there"), ""),
    "dicom with an orientation of zeros": (_garbled(2, ImageOrientationPatient="0\\0\\0\\0\\0\\0"), "position"),
    "dicom slices of no size": (_garbled(2, PixelSpacing="nan\\nan"), ""),
    "tiff of 2^40 pixels": (_tiff((8, 9), width=1 << 20, length=1 << 20), "million|limit"),
    "tiff without any directory": (_file("a.tif", b"II*\0" + b"\xff" * 12), ""),
    "tiff in a circle": (_file("a.tif", b"II*\0\x08\0\0\0" + b"\0\0\x08\0\0\0"), ""),
    "png of 2^31 by 2^31": (_file("a.png", png_header(2**31 - 1, 2**31 - 1)), "million pixels"),
    "png whose comment is a bomb": (_png_text, ""),
    "bmp of 2^31 by 1": (
        _file(
            "a.bmp", b"BM" + struct.pack("<IHHI IiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 1, 1, 24, 0, 0, 1, 1, 0, 0)
        ),
        "million pixels",
    ),
    "jpeg of 65500 by 65500": (
        _file(
            "a.jpg",
            b"\xff\xd8\xff\xc0\0\x0b\x08"
            + struct.pack(">HH", 65500, 65500)
            + b"\x01\x01\x11\0\xff\xda\0\x08\x01\x01\0\0\x3f\0",
        ),
        "million pixels",
    ),
    "links in a circle": (_circle, "no image found"),
    "a link that leaves the folder": (_link_out, "no image found"),
    "a pipe that never ends": (_pipe, "no image found"),
}
"""name -> (fill a folder, pattern of the reason)."""
