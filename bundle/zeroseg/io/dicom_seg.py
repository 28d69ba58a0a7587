"""DICOM SEG: masks as DICOM objects that refer to the very images they were drawn on."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom

import zeroseg
from zeroseg.errors import ZeroSegError
from zeroseg.io.decoding import one_line
from zeroseg.io.image import Image
from zeroseg.io.writing import atomic_path

# Attributes a DICOM file must have but may leave empty (type 2); anonymised files often lack them altogether.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)


def write_dicom_seg(
    image: Image,
    labels: np.ndarray,
    path: str | os.PathLike,
    label_names: Mapping[int, str] | None = None,
    algorithm_version: str = zeroseg.__version__,
    algorithm_type: str = "AUTOMATIC",
) -> Path | None:
    """Write a label map as a binary DICOM SEG with one segment per label present.

    Segments are numbered 1..K in the order of the labels, as DICOM asks; the label's own number or name is the
    segment's label. Frames without any pixel of a segment are left out. Every segment is coded as tissue, because a
    zero-shot segmentation does not know better. Patient and study attributes are those of the source.

    Args:
        image: a DICOM image or series from :func:`zeroseg.io.reading.read_image`.
        labels: (H, W) or (X, Y, Z) integers or bool in 0..255, of shape ``image.shape``; 0 is background.
        path: target file, usually ``<stem>_seg.dcm``.
        label_names: names of labels, e.g. {1: "liver"}; at most 64 characters each; others are "Segment <label>".
        algorithm_version: version written with the algorithm's name, ZeroSeg.
        algorithm_type: AUTOMATIC, or SEMIAUTOMATIC when a person gave points, a box or a text.

    Returns:
        The path written; None when all labels are 0, because a SEG without a segment is not allowed.

    Raises:
        ZeroSegError: the source cannot carry a SEG (not DICOM, a colour image, no frame of reference where one is
            mandatory, missing identifiers), or the folder cannot be written to; the message gives the reason.
        ValueError: the labels' shape or type does not fit the image.
    """
    labels = np.asarray(labels)
    if labels.shape != image.shape or labels.dtype.kind not in "bui":
        raise ValueError(f"labels must be integers of shape {image.shape}, not {labels.dtype} of shape {labels.shape}")
    if image.kind not in ("dicom", "dicom_series"):
        raise ZeroSegError("no DICOM SEG, because the image is not DICOM; use the NIfTI or PNG mask")
    present = [int(label) for label in np.unique(labels) if label]
    if not present:
        return None

    # (X, Y, Z) -> (frames, rows, columns): slice k of the volume is source k, x runs along its rows
    frames = labels.transpose(2, 1, 0) if image.is_volume else labels[None]
    segments = np.searchsorted([0, *present], frames).astype(np.uint8)  # label -> 0..K
    names = [(label_names or {}).get(label, f"Segment {label}") for label in present]
    encoded = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the style of patient names in the source
            sources = [_source(file) for file in image.source]
            segmentation = _segmentation(sources, segments, names, algorithm_version, algorithm_type)
            # Names of segments may be in letters that the source's character set does not have.
            segmentation.SpecificCharacterSet = "ISO_IR 192"
            segmentation.save_as(encoded, write_like_original=False)
    except ZeroSegError:
        raise
    except Exception as error:  # headers lack or garble attributes in ways only the encoding brings to light
        reason = one_line(f"{image.source[0]}: no DICOM SEG, because the source cannot carry one ({error})")
        raise ZeroSegError(f"{reason}; use the NIfTI or PNG mask") from error
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
    return path


def _source(path: Path) -> pydicom.Dataset:
    """The header of a source image, with what may be empty but has to be there."""
    source = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    if int(source.get("SamplesPerPixel") or 1) > 1:
        raise ZeroSegError(f"{path}: no DICOM SEG, because the source is a colour image; use the PNG mask")
    for keyword in _MAY_BE_EMPTY:
        if keyword not in source:
            setattr(source, keyword, None)
    return source


def _segmentation(
    sources: list[pydicom.Dataset], segments: np.ndarray, names: list[str], version: str, algorithm_type: str
) -> pydicom.Dataset:
    # Imported here: highdicom takes a second, and most runs meet no DICOM.
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="ZeroSeg", version=version, family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=algorithm_type,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=segments,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=int(sources[0].get("SeriesNumber") or 0) + 9000,  # clear of the scanner's own series
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="ZeroSeg",
        manufacturer_model_name="ZeroSeg",
        software_versions=version,
        device_serial_number="0",
        series_description="ZeroSeg segmentation",
    )
