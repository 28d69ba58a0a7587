"""The one place where prompts are checked: clicks, boxes, scribbles, masks and words, in images and in volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zeroseg.errors import ZeroSegError

SELECTS = ("segments", "auto", "points", "box", "text")
"""Rules that choose a mask; see ``zeroseg.interaction.inferer``."""
DRAWN = ("scribbles", "mask")
"""Prompts that are arrays of the image's shape; a prompts file names an image file for each."""
PROMPT_KEYS = ("select", "points", "labels", "box", "text", *DRAWN, "candidate")
"""Arguments of ``check_prompts`` that a prompts file may hold."""
CANDIDATES = (1, 2, 3)
MOST_NOUNS = 32
"""Each noun takes the backbone about ten passes an image."""
LARGEST = 2**53
"""Beyond it float64 tells whole numbers no longer apart; no image has as many pixels."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts for one image or volume, checked.

    Attributes:
        rule: segments, auto, points, box or text.
        shape: (H, W) or (X, Y, Z) of what they belong to.
        points: clicks in the order given: (x, y) = (column, row), or voxel indices (x, y, z).
        labels: 1 (object) or 0 (background) per click.
        box: low corner, high corner, in the order of a click's numbers, or None.
        text: the words, without surrounding blanks, or None.
        scribbles: uint8 of ``shape``: 1 object, 2 background, 0 neither; or None.
        mask: bool of ``shape``, the answer to be corrected, or None.
        candidate: which of several nested answers, 1..3, or None for the best one.
        nouns: rule segments: what to name them by, in the order given; empty where they stay without names.
    """

    rule: str
    shape: tuple[int, ...]
    points: tuple[tuple[float, ...], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, ...] | None = None
    text: str | None = None
    scribbles: np.ndarray | None = None
    mask: np.ndarray | None = None
    candidate: int | None = None
    nouns: tuple[str, ...] = ()

    @property
    def shows_object(self) -> bool:
        """Whether a click or a stroke lies on the object."""
        return any(self.labels) or (self.scribbles is not None and bool((self.scribbles == 1).any()))


def check_prompts(
    shape: Sequence[int],
    select: str | None = None,
    points: Any = None,
    labels: Any = None,
    box: Any = None,
    text: Any = None,
    scribbles: Any = None,
    mask: Any = None,
    candidate: Any = None,
) -> Prompts:
    """All prompts of a call, checked against the image they are for.

    Args:
        shape: (H, W) of an image or (X, Y, Z) of a volume.
        select: the rule; None: by the prompt given, in the order points, scribbles or mask, box, text, else ``auto``.
        points: sequence of (x, y) or (x, y, z).
        labels: sequence of 0 and 1, one per click; None: all 1.
        box: four or six numbers, low corner first, both corners inside.
        text: the words; rule segments: nouns with commas between.
        scribbles: integers of ``shape``: 1 object, 2 background, 0 neither.
        mask: bool, or 0 and 1, of ``shape``.
        candidate: 1, 2 or 3.

    Raises:
        ZeroSegError: a prompt is malformed or outside, or the rule's prompt is missing; one line.
    """
    shape = tuple(int(n) for n in shape)
    extent = extent_of(shape)
    shown = scribbles is not None or mask is not None
    rule = _rule(select, points is not None or shown, box is not None, text is not None)
    clicks, kinds = check_points(points, labels, extent)
    strokes, start = _scribbles(scribbles, shape), _mask(mask, shape)
    corners = _box(box, extent)
    if rule == "points" and not (
        any(kinds) or corners is not None or start is not None or (strokes is not None and (strokes == 1).any())
    ):
        raise ZeroSegError("select points needs at least one click with label 1 (on the object)")
    words = check_text(text) if rule == "text" else None
    nouns = check_nouns(text) if rule == "segments" and text is not None else ()
    return Prompts(
        rule, shape, tuple(clicks), tuple(kinds), corners, words, strokes, start, _candidate(candidate), nouns
    )


def contradicts(prompts: Prompts) -> bool:
    """Whether some pixel is marked both as object and as background, by clicks or strokes."""
    marked: dict[tuple[int, ...], int] = {}
    for point, label in zip(prompts.points, prompts.labels, strict=True):
        pixel = tuple(int(v + 0.5) for v in point)
        if marked.setdefault(pixel, label) != label:
            return True
        if prompts.scribbles is not None:
            stroke = prompts.scribbles[pixel[::-1] if len(pixel) == 2 else pixel]
            if stroke and (stroke == 1) != bool(label):
                return True
    return False


def extent_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Pixels along the numbers of a click: columns, rows in an image (H, W); x, y, z in a volume (X, Y, Z)."""
    return tuple(shape[::-1]) if len(shape) == 2 else tuple(shape)


def _rule(select: Any, points: bool, box: bool, text: bool) -> str:
    if select is None:
        return "points" if points else "box" if box else "text" if text else "auto"
    if select not in SELECTS:
        raise ZeroSegError(f"unknown select {select!r}: use one of {', '.join(SELECTS)}")
    given = {"points": points, "box": box, "text": text}
    if not given.get(select, True):
        raise ZeroSegError(f"select {select} needs a prompt: give {select} for this image")
    return select


def check_points(points: Any, labels: Any, extent: Sequence[int]) -> tuple[list[tuple[float, ...]], list[int]]:
    """Clicks and their labels, checked against the image.

    Args:
        points: sequence of (x, y) or (x, y, z), or None.
        labels: sequence of 0 and 1, or None for all 1.
        extent: number of pixels along x, y (and z).

    Raises:
        ZeroSegError: a click is malformed or outside, or the labels do not match or have no clicks.
    """
    if points is None:
        if labels is not None:
            raise ZeroSegError("labels are given without points: give the points they belong to, or leave labels out")
        return [], []
    axes = "xyz"[: len(extent)]
    try:
        clicks = [tuple(float(v) for v in point) for point in points]
    except (TypeError, ValueError, OverflowError):
        raise ZeroSegError(f"points must be a list of [{', '.join(axes)}] numbers, not {_short(points)}") from None
    for click in clicks:
        if len(click) != len(extent):
            raise ZeroSegError(f"point {_short(list(click))} must have {len(extent)} numbers: {', '.join(axes)}")
        if not all(0 <= v <= n - 1 for v, n in zip(click, extent, strict=True)):
            inside = ", ".join(f"{a} 0..{n - 1}" for a, n in zip(axes, extent, strict=True))
            raise ZeroSegError(f"point {list(click)} lies outside the image: {inside}")
    kinds = [1] * len(clicks) if labels is None else list(labels) if hasattr(labels, "__iter__") else []
    if len(kinds) != len(clicks) or not all(np.ndim(k) == 0 and k in (0, 1) for k in kinds):
        raise ZeroSegError(f"labels must hold one 0 or 1 for each of the {len(clicks)} points, not {_short(labels)}")
    if not clicks:
        raise ZeroSegError("points is empty: give at least one click [x, y], or leave points out")
    return clicks, [int(k) for k in kinds]


def _box(box: Any, extent: Sequence[int]) -> tuple[float, ...] | None:
    if box is None:
        return None
    n = len(extent)
    try:
        corners = tuple(float(v) for v in box)
    except (TypeError, ValueError, OverflowError):
        raise ZeroSegError(f"box must be {2 * n} numbers, not {_short(box)}") from None
    if len(corners) != 2 * n:
        raise ZeroSegError(f"box must be {2 * n} numbers (low corner, high corner), not {len(corners)}")
    low, high = corners[:n], corners[n:]
    if not all(0 <= a <= b <= size - 1 for a, b, size in zip(low, high, extent, strict=True)):
        raise ZeroSegError(
            f"box {list(corners)} must have its low corner first and lie inside the image of {list(extent)} pixels"
        )
    return corners


def check_text(text: Any) -> str:
    """The words without surrounding blanks.

    Raises:
        ZeroSegError: they are no string, or blank.
    """
    if not isinstance(text, str) or not text.strip():
        raise ZeroSegError(f"the text prompt must be words, not {_short(text)}")
    return text.strip()


def check_nouns(text: Any) -> tuple[str, ...]:
    """The nouns of a list with commas between, without surrounding blanks.

    Raises:
        ZeroSegError: it is no text, or a noun is blank or stands twice, or there are more than ``MOST_NOUNS``.
    """
    nouns = [noun.strip() for noun in check_text(text).split(",")]
    if not all(nouns):
        raise ZeroSegError(f"the list of nouns has an empty one: write nouns with commas between, not {_short(text)}")
    if len(nouns) > MOST_NOUNS:
        raise ZeroSegError(f"segments are named by at most {MOST_NOUNS} nouns, not {len(nouns)}")
    seen: set[str] = set()
    for noun in nouns:
        if noun.casefold() in seen:
            raise ZeroSegError(f"the list of nouns has {_short(noun)} twice: give each noun once")
        seen.add(noun.casefold())
    return tuple(nouns)


def _scribbles(scribbles: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if scribbles is None:
        return None
    strokes = _array("scribbles", scribbles, shape)
    if strokes.dtype.kind not in "iu":
        raise ZeroSegError(f"scribbles must be whole numbers (1 object, 2 background, 0 neither), not {strokes.dtype}")
    if not np.isin(strokes, (0, 1, 2)).all():
        other = sorted({int(v) for v in np.unique(strokes)} - {0, 1, 2})
        raise ZeroSegError(f"scribbles must hold 1 (object), 2 (background) and 0 (neither) only, not {other[0]}")
    if not strokes.any():
        raise ZeroSegError("scribbles are empty: draw on the object (1) or on the background (2), or leave them out")
    return strokes.astype(np.uint8)


def _mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if mask is None:
        return None
    values = _array("mask", mask, shape)
    if values.dtype != bool and (values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all()):
        raise ZeroSegError("mask must hold true and false, or 0 and 1, only")
    # An empty one says nothing.
    return values.astype(bool) if values.any() else None


def _array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A prompt drawn on the image, as an array of the image's shape."""
    try:
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ZeroSegError(f"{name} must be an array of the image's shape {shape}, not {_short(value)}") from None
    if array.shape != shape:
        raise ZeroSegError(f"{name} must have the image's shape {shape}, not {array.shape}")
    return array


def _candidate(candidate: Any) -> int | None:
    if candidate is None:
        return None
    if isinstance(candidate, (bool, np.bool_)) or np.ndim(candidate) or candidate not in CANDIDATES:
        raise ZeroSegError(f"candidate must be 1, 2 or 3, not {_short(candidate)}")
    return int(candidate)


def _short(value: Any) -> str:
    """A value for a message: one line, not longer than a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def from_viewer(foreground: Any, background: Any, box: Any, volume: bool, drawn: bool = False) -> dict[str, Any]:
    """Prompts as OHIF and 3D Slicer send them -> ``points``, ``labels`` and ``box`` of ``check_prompts``, as far as given.

    Args:
        foreground, background: lists of voxel indices [i, j, k]; in a picture k is 0 or left out.
        box: voxel indices of its first and last corner, six numbers in a volume and four in a picture.
        volume: whether the image is a volume.
        drawn: whether strokes or a mask say where the object is.

    Raises:
        ZeroSegError: they are not of that form, or nothing says where the object is.
    """
    wanted, unwanted = (
        _viewer_clicks(name, given, volume) for name, given in (("foreground", foreground), ("background", background))
    )
    corners = _viewer_box(box or None, volume)
    if not wanted and corners is None and not drawn:
        raise ZeroSegError("no click was given: place at least one point on the object")
    prompt: dict[str, Any] = {} if corners is None else {"box": corners}
    if wanted or unwanted:
        prompt |= {"points": wanted + unwanted, "labels": [1] * len(wanted) + [0] * len(unwanted)}
    return prompt


def _viewer_clicks(name: str, points: Any, volume: bool) -> list[list[float]]:
    if points is None:
        return []
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) in (2, 3) for p in points):
        raise ZeroSegError(f"{name} must be a list of voxel indices [[i, j, k]], not {_short(points)}")
    if not all(_is_number(v) for p in points for v in p):
        raise ZeroSegError(f"{name} must hold numbers only, not {_short(points)}")
    if not all(_is_index(v) for p in points for v in p) or (volume and any(len(p) < 3 for p in points)):
        raise ZeroSegError(f"{name} must hold voxel indices of the image, i, j, k in a volume, not {_short(points)}")
    if not volume and any(len(p) == 3 and round(p[2]) != 0 for p in points):
        raise ZeroSegError(
            f"{name}: the image has one slice, so k must be 0, not {[p[2] for p in points if len(p) == 3]}"
        )
    return points if volume else [p[:2] for p in points]


def _viewer_box(box: Any, volume: bool) -> list[float] | None:
    count = 6 if volume else 4
    fits = isinstance(box, list) and len(box) == count and all(_is_number(v) and _is_index(v) for v in box)
    if box is not None and not fits:
        raise ZeroSegError(f"box must be a list of {count} voxel indices, first corner then last, not {_short(box)}")
    return box


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e9


def check_values(value: Any, name: str = "prompt") -> None:
    """Refuse numbers and texts that no array and no tokenizer can take, before anybody asks what they mean.

    Args:
        value: a prompt as read from JSON: dictionaries, lists, texts, numbers.
        name: what the message calls it.

    Raises:
        ZeroSegError: a whole number is beyond ``LARGEST``, or a text is no valid Unicode.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ZeroSegError(f"{name}: a number of {value.bit_length() * 3 // 10 + 1} digits is beyond all images")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ZeroSegError(f"{name}: the text is no valid Unicode")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in inner:
        check_values(item, str(key) if isinstance(value, dict) else name)
