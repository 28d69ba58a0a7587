"""Answers to ordered prompts in a volume, by the promptable head for volumes.

The first prompt finds the object: the head looks at cubes of many widths around it, from a few voxels to the whole scan, and the answer
that all the others agree with most is taken. Each further prompt mends the
answer before: what the head would change in a cube around the object is taken over where it is connected to the mark and nearer to
it than to any mark of the other kind (of the background: not much further), in mm; all slices alike, and nothing elsewhere. Cost follows the object, not the scan.
Where a mark of the background shows that far too much was found, the object is found anew.

An answer depends on the scan and on the ordered prompts only: all of them are replayed, from the longest beginning already answered.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor

from zeroseg.backbones.weights import MODELS
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.promptable import STEP, agreement, in_order, load_head, same_beginning
from zeroseg.interaction.prompts import Prompts, contradicts
from zeroseg.interaction.volume_head import (
    CANDIDATES,
    CELLS,
    Cube,
    VolumeHead,
    assemble,
    cube_around,
    see,
    see_inside,
    unsee,
)
from zeroseg.regions import depth_inside, distance_to
from zeroseg.segmentation import Segmentation
from zeroseg.timing import timed

SMALLEST = 10
"""Side of the smallest cube looked at, in voxels of mean side."""
LARGEST_MM = 500.0
"""Side of the largest cube looked at, in mm, unless the marks lie further apart."""
ROOM = 1.5
"""A cube is this many times as wide as the box, or the answer, that it is around."""
SAY, SURE = 0.4, 0.5
"""Weight of a first candidate's IoU with a prior, beside its estimated IoU; and the estimate below which the prior itself is shown, or a new answer looked for."""
BEGINNING = 0.5
"""A mark of the object that lies further from the answer than this times its width asks for a new answer, which that is joined to."""
DISC, NEAR_DISCS, LATE_SHARE, LEAST_SHARE = 0.7, 4.0, 2.0, 0.05
"""As in ``promptable``: a mark changes a ball of this share of its depth at least; and from the third mark on, at most so many balls
of its depth, or this share of the answer divided by the number of corrections, but not below the last number of it."""
REACH = 1.5
"""A mark of the background takes away what lies up to so many times as far from it as from a mark of the object. Chosen on development volumes."""
ANEW, DOUBT = 0.25, 0.1
"""After a mark of the background, an answer found anew is taken if it has less than this share of the mended one's voxels and its
estimated IoU is at most so much lower."""

VOLUME_HEAD = MODELS / "interaction_volume"
SESSION_BYTES = 512 << 20
"""Bytes of the scans and answers kept between calls."""


def _go_on() -> None:
    """The pause of one who waits."""


@dataclass(frozen=True)
class VolumeEvent:
    """One thing the user did.

    Attributes:
        marks: ((x, y, z, kind), ...) voxels marked, in order; kind 1 object, 2 background.
        box: (x0, y0, z0, x1, y1, z1), the ends excluded, or None.
    """

    marks: tuple[tuple[int, int, int, int], ...] = ()
    box: tuple[int, int, int, int, int, int] | None = None


@dataclass(frozen=True)
class VolumeAnswer:
    """What is shown after an event, within a part of the scan; outside of it all is background.

    Attributes:
        part: where the arrays lie in the scan.
        candidates: (3, x, y, z) bool, nested; after a correction all are edits of the answer before.
        probability: (x, y, z) float16 in [0, 1]; 0 where nothing was looked at.
        estimates: expected IoU of the three candidates.
        shown: which candidate is the answer, from 0.
    """

    part: tuple[slice, slice, slice]
    candidates: np.ndarray
    probability: np.ndarray
    estimates: tuple[float, ...]
    shown: int

    @property
    def mask(self) -> np.ndarray:
        return self.candidates[self.shown]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First voxel along each axis of the mask in the scan, and the first one beyond it; the mask is not empty."""
        found = ndimage.find_objects(self.mask.astype(np.uint8))[0]
        low = np.array([p.start + s.start for p, s in zip(self.part, found, strict=True)])
        high = np.array([p.start + s.stop for p, s in zip(self.part, found, strict=True)])
        return low, high

    def whole(self, shape: Sequence[int]) -> np.ndarray:
        """(X, Y, Z) bool of the scan's shape."""
        out = np.zeros(tuple(shape), bool)
        out[self.part] = self.mask
        return out


def volume_events(prompts: Prompts) -> list[VolumeEvent]:
    """Checked prompts as the events of a session, see ``in_order``."""
    marks: list[tuple[int, int, int, int]] = []
    box = None
    if prompts.box is not None:
        low, high = prompts.box[:3], prompts.box[3:]
        ends = [*(round(v) for v in low), *(round(v) + 1 for v in high)]
        box = ends[0], ends[1], ends[2], ends[3], ends[4], ends[5]
    if prompts.scribbles is not None:
        places = np.argwhere(prompts.scribbles)
        marks = [(int(x), int(y), int(z), int(prompts.scribbles[x, y, z])) for x, y, z in places]
    clicks = ((int(x + 0.5), int(y + 0.5), int(z + 0.5)) for x, y, z in prompts.points)
    return in_order(prompts, marks, box, clicks, VolumeEvent)


def affines_of(inputs: Tensor, given: Any) -> list[Any]:
    """The affine of every item of a batch, as MONAI's inferers are given batches.

    Args:
        inputs: (B, ...); a MetaTensor knows its own.
        given: (4, 4) of all items, (B, 4, 4), or None.
    """
    affine = np.asarray(inputs.affine) if given is None and isinstance(inputs, MetaTensor) else given
    return list(affine) if np.ndim(affine) == 3 else [affine] * len(inputs)


def spacing_of(affine: np.ndarray | None) -> tuple[float, float, float]:
    """Voxel size in mm of a (4, 4) affine; cubes of 1 mm where none is given.

    Raises:
        ZeroSegError: it is no affine that maps voxels to mm.
    """
    if affine is None:
        return 1.0, 1.0, 1.0
    try:
        matrix = np.asarray(affine, float)
    except (TypeError, ValueError):
        raise ZeroSegError("affine must be a 4 x 4 matrix of numbers, voxel index to mm") from None
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ZeroSegError(f"affine must be a 4 x 4 matrix of finite numbers, not {matrix.shape}")
    x, y, z = np.linalg.norm(matrix[:3, :3], axis=0).tolist()
    if min(x, y, z) <= 0:
        raise ZeroSegError("affine gives voxels no extent along an axis: pass the scan's own, or none")
    return x, y, z


class VolumeSessions:
    """The sessions of the scans seen last, below a limit in bytes; safe between threads.

    Args:
        limit: bytes of all of them together; one that is larger is not kept.
    """

    def __init__(self, limit: int = SESSION_BYTES):
        self.limit = limit
        self._sessions: OrderedDict[tuple, VolumeSession] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, image: Tensor, spacing: Sequence[float]) -> VolumeSession:
        """The session of a scan (X, Y, Z) in [0, 1], known by its content."""
        image = image.float().cpu().contiguous()
        key = hashlib.sha256(image.numpy()).digest(), tuple(image.shape), tuple(spacing)
        with self._lock:
            session = self._sessions.pop(key, None) or VolumeSession(load_volume_head(), image, spacing)
            self._sessions[key] = session
            while self._sessions and sum(s.nbytes for s in self._sessions.values()) > self.limit:
                self._sessions.popitem(last=False)
        return session


def load_volume_head() -> VolumeHead:
    """The embedded head for volumes.

    Raises:
        WeightsError: as ``promptable.load_head``.
    """
    return load_head(VOLUME_HEAD, VolumeHead)


def answer_volume(
    session: VolumeSession,
    prompts: Prompts,
    pause: Callable[[], None],
    seconds: dict[str, float],
    prior: np.ndarray | None = None,
) -> Segmentation:
    """The mask that checked prompts of rule ``points`` or ``box`` mean in a volume.

    Args:
        session: of the volume.
        prompts: for it.
        pause: called between looks.
        seconds: spent so far; what this takes is added.
        prior: (X, Y, Z) bool, see ``VolumeSession.answer``.
    """
    shape = session.shape
    with timed(seconds, "select"):
        events = volume_events(prompts)
        answer = session.answer(events, prompts.mask, prompts.candidate, pause, prior)
        mask = answer.whole(shape)
        confidence = np.ones(shape, np.float32)
        sure = np.where(answer.mask, answer.probability, 1 - answer.probability)
        confidence[answer.part] = sure
    # The user's word stands.
    if prompts.scribbles is not None:
        mask[prompts.scribbles == 1], mask[prompts.scribbles == 2] = True, False
    for point, kind in zip(prompts.points, prompts.labels, strict=True):
        mask[tuple(int(v + 0.5) for v in point)] = bool(kind)
    voxel_ml = float(np.prod(session.spacing)) / 1000
    details = {
        "estimated_iou": round(answer.estimates[answer.shown], 4),
        "candidate": answer.shown + 1,
        "candidates": [
            {"voxels": int(np.count_nonzero(one)), "estimated_iou": round(value, 4)}
            for one, value in zip(answer.candidates, answer.estimates, strict=True)
        ],
        "volume_ml": round(np.count_nonzero(mask) * voxel_ml, 4),
        "spacing_mm": [round(s, 4) for s in session.spacing],
    }
    notes = []
    if contradicts(prompts):
        notes.append("a voxel was marked both as object and as background: the later mark stands")
    if np.count_nonzero(mask) <= sum(prompts.labels):
        notes.append("nothing was found around the marks: they may lie in air or on noise")
    scores = [float(confidence[mask].mean())] if mask.any() else []
    return Segmentation(
        mask.astype(np.uint8), confidence, scores, prompts.rule, False, seconds, details, prompts.text, notes=notes
    )


class VolumeSession:
    """Prompts on one scan, replayed in order; answered beginnings are kept, so that a further prompt costs one answer.

    Args:
        head: the trained network.
        image: (X, Y, Z) in [0, 1].
        spacing: voxel size in mm.
    """

    def __init__(self, head: VolumeHead, image: Tensor, spacing: Sequence[float]):
        self.head, self.image, self.pause = head, image.float().cpu(), _go_on
        self.shape = tuple(image.shape)
        self.spacing = tuple(float(s) for s in spacing)
        self._lock = threading.Lock()
        self._begun: tuple = ()
        self._events: list[VolumeEvent] = []
        self._answers: list[VolumeAnswer] = []

    @property
    def nbytes(self) -> int:
        """Bytes it keeps, the scan included."""
        kept = sum(a.candidates.nbytes + a.probability.nbytes for a in self._answers)
        return self.image.numel() * self.image.element_size() + kept

    def answer(
        self,
        events: Sequence[VolumeEvent],
        start: np.ndarray | None = None,
        candidate: int | None = None,
        pause: Callable[[], None] = _go_on,
        prior: np.ndarray | None = None,
    ) -> VolumeAnswer:
        """Replay events.

        Args:
            events: in the order they were made, at least one unless a mask is given to start from.
            start: (X, Y, Z) bool mask to start from, or None.
            candidate: 1 to 3, which of the nested answers to the first event is gone on with; None: the one of best estimate.
            pause: called between looks; it may raise, where nobody waits for the answer any more.
            prior: (X, Y, Z) bool, what is known of the object otherwise, such as by words; it weighs in the first answer, as far
                as it is marked by the events.
        """
        begin = None if start is None or not start.any() else self._given(start)
        if not events:
            if begin is None:
                raise ValueError("neither an event nor a mask to start from")
            return begin
        with self._lock:
            self.pause = pause
            known = None if prior is None else hashlib.sha256(np.packbits(prior).tobytes()).digest()
            begun = None if begin is None else (begin.part, begin.mask.tobytes()), candidate, known
            same = same_beginning(events, self._events) if begun == self._begun else 0
            if same == len(events) == len(self._events):
                return self._answers[-1]
            # Of earlier answers only what is shown is kept, so the last event is answered again where it was passed before.
            same = min(same, len(events) - 1)
            self._begun = begun
            del self._events[same:], self._answers[same:]
            for at in range(same, len(events)):
                before = self._answers[-1] if self._answers else begin
                answer = self._next(events[: at + 1], before, candidate if at == 0 else None, prior)
                if self._answers:
                    self._answers[-1] = _slim(self._answers[-1])
                self._events.append(events[at])
                self._answers.append(answer)
            return self._answers[len(events) - 1]

    def _given(self, mask: np.ndarray) -> VolumeAnswer:
        part = ndimage.find_objects(mask.astype(np.uint8))[0]
        inner = mask[part]
        return VolumeAnswer(part, np.stack([inner] * CANDIDATES), inner.astype(np.float16), (1.0,) * CANDIDATES, 0)

    def _next(
        self,
        events: Sequence[VolumeEvent],
        before: VolumeAnswer | None,
        candidate: int | None,
        prior: np.ndarray | None,
    ) -> VolumeAnswer:
        marks = np.array([m for e in events for m in e.marks], int).reshape(-1, 4)
        box = next((e.box for e in reversed(events) if e.box is not None), None)
        if before is not None and not before.mask.any() and box is None and not (marks[:, 3] == 1).any():
            return before
        if before is None or not before.mask.any():
            answer = self._find(marks, box)
            if prior is not None:
                answer = self._weighed(answer, marks, box, prior)
            return answer if candidate is None else replace(answer, shown=candidate - 1)
        newest = np.array(events[-1].marks, int).reshape(-1, 4)
        if box is None and self._is_beginning(before, newest):
            return self._joined(self._find(marks, None), before, marks)
        mended = self._mend(newest, marks, box, before)
        # A mask that the user began with, or a box, is never thrown away.
        begun = self._begun[0] is not None or box is not None
        if begun or (newest[:, 3] == 1).any() or mended.estimates[mended.shown] > SURE:
            return mended
        found = self._find(marks, None)
        smaller = np.count_nonzero(found.mask) < ANEW * np.count_nonzero(mended.mask)
        doubt = mended.estimates[mended.shown] - found.estimates[found.shown]
        return found if smaller and doubt < DOUBT else mended

    def _is_beginning(self, before: VolumeAnswer, newest: np.ndarray) -> bool:
        """Whether marks of the object lie further from an answer than that is wide: then it was but a beginning."""
        if not len(newest) or (newest[:, 3] != 1).any():
            return False
        size = np.array(self.spacing)
        low, high = before.bounds
        places = newest[:, :3]
        apart = np.maximum(np.maximum(low - places, places + 1 - high), 0) * size
        return bool(np.linalg.norm(apart, axis=1).min() > BEGINNING * float(((high - low) * size).max()))

    def _joined(self, found: VolumeAnswer, before: VolumeAnswer, marks: np.ndarray) -> VolumeAnswer:
        """A new answer with all of the one before."""
        part = _union(found.part, before.part, np.zeros((0, 4), int))
        masks = np.zeros((CANDIDATES, *(s.stop - s.start for s in part)), bool)
        masks[(slice(None), *_within(found.part, part))] = found.candidates
        masks[(slice(None), *_within(before.part, part))] |= before.mask
        probability = np.zeros(masks.shape[1:], np.float16)
        probability[_within(found.part, part)] = found.probability
        local = _local(marks, part)
        masks = np.stack([_obey(one, local) for one in masks])
        return VolumeAnswer(part, masks, probability, found.estimates, found.shown)

    # Looking -----------------------------------------------------------------------------------------------------------

    def look(self, cube: Cube, marks: np.ndarray, box, last: VolumeAnswer | None) -> tuple[Tensor, Tensor]:
        """Logits (3, CELLS, CELLS, CELLS) and estimated IoU (3,) of a cube."""
        return tuple(t[0] for t in self._look([cube], marks, box, last))

    def _look(self, cubes: Sequence[Cube], marks: np.ndarray, box, last: VolumeAnswer | None) -> tuple[Tensor, Tensor]:
        self.pause()
        seen = []
        for cube in cubes:
            cells = cube.cells(marks[:, :3])
            kinds = marks[:, 3]
            shown = None if last is None else _cells_of(last, cube, self.shape)
            frame = None if box is None else _box_cells(box, cube)
            image, inside = see(self.image[None], cube)[0], see_inside(cube, self.shape)
            seen.append(assemble(image, inside, cells[kinds == 1], cells[kinds == 2], frame, shown))
        with torch.inference_mode():
            logits, quality = self.head(torch.stack(seen))
        return logits, quality.sigmoid()

    # The first answer --------------------------------------------------------------------------------------------------

    def _find(self, marks: np.ndarray, box) -> VolumeAnswer:
        size = np.array(self.spacing)
        wanted = marks[marks[:, 3] == 1][:, :3]
        if box is not None:
            low, high = np.array(box[:3]), np.array(box[3:])
            flat = [a for a in range(3) if high[a] - low[a] == 1 and self.shape[a] > 1]
            cube = cube_around((low + high) / 2, ROOM * float(((high - low) * size).max()), self.spacing)
            if flat and not len(wanted):
                # A box in one slice says nothing of the others: its middle is clicked.
                middle = (*((low + high) // 2), 1)
                logits, quality = self.look(cube, np.vstack([marks, middle]), None, None)
            else:
                logits, quality = self.look(cube, marks, box, None)
        else:
            return self.find_agreed(marks)[0]
        return _bounded(self._answer(cube, logits, quality, marks, int(quality.argmax())), box, marks)

    def find_agreed(self, marks: np.ndarray) -> tuple[VolumeAnswer, float]:
        """The first answer to marks, (n, 4) voxel and kind, and how much those of all widths agree with it, in [0, 1]."""
        wanted = marks[marks[:, 3] == 1][:, :3]
        middle = (wanted.min(0) + wanted.max(0) + 1) / 2
        spread = float(((np.ptp(wanted, axis=0) + 1) * np.array(self.spacing)).max())
        cube, logits, quality, shown, agreed = self._best_width(middle, spread, marks)
        return self._answer(cube, logits, quality, marks, shown), agreed

    def _weighed(self, answer: VolumeAnswer, marks: np.ndarray, box, prior: np.ndarray) -> VolumeAnswer:
        """The candidate that a prior agrees with; the marked part of the prior itself where the head is unsure."""
        parts, _ = ndimage.label(prior)
        hit = parts[tuple(marks[marks[:, 3] == 1][:, :3].T)]
        if box is not None:
            x, y, z = (slice(box[a], box[a + 3]) for a in range(3))
            hit = np.append(hit, np.unique(parts[x, y, z]))
        known = np.isin(parts, np.setdiff1d(hit, [0]))
        if not known.any():
            return answer
        if max(answer.estimates) < SURE:
            return self._given(_obey(known, marks))
        inner, total = known[answer.part], np.count_nonzero(known)
        said = []
        for one in answer.candidates:
            common = np.count_nonzero(one & inner)
            said.append(common / max(1, np.count_nonzero(one) + total - common))
        return replace(answer, shown=int(np.argmax(np.array(answer.estimates) + SAY * np.array(said))))

    def _best_width(
        self, middle: np.ndarray, spread: float, marks: np.ndarray
    ) -> tuple[Cube, Tensor, Tensor, int, float]:
        """Of all candidates of cubes of many widths around a place, the one that the others agree with most.

        Each says what it does of every place in a common set, finer near the middle; the Dice of two answers is weighted by how sure
        the head is of the other one.

        Returns:
            its cube, the cube's logits and estimates, which candidate it is, and how much the others agree.
        """
        size, extent = np.array(self.spacing), np.array(self.shape) * np.array(self.spacing)
        first = max(SMALLEST * float(size.prod() ** (1 / 3)), 1.3 * spread)
        last = max(first, min(1.3 * float(extent.max()), LARGEST_MM))
        count = 1 + round(np.log(last / first) / np.log(STEP))
        sides = first * STEP ** np.arange(count)
        cubes = [cube_around(middle.tolist(), float(side), self.spacing) for side in sides]
        logits, quality = self._look(cubes, marks, None, None)
        places, volumes = _common_places(sides)
        said = np.zeros((count * CANDIDATES, len(places)), np.float32)
        for k, (cube, side) in enumerate(zip(cubes, sides, strict=True)):
            cells = cube.cells(marks[marks[:, 3] == 1][:, :3])
            # What the head says of cells outside of the scan means nothing.
            inside = see_inside(cube, self.shape) > 0
            at = np.floor((places / side + 0.5) * CELLS).astype(int)
            known = ((at >= 0) & (at < CELLS)).all(1)
            for c in range(CANDIDATES):
                mask = ((logits[k, c] > 0) & inside).numpy()
                mask[tuple(cells.T)] = True
                parts, _ = ndimage.label(mask)
                mask = np.isin(parts, np.unique(parts[tuple(cells.T)]))
                said[k * CANDIDATES + c, known] = mask[tuple(at[known].T)]
        scores = agreement(said, said * volumes, quality)
        k, c = divmod(int(scores.argmax()), CANDIDATES)
        return cubes[k], logits[k], quality[k], c, float(scores.max())

    def _cube_of(self, answer: VolumeAnswer, marks: np.ndarray) -> Cube:
        """The cube around an answer and the marks given."""
        low, high = answer.bounds
        if len(marks):
            low, high = np.minimum(low, marks[:, :3].min(0)), np.maximum(high, marks[:, :3].max(0) + 1)
        size = np.array(self.spacing)
        side = max(ROOM * float(((high - low) * size).max()), SMALLEST * float(size.prod() ** (1 / 3)))
        return cube_around((low + high) / 2, side, self.spacing)

    def _answer(self, cube: Cube, logits: Tensor, quality: Tensor, marks: np.ndarray, shown: int) -> VolumeAnswer:
        part = cube.part(self.shape)
        full = unsee(logits, cube, self.shape)
        local = _local(marks, part)
        masks = np.stack([_keep_marked(_obey((one > 0).numpy(), local), local) for one in full])
        return VolumeAnswer(part, masks, full[shown].sigmoid().half().numpy(), tuple(quality.tolist()), shown)

    # Corrections -------------------------------------------------------------------------------------------------------

    def _mend(self, newest: np.ndarray, marks: np.ndarray, box, before: VolumeAnswer) -> VolumeAnswer:
        cube = self._cube_of(before, newest)
        logits, quality = self.look(cube, marks, box, before)
        part = _union(before.part, cube.part(self.shape), newest)
        shape = tuple(s.stop - s.start for s in part)
        old = np.zeros(shape, bool)
        old[_within(before.part, part)] = before.mask
        shown, seen = int(quality.argmax()), _within(cube.part(self.shape), part)
        full = unsee(logits, cube, self.shape)
        proposed = np.repeat(old[None], CANDIDATES, 0)
        proposed[(slice(None), *seen)] = (full > 0).numpy()
        probability = np.zeros(shape, np.float16)
        probability[seen] = full[shown].sigmoid().half().numpy()
        del full
        masks = mend_volume(old, proposed, _local(newest, part), _local(marks, part), self.spacing, len(marks))
        return VolumeAnswer(part, masks, probability, tuple(quality.tolist()), shown)


def mend_volume(
    before: np.ndarray,
    proposed: np.ndarray,
    newest: np.ndarray,
    marks: np.ndarray,
    spacing: Sequence[float],
    count: int,
) -> np.ndarray:
    """The answer before, changed only where the newest marks ask for it, once for each of K proposals; as ``promptable.mend`` in mm.

    Args:
        before: (x, y, z) bool.
        proposed: (K, x, y, z) bool.
        newest: (n, 4) marks of the last event, voxel and kind.
        marks: (m, 4) all marks so far.
        spacing: voxel size in mm.
        count: how many marks there are in the whole scan.

    Returns:
        (K, x, y, z) bool.
    """
    masks = np.repeat(before[None], len(proposed), 0)
    for kind in (1, 2):
        places = newest[newest[:, 3] == kind][:, :3]
        if not len(places):
            continue
        at = tuple(places.T)
        wanted = before != (kind == 1)
        away = distance_to(places, before.shape, spacing)
        allowed = wanted
        others = marks[marks[:, 3] == 3 - kind][:, :3]
        if len(others):
            reach = REACH if kind == 2 else 1.0
            allowed = allowed & (away <= reach * distance_to(others, before.shape, spacing))
        # How far the mark lies from the answer's edge, on its wrong side; 0 where it confirms the answer.
        depth = 0.0
        if len(places) == 1 and wanted[at][0]:
            ends = [s * min(p + 1, n - p) for p, n, s in zip(places[0].tolist(), before.shape, spacing, strict=True)]
            depth = float(min(*ends, away.min(where=~wanted, initial=np.inf)))
        elif wanted[at].any():
            depth = float(depth_inside(wanted, spacing)[at].max())
        done = count if len(newest) == 1 else 1
        share = LATE_SHARE * max(LEAST_SHARE, 1 / max(1, done - 1))
        ball = 4 / 3 * np.pi * depth**3 / float(np.prod(spacing))
        most = max(share * np.count_nonzero(before), NEAR_DISCS * ball)
        for k, proposal in enumerate(proposed):
            change = (proposal != before) & allowed
            if depth:
                change |= (away < max(1.2 * min(spacing), DISC * depth)) & allowed
            parts, _ = ndimage.label(change)
            change = np.isin(parts, np.setdiff1d(parts[at], [0]))
            if done > 2 and np.count_nonzero(change) > most:
                change &= away <= np.sort(away[change])[int(most)]
            masks[k] = np.where(change, kind == 1, masks[k])
    return np.stack([_obey(mask, marks) for mask in masks])


def _obey(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """A mask in which every marked voxel has the user's label; of contradictory marks, the last."""
    out = mask.copy()
    for x, y, z, kind in marks:
        out[x, y, z] = kind == 1
    return out


def _keep_marked(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that hold a mark of the object; all, where there is none."""
    parts, _ = ndimage.label(mask)
    wanted = np.setdiff1d(parts[tuple(marks[marks[:, 3] == 1][:, :3].T)], [0])
    return np.isin(parts, wanted) if len(wanted) else mask


def _bounded(answer: VolumeAnswer, box: Sequence[int], marks: np.ndarray) -> VolumeAnswer:
    """An answer without what lies outside of a box; of a box in one slice, outside of it in that slice."""
    inside = np.zeros(answer.mask.shape, bool)
    spans = [
        slice(max(0, box[a] - p.start), max(0, box[a + 3] - p.start))
        for a, p in zip(range(3), answer.part, strict=True)
    ]
    inside[tuple(spans)] = True
    for axis, span in enumerate(spans):
        if box[axis + 3] - box[axis] == 1:
            away = np.ones(inside.shape[axis], bool)
            away[span] = False
            inside[tuple(away if a == axis else slice(None) for a in range(3))] = True
    local = _local(marks, answer.part)
    return replace(answer, candidates=np.stack([_obey(one & inside, local) for one in answer.candidates]))


def _local(marks: np.ndarray, part: Sequence[slice]) -> np.ndarray:
    """Those of (n, 4) marks that lie in a part of the scan, in its own indices."""
    low, high = np.array([s.start for s in part]), np.array([s.stop for s in part])
    inner = marks[((marks[:, :3] >= low) & (marks[:, :3] < high)).all(1)].copy()
    inner[:, :3] -= low
    return inner


def _within(inner: Sequence[slice], outer: Sequence[slice]) -> tuple[slice, slice, slice]:
    x, y, z = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    return x, y, z


def _union(first: Sequence[slice], second: Sequence[slice], marks: np.ndarray) -> tuple[slice, slice, slice]:
    low = np.minimum([s.start for s in first], [s.start for s in second])
    high = np.maximum([s.stop for s in first], [s.stop for s in second])
    if len(marks):
        low, high = np.minimum(low, marks[:, :3].min(0)), np.maximum(high, marks[:, :3].max(0) + 1)
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return x, y, z


def _cells_of(answer: VolumeAnswer, cube: Cube, shape: Sequence[int]) -> Tensor:
    """(CELLS, CELLS, CELLS) float: an answer as a cube sees it."""
    part = _union(answer.part, cube.part(shape), np.zeros((0, 4), int))
    mask = torch.zeros([s.stop - s.start for s in part])
    mask[_within(answer.part, part)] = torch.from_numpy(answer.mask).float()
    # Of the parts of the scan that both touch, so that nothing of the answer goes on beyond its border.
    x, y, z = (c - p.start for c, p in zip(cube.low, part, strict=True))
    return see(mask[None], Cube((x, y, z), cube.sides))[0]


def _box_cells(box: Sequence[int], cube: Cube) -> Tensor:
    """(CELLS, CELLS, CELLS) float: 1 in a box of voxels."""
    ends = []
    for axis in range(3):
        at = [(v - cube.low[axis]) / cube.sides[axis] * CELLS for v in (box[axis], box[axis + 3])]
        low = max(0, min(CELLS - 1, round(at[0])))
        ends.append(slice(low, max(low + 1, min(CELLS, round(at[1])))))
    out = torch.zeros(CELLS, CELLS, CELLS)
    out[tuple(ends)] = 1
    return out


def _common_places(sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places at which answers of nested cubes around one middle are compared, and the volume that each stands for.

    Args:
        sides: of the cubes, from narrow to wide, in mm.

    Returns:
        (n, 3) mm from the middle, and (n,): the cells of each cube that do not lie in the next narrower one.
    """
    line = (np.arange(CELLS) + 0.5) / CELLS - 0.5
    cells = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    places, volumes, inner = [], [], 0.0
    for side in sides.tolist():
        out = np.abs(cells).max(1) * side >= inner / 2
        places.append(cells[out] * side)
        volumes.append(np.full(len(places[-1]), (side / CELLS) ** 3))
        inner = side
    return np.concatenate(places), np.concatenate(volumes).astype(np.float32)


def _slim(answer: VolumeAnswer) -> VolumeAnswer:
    """Without the candidates that are not shown, and cut to what there is."""
    if len(answer.candidates) == 1:
        return answer
    return VolumeAnswer(answer.part, answer.mask[None].copy(), answer.probability, answer.estimates, 0)
