"""MONAI Label writes its table of images, and copies labels, in place; until test_mends.py::test_storing.

A full disk or a killed process would leave a cut table, with which no server starts, or half of a label in place of the one before.
Its threads, those of requests and the one that watches the folder, also change the table while others go through it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock
from monailabel.datastore import local
from monailabel.datastore.local import LocalDatastore

from zeroseg.io import atomic_path

logger = logging.getLogger(__name__)


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a file, which appears whole or not at all.

    Raises:
        ZeroSegError: the folder cannot be written to, or the disk is full.
    """
    with atomic_path(target) as part:
        shutil.copyfile(source, part)


def is_listed(name: str) -> bool:
    """Whether a file of that name can be an image or a label: hidden ones are not finished, and the table is UTF-8."""
    if name.startswith("."):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        logger.warning("%s is left out: its name is not UTF-8, rename it", ascii(name))
        return False
    return True


def _in_turn(method: Callable, changes: bool = False) -> Callable:
    """A method of ``Storing`` that runs while no other thread goes through the table or changes it.

    Args:
        method: of MONAI Label's datastore.
        changes: it changes the table: what a batch, in a process of its own, wrote into it meanwhile is kept.
    """

    @wraps(method)
    def alone(self, *args, **options):
        with self.turn:
            if changes:
                self._init_from_datastore_file()
            return method(self, *args, **options)

    return alone


class Storing(LocalDatastore):
    """MONAI Label's datastore, whose table and files are whole at any time.

    In the order of bases it comes after ``DICOMWebDatastore``, which fetches: who waits for others (``fetching.alone``, a server) must
    not hold ``turn``, and who holds MONAI Label's lock on the table between processes must hold it already.

    Attributes:
        turn: of the threads of this process; held while the table is read or changed as a whole.
    """

    refresh = _in_turn(LocalDatastore.refresh)
    add_image = _in_turn(LocalDatastore.add_image, changes=True)
    save_label = _in_turn(LocalDatastore.save_label, changes=True)
    update_image_info = _in_turn(LocalDatastore.update_image_info, changes=True)
    update_label_info = _in_turn(LocalDatastore.update_label_info, changes=True)
    get_labeled_images = _in_turn(LocalDatastore.get_labeled_images)
    get_unlabeled_images = _in_turn(LocalDatastore.get_unlabeled_images)
    datalist = _in_turn(LocalDatastore.datalist)
    json = _in_turn(LocalDatastore.json)
    _init_from_datastore_file = _in_turn(LocalDatastore._init_from_datastore_file)

    def __init__(self, *args: Any, **options: Any):
        self.turn = threading.RLock()
        # It takes nothing else of that module.
        local.shutil = SimpleNamespace(copy=copy)
        super().__init__(*args, **options)
        if self._auto_reload:
            # What is written whole appears by a renaming, of other processes too.
            self._handler.on_moved = self._on_any_event

    def status(self) -> dict[str, Any]:
        """As MONAI Label's."""
        with self.turn:
            tags = Counter(tag for image in self._datastore.objects.values() for tag in image.labels)
        return {
            "total": len(self.list_images()),
            "completed": len(self.get_labeled_images()),
            "label_tags": dict(tags),
        }

    def _update_datastore_file(self, lock=True):
        if lock:
            with self.turn, FileLock(self._lock_file):
                self._update_datastore_file(lock=False)
            return
        # Who holds MONAI Label's lock must not wait for a turn: others wait for that lock in theirs.
        table = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        with atomic_path(self._datastore_config_path) as part:
            part.write_text(table)
        self._config_ts = os.stat(self._datastore_config_path).st_mtime

    def _on_any_event(self, event):
        paths = [Path(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path]
        # An exception would end the thread that watches, for good.
        try:
            if paths[-1] == Path(self._datastore_config_path):
                self._init_from_datastore_file()
            elif any(is_listed(path.name) for path in paths):
                self.refresh()
        except Exception:
            logger.exception("what changed in the folder of images is not seen yet (%s)", paths[-1].name)

    def _on_modify_event(self, event):
        if Path(os.fsdecode(event.src_path)) == Path(self._datastore_config_path):
            self._on_any_event(event)

    def _list_files(self, path, patterns):
        return {name: file for name, file in super()._list_files(path, patterns).items() if is_listed(name)}
