"""Volumes: slice by slice through a 2-D inferer, with identities carried from slice to slice."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zeroseg.attention.linking import link_slices
from zeroseg.attention.prepare import prepare
from zeroseg.interaction.prompts import Prompts
from zeroseg.regions import innermost
from zeroseg.segmentation import Segmentation, scores_of

FOLLOW_DICE = 0.4
"""A followed object has ended where its mask overlaps the slice before by less than this Dice."""
FOLLOW_GROWTH = 2.0
"""... or where its area grows or shrinks by more than this factor from one slice to the next."""


class SliceInferer(Protocol):
    """What a walk through a volume needs of the 2-D inferer."""

    slice_axis: int
    progress: bool

    def encode_prepared(self, full: Tensor) -> Any:
        """A slice, (3, H, W) in [0, 1], made ready for ``predict``."""

    def predict(self, encoded: Any, select: str | None = None, **prompt: Any) -> Segmentation:
        """The answer for a slice."""

    def pause(self, done: int = 0, total: int = 0) -> None:
        """Called before each slice; it may raise, where nobody waits for the answer any more."""


def segment_volume(
    inferer: SliceInferer,
    volume: Tensor | np.ndarray,
    prompts: Prompts,
    prepared: bool = False,
) -> Segmentation:
    """Segment (C, X, Y, Z) along the inferer's ``slice_axis``; the prompts were checked for the volume.

    Contrast is stretched once over the whole volume, so that an empty slice stays empty; ``prepared`` says that ``prepare``
    did it already. The backbone runs once per slice that the rule needs.

    Raises:
        ZeroSegError: as ``prepare``.
    """
    axis = inferer.slice_axis % 3
    volume = torch.as_tensor(np.asarray(volume)) if not isinstance(volume, Tensor) else volume.as_subclass(Tensor)
    walk = _Walk(inferer, volume if prepared else prepare(volume), axis)
    if prompts.rule in ("points", "box") and prompts.box is not None:
        return walk.within(prompts)
    if prompts.rule == "points":
        return walk.follow(prompts)
    text = prompts.text if prompts.rule == "text" else ", ".join(prompts.nouns) or None
    return walk.each(range(walk.count), prompts.rule, len(prompts.nouns), **({} if text is None else {"text": text}))


class _Walk:
    """One volume being walked through; collects what the slices give."""

    def __init__(self, inferer: SliceInferer, volume: Tensor, axis: int):
        self.inferer, self.axis = inferer, axis
        # (3, slices, rows, columns): a slice's rows are the lower voxel axis.
        self.slices = volume.movedim(axis + 1, 1)
        self.count = self.slices.shape[1]
        self.shape = tuple(self.slices.shape[1:])
        self.labels = np.zeros(self.shape, np.uint8)
        self.confidence = np.ones(self.shape, np.float32)
        self.seconds: dict[str, float] = {}
        # What the answers to marks say of themselves; of the only slice there is, all of it.
        self.notes: dict[str, None] = {}
        self.details: dict[str, Any] = {}

    def each(self, indices: range, rule: str, named: int = 0, **prompt) -> Segmentation:
        """Apply a rule to every slice of a range; what lies outside is background. Labels up to ``named`` have names, which mean
        one thing in all slices."""
        results: dict[int, Segmentation] = {}
        for k in tqdm(indices, desc="slices", leave=False, disable=not self.inferer.progress):
            self.inferer.pause(len(results), len(indices))
            results[k] = self._collect(self.inferer.predict(self._encode(k), rule, **prompt))
        if rule == "segments":
            nameless = [np.where(results[k].labels > named, results[k].labels, 0) for k in indices]
            for k, linked in zip(indices, link_slices(nameless), strict=True):
                after = np.where((linked > 0) & (linked <= 255 - named), linked + np.uint8(named), 0)
                self.labels[k] = np.where(results[k].labels > named, after, results[k].labels)
        else:
            for k, result in results.items():
                self.labels[k] = result.labels
        for k, result in results.items():
            self.confidence[k] = result.confidence
        absent = rule == "text" and all(r.absent for r in results.values())
        told = rule == "text" or named
        details: dict = {"slices": [{"index": k, **r.details} for k, r in results.items()]} if told else {}
        if named:
            labels = {name: value for r in results.values() for name, value in r.details["labels"].items()}
            details["labels"] = dict(sorted(labels.items(), key=lambda item: item[1]))
        reason = "no slice shows it" if absent else None
        result = self._result(rule, absent, details, prompt.get("text") if rule == "text" else None, reason)
        # What a prompt was taken for is said of every slice.
        result.notes += dict.fromkeys(note for r in results.values() for note in r.notes if told)
        return result

    def _marks(self, prompts: Prompts) -> dict[int, dict[str, Any]]:
        """Slice -> the clicks, strokes and part of a mask in it, as ``predict`` takes them."""
        marks: dict[int, dict[str, Any]] = {}
        for click, kind in zip(prompts.points, prompts.labels, strict=True):
            row, column = (v for i, v in enumerate(click) if i != self.axis)
            here = marks.setdefault(round(click[self.axis]), {})
            here.setdefault("points", []).append([column, row])
            here.setdefault("labels", []).append(kind)
        for name, array in (("scribbles", prompts.scribbles), ("mask", prompts.mask)):
            if array is not None:
                for k, part in enumerate(np.moveaxis(array, self.axis, 0)):
                    if part.any():
                        marks.setdefault(k, {})[name] = part
        return marks

    def within(self, prompts: Prompts) -> Segmentation:
        """Segment each slice of a box by the box and by the marks in that slice."""
        assert prompts.box is not None
        marks = self._marks(prompts)
        low, high = round(prompts.box[self.axis]), round(prompts.box[self.axis + 3])
        # (row, column) order of the slice.
        flat = [v for i, v in enumerate(prompts.box) if i % 3 != self.axis]
        box = [flat[1], flat[0], flat[3], flat[2]]
        for k in tqdm(range(low, high + 1), desc="slices", leave=False, disable=not self.inferer.progress):
            self.inferer.pause(k - low, high + 1 - low)
            here = marks.get(k, {})
            self._answer(k, prompts, "points" if here else "box", box=box, **here)
        return self._obeyed(self._result(prompts.rule, False, self.details), prompts)

    def follow(self, prompts: Prompts) -> Segmentation:
        """Segment each slice that was clicked, scribbled on or is part of the mask given, then follow its object both ways
        until it ends or meets another such slice."""
        marks = self._marks(prompts)
        anchors = sorted(
            k
            for k, here in marks.items()
            if any(here.get("labels", ())) or "mask" in here or (here.get("scribbles", np.zeros(1)) == 1).any()
        )
        reached = {}
        bar = tqdm(desc="slices", total=self.count, leave=False, disable=not self.inferer.progress)
        for k in anchors:
            self._answer(k, prompts, "points", **marks[k])
            bar.update()
        for k in anchors:
            for step in (-1, 1):
                before = self.labels[k] > 0
                at = k + step
                while 0 <= at < self.count and at not in anchors:
                    result = self._next(at, before, marks.get(at, {}))
                    if result is None:
                        break
                    self._keep(at, result)
                    reached[at] = k
                    before = result.labels > 0
                    at += step
                    bar.update()
        bar.close()
        details = {**self.details, "clicked_slices": anchors, "slices": sorted([*anchors, *reached])}
        return self._obeyed(self._result("points", False, details), prompts)

    def _answer(self, k: int, prompts: Prompts, rule: str, **marks: Any) -> None:
        """Keep what the marks in slice k mean."""
        chosen = {} if prompts.candidate is None else {"candidate": prompts.candidate}
        result = self._collect(self.inferer.predict(self._encode(k), rule, **marks, **chosen))
        self._keep(k, result)
        self.notes |= dict.fromkeys(result.notes)
        if self.count == 1:
            self.details = result.details

    def _obeyed(self, result: Segmentation, prompts: Prompts) -> Segmentation:
        """The user's word stands outside of the box and in slices that were not clicked as well."""
        if prompts.scribbles is not None:
            result.labels[prompts.scribbles == 1], result.labels[prompts.scribbles == 2] = 1, 0
        for point, kind in zip(prompts.points, prompts.labels, strict=True):
            result.labels[tuple(round(v) for v in point)] = kind
        result.notes += self.notes
        return result

    def _next(self, k: int, before: np.ndarray, avoid: dict[str, Any]) -> Segmentation | None:
        """The object of the slice before, found again in slice k by a click at its innermost point; None where it ended.

        Args:
            k: index of the slice.
            before: (rows, columns) bool.
            avoid: the marks in slice k, all of the background.
        """
        if not before.any():
            return None
        row, column = innermost(before)
        points, labels = [[float(column), float(row)], *avoid.get("points", [])], [1, *avoid.get("labels", [])]
        marks = {**avoid, "points": points, "labels": labels}
        result = self._collect(self.inferer.predict(self._encode(k), "points", **marks))
        now = result.labels > 0
        overlap = 2 * np.count_nonzero(now & before) / max(1, np.count_nonzero(now) + np.count_nonzero(before))
        growth = np.count_nonzero(now) / max(1, np.count_nonzero(before))
        if overlap < FOLLOW_DICE or not 1 / FOLLOW_GROWTH <= growth <= FOLLOW_GROWTH:
            return None
        return result

    def _encode(self, k: int):
        return self.inferer.encode_prepared(self.slices[:, k])

    def _keep(self, k: int, result: Segmentation) -> None:
        self.labels[k], self.confidence[k] = result.labels, result.confidence

    def _collect(self, result: Segmentation) -> Segmentation:
        for stage, spent in result.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return result

    def _result(
        self, rule: str, absent: bool, details: dict, name: str | None = None, reason: str | None = None
    ) -> Segmentation:
        labels = np.ascontiguousarray(np.moveaxis(self.labels, 0, self.axis))
        confidence = np.ascontiguousarray(np.moveaxis(self.confidence, 0, self.axis))
        return Segmentation(
            labels, confidence, scores_of(labels, confidence), rule, absent, self.seconds, details, name, reason
        )
