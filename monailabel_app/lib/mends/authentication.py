"""MONAI Label turns valid tokens away (MONAI_LABEL_AUTH_ENABLE); until test_mends.py::test_authentication.

It checks a token's signature without saying which algorithm it may have, which PyJWT 2 refuses. Keycloak signs with RS256, and
nothing else is accepted here.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jwt

ALGORITHMS = ("RS256",)


def install() -> None:
    """Name the algorithm in MONAI Label's one call of PyJWT."""
    from monailabel.endpoints.user import auth

    auth.jwt = SimpleNamespace(decode=partial(jwt.decode, algorithms=list(ALGORITHMS)))
