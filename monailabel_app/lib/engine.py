"""One frozen model for all tasks and all viewers, and what it has already seen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.memory import ByteLimitedCache, CachedInferer, bytes_of
from lib.sources import OpenImage, read_source, source_of, stamp
from zeroseg.errors import ZeroSegError
from zeroseg.learning import LearnedHead
from zeroseg.learning.features import read_prepared
from zeroseg.segmentation import Segmentation, scores_of


class Engine:
    """Reads images and segments them; one per server.

    Args:
        backbone: the frozen model; loads on first use.
        cache_bytes: limit of each of the two caches, of images and of encodings.
        settings: of the inferer, for all tasks.
    """

    def __init__(self, backbone, cache_bytes: int = 1 << 30, **settings: Any):
        self.images: ByteLimitedCache[OpenImage] = ByteLimitedCache(cache_bytes, bytes_of)
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
            entry = read_source(path)
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
            prompt: points, labels, box, text, scribbles, mask, candidate; coordinates are voxel indices.

        Raises:
            ZeroSegError: a setting or a prompt is wrong; WeightsError: the weights cannot be loaded.
        """
        inferer = self.inferer.replace(**(settings or {}))
        if only_slice is None or not entry.image.is_volume:
            return inferer.segment(entry.prepared, select, prepared=True, affine=entry.image.affine, **prompt)
        axis = inferer.slice_axis % 3
        at, labels, confidence = _only(entry.image.shape, axis, only_slice)
        part = entry.prepared.narrow(axis + 1, only_slice, 1)
        result = inferer.segment(part, select, prepared=True, **_shifted(prompt, axis, only_slice))
        labels[at], confidence[at] = result.labels.squeeze(axis), result.confidence.squeeze(axis)
        result.labels, result.confidence = labels, confidence
        return result

    def learned(self, entry: OpenImage, head: LearnedHead, only_slice: int | None = None) -> Segmentation:
        """The labels of a trained head on an image, or on one slice of a volume.

        Args:
            entry: from ``open``.
            head: trained on this engine's backbone.
            only_slice: as for ``segment``.

        Raises:
            ZeroSegError: there is no such slice.
        """
        start = time.perf_counter()
        if only_slice is None or not entry.image.is_volume:
            found = head.predict(entry.unprepared)
            labels, confidence = found.label_map, found.certainty
        else:
            axis = self.inferer.slice_axis % 3
            at, labels, confidence = _only(entry.image.shape, axis, only_slice)
            if head.of_volumes:
                found = head.predict(entry.unprepared)
                labels[at], confidence[at] = found.label_map[at], found.certainty[at]
            else:
                found = head.predict(self.inferer.encode_prepared(entry.prepared.select(axis + 1, only_slice)))
                labels[at], confidence[at] = found.label_map, found.certainty
        seconds, details = {"predict": time.perf_counter() - start}, {"expected_dice": round(found.confidence, 4)}
        scores = scores_of(labels, confidence)
        return Segmentation(labels, confidence, scores, "learned", seconds=seconds, details=details)

    def slices_of(self, entry: OpenImage, count: int) -> list[Tensor]:
        """A picture, or so many slices of a volume, evenly spaced: (3, H, W) each."""
        if not entry.image.is_volume:
            return [entry.prepared]
        axis = self.inferer.slice_axis % 3 + 1
        last = entry.prepared.shape[axis] - 1
        places = np.unique(np.rint((np.arange(count) + 0.5) / count * last).astype(int))
        return [entry.prepared.select(axis, int(place)) for place in places]

    def mean_feature(self, part: Tensor) -> np.ndarray:
        """(C,) mean over (3, H, W) of the frozen decoder's features; each of its blocks has length 1."""
        read = read_prepared(self.inferer, part)
        blocks = read.features.float().mean((1, 2)).split(read.blocks)
        return torch.cat([F.normalize(block, dim=0) for block in blocks]).numpy()


def _only(shape: tuple[int, ...], axis: int, number: int) -> tuple[tuple, np.ndarray, np.ndarray]:
    """The index of one slice of a volume, and labels and confidence of the volume while nothing is found.

    Raises:
        ZeroSegError: there is no such slice.
    """
    if not 0 <= number < shape[axis]:
        raise ZeroSegError(f"slice {number} lies outside the volume: 0..{shape[axis] - 1}")
    return (slice(None),) * axis + (number,), np.zeros(shape, np.uint8), np.ones(shape, np.float32)


def _shifted(prompt: dict, axis: int, at: int) -> dict:
    """A prompt in the coordinates of one slice of a volume; what lies in other slices is left out.

    Raises:
        ZeroSegError: the box does not reach the slice.
    """
    shifted = dict(prompt)
    if prompt.get("points") is not None:
        kept = [(p, k) for p, k in zip(prompt["points"], prompt["labels"], strict=True) if round(p[axis]) == at]
        for name in ("points", "labels"):
            del shifted[name]
        if kept:
            shifted["points"] = [[0 if i == axis else v for i, v in enumerate(p)] for p, _ in kept]
            shifted["labels"] = [kind for _, kind in kept]
    if prompt.get("box") is not None:
        box = list(prompt["box"])
        if not round(box[axis]) <= at <= round(box[axis + 3]):
            raise ZeroSegError(f"the box does not reach slice {at}")
        box[axis] = box[axis + 3] = 0
        shifted["box"] = box
    for name in ("scribbles", "mask"):
        if prompt.get(name) is not None:
            part = prompt[name].take([at], axis)
            if part.any():
                shifted[name] = part
            else:
                del shifted[name]
    return shifted
