"""Images and their masks: which belong together, and which half of a set a case is in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from zeroseg.errors import ZeroSegError
from zeroseg.io import Case, find_cases, read_image


def half_of(stem: str) -> str:
    """``dev`` or ``test``, fixed by the SHA-256 of the stem, whatever else is in the set."""
    return ("dev", "test")[int(hashlib.sha256(stem.encode()).hexdigest(), 16) % 2]


def find_pairs(
    images: Path, masks: Path, out: Path, half: str = "all", limit: int | None = None
) -> tuple[list[tuple[Case, Case]], list[str]]:
    """Cases that have an image and a mask.

    Returns:
        list of (image, mask), and the stems of images without a mask.

    Raises:
        ZeroSegError: a folder is missing or empty, or nothing is left to evaluate.
    """
    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise ZeroSegError(f"{folder}: no such folder; give an existing one as --{name}")
    found = find_cases(images, exclude=out)
    truths = {case.stem: case for case in find_cases(masks, exclude=out)}
    pairs = [(case, truths[case.stem]) for case in found if case.stem in truths]
    if not pairs:
        raise ZeroSegError(f"no mask in {masks} has the name of an image in {images} (without extension)")
    chosen = [pair for pair in pairs if half in ("all", half_of(pair[0].stem))][:limit]
    if not chosen:
        raise ZeroSegError(f"none of the {len(pairs)} cases of {images} belongs to the half {half!r}; use --half all")
    return chosen, [case.stem for case in found if case.stem not in truths]


def sets_of(suite: Path) -> list[tuple[Path, bool]]:
    """The sets of a folder, each with ``images`` and ``masks``, and whether a set holds volumes.

    A set whose first image cannot be read counts as one of images: its evaluation says what is wrong.

    Raises:
        ZeroSegError: the folder is not there, or holds no set.
    """
    if not suite.is_dir():
        raise ZeroSegError(f"{suite}: no such folder; give the folder that holds the sets as --suite")
    sets = [f for f in sorted(suite.iterdir()) if (f / "images").is_dir() and (f / "masks").is_dir()]
    if not sets:
        raise ZeroSegError(f"{suite}: no set with the folders images/ and masks/ in it")
    return [(folder, holds_volumes(folder / "images")) for folder in sets]


def holds_volumes(images: Path) -> bool:
    """Whether the first case of a folder is a volume; not where it cannot be read."""
    try:
        first = find_cases(images)[0]
        return first.kind == "dicom_series" or read_image(first).is_volume
    except ZeroSegError:
        return False
