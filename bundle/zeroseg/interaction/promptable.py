"""Answers to ordered prompts by the promptable head: the first prompt finds the object, each further one mends the answer before.

An answer depends on the encoding and on the ordered prompts only: all of them are replayed, from the longest beginning already answered.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor

from zeroseg.attention import EncodedImage
from zeroseg.attention.readout import Readout
from zeroseg.backbones.weights import MODELS, verify_sums
from zeroseg.errors import WeightsError
from zeroseg.interaction.clicks import pixel_of, resized
from zeroseg.interaction.head import CANDIDATES, PromptHead, Window, assemble
from zeroseg.interaction.prompts import Prompts
from zeroseg.interaction.settings import Settings

MARGIN = 1.6
"""A window is this many times as wide as the answer it is to mend."""
SMALLEST = 48
"""Side in pixels of the smallest window."""
STROKE_TOKENS = 6
"""Tokens of a stroke from which attention is followed."""


@dataclass(frozen=True)
class Event:
    """One thing the user did.

    Attributes:
        marks: ((row, column, kind), ...) pixels drawn on, in order; kind 1 object, 2 background.
        box: (top, left, bottom, right), the ends excluded, or None.
    """

    marks: tuple[tuple[int, int, int], ...] = ()
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Answer:
    """What is shown after an event.

    Attributes:
        mask: (H, W) bool.
        probability: (H, W) float32 in [0, 1]; 0 where nothing was looked at.
        estimates: expected IoU of the three candidates, smallest mask first.
        candidates: (3, H, W) bool; after a correction all are edits of the answer before.
        shown: which candidate ``mask`` is, from 0.
    """

    mask: np.ndarray
    probability: np.ndarray
    estimates: tuple[float, ...]
    candidates: np.ndarray
    shown: int


@cache
def load_head(folder: Path = MODELS / "interaction") -> PromptHead:
    """The trained head of a folder with ``config.json`` and ``head.safetensors``; checked and loaded once.

    Raises:
        WeightsError: the folder is not there, does not match its SHA256SUMS, or holds another network's weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        verify_sums(folder)
        head = PromptHead(config["widths"], config["blocks"])
        head.load_state_dict(load_file(str(folder / "head.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"cannot load the promptable head in {folder.name}: {first}; or use refiner rules"
        ) from error
    return head.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def answer_by_head(
    encoded: EncodedImage, prompts: Prompts, settings: Settings, head: PromptHead | None = None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """The mask that the prompts mean, by the promptable head; takes and gives what ``clicks.answer_clicks`` does.

    Strokes and the box come first, together; then the clicks, one by one.

    Args:
        encoded: the image.
        prompts: of rule ``points`` or ``box``.
        settings: ``affinity`` and others have shaped the encoding; none is used here.
        head: the embedded one by default.
    """
    head = head or load_head()
    shape = tuple(encoded.image.shape[1:])
    session = encoded.keep("session", id(head), lambda: Session(head, encoded.image, encoded.readout))
    start = None if prompts.mask is None else resized(prompts.mask, shape)
    answer = session.answer(events_of(encoded, prompts), start, prompts.candidate)
    sure = np.where(answer.mask, answer.probability, 1 - answer.probability)
    details = {
        "estimated_iou": round(answer.estimates[answer.shown], 4),
        "candidate": answer.shown + 1,
        "candidates": [
            {"area": int(np.count_nonzero(mask)), "estimated_iou": round(value, 4)}
            for mask, value in zip(answer.candidates, answer.estimates, strict=True)
        ],
    }
    return answer.mask.copy(), sure.astype(np.float32), details


def events_of(encoded: EncodedImage, prompts: Prompts) -> list[Event]:
    """Checked prompts as the events of a session, on the working grid."""
    shape = tuple(encoded.image.shape[1:])
    marks: list[tuple[int, int, int]] = []
    box = None
    if prompts.box is not None:
        (top, left), (bottom, right) = (pixel_of(encoded, c) for c in (prompts.box[:2], prompts.box[2:]))
        box = top, left, bottom + 1, right + 1
    if prompts.scribbles is not None:
        rows, columns = np.nonzero(prompts.scribbles)
        at = np.stack([rows * shape[0] // encoded.size[0], columns * shape[1] // encoded.size[1]], 1)
        marks = [(int(r), int(c), int(prompts.scribbles[y, x])) for (r, c), y, x in zip(at, rows, columns, strict=True)]
    events = [Event(tuple(marks), box)] if marks or box else []
    waiting: list[tuple[int, int, int]] = []
    for click, label in zip(prompts.points, prompts.labels, strict=True):
        waiting.append((*pixel_of(encoded, click), 1 if label else 2))
        # Background clicks that come before there is an object wait for it.
        if events or prompts.mask is not None or label:
            events.append(Event(tuple(waiting)))
            waiting = []
    return events


class Session:
    """Prompts on one image, replayed in order; answered beginnings are kept, so that a further prompt costs one answer.

    Args:
        head: the trained network.
        image: (3, H, W) in [0, 1].
        readout: the frozen model's maps of that image, or None to go without.
    """

    def __init__(self, head: PromptHead, image: Tensor, readout: Readout | None):
        self.head, self.image, self.readout = head, image.float().cpu(), readout
        self._lock = threading.Lock()
        self._begun: tuple = ()
        self._events: list[Event] = []
        # Bits of the mask after each event; only the last answer is kept whole.
        self._masks: list[np.ndarray] = []
        self._last: Answer | None = None

    def answer(self, events: Sequence[Event], start: np.ndarray | None = None, candidate: int | None = None) -> Answer:
        """Replay events.

        Args:
            events: in the order they were made, at least one unless a mask is given to start from.
            start: (H, W) bool mask to start from, or None.
            candidate: 1 to 3, which of the nested answers to the first event is gone on with; None: the one of best estimate.
        """
        if not events:
            return Answer(start, start.astype(np.float32), (1.0,) * CANDIDATES, np.stack([start] * CANDIDATES), 0)
        with self._lock:
            begun = (None if start is None else start.tobytes(), candidate)
            same = 0
            if begun == self._begun:
                pairs = zip(events, self._events, strict=False)
                same = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(events), len(self._events)))
            if same == len(events) == len(self._events):
                return self._last
            # The last answer's candidates are wanted, so its event is answered again where it was passed before.
            same = min(same, len(events) - 1)
            self._begun = begun
            del self._events[same:], self._masks[same:]
            for at in range(same, len(events)):
                before = self._unpacked(self._masks[-1]) if self._masks else start
                self._last = self._next(events[: at + 1], before, candidate if at == 0 else None)
                self._events.append(events[at])
                self._masks.append(np.packbits(self._last.mask))
            return self._last

    def _unpacked(self, bits: np.ndarray) -> np.ndarray:
        height, width = self.image.shape[1:]
        return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)

    def _next(self, events: Sequence[Event], before: np.ndarray | None, candidate: int | None) -> Answer:
        size = tuple(self.image.shape[1:])
        marks, box = np.zeros(size, np.uint8), None
        for event in events:
            for row, column, kind in event.marks:
                marks[row, column] = kind
            box = event.box or box
        if before is None:
            answer = self._find(events, marks, box)
            if candidate is not None:
                answer = replace(answer, mask=answer.candidates[candidate - 1], shown=candidate - 1)
            return answer
        return self._mend(events, marks, box, before)

    def look(self, events, marks, box, before, window: Window) -> tuple[Tensor, Tensor]:
        """Logits (3, h, w) over a window's own pixels, and estimated IoU (3,)."""
        last = None if before is None else torch.from_numpy(before)
        x = assemble(self.image, torch.from_numpy(marks), box, last, self._attention(events), window)
        with torch.inference_mode():
            logits, quality = self.head(x[None].contiguous(memory_format=torch.channels_last))
            size = (window.bottom - window.top, window.right - window.left)
            return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0], quality[0].sigmoid()

    def _attention(self, events: Sequence[Event]) -> Tensor | None:
        if self.readout is None:
            return None
        side, (height, width) = self.readout.side, self.image.shape[1:]
        maps = np.zeros((6, side * side), np.float32)
        maps[4], maps[5] = self.readout.salience, self.readout.edges
        for event in events:
            for kind in (1, 2):
                places = [m for m in event.marks if m[2] == kind]
                for at in np.unique(
                    np.linspace(0, len(places) - 1, min(STROKE_TOKENS, len(places))).round().astype(int)
                ):
                    row, column, _ = places[at]
                    near, alike = self.readout.relevance(row * side // height * side + column * side // width)
                    np.maximum(maps[kind - 1], near, out=maps[kind - 1])
                    np.maximum(maps[kind + 1], alike, out=maps[kind + 1])
        return torch.from_numpy(maps.reshape(6, side, side))

    def _find(self, events, marks, box) -> Answer:
        """The first answer: the whole image, then closer, as long as the object is small in what is seen."""
        size = tuple(self.image.shape[1:])
        window = Window(0, 0, *size) if box is None else _around(size, box, MARGIN)
        best = None
        for _ in range(3):
            logits, quality = self.look(events, marks, box, None, window)
            shown = int(quality.argmax())
            answer = self._pasted(logits, quality, shown, window, marks, None)
            best = answer if best is None else better(best, answer)
            kept = _bounds(answer.mask, marks == 1)
            closer = _around(size, kept, MARGIN)
            if box is not None or not _smaller(closer, window):
                break
            window = closer
        return best

    def _mend(self, events, marks, box, before) -> Answer:
        size = tuple(self.image.shape[1:])
        newest = events[-1].marks
        touched = np.zeros(size, bool)
        for row, column, _ in newest:
            touched[row, column] = True
        window = _around(size, _bounds(before, touched), MARGIN)
        logits, quality = self.look(events, marks, box, before, window)
        return self._pasted(logits, quality, int(quality.argmax()), window, marks, (before, newest))

    def _pasted(self, logits, quality, shown, window, marks, edit) -> Answer:
        size = tuple(self.image.shape[1:])
        candidates = np.zeros((CANDIDATES, *size), bool)
        for k in range(CANDIDATES):
            full = np.full(size, -20.0, np.float32)
            full[window.slices] = logits[k].numpy()
            if edit is None:
                candidates[k] = keep_marked(obey(full > 0, full, marks, window), marks)
            else:
                candidates[k] = mend(edit[0], full, window, edit[1], marks)
        probability = np.zeros(size, np.float32)
        probability[window.slices] = logits[shown].sigmoid().numpy()
        return Answer(candidates[shown], probability, tuple(quality.tolist()), candidates, shown)


def better(a: Answer, b: Answer) -> Answer:
    """Of a wider look and a closer one, the closer unless its estimate is clearly lower."""
    return b if max(b.estimates) >= max(a.estimates) - 0.1 else a


def obey(mask: np.ndarray, logits: np.ndarray, marks: np.ndarray, window: Window) -> np.ndarray:
    """A mask in which every marked pixel has the user's label; what is as sure as the mark goes with it, if it is connected."""
    for row, column in np.argwhere((marks == 1) & ~mask):
        parts, _ = ndimage.label(logits >= min(0.0, float(logits[row, column])))
        mask = (
            mask | (parts == parts[row, column])
            if np.count_nonzero(parts == parts[row, column]) < 0.5 * mask.size
            else mask
        )
    for row, column in np.argwhere((marks == 2) & mask):
        parts, _ = ndimage.label(mask & (logits <= float(logits[row, column])))
        mask = mask & (parts != parts[row, column])
    mask = np.where(marks == 1, True, mask)
    return np.where(marks == 2, False, mask)


def mend(before: np.ndarray, logits: np.ndarray, window: Window, newest, marks: np.ndarray) -> np.ndarray:
    """The answer before, changed where the newest marks ask for it: of all changes only those connected to them are made."""
    after = before.copy()
    after[window.slices] = logits[window.slices] > 0
    changed, _ = ndimage.label(after != before)
    wanted = {int(changed[r, c]) for r, c, _ in newest} - {0}
    mask = np.where(np.isin(changed, list(wanted)), after, before) if wanted else before
    return obey(mask, logits, marks, window)


def keep_marked(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that hold a mark of the object; all, where there is none."""
    parts, _ = ndimage.label(mask)
    wanted = set(np.unique(parts[(marks == 1) & mask]).tolist()) - {0}
    return np.isin(parts, list(wanted)) if wanted else mask


def _bounds(mask: np.ndarray, also: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of two masks together, the ends excluded."""
    both = mask | also
    rows, columns = np.flatnonzero(both.any(1)), np.flatnonzero(both.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _around(size: tuple[int, int], box: tuple[int, int, int, int], margin: float) -> Window:
    """A window around a box, ``margin`` times as wide, at least ``SMALLEST`` pixels, within the image."""
    sides = [max(SMALLEST, margin * (b - a)) for a, b in ((box[0], box[2]), (box[1], box[3]))]
    mean = (sides[0] * sides[1]) ** 0.5
    ends = []
    for low, high, side, most in ((box[0], box[2], sides[0], size[0]), (box[1], box[3], sides[1], size[1])):
        side = min(most, round(max(side, 0.75 * mean)))
        start = min(max(0, round((low + high - side) / 2)), most - side)
        ends.append((start, start + side))
    return Window(ends[0][0], ends[1][0], ends[0][1], ends[1][1])


def _smaller(closer: Window, window: Window) -> bool:
    """Whether a closer look would see clearly more."""
    area = (closer.bottom - closer.top) * (closer.right - closer.left)
    return area < 0.5 * (window.bottom - window.top) * (window.right - window.left)
