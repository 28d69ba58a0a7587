"""Files that live for one answer."""

from __future__ import annotations

import os
import tempfile


def temporary(extension: str) -> str:
    """Path of a new empty file in the system's temporary folder; MONAI Label removes an answer's file once it is sent."""
    handle, path = tempfile.mkstemp(suffix=extension, prefix="zeroseg-")
    os.close(handle)
    return path
