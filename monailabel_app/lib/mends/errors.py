"""MONAI Label answers most failures with a bare 500 and joins names to its folders; until test_mends.py::test_errors.

Here every failure becomes an HTTP status and one line of text, and names from outside are never paths: 422 for what the user can
mend, 404 for what is not there, 503 where weights or memory are missing or the DICOM server cannot be reached.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tarfile
import tempfile
from json import JSONDecodeError
from typing import Any
from urllib.parse import parse_qsl, unquote

import requests
from fastapi import HTTPException
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from pydantic import ValidationError
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lib.mends.limits import foreign
from lib.mends.responsive import Abandoned
from zeroseg.errors import MemoryShortage, WeightsError, ZeroSegError, is_out_of_memory

logger = logging.getLogger(__name__)

_BAD_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP)
_MISUNDERSTOOD = (
    *(ValidationError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError),
    *(OverflowError, RecursionError),
)
"""Raised by MONAI Label's own code on requests of an unexpected form, the last two on numbers beyond all bounds and JSON nested without
end; the app's own bugs arrive as InternalError."""

_hidden: set[str] = {tempfile.gettempdir()}
"""Folders of the server that no client has to know."""

NAMES = ("image", "id", "label", "tag", "session_id", "model", "strategy", "method")
"""Query parameters that MONAI Label uses as names in its folders or tables."""


class NotFound(Exception):
    """A model, an image or a label that the server does not have; the message says which."""


class Foreign(Exception):
    """The request comes from a web page of somebody else."""


class Fixed(Exception):
    """The request would change what no client may: the message says what does."""


class Refused(Exception):
    """The request is malformed or asks for what is not allowed; the message says what to change."""


def is_name(text: str) -> bool:
    """Whether a text from a request can serve as a file's name: no folder, no control character, not too long."""
    return text not in (".", "..") and not any(c in "/\\" or ord(c) < 32 for c in text) and len(text.encode()) <= 255


def check_names(path: str, query: str) -> None:
    """Refuse a request whose names could leave the server's folders.

    Args:
        path: decoded path of the URL.
        query: the raw query string.

    Raises:
        Refused: a name holds a folder or control characters.
    """
    names = [value for key, value in parse_qsl(query, keep_blank_values=True) if key in NAMES]
    for name in [*names, *path.split("/")]:
        if not is_name(name) or not is_name(unquote(name)):
            shown = "".join(c if c.isprintable() else "?" for c in name)[:80]
            raise Refused(f"{shown!r} is no valid name: names hold no folders")


def hide(*folders: str | os.PathLike) -> None:
    """Leave folders of the server out of what ``status_and_detail`` says."""
    paths = (path for folder in folders for path in (os.path.abspath(folder), os.path.realpath(folder)))
    _hidden.update(path for path in paths if os.path.basename(path))


def _shown(text: str) -> str:
    """A text without the folders to hide: files in them by their names there, themselves by theirs."""
    for folder in sorted(_hidden, key=len, reverse=True):
        name = os.path.basename(folder)
        text = re.sub(rf"(?<!\w){re.escape(folder)}(/|(?!\w))", lambda found, name=name: "" if found[1] else name, text)
    return text


def status_and_detail(error: BaseException) -> tuple[int, Any]:
    """HTTP status and text for an exception; the text names no folder of the server."""
    status, detail = _explained(error)
    return status, _shown(detail) if isinstance(detail, str) else detail


def _explained(error: BaseException) -> tuple[int, Any]:
    # MONAI Label answers 500 where the request was wrong, with a text that says so.
    if isinstance(error, HTTPException):
        return (422 if error.status_code == 500 else error.status_code), error.detail
    if isinstance(error, WeightsError):
        return 503, f"weights: {error}"
    if isinstance(error, MemoryShortage) or is_out_of_memory(error):
        return 503, "the server has not enough memory for this image: try one slice (option extent), or a smaller image"
    if isinstance(error, (ZeroSegError, Refused)):
        return 422, str(error)
    if isinstance(error, NotFound):
        return 404, str(error)
    if isinstance(error, (ImageNotFoundException, LabelNotFoundException)):
        return 404, error.msg
    if isinstance(error, MONAILabelException):
        return (404 if "There is no" in error.msg else 422), error.msg
    if isinstance(error, JSONDecodeError):
        return 422, f"the parameters are not valid JSON: {error}"
    if isinstance(error, requests.exceptions.MissingSchema):
        return 404, "this server serves a folder of images: OHIF needs one that serves a DICOMweb server"
    if isinstance(error, requests.HTTPError) and error.response is not None and 400 <= error.response.status_code < 500:
        return 404, f"the DICOM server does not have it ({error.response.status_code})"
    if isinstance(error, requests.RequestException):
        return 503, f"the DICOM server cannot be reached ({type(error).__name__}): check that it runs"
    if isinstance(error, shutil.ReadError):
        return 422, f"the archive cannot be unpacked: {error}"
    if isinstance(error, OSError) and error.errno in _BAD_NAME:
        return 422, f"a name in the request cannot be a file's: {error.strerror}"
    if isinstance(error, OSError):
        return 503, f"the server cannot read or write a file: {error.strerror or type(error).__name__}"
    if isinstance(error, _MISUNDERSTOOD):
        return 422, f"the request could not be understood ({type(error).__name__}: {str(error)[:200]})"
    return 500, f"internal error ({type(error).__name__}: {str(error)[:200]}); the server's log holds the details"


class InternalError(Exception):
    """A fault of the app, not of the request."""


async def answer(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    if isinstance(error, Abandoned):
        raise error
    status, detail = status_and_detail(error)
    if status >= 500:
        logger.error("%s %s: %s", request.method, request.url.path, detail, exc_info=error)
    else:
        logger.info("%s %s: %s %s", request.method, request.url.path, status, detail)
    return JSONResponse({"detail": detail}, status, getattr(error, "headers", None))


class RefusingPaths:
    """ASGI application in front of another one that refuses what no client of this server has to ask for.

    403 for pages of other sites, 405 for weights from outside, 422 for names which are paths, and for loading the app anew, which
    would leave the old one's memory behind.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            try:
                headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
                reason = foreign((scope.get("server") or ("", 0))[0], headers.get(b"host", ""), headers.get(b"origin"))
                if reason:
                    raise Foreign(reason)
                if scope["path"].rstrip("/") == "/reload":
                    raise Refused("the app is not loaded anew while it serves: start the server again")
                if scope["path"].startswith("/model/") and scope["method"] not in ("GET", "HEAD"):
                    raise Fixed(
                        "weights are not taken from clients, nor removed by them: POST /train/learned makes new ones"
                    )
                check_names(scope["path"], scope["query_string"].decode("latin-1"))
            except Foreign as error:
                await JSONResponse({"detail": str(error)}, 403)(scope, receive, send)
                return
            except Fixed as error:
                await JSONResponse({"detail": str(error)}, 405, {"allow": "GET, HEAD"})(scope, receive, send)
                return
            except Refused as error:
                await JSONResponse({"detail": str(error)}, 422)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def install(stack) -> None:
    """Give a built middleware stack the handler above for every exception."""
    layer = stack
    while layer is not None and not isinstance(layer, ExceptionMiddleware):
        layer = getattr(layer, "app", None)
    if layer is None:
        raise RuntimeError(
            "Starlette's ExceptionMiddleware was not found: this version of Starlette is built differently"
        )
    # Uploaded archives: Python before 3.14 unpacks a tar's members wherever their names say.
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    layer.add_exception_handler(Exception, answer)
    layer.add_exception_handler(HTTPException, answer)
