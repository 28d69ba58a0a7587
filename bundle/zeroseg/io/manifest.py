"""What a run's manifest records: hashes, versions, and JSON that every reader accepts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import zeroseg
from zeroseg.io.writing import atomic_path

_PACKAGES = ("torch", "monai", "diffusers", "transformers", "numpy", "nibabel", "pydicom")


def versions() -> dict[str, str | None]:
    """Versions of ZeroSeg, Python and the packages that shape a result; None for one that is not installed.

    Packages are not imported for it, so asking costs milliseconds.
    """
    found: dict[str, str | None] = {"zeroseg": zeroseg.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_json(path: str | os.PathLike, obj: Any) -> Path:
    """Write ``obj`` as indented UTF-8 JSON, whole or not at all.

    Args:
        path: target file.
        obj: anything made of dicts, sequences, sets, dataclasses, paths, numpy arrays and scalars, and JSON's own
            types. NaN and Inf become null, because JSON has no word for them.

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
        TypeError: ``obj`` holds something else.
    """
    text = json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        # A file name that is no UTF-8 keeps its bytes: as lone surrogates, which JSON writes with a backslash.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, np.ndarray | np.generic):
        return _plain(obj.tolist())
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, set | frozenset):
        return sorted(_plain(value) for value in obj)
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj
