"""MONAI Label takes requests of any length and of any web page's; until test_mends.py::test_limits.

How much a client may send, and from where: limits that the server's environment can move.
"""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from monailabel.config import settings

from zeroseg.io.limits import limit_of

UPLOAD_VARIABLE = "ZEROSEG_MAX_UPLOAD_MB"
UPLOAD_MB = 4096
HOSTS_VARIABLE = "ZEROSEG_ALLOWED_HOSTS"


def upload_limit() -> int:
    """Bytes a request, or what an uploaded archive holds, may have."""
    return limit_of(UPLOAD_VARIABLE, UPLOAD_MB) << 20


def allowed_hosts() -> set[str]:
    """Names a browser may know this server by, beside those of this machine: ``ZEROSEG_ALLOWED_HOSTS``, with commas."""
    return {name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",") if name.strip()}


def is_address(host: str) -> bool:
    """Whether a text is an IP address, not a name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine itself."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def foreign(server: str, host: str, origin: str | None) -> str | None:
    """Why a request comes from a page that is none of this server's; None when it does not.

    A server that listens on this machine only is still within reach of every web page the user opens: the page asks the
    browser to ask (cross-site requests), or gives its own name this machine's address (DNS rebinding). One that listens on other
    addresses is within reach of the pages opened in its network.

    Args:
        server: the address the request arrived at.
        host: its ``Host`` header.
        origin: its ``Origin`` header, which browsers send with every request of one site to another.
    """
    try:
        name, page = (urlsplit(f"//{host}").hostname or "").lower(), urlsplit(origin or "")
        place, known = page.hostname, allowed_hosts()
    except ValueError:
        return "the header Host or Origin of this request is malformed"
    # An address cannot be given to a page as its name, so it will do where no names are set.
    unknown = name not in known and not is_loopback(name)
    if unknown and (known or is_loopback(server) or not is_address(name)):
        return f"this server is not known as {name[:80]!r}: allow the name by the environment variable {HOSTS_VARIABLE}"
    if origin is None or page.netloc.lower() == host.lower() or place in known:
        return None
    if origin.rstrip("/") in {str(given).rstrip("/") for given in settings.MONAI_LABEL_CORS_ORIGINS or ()}:
        return None
    return f"pages of {origin[:80]!r} may not use this server: allow them by the environment variable MONAI_LABEL_CORS_ORIGINS"
