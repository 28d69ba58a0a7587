"""One frozen model for all tasks and all viewers, and what it has already seen.

An image is read once and a slice goes through the backbone once; clicks and texts on it are answered from memory. All caches
forget the least recently used first and stay below a limit in bytes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lib.responsive import stop_if_abandoned
from zeroseg.attention import AttentionSegmentationInferer, EncodedImage
from zeroseg.attention.prepare import prepare
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image, to_unit_range
from zeroseg.segmentation import Segmentation

Value = TypeVar("Value")
CONVERTED = ".converted"
"""Folder in a folder of studies that holds DICOM series as NIfTI, for viewers that download an image."""


class ByteLimitedCache(Generic[Value]):
    """Least-recently-used cache with a limit on bytes in place of entries; safe between threads.

    Args:
        limit: bytes; an entry larger than the limit is not kept.
        size_of: bytes an entry takes.
    """

    def __init__(self, limit: int, size_of: Callable[[Value], int]):
        self.limit, self.size_of = limit, size_of
        self.used = 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """The entry, now the most recently used one; None when it is not there."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Value) -> None:
        """Keep an entry, and forget the oldest ones until the limit holds."""
        size = self.size_of(value)
        with self._lock:
            if key in self._entries:
                self.used -= self._entries.pop(key)[1]
            if size > self.limit:
                return
            self._entries[key] = value, size
            self.used += size
            while self.used > self.limit:
                self.used -= self._entries.popitem(last=False)[1][1]


class CachedInferer(AttentionSegmentationInferer):
    """The bundle's inferer with a memory for encodings, keyed by image content, backbone and settings.

    Args:
        limit: bytes of whole encodings; a tenth of it is for what is left of those that had to go, which serves clicks.
        settings: of the bundle's inferer.
    """

    def __init__(self, limit: int, **settings: Any):
        super().__init__(**settings)
        self.encodings: ByteLimitedCache[EncodedImage] = ByteLimitedCache(limit, _bytes_of_encoding)
        self.remains: ByteLimitedCache[EncodedImage] = ByteLimitedCache(limit // 10, _bytes_of_encoding)

    def encode_prepared(self, full: Tensor) -> EncodedImage:
        """``encode_prepared`` of the bundle, or its earlier answer; stops where nobody waits for the answer any more."""
        stop_if_abandoned()
        self.check()
        full = full.contiguous()  # a copy, unless it is the image itself: a view would keep its whole volume in memory
        content = hashlib.sha256(full.cpu().numpy()).hexdigest()
        key = (content, tuple(full.shape), self.backbone.fingerprint, self.encoding_key)
        encoded = self.encodings.get(key)
        if encoded is not None:
            encoded.seconds = {}  # this call spends no time on it
            return encoded
        left = self.remains.get(key)
        # What a prompt recalls for it lives as long as the prompt, not as long as the memory.
        return self._encode(key, full) if left is None else left.fresh()

    def _encode(self, key: Hashable, full: Tensor) -> EncodedImage:
        encoded = super().encode_prepared(full)
        start = time.perf_counter()
        # Measured now, because the attention may be gone when the next click comes.
        self.remains.put(key, encoded.without_attention(lambda: self._encode(key, full)))
        encoded.seconds["paths"] = time.perf_counter() - start
        self.encodings.put(key, encoded)
        return encoded


@dataclass
class OpenImage:
    """An image as read, and as the inferer takes it: (3, H, W) or (3, X, Y, Z) float32 in [0, 1]."""

    image: Image
    prepared: Tensor


def _bytes_of_image(entry: OpenImage) -> int:
    return entry.image.array.nbytes + entry.prepared.untyped_storage().nbytes()


def _bytes_of_encoding(encoded: EncodedImage) -> int:
    return encoded.nbytes


def source_of(path: Path) -> Path:
    """What to read for a datastore's path: the DICOM files a NIfTI file was converted from, where they are kept.

    They know the modality and the slices they are, which the NIfTI file does not. MONAI Label keeps ``<uid>.nii.gz`` beside
    the folder ``<uid>/`` of a DICOMweb series, and ``FolderDatastore`` keeps its conversions in a folder of their own.
    """
    if not path.name.endswith(".nii.gz"):
        return path
    parent = path.parent.parent if path.parent.name == CONVERTED else path.parent
    folder = parent / path.name.removesuffix(".nii.gz")
    return folder if folder.is_dir() and any(folder.iterdir()) else path


def stamp(path: Path) -> tuple:
    """What changes when a file, or one of a folder, does.

    The time of modification alone does not: copying sets it, clocks go wrong, and another patient's image may be as long.
    The inode and the time of its last change cannot be set by a user; stamps are compared for equality only, so that a
    clock that goes backwards does no harm.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(f.name, f.stat()) for f in files]
    return tuple((name, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_size) for name, s in found)


class Engine:
    """Reads images and segments them; one per server.

    Args:
        backbone: the frozen model; loads on first use.
        cache_bytes: limit of each of the two caches, of images and of encodings.
        settings: of the inferer, for all tasks.
    """

    def __init__(self, backbone, cache_bytes: int = 1 << 30, **settings: Any):
        self.images: ByteLimitedCache[OpenImage] = ByteLimitedCache(cache_bytes, _bytes_of_image)
        self.inferer = CachedInferer(cache_bytes, backbone=backbone, **settings)

    def open(self, uri: str) -> OpenImage:
        """Read an image file, a DICOM file, or a folder that holds one DICOM series.

        Raises:
            ZeroSegError: it cannot be read, or the folder holds several images.
        """
        path = source_of(Path(uri))
        key = str(path), stamp(path) if path.exists() else None
        entry = self.images.get(key)
        if entry is None:
            cases = find_cases(path)
            if len(cases) > 1:
                names = ", ".join(c.stem for c in cases[:5])
                raise ZeroSegError(
                    f"{path.name} holds {len(cases)} images ({names}): give one image or one series at a time"
                )
            image = read_image(cases[0])
            entry = OpenImage(image, prepare(torch.from_numpy(to_unit_range(image))))
            self.images.put(key, entry)
        return entry

    def segment(
        self, entry: OpenImage, select: str, only_slice: int | None = None, settings: dict | None = None, **prompt
    ) -> Segmentation:
        """Segment an image, or one slice of a volume.

        Args:
            entry: from ``open``.
            select: segments, auto, points, box or text.
            only_slice: index along the volume's slice axis; the others stay empty. None: the whole volume.
            settings: settings of the inferer for this call.
            prompt: points, labels, box, text; coordinates are voxel indices.

        Raises:
            ZeroSegError: a setting or a prompt is wrong; WeightsError: the weights cannot be loaded.
        """
        inferer = self.inferer.replace(**(settings or {}))
        if only_slice is None or not entry.image.is_volume:
            return inferer.segment(entry.prepared, select, prepared=True, **prompt)
        axis = inferer.slice_axis % 3
        count = entry.image.shape[axis]
        if not 0 <= only_slice < count:
            raise ZeroSegError(f"slice {only_slice} lies outside the volume: 0..{count - 1}")
        window = [slice(None)] * 3
        window[axis] = slice(only_slice, only_slice + 1)
        part = entry.prepared[(slice(None), *window)]
        result = inferer.segment(part, select, prepared=True, **_shifted(prompt, axis, only_slice))
        labels = np.zeros(entry.image.shape, np.uint8)
        confidence = np.ones(entry.image.shape, np.float32)
        labels[tuple(window)], confidence[tuple(window)] = result.labels, result.confidence
        result.labels, result.confidence = labels, confidence
        return result


def _shifted(prompt: dict, axis: int, start: int) -> dict:
    """A prompt in the coordinates of one slice of a volume."""
    shifted = dict(prompt)
    if prompt.get("points") is not None:
        points = [list(p) for p in prompt["points"]]
        for point in points:
            point[axis] -= start
        shifted["points"] = points
    if prompt.get("box") is not None:
        box = list(prompt["box"])
        box[axis], box[axis + 3] = box[axis] - start, box[axis + 3] - start
        shifted["box"] = box
    return shifted
