"""Answers to ordered prompts by the promptable head: the first prompt finds the object, each further one mends the answer before.

Where the head is unsure of the mended answer, the object is found anew from all marks, in windows of all widths; so is what strokes mean.

An answer depends on the encoding and on the ordered prompts only: all of them are replayed, from the longest beginning already answered.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from zeroseg.attention import EncodedImage, rules
from zeroseg.attention.readout import Readout
from zeroseg.backbones.convolution import use_onednn
from zeroseg.backbones.weights import MODELS, verify_sums
from zeroseg.errors import WeightsError, first_line
from zeroseg.interaction.clicks import pixel_of, resized
from zeroseg.interaction.head import CANDIDATES, PromptHead, Window, assemble
from zeroseg.interaction.prompts import Prompts
from zeroseg.interaction.settings import Settings
from zeroseg.interaction.strokes import stroke_odds
from zeroseg.regions import depth_inside, distance_to, innermost, largest_component

Made = TypeVar("Made")

MARGIN = 1.6
"""A window is this many times as wide as the answer it is to mend."""
SMALLEST = 48
"""Side in pixels of the smallest window."""
DISC, NEAR_DISCS, LATE_SHARE, LEAST_SHARE = 0.7, 4.0, 0.6, 0.05
"""A mark changes a disc of this share of its depth at least; and from the third mark on, at most so many discs of its depth, or this
share of the answer divided by the number of corrections, but not below the last number of it. Chosen on development images."""
SAY = 0.8
"""Weight of a first candidate's IoU with the rule's answer, beside its estimated IoU. Chosen on development images."""
SURE = 0.8
"""Estimated IoU below which a first answer is left to the rule (attention's steepest contour). Chosen on development images."""
DOUBTED = 0.6
"""Estimated IoU of a mended answer up to which a new one is looked for. Chosen on development images."""
NARROWEST, STEP = 32, 1.4
"""Of the windows of all widths in which an object is looked for: side of the narrowest in pixels, and ratio of two sides (of cubes
in volumes, too)."""
AGREEMENT = 4.0
"""How much more a candidate counts among others of which the head is surer: e to this times the estimated IoU."""
LEAST_STROKE, STROKE_WEIGHT, STROKE_REACH = 5, 0.15, 3
"""Strokes have a say among candidates where object and background have so many marked pixels each; the weight of a candidate's mean
log-odds by them, beside its agreement with the others; and the cells around all candidates over which the mean is taken. The
weight was chosen on development images."""
COMPARED = 512
"""Longest side of the grid on which their candidates are compared."""
MAIN, TRUST = 0.5, 0.4
"""``find_whole`` asks that the largest part of a region makes up more than this share of it, and that the head's estimated IoU times
its answer's IoU with that part is at least the second number. Chosen on development images."""
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

    @property
    def confidence(self) -> np.ndarray:
        """(H, W) float32, the probability of the label given to every pixel."""
        return np.where(self.mask, self.probability, 1 - self.probability).astype(np.float32)


@cache
def load_head(folder: Path = MODELS / "interaction", network: type[nn.Module] = PromptHead) -> Any:
    """The trained head of a folder with ``config.json`` and ``head.safetensors``; checked and loaded once.

    Args:
        folder: that holds them and their SHA256SUMS.
        network: ``PromptHead`` for images, or ``VolumeHead``.

    Raises:
        WeightsError: the folder is not there, does not match its SHA256SUMS, or holds another network's weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        verify_sums(folder)
        head = network(config["widths"], config["blocks"])
        head.load_state_dict(load_file(str(folder / "head.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"cannot load the promptable head in {folder.name}: {first_line(error)}; or use refiner rules"
        ) from error
    flat = network is PromptHead
    return (
        use_onednn(head)
        .eval()
        .requires_grad_(False)
        .to(memory_format=torch.channels_last if flat else torch.channels_last_3d)
    )


def answer_by_head(
    encoded: EncodedImage, prompts: Prompts, settings: Settings, head: PromptHead | None = None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """The mask that the prompts mean, by the promptable head; takes and gives what ``clicks.answer_clicks`` does.

    Strokes and the box come first, together; then the clicks, one by one.

    Args:
        encoded: the image.
        prompts: of rule ``points`` or ``box``.
        settings: ``refine`` shapes the answer of attention, which stands where the head is unsure; others have shaped the encoding.
        head: the embedded one by default.
    """
    start = None if prompts.mask is None else resized(prompts.mask, tuple(encoded.image.shape[1:]))
    session = _session(encoded, settings, head or load_head())
    events = events_of(encoded, prompts)
    if start is not None and events and not start.any():
        # A few pixels of a large picture are none on the working grid.
        start = None
    answer = session.answer(events, start, prompts.candidate)
    details = {
        "estimated_iou": round(answer.estimates[answer.shown], 4),
        "candidate": answer.shown + 1,
        "candidates": [
            {"area": int(np.count_nonzero(mask)), "estimated_iou": round(value, 4)}
            for mask, value in zip(answer.candidates, answer.estimates, strict=True)
        ],
    }
    return answer.mask.copy(), answer.confidence, details


def find_whole(
    encoded: EncodedImage, region: np.ndarray, settings: Settings, head: PromptHead | None = None
) -> tuple[Answer | None, dict]:
    """The object that a region points at: what one click at the innermost pixel of its largest part gives.

    A rule says roughly where the object is, the head says how far it goes. The head is believed where one part makes up most of
    the region and where it is sure of an answer that agrees with that part, see ``MAIN`` and ``TRUST``; many cells, or
    a region that is no object, stay as they are.

    Args:
        encoded: the image.
        region: (h, w) bool on the grid of ``encoded.image``, from a rule that knows no prompt.
        settings: as ``answer_by_head``.
        head: the embedded one by default.

    Returns:
        the answer, or None where the region stands; and what a manifest records: ``by`` head or rules, and if the head was
        asked ``click`` (x, y) in pixels of the original image, ``estimated_iou`` and ``agreement``, the IoU with the part.
    """
    main = largest_component(region) if region.any() else region
    if np.count_nonzero(main) <= MAIN * np.count_nonzero(region):
        return None, {"by": "rules"}
    row, column = innermost(main)
    answer = _session(encoded, settings, head or load_head()).answer([Event(((row, column, 1),))])
    agreement = np.count_nonzero(answer.mask & main) / np.count_nonzero(answer.mask | main)
    estimate = answer.estimates[answer.shown]
    believed = estimate * agreement >= TRUST
    (height, width), (full_height, full_width) = region.shape, encoded.size
    details = {
        "by": "head" if believed else "rules",
        "click": [int((column + 0.5) * full_width / width), int((row + 0.5) * full_height / height)],
        "estimated_iou": round(estimate, 4),
        "agreement": round(agreement, 4),
    }
    return (answer if believed else None), details


def _session(encoded: EncodedImage, settings: Settings, head: PromptHead) -> Session:
    """The session on an image, kept with it."""

    def begin() -> Session:
        return Session(head, encoded.image, encoded.readout, lambda event: _by_rule(encoded, event, settings.refine))

    return encoded.keep("session", (id(head), settings.refine), begin)


def _by_rule(encoded: EncodedImage, event: Event, refine: str) -> np.ndarray | None:
    """(h, w) bool, what attention alone gives for an event: the steepest contour around its marks on the object."""
    height, width = encoded.image.shape[1:]
    seeds = [(row, column) for row, column, kind in event.marks if kind == 1]
    if not seeds:
        return None
    tokens = {_token(row, column, encoded.side, height, width) for row, column in seeds}
    relevance = rules.click_relevance(encoded.paths, sorted(tokens)[:STROKE_TOKENS])
    return rules.cut(encoded.upsample(relevance[None], refine)[0].cpu().numpy(), seeds)[0]


def _token(row: int, column: int, side: int, height: int, width: int) -> int:
    """The token under a pixel of the working grid, as the head was trained to see it."""
    return row * side // height * side + column * side // width


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
    places = (pixel_of(encoded, click) for click in prompts.points)
    return in_order(prompts, marks, box, places, Event)


def in_order(
    prompts: Prompts,
    marks: list,
    box: tuple[int, ...] | None,
    places: Iterable[tuple[int, ...]],
    event: Callable[..., Made],
) -> list[Made]:
    """The events of a session, in images and in volumes: strokes and box first, together; then the clicks, one by one.

    What is marked as background before there is an object waits for it.

    Args:
        prompts: checked.
        marks: (*place, kind) of every place drawn on; kind 1 object, 2 background.
        box: on the same grid, or None.
        places: of the clicks, in the order they were made.
        event: makes one of marks and, perhaps, a box.
    """
    known = box is not None or prompts.mask is not None or any(kind == 1 for *_, kind in marks)
    events = [event(tuple(marks), box)] if known and (marks or box) else []
    waiting = [] if known else [*marks]
    for place, label in zip(places, prompts.labels, strict=True):
        waiting.append((*place, 1 if label else 2))
        known = known or bool(label)
        if known:
            events.append(event(tuple(waiting)))
            waiting = []
    return events


def same_beginning(one: Sequence[object], other: Sequence[object]) -> int:
    """How many events two sessions have in common before they differ, or one ends."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Session:
    """Prompts on one image, replayed in order; answered beginnings are kept, so that a further prompt costs one answer.

    Args:
        head: the trained network.
        image: (3, H, W) in [0, 1].
        readout: the frozen model's maps of that image, or None to go without.
        rule: (H, W) bool that attention alone gives for a first event, or None; it answers where the head is unsure.
    """

    def __init__(
        self,
        head: PromptHead,
        image: Tensor,
        readout: Readout | None,
        rule: Callable[[Event], np.ndarray | None] = lambda event: None,
    ):
        self.head, self.image, self.readout, self.rule = head, image.float().cpu(), readout, rule
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
            if start is None:
                raise ValueError("neither an event nor a mask to start from")
            return Answer(start, start.astype(np.float32), (1.0,) * CANDIDATES, np.stack([start] * CANDIDATES), 0)
        with self._lock:
            begun = (None if start is None else start.tobytes(), candidate)
            same = same_beginning(events, self._events) if begun == self._begun else 0
            if same == len(events) == len(self._events) and self._last is not None:
                return self._last
            # The last answer's candidates are wanted, so its event is answered again where it was passed before.
            same = min(same, len(events) - 1)
            self._begun, self._last = begun, None
            del self._events[same:], self._masks[same:]
            for at in range(same, len(events)):
                before = self._unpacked(self._masks[-1]) if self._masks else start
                if at < len(events) - 1 and before is not None and agrees(events[at], before):
                    self._events.append(events[at])
                    self._masks.append(np.packbits(before))
                    continue
                answer = self._last = self._next(events[: at + 1], before, candidate if at == 0 else None)
                self._events.append(events[at])
                self._masks.append(np.packbits(answer.mask))
            return answer

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
        mended = self._mend(events, marks, box, before)
        # A mask that the user began with, or a box, is never thrown away.
        begun = self._begun[0] is not None or box is not None
        if begun or not (marks == 1).any() or mended.estimates[mended.shown] > DOUBTED:
            return mended
        found = self._find_by_agreement(events, marks)
        return found if found.estimates[found.shown] > mended.estimates[mended.shown] else mended

    def look(self, events, marks, box, before, window: Window) -> tuple[Tensor, Tensor]:
        """Logits (3, h, w) over a window's own pixels, and estimated IoU (3,)."""
        logits, quality = self.look_through(events, marks, box, before, [window])
        return over(logits[0], window), quality[0]

    def look_through(self, events, marks, box, before, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Logits (N, 3, WINDOW, WINDOW) as the network gives them, and estimated IoU (N, 3), of N windows."""
        last = None if before is None else torch.from_numpy(before)
        drawn, attention = torch.from_numpy(marks), self._attention(events)
        x = torch.stack([assemble(self.image, drawn, box, last, attention, window) for window in windows])
        with torch.inference_mode():
            logits, quality = self.head(x.contiguous(memory_format=torch.channels_last))
            return logits, quality.sigmoid()

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
                    near, alike = self.readout.relevance(_token(row, column, side, height, width))
                    np.maximum(maps[kind - 1], near, out=maps[kind - 1])
                    np.maximum(maps[kind + 1], alike, out=maps[kind + 1])
        return torch.from_numpy(maps.reshape(6, side, side))

    def _find(self, events, marks, box) -> Answer:
        """The first answer: within the box and what is around it, or within the whole image; to strokes, in windows of all widths."""
        strokes = len(events[0].marks) > 1
        if strokes and box is None and (marks == 1).any():
            return self._find_by_agreement(events, marks)
        size = tuple(self.image.shape[1:])
        window = Window(0, 0, *size) if box is None else _around(size, box, MARGIN)
        logits, quality = self.look(events, marks, box, None, window)
        candidates = self._candidates(logits, window, marks)
        answer = self._shown(candidates, logits, quality, int(quality.argmax()), window)
        # The rule was made for one click, and is worse than the head where there are strokes.
        prior = None if strokes else self.rule(events[0])
        if prior is None:
            return answer
        if max(answer.estimates) >= SURE:
            said = [np.count_nonzero(m & prior) / max(1, np.count_nonzero(m | prior)) for m in candidates]
            shown = int(np.argmax(np.array(answer.estimates) + SAY * np.array(said)))
            return self._shown(candidates, logits, quality, shown, window)
        # Nested around the rule's answer, which is shown.
        nested = candidates[0] & prior, prior, candidates[2] | prior
        candidates = np.stack([obey(mask, marks) for mask in nested])
        return replace(answer, mask=candidates[1], candidates=candidates, shown=1)

    def _find_by_agreement(self, events, marks) -> Answer:
        """Of all candidates of windows of many widths around the marks of the object, the one that the others agree with most.

        Strokes on both, object and background, have a say as well, see ``stroke_odds``.
        """
        size = tuple(self.image.shape[1:])
        windows = all_widths(size, _bounds(marks == 1, marks == 1))
        logits, quality = self.look_through(events, marks, None, None, windows)
        if len(events[0].marks) > 1:
            # Strokes say how large the object is about: what is found in the whole image is looked at from closer by, too.
            found = self._candidates(over(logits[-1], windows[-1]), windows[-1], marks)[int(quality[-1].argmax())]
            windows.append(_around(size, _bounds(found, marks == 1), MARGIN))
            closer = self.look_through(events, marks, None, None, windows[-1:])
            logits, quality = torch.cat([logits, closer[0]]), torch.cat([quality, closer[1]])
        # Compared on a grid, one window after the other, so that a large picture takes no more memory than for a first answer.
        step = -(-max(size) // COMPARED)
        said = np.zeros((len(windows), CANDIDATES, *_gridded(size, step)), np.float32)
        for k, window in enumerate(windows):
            top, left = -(-window.top // step), -(-window.left // step)
            local = marks[window.slices]
            for c, one in enumerate(over(logits[k], window).numpy()):
                mask = keep_marked(obey(one > 0, local), local)
                part = mask[top * step - window.top :: step, left * step - window.left :: step]
                said[k, c, top : top + part.shape[0], left : left + part.shape[1]] = part
        grid, said = said.shape[2:], said.reshape(len(windows) * CANDIDATES, -1)
        score = agreement(said, said, quality)
        odds = self._odds(marks, step)
        if odds is not None:
            near = ndimage.binary_dilation(said.any(0).reshape(grid), iterations=STROKE_REACH)
            score += STROKE_WEIGHT * (2 * said[:, near.ravel()] - 1) @ odds[near] / max(1, np.count_nonzero(near))
        k, shown = divmod(int(score.argmax()), CANDIDATES)
        own = over(logits[k], windows[k])
        return self._shown(self._candidates(own, windows[k], marks), own, quality[k], shown, windows[k])

    def _odds(self, marks: np.ndarray, step: int) -> np.ndarray | None:
        """What strokes say on a grid of every ``step``-th pixel; None where there are none on both, object and background."""
        if min(np.count_nonzero(marks == kind) for kind in (1, 2)) < LEAST_STROKE:
            return None
        rows, columns = marks.nonzero()
        drawn = np.zeros(_gridded(marks.shape, step), np.uint8)
        drawn[rows // step, columns // step] = marks[rows, columns]
        return stroke_odds(F.adaptive_avg_pool2d(self.image[None], drawn.shape)[0], self.readout, drawn)

    def _candidates(self, logits: Tensor, window: Window, marks: np.ndarray) -> np.ndarray:
        """(3, H, W) bool: what the network proposes, as far as it is marked."""
        return np.stack([keep_marked(obey(full > 0, marks), marks) for full in self._full(logits, window)])

    def _mend(self, events, marks, box, before) -> Answer:
        size = tuple(self.image.shape[1:])
        newest = events[-1].marks
        touched = np.zeros(size, bool)
        for row, column, _ in newest:
            touched[row, column] = True
        window = _around(size, _bounds(before, touched), MARGIN)
        logits, quality = self.look(events, marks, box, before, window)
        candidates = mend(before, self._full(logits, window), window, newest, marks)
        return self._shown(candidates, logits, quality, int(quality.argmax()), window)

    def _full(self, logits: Tensor, window: Window) -> np.ndarray:
        """(3, H, W) logits over the image; surely background outside of the window."""
        full = np.full((CANDIDATES, *self.image.shape[1:]), -20.0, np.float32)
        full[(slice(None), *window.slices)] = logits.numpy()
        return full

    def _shown(self, candidates: np.ndarray, logits: Tensor, quality: Tensor, shown: int, window: Window) -> Answer:
        probability = np.zeros(candidates.shape[1:], np.float32)
        probability[window.slices] = logits[shown].sigmoid().numpy()
        return Answer(candidates[shown], probability, tuple(quality.tolist()), candidates, shown)


def mend(
    before: np.ndarray, logits: np.ndarray, window: Window, newest: Sequence[tuple[int, int, int]], marks: np.ndarray
) -> np.ndarray:
    """The answer before, changed only where the newest marks ask for it, once for each of K proposals.

    Of what the network would change, that is kept which is connected to the marks (after FocalClick, Chen et al. 2022), lies nearer
    to them than to any mark of the other kind, and is not out of proportion: a correction late in a session, or one made
    close to the edge, moves less. Where the network would change nothing, the disc changes of which a mark can be the middle.

    Args:
        before: (H, W) bool.
        logits: (K, H, W) float, meant within ``window``.
        window: what the network saw.
        newest: (row, column, kind) of the last event.
        marks: (H, W) uint8, all marks so far.

    Returns:
        (K, H, W) bool.
    """
    proposed = np.repeat(before[None], len(logits), 0)
    inside = (slice(None), *window.slices)
    proposed[inside] = logits[inside] > 0
    masks = np.repeat(before[None], len(logits), 0)
    for kind in (1, 2):
        places = np.array([(r, c) for r, c, k in newest if k == kind])
        if not len(places):
            continue
        rows, columns = places.T
        wanted = before != (kind == 1)
        away = distance_to(places, before.shape)
        allowed = wanted
        if (marks == 3 - kind).any():
            allowed = allowed & (away <= distance_to(np.argwhere(marks == 3 - kind), before.shape))
        # How far the mark lies from the answer's edge, on its wrong side; 0 where it confirms the answer.
        depth = float(depth_inside(wanted)[rows, columns].max())
        done = int(np.count_nonzero(marks)) if len(newest) == 1 else 1
        share = LATE_SHARE * max(LEAST_SHARE, 1 / max(1, done - 1))
        most = max(share * np.count_nonzero(before), NEAR_DISCS * np.pi * depth**2)
        for k, proposal in enumerate(proposed):
            change = (proposal != before) & allowed
            if depth:
                change |= (away < max(1.5, DISC * depth)) & allowed
            parts, _ = ndimage.label(change)
            change = np.isin(parts, np.setdiff1d(parts[rows, columns], [0]))
            if done > 2 and np.count_nonzero(change) > most:
                change &= away <= np.sort(away[change])[int(most)]
            masks[k] = np.where(change, kind == 1, masks[k])
    return np.stack([obey(mask, marks) for mask in masks])


def agreement(said: np.ndarray, weighted: np.ndarray, quality: Tensor) -> np.ndarray:
    """How much each of K masks agrees with all of them: its mean Dice with each, that with a surer one counting more.

    Args:
        said: (K, n) float32, 1 in the mask.
        weighted: the same, times what each of the n places stands for.
        quality: estimated IoU, K numbers in any shape.

    Returns:
        (K,) in [0, 1].
    """
    common = weighted @ said.T
    total = common.diagonal()
    overlap = 2 * common / (total[:, None] + total[None] + 1e-9)
    weight = np.exp(AGREEMENT * quality.numpy().ravel())
    return overlap @ (weight / weight.sum())


def agrees(event: Event, mask: np.ndarray) -> bool:
    """Whether an answer already has the label of every mark of an event, so that there is nothing to mend."""
    return event.box is None and all(mask[row, column] == (kind == 1) for row, column, kind in event.marks)


def obey(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """A mask in which every marked pixel has the user's label."""
    return np.where(marks == 2, False, np.where(marks == 1, True, mask))


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


def _gridded(size: Sequence[int], step: int) -> tuple[int, ...]:
    """How many of every ``step``-th pixel there are along each side."""
    return tuple(-(-side // step) for side in size)


def over(logits: Tensor, window: Window) -> Tensor:
    """(3, WINDOW, WINDOW) -> (3, h, w), over a window's own pixels."""
    size = (window.bottom - window.top, window.right - window.left)
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]


def all_widths(size: tuple[int, int], box: tuple[int, int, int, int]) -> list[Window]:
    """Windows around a box, from the narrowest that holds it to the whole image; those that would leave the image are shifted back."""
    windows, side = [], float(NARROWEST)
    while side < max(size):
        sides = [min(round(side), most) for most in size]
        starts = [
            min(max(0, (low + high - wide) // 2), most - wide)
            for low, high, wide, most in ((box[0], box[2], sides[0], size[0]), (box[1], box[3], sides[1], size[1]))
        ]
        if all(wide >= high - low for low, high, wide in ((box[0], box[2], sides[0]), (box[1], box[3], sides[1]))):
            windows.append(Window(starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1]))
        side *= STEP
    return [*windows, Window(0, 0, *size)]


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
