"""MONAI Label leaves the files of a request that fails in the temporary folder; until test_mends.py::test_files.

Patients' images would pile up there. So every temporary file made while a request runs, for an upload or an answer on its way out,
is noted, and what is left of them goes when it ends.
"""

from __future__ import annotations

import contextvars
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_MODULES = ("datastore.local", "datastore.utils.convert", "utils.sessions")
_MODULES += tuple(f"endpoints.{name}" for name in ("datastore", "infer", "model", "session", "wsi_infer"))
_made: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("made", default=None)


def temporary(extension: str) -> str:
    """Path of a new empty file in the system's temporary folder; it goes with the request."""
    handle, path = tempfile.mkstemp(suffix=extension, prefix="zeroseg-")
    os.close(handle)
    return _note(path)


def is_of_this_request(path: Path) -> bool:
    """Whether the server itself made a temporary file for the request that runs: no client can name another one."""
    return str(path) in (_made.get() or ())


@contextmanager
def of_one_request() -> Iterator[None]:
    """Remove, at the end of the block, the temporary files made in it."""
    token = _made.set([])
    try:
        yield
    finally:
        for path in _made.get() or ():
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(path)
        _made.reset(token)


def install() -> None:
    """Note the temporary files of MONAI Label's endpoints."""
    for name in _MODULES:
        importlib.import_module(f"monailabel.{name}").tempfile = _Noting()


class _Noting:
    """The module ``tempfile`` for code that takes a name from it and makes the file itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tempfile, name)

    def NamedTemporaryFile(self, *args: Any, **options: Any) -> Any:
        made = tempfile.NamedTemporaryFile(*args, **options)  # noqa: SIM115 - the caller wants its name
        _note(made.name)
        return made

    def TemporaryDirectory(self, *args: Any, **options: Any) -> Any:
        made = tempfile.TemporaryDirectory(*args, **options)
        _note(made.name)
        return made


def _note(path: str) -> str:
    made = _made.get()
    if made is not None:
        made.append(path)
    return path
