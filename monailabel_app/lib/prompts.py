"""Prompts beside clicks, as 3D Slicer and OHIF send them: a region of interest, and what was drawn on the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.mends import files
from lib.mends.dicom_seg import on_grid
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image

STROKES = {"foreground_scribbles": 1, "background_scribbles": 2}
"""Names of 3D Slicer's two scribble layers -> what they mean in a prompt."""


def region_of(roi: Any, image: Image) -> list[int] | None:
    """A region of interest as the box of a prompt: low corner, high corner, both inside the image.

    Args:
        roi: ``[x0, x1, y0, y1, z0, z1]`` in voxel indices, as 3D Slicer sends it: a pair may be in any order and reach beyond the
            image; the last pair may be missing for a picture. None or empty: there is none.
        image: the image it lies in.

    Returns:
        Six numbers in a volume, four (columns, rows) in a picture; None where there is no region.

    Raises:
        ZeroSegError: it is of another form, or lies beside the image.
    """
    if roi is None or roi == []:
        return None
    numbers = isinstance(roi, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in roi
    )
    if not numbers or len(roi) not in ((6,) if image.is_volume else (4, 6)):
        raise ZeroSegError("roi must be [x0, x1, y0, y1, z0, z1] in voxel indices, or [] for none")
    extent = image.shape if image.is_volume else image.shape[::-1]
    low, high = [], []
    for axis, size in enumerate(extent):
        start, end = sorted((round(roi[2 * axis]), round(roi[2 * axis + 1])))
        if end < 0 or start >= size:
            raise ZeroSegError(f"the roi {roi} lies outside the image of {list(extent)} voxels")
        low.append(max(0, start))
        high.append(min(size - 1, end))
    return low + high


def window_of(region: Sequence[int], volume: bool) -> tuple[slice, ...]:
    """A box of ``region_of`` as an index into the image's arrays, (X, Y, Z) or (H, W)."""
    half = len(region) // 2
    axes = [slice(a, b + 1) for a, b in zip(region[:half], region[half:], strict=True)]
    return tuple(axes if volume else axes[::-1])


def drawn(request: dict[str, Any], image: Image) -> dict[str, np.ndarray]:
    """Strokes, and an answer to start from, of a label map that was uploaded with the request.

    ``label_info`` says what its values are: ``[{"name": "foreground_scribbles", "id": 2}, ...]`` (``idx`` in place of ``id`` will do).
    Strokes have the two names of ``STROKES``; the segment named in ``selected_label_name``, or the only other one, is the answer
    to start from. A map without names holds that answer alone.

    Returns:
        ``scribbles`` (uint8: 1 object, 2 background, 0 neither) and ``mask`` (bool), of the image's shape, as far as drawn.

    Raises:
        ZeroSegError: the map cannot be read, does not fit the image, or holds nothing of use.
    """
    path = uploaded(request)
    if path is None:
        return {}
    labels = on_grid(read_image(find_cases(path)[0]), image)
    values = values_of(request.get("label_info"))
    prompt: dict[str, np.ndarray] = {}
    scribbles = np.zeros(labels.shape, np.uint8)
    for name, kind in STROKES.items():
        if name in values:
            scribbles[labels == values[name]] = kind
    if scribbles.any():
        prompt["scribbles"] = scribbles
    others = {name: value for name, value in values.items() if name not in STROKES}
    wanted = request.get("selected_label_name")
    if isinstance(wanted, str) and wanted in others:
        mask = labels == others[wanted]
    elif len(others) == 1:
        mask = labels == next(iter(others.values()))
    else:
        mask = (labels > 0) & (not values)
    if mask.any():
        prompt["mask"] = mask
    if not prompt:
        raise ZeroSegError(
            "the label map holds neither strokes nor a mask to start from: draw on foreground_scribbles or background_scribbles "
            "and name them in label_info"
        )
    return prompt


def uploaded(request: dict[str, Any]) -> Path | None:
    """The label map sent with a request; None where there is none. A path that a client names is none."""
    label = request.get("label")
    return Path(label) if isinstance(label, str) and files.is_of_this_request(Path(label)) else None


def values_of(label_info: Any) -> dict[str, int]:
    """Name -> value of the labels that ``label_info`` lists.

    Raises:
        ZeroSegError: it is no list of names with whole numbers.
    """
    if not label_info:
        return {}
    values = {}
    for entry in label_info if isinstance(label_info, list) else [None]:
        value = entry.get("id", entry.get("idx")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int):
            raise ZeroSegError('label_info must list names with their values: [{"name": "liver", "id": 1}]')
        values[name] = value
    return values
