"""Orders that look at the images: what the model is least sure of, and what is least like the images before."""

from __future__ import annotations

import logging
import random
import time
from abc import abstractmethod
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from lib.engine import Engine
from lib.heads import Heads
from lib.infers.base import pick
from lib.mends.errors import NotFound
from lib.mends.responsive import stop_if_abandoned
from lib.sources import OpenImage, source_of, stamp
from lib.strategies import NextImage, handed_out
from lib.submissions import submitted
from zeroseg.errors import ZeroSegError

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""How long a button may take, unless the request says otherwise. What was measured is kept, and the next press goes on."""
SLICES = 3
"""Of a volume so many slices are looked at, evenly spaced."""


class Measured(NextImage):
    """A strategy that measures every image once, as many as its time allows, in an order that does not change.

    Args:
        description: for the viewers.
        engine: opens and encodes the images.
    """

    def __init__(self, description: str, engine: Engine):
        super().__init__(description)
        self.engine = engine
        self._known: dict[Hashable, tuple[Hashable, Any]] = {}

    @abstractmethod
    def measure(self, entry: OpenImage) -> Any:
        """What is measured of an image."""

    def version(self) -> Hashable:
        """What the measure depends on beside the image."""
        return None

    def measured(self, images: list[str], request: dict[str, Any], datastore) -> dict[str, Any]:
        """Image -> its measure, for at least one image and as many as the request's ``seconds`` allow.

        Raises:
            ZeroSegError: none of the images can be read.
        """
        end = time.monotonic() + pick("seconds", request.get("seconds", SECONDS), SECONDS)
        version = self.version()
        found: dict[str, Any] = {}
        last: Exception | None = None
        # Not by name: series of one patient often stand together.
        for image in random.Random(0).sample(images, len(images)):
            kept = self._known.get((image, version))
            if found and time.monotonic() > end:
                if kept is not None:
                    found[image] = kept[1]
                continue
            try:
                path = datastore.get_image_uri(image)
                now = stamp(source_of(Path(path)))
                if kept is None or kept[0] != now:
                    stop_if_abandoned()
                    kept = self._known[image, version] = now, self.measure(self.engine.open(path))
            except (ZeroSegError, NotFound) as error:
                last = error
                logger.warning("%s is left out: %s", image, error)
                continue
            found[image] = kept[1]
        if not found and last is not None:
            raise last
        return found


class Uncertain(Measured):
    """The image of which ``learned`` is least sure; before there is such a head, of which a click is."""

    def __init__(self, engine: Engine, heads: Heads):
        super().__init__(
            "What the model is least sure of: learned, or before it was trained a click on what stands out", engine
        )
        self.heads = heads

    def version(self) -> Hashable:
        return (self.heads.record() or {}).get("name")

    def measure(self, entry: OpenImage) -> float:
        """Confidence in [0, 1]."""
        head = None if self.heads.record() is None else self.heads.head()
        if head is not None and head.of_volumes:
            # A picture among volumes is what such a head cannot label at all.
            return head.predict(entry.unprepared).confidence if entry.image.is_volume else 0.0
        parts, inferer = self.engine.slices_of(entry, SLICES), self.engine.inferer
        if head is None:
            return float(np.mean([self._click(part) for part in parts]))
        return float(np.mean([head.predict(inferer.encode_prepared(part)).confidence for part in parts]))

    def _click(self, part: Tensor) -> float:
        """Score of the mask that a click in the middle of what stands out gives."""
        inferer = self.engine.inferer
        encoded = inferer.encode_prepared(part)
        salient = inferer.predict(encoded, "auto").labels > 0
        if not salient.any():
            return 0.0
        depth = ndimage.distance_transform_edt(np.pad(salient, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        return inferer.predict(encoded, "points", points=[[float(column), float(row)]]).scores[0]

    def choose(self, images: list[str], request: dict[str, Any], datastore) -> tuple[str, dict[str, Any]]:
        found = self.measured(images, request, datastore)
        image = min(sorted(found), key=lambda name: found[name])
        return image, {"confidence": round(found[image], 4), "of": len(found)}


class Diverse(Measured):
    """The image whose mean feature is farthest from those of the images labelled or handed out before (farthest point first).

    The first one is the image nearest to the mean of all: the most usual.
    """

    def __init__(self, engine: Engine):
        super().__init__("What is least like the images that were labelled before", engine)

    def measure(self, entry: OpenImage) -> np.ndarray:
        """Mean features, of length 1."""
        mean = np.mean([self.engine.mean_feature(part) for part in self.engine.slices_of(entry, SLICES)], 0)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)

    def choose(self, images: list[str], request: dict[str, Any], datastore) -> tuple[str, dict[str, Any]]:
        names = datastore.list_images()
        before = sorted(
            {name for name in names if handed_out(datastore, name)} | (set(submitted(datastore)) & set(names))
        )
        found = self.measured([*before, *(name for name in images if name not in before)], request, datastore)
        wanted = [name for name in images if name in found] or images[:1]
        if any(name not in found for name in wanted):
            return wanted[0], {}
        features = np.stack([found[name] for name in wanted])
        seen = [found[name] for name in before if name in found and name not in wanted]
        if not seen:
            typical = np.mean(list(found.values()), 0)
            nearest = int((features @ typical).argmax())
            return wanted[nearest], {"distance": 0.0, "of": len(found)}
        distance = (1 - features @ np.stack(seen).T).min(1)
        farthest = int(distance.argmax())
        return wanted[farthest], {"distance": round(float(distance[farthest]), 4), "of": len(found)}
