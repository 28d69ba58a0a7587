"""What is kept between requests: a slice goes through the backbone once, clicks and texts on it are answered from memory.

All caches forget the least recently used first and stay below a limit in bytes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from cachetools import LRUCache
from torch import Tensor

from lib.mends.responsive import stop_if_abandoned
from lib.sources import OpenImage
from zeroseg.attention import AttentionSegmentationInferer, EncodedImage

Value = TypeVar("Value")


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


class CachedInferer(AttentionSegmentationInferer):
    """The bundle's inferer with a memory for encodings, keyed by image content, backbone and settings.

    Args:
        limit: bytes of whole encodings; a tenth of it is for what is left of those that had to go, which serves clicks.
        settings: of the bundle's inferer.
    """

    def __init__(self, limit: int, **settings: Any):
        super().__init__(**settings)
        self.encodings: ByteLimitedCache[EncodedImage] = ByteLimitedCache(limit, bytes_of)
        self.remains: ByteLimitedCache[EncodedImage] = ByteLimitedCache(limit // 10, bytes_of)

    def check(self) -> None:
        """``check`` of the bundle, which comes before every pass of the model; stops where nobody waits for the answer any more."""
        stop_if_abandoned()
        super().check()

    def encode_prepared(self, full: Tensor, text: str | None = None) -> EncodedImage:
        """``encode_prepared`` of the bundle, or its earlier answer."""
        self.check()
        # A copy, unless it is the image itself: a view would keep its whole volume in memory.
        full = full.contiguous()
        content = hashlib.sha256(full.cpu().numpy()).hexdigest()
        key = (content, tuple(full.shape), self.backbone.fingerprint, self.encoding_key, text)
        encoded = self.encodings.get(key)
        if encoded is not None:
            # This call spends no time on it.
            encoded.seconds = {}
            return encoded
        left = self.remains.get(key)
        # What a prompt recalls for it lives as long as the prompt, not as long as the memory.
        return self._encode(key, full, text) if left is None else left.fresh()

    def pause(self, done: int = 0, total: int = 0) -> None:
        """Stops where nobody waits for the answer any more, and says how far it is."""
        stop_if_abandoned(done, total)

    def _encode(self, key: Hashable, full: Tensor, text: str | None) -> EncodedImage:
        encoded = super().encode_prepared(full, text)
        start = time.perf_counter()
        # Measured now, because the attention may be gone when the next click comes.
        self.remains.put(key, encoded.without_attention(lambda: self._encode(key, full, text)))
        encoded.seconds["paths"] = time.perf_counter() - start
        self.encodings.put(key, encoded)
        return encoded


def bytes_of(entry: EncodedImage | OpenImage) -> int:
    """Bytes an entry takes in memory."""
    return entry.nbytes
