"""Reading images and volumes, writing masks, DICOM SEG, overlays and manifests."""

from zeroseg.hashing import file_sha256
from zeroseg.io.decoding import one_line
from zeroseg.io.dicom_seg import write_dicom_seg
from zeroseg.io.finding import Case, find_cases
from zeroseg.io.image import Image, check_same_grid, same_place, slice_affine, without_shear
from zeroseg.io.intensity import to_unit_range
from zeroseg.io.manifest import versions, write_json
from zeroseg.io.overlay import contact_html, contact_sheet, draw_overlay, overlay_slices
from zeroseg.io.reading import read_image
from zeroseg.io.writing import (
    atomic_path,
    remove_unfinished,
    sole_writer,
    staged,
    to_nifti,
    write_confidence,
    write_map,
    write_mask,
)

__all__ = [
    "Case",
    "Image",
    "atomic_path",
    "check_same_grid",
    "contact_html",
    "contact_sheet",
    "draw_overlay",
    "file_sha256",
    "find_cases",
    "one_line",
    "overlay_slices",
    "read_image",
    "remove_unfinished",
    "same_place",
    "slice_affine",
    "sole_writer",
    "staged",
    "to_nifti",
    "to_unit_range",
    "versions",
    "without_shear",
    "write_confidence",
    "write_dicom_seg",
    "write_json",
    "write_map",
    "write_mask",
]
