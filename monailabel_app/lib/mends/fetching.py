"""MONAI Label takes a series for whole once a file of it is there; until test_mends.py::test_fetching.

A full disk, a dropped connection or a killed process would leave a shortened volume that is segmented like any other. Where it
fetches frame by frame it also goes on without those that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.utils import dicom

from lib.mends.errors import NotFound
from zeroseg.io import remove_unfinished, staged


def install() -> None:
    """Have errors of single frames raised."""
    dicom.ThreadPoolExecutor = _Raising


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let nobody else fetch into a folder: trainings, scorings and batches do so in processes of their own.

    Args:
        folder: existing; what a killed process left unfinished in it is removed.
    """
    with FileLock(folder / ".fetching"):
        remove_unfinished(folder)
        yield


def is_whole(folder: Path) -> bool:
    """Whether a series was fetched into a folder."""
    return folder.is_dir() and any(folder.iterdir())


def fetch(series: str, folder: Path, client: Any, by_frame: bool) -> None:
    """Download a series that is not there yet; its folder appears whole or not at all. Only ``alone``.

    Args:
        series: its instance UID.
        folder: where its DICOM files shall lie; missing or empty, in an existing one.
        client: of the DICOMweb server.
        by_frame: fetch single frames.

    Raises:
        NotFound: the server has no such series.
        OSError: the disk is full, or the server does not answer.
    """
    if is_whole(folder):
        return
    with staged(folder.parent) as stage:
        try:
            dicom.dicom_web_download_series(None, series, str(stage / folder.name), client, by_frame)
        except IndexError as error:
            raise NotFound(f"there is no series {series!r} on the DICOM server") from error


class _Raising(ThreadPoolExecutor):
    """For code that takes no result of ``map``, and so hears of no error."""

    def map(self, *args: Any, **options: Any) -> Any:
        return list(super().map(*args, **options))
