"""Headers of DICOM files, and what is refused by them before a decoder sees the file."""

from __future__ import annotations

import struct
from pathlib import Path

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import defragment_data
from pydicom.pixel_data_handlers.util import get_expected_length
from pydicom.uid import UID, ImplicitVRLittleEndian, UncompressedTransferSyntaxes

from zeroseg.errors import ZeroSegError
from zeroseg.io.limits import check_size, refuse_inflating

_SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"


def dicom_header(path: Path) -> Dataset:
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
    check_size(path, (header.get("Rows") or 0, header.get("Columns") or 0), int(header.get("SamplesPerPixel") or 1))
    stored, expected = len(header.PixelData), get_expected_length(header)
    if stored < expected and not is_compressed(header):  # GDCM would fill up with whatever is in memory
        raise ZeroSegError(
            f"{path}: {stored} bytes of pixels where {expected} belong, the file is damaged; export it again"
        )
    _check_coded_size(path, header)
    _check_structure(path, header)
    del header.PixelData  # the decoder reads it again; here it would be kept for every slice of a series
    return header


def _check_coded_size(path: Path, header: Dataset) -> None:
    """Refuse compressed pixels whose own header declares another size: a decoder allocates by that one."""
    if not is_compressed(header):
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


def transfer_syntax(header: Dataset) -> UID:
    """How the pixels are coded; files too old to say so are implicit little endian."""
    return UID(getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ImplicitVRLittleEndian)


def is_compressed(header: Dataset) -> bool:
    return transfer_syntax(header) not in UncompressedTransferSyntaxes
