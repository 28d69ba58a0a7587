"""What a cohort run remembers of every job: one small file each, in a hidden folder beside the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zeroseg import io
from zeroseg.errors import ZeroSegError

RECORDS = ".zeroseg-batch"


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
        io.remove_unfinished(folder)


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold an output folder, made when missing, against every other run, the bundle's too; see ``zeroseg.io.sole_writer``.

    Raises:
        ZeroSegError: another run holds it, or the folder cannot be written to.
    """
    try:
        (output / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZeroSegError(f"cannot write into the output folder {output}: {error.strerror or error}") from error
    with io.sole_writer(output):
        remove_leftovers(output)
        yield
