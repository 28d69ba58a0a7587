"""MONAI Label knows four outputs of an inference, a map of confidence not among them; until test_mends.py::test_confidence.

``POST /infer/MODEL?output=confidence`` answers, in place of the mask, how far each voxel's label beats the runner-up, in [0, 1].
"""

from __future__ import annotations

from contextvars import ContextVar
from urllib.parse import parse_qsl, urlencode

_wanted: ContextVar[bool] = ContextVar("confidence", default=False)


def is_wanted() -> bool:
    """Whether the request that runs asks for the confidence in place of the mask."""
    return _wanted.get()


class ConfidenceOutput:
    """ASGI application in front of MONAI Label's, which takes ``output=confidence`` for a request of the image.

    It has to stand inside ``responsive.OffLoop``, whose threads see no other thread's context.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/infer/"):
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            if ("output", "confidence") in query:
                _wanted.set(True)
                image = [(key, "image" if (key, value) == ("output", "confidence") else value) for key, value in query]
                scope = {**scope, "query_string": urlencode(image).encode("latin-1")}
        await self.app(scope, receive, send)
