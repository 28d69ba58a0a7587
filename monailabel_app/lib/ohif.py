"""OHIF as MONAI Label ships it, with the server's reasons shown to the user (``ohif.js``) and its assets found."""

from __future__ import annotations

from pathlib import Path

import monailabel.endpoints
from fastapi.responses import FileResponse, HTMLResponse, Response
from monailabel.utils.others.generic import get_mime_type

SCRIPT = Path(__file__).with_suffix(".js")


def install() -> None:
    """Put ``page`` in the place of MONAI Label's function."""
    from monailabel.endpoints import ohif

    ohif.get_ohif = page


def page(path: str) -> Response:
    """A file of the viewer; every other path is the viewer itself, which reads its own address.

    MONAI Label 0.8.5 looks for ``a:b`` where ``a/b`` was asked for, so that files in folders are never found.
    """
    root = Path(monailabel.endpoints.__file__).parent / "static" / "ohif"
    file = (root / path).resolve()
    if path and file.is_file() and file.is_relative_to(root.resolve()) and file.name != "index.html":
        return FileResponse(file, media_type=get_mime_type(str(file)))
    viewer = (root / "index.html").read_text()
    return HTMLResponse(viewer.replace("<head>", f"<head><script>{SCRIPT.read_text()}</script>", 1))
