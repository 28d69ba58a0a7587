"""What is kept between requests: a slice goes through the backbone once, clicks and texts on it are answered from memory.

All caches forget the least recently used first and stay below a limit in bytes.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from cachetools import LRUCache
from torch import Tensor

from lib.mends.responsive import stop_if_abandoned
from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.attention.inferer import EncodedImage

Value = TypeVar("Value")
MERGING = ("thresholds", "max_segments", "grid")
"""Settings of the inferer that concern the proposals an encoding keeps, not the encoding."""
PER_CALL = (
    *MERGING,
    "assign",
    "select",
    "refine",
    "text_certainty",
    "slice_axis",
    "working_size",
    "progress",
    "backbone",
)
"""Settings of the inferer that an encoding does not depend on; working_size is fixed, the backbone has its fingerprint."""


class ByteLimitedCache(Generic[Value]):
    """Least-recently-used cache with a limit on bytes in place of entries; safe between threads.

    Args:
        limit: bytes; an entry larger than the limit is not kept.
        size_of: bytes an entry takes.
    """

    def __init__(self, limit: int, size_of: Callable[[Value], int]):
        self._entries: LRUCache[Hashable, Value] = LRUCache(limit, getsizeof=size_of)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def limit(self) -> int:
        """Bytes all entries together may take."""
        return self._entries.maxsize

    @property
    def used(self) -> int:
        """Bytes they take."""
        return self._entries.currsize

    def get(self, key: Hashable) -> Value | None:
        """The entry, now the most recently used one; None when it is not there."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Keep an entry, and forget the oldest ones until the limit holds."""
        with self._lock:
            self._entries.pop(key, None)
            # A value larger than the limit.
            with suppress(ValueError):
                self._entries[key] = value


class RecalledEncoding(EncodedImage):
    """What is left of an encoding when its attention had to go: enough for clicks, which need the paths between tokens only.

    The attention of a slice takes 64 MB for the embedded model, the paths less than 1 MB: a click that follows an object
    through a hundred slices is answered from memory all the same. A prompt that needs the attention runs the backbone again.
    """

    def __init__(self, encoded: EncodedImage, again: Callable[[], EncodedImage]):
        self.image, self.size, self.latents = encoded.image, encoded.size, encoded.latents
        self.seconds, self._side, self._again = {}, encoded.side, again
        self._paths, self._full = encoded.paths, None

    @property
    def full(self) -> EncodedImage:
        if self._full is None:
            self._full = self._again()
        return self._full

    attention = property(lambda self: self.full.attention)
    distance = property(lambda self: self.full.distance)
    side = property(lambda self: self._side)
    paths = property(lambda self: self._paths)
    _proposals = property(
        lambda self: self.full._proposals, lambda self, value: setattr(self.full, "_proposals", value)
    )
    _probe = property(lambda self: self.full._probe, lambda self, value: setattr(self.full, "_probe", value))


class CachedInferer(AttentionSegmentationInferer):
    """The bundle's inferer with a memory for encodings, keyed by image content, backbone and settings.

    Args:
        limit: bytes of whole encodings; a tenth of it is for the remains that serve clicks.
        settings: of the bundle's inferer.
    """

    def __init__(self, limit: int, **settings: Any):
        super().__init__(**settings)
        self.encodings: ByteLimitedCache[EncodedImage] = ByteLimitedCache(limit, bytes_of)
        self.remains: ByteLimitedCache[RecalledEncoding] = ByteLimitedCache(limit // 10, bytes_of)

    def settings(self) -> dict:
        return {k: v for k, v in super().settings().items() if k not in ("encodings", "remains")}

    def encode_prepared(self, full: Tensor) -> EncodedImage:
        """``encode_prepared`` of the bundle, or its earlier answer; stops where nobody waits for the answer any more."""
        stop_if_abandoned()
        self.check()
        # A copy, unless it is the image itself: a view would keep its whole volume in memory.
        full = full.contiguous()
        content = hashlib.sha256(full.cpu().numpy()).hexdigest()
        settings = tuple((k, str(v)) for k, v in sorted(self.settings().items()) if k not in PER_CALL)
        key = (content, tuple(full.shape), self.backbone.fingerprint, settings)
        encoded = self.encodings.get(key)
        if encoded is None:
            encoded = self.remains.get(key)
            if encoded is None:
                return self._encode(key, full)
            encoded._full = None
        # This call spends no time on them.
        encoded.seconds = {}
        return encoded

    def proposals(self, encoded: EncodedImage):
        """As the bundle's; what was kept for other settings is forgotten."""
        merging = [getattr(self, name) for name in MERGING]
        if vars(encoded).get("merging") != merging:
            encoded._proposals, encoded.merging = None, merging
        return super().proposals(encoded)

    def _encode(self, key: Hashable, full: Tensor) -> EncodedImage:
        encoded = super().encode_prepared(full)
        start = time.perf_counter()
        # Measured now, because the attention may be gone when the next click comes.
        self.remains.put(key, RecalledEncoding(encoded, lambda: self._encode(key, full)))
        encoded.seconds["paths"] = time.perf_counter() - start
        self.encodings.put(key, encoded)
        return encoded

    def with_settings(self, **settings: Any) -> CachedInferer:
        """A copy with other settings that shares backbone and memory."""
        other = copy.copy(self)
        for name, value in settings.items():
            setattr(other, name, value)
        return other


def bytes_of(encoded: EncodedImage) -> int:
    """Bytes an encoding takes in memory, or what is left of it."""
    kept = encoded.image.nbytes + encoded.latents.nbytes
    if isinstance(encoded, RecalledEncoding):
        # 8-neighbourhoods, each step kept once: a float64 cost and an int32 end.
        return kept + 4 * encoded.side**2 * 12
    # Beside the attention stand its logarithms, as large, once a prompt has needed them.
    return kept + 2 * encoded.attention.nbytes
