"""What a cohort run remembers of every job: one small file each, in a hidden folder beside the results."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from zeroseg.errors import ZeroSegError

RECORDS = ".zeroseg-batch"
TEMPORARY = ".zeroseg-" + "[0-9a-f]" * 16 + "*"
"""What ``zeroseg.io.atomic_path`` calls a file it has not finished."""


def record_path(output: Path, stem: str) -> Path:
    """Where the record of a job is."""
    return output / RECORDS / f"{stem}.json"


def read_record(output: Path, stem: str) -> dict[str, Any] | None:
    """``key``, ``fingerprint`` and ``entries`` of a job done before; None: nothing is known of it."""
    try:
        record = json.loads(record_path(output, stem).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"key", "fingerprint", "entries"} <= set(record) else None


def failed(stem: str, reason: str) -> dict[str, Any]:
    """The manifest's entry of a job that came to nothing."""
    return {"case": stem, "status": "failed", "reason": reason}


def digest(content: Any) -> str:
    """SHA-256 of anything JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def remove_leftovers(output: Path) -> None:
    """Remove the unfinished files of processes that were killed."""
    for folder in (output, output / RECORDS):
        for path in folder.glob(TEMPORARY):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold an output folder, which is made when missing; the hold goes with the process, however that ends.

    Raises:
        ZeroSegError: another run holds it, or the folder cannot be written to.
    """
    try:
        (output / RECORDS).mkdir(parents=True, exist_ok=True)
        lock = open(output / RECORDS / "lock", "w")  # noqa: SIM115 - open as long as the block lasts
    except OSError as error:
        raise ZeroSegError(f"cannot write into the output folder {output}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ZeroSegError(f"another run writes into {output}: wait for it, or give another folder") from None
        remove_leftovers(output)
        yield
