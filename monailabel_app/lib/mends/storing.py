"""MONAI Label writes its table of images, and copies labels, in place; until test_mends.py::test_storing.

A full disk or a killed process would leave a cut table, with which no server starts, or half of a label in place of the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock
from monailabel.datastore import local
from monailabel.datastore.local import LocalDatastore

from zeroseg.io import atomic_path


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a file, which appears whole or not at all.

    Raises:
        ZeroSegError: the folder cannot be written to, or the disk is full.
    """
    with atomic_path(target) as part:
        shutil.copyfile(source, part)


def is_listed(name: str) -> bool:
    """Whether a file of that name can be an image or a label: hidden ones are not finished."""
    return not name.startswith(".")


class Storing(LocalDatastore):
    """MONAI Label's datastore, whose table and files are whole at any time.

    In the order of bases it comes after ``DICOMWebDatastore``.
    """

    def __init__(self, *args: Any, **options: Any):
        # It takes nothing else of that module.
        local.shutil = SimpleNamespace(copy=copy)
        super().__init__(*args, **options)
        if self._auto_reload:
            # What is written whole appears by a renaming, of other processes too.
            self._handler.on_moved = self._on_any_event

    def _update_datastore_file(self, lock=True):
        table = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        with FileLock(self._lock_file) if lock else nullcontext():
            with atomic_path(self._datastore_config_path) as part:
                part.write_text(table)
            self._config_ts = os.stat(self._datastore_config_path).st_mtime

    def _on_any_event(self, event):
        paths = [Path(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path]
        if paths[-1] == Path(self._datastore_config_path):
            self._init_from_datastore_file()
        elif not all(path.name.startswith(".") for path in paths):
            super()._on_any_event(event)

    def _list_files(self, path, patterns):
        return {name: file for name, file in super()._list_files(path, patterns).items() if is_listed(name)}
