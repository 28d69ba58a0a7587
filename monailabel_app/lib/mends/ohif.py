"""MONAI Label does not find OHIF's files in folders; until test_mends.py::test_ohif.

OHIF as MONAI Label ships it, with its assets found, segments told apart by colour, and ``ohif.js`` in its page. The last two
are additions to OHIF's panel, not mends of MONAI Label: they stay when the first goes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import monailabel.endpoints
from fastapi.responses import FileResponse, HTMLResponse, Response
from monailabel.utils.others.generic import get_mime_type

SCRIPT = Path(__file__).with_suffix(".js")
COLOURS = "of GenericAnatomyColors)"
"""Where OHIF's MONAI Label panel looks up the colour of a label's name; a name it does not know gets one by adding up its letters,
and segment_01 to segment_16 cannot be told apart."""
MORE_COLOURS = "of [...window.zerosegColours, ...GenericAnatomyColors])"


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
        if file == script_with_colours(root.resolve()):
            return Response(file.read_text().replace(COLOURS, MORE_COLOURS), media_type="text/javascript")
        return FileResponse(file, media_type=get_mime_type(str(file)))
    viewer = (root / "index.html").read_text()
    return HTMLResponse(viewer.replace("<head>", f"<head><script>{SCRIPT.read_text()}</script>", 1))


@cache
def script_with_colours(root: Path) -> Path | None:
    """The script of the viewer that holds ``COLOURS``; None when this OHIF does it otherwise."""
    return next((file for file in sorted(root.glob("*.bundle.*.js")) if COLOURS in file.read_text()), None)
