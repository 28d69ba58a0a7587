"""Orders that need no model."""

from __future__ import annotations

import random
from typing import Any

from lib.strategies import NextImage


class First(NextImage):
    """The images in the order of their names."""

    def __init__(self) -> None:
        super().__init__("The unlabelled images in the order of their names")

    def choose(self, images: list[str], request: dict[str, Any], datastore) -> tuple[str, dict[str, Any]]:
        return images[0], {}


class Random(NextImage):
    """Any of them; ``seed`` in the request makes the choice the same every time."""

    def __init__(self) -> None:
        super().__init__("Any unlabelled image; the server may answer with the strategy it was configured with")

    def choose(self, images: list[str], request: dict[str, Any], datastore) -> tuple[str, dict[str, Any]]:
        return random.Random(request.get("seed")).choice(images), {}
