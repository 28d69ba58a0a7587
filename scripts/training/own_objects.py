"""Objects that a promptable head finds itself in real images, to train it further without a human mask.

After the fully automatic stage of Segment Anything's data engine (Kirillov et al. 2023): the head is clicked all over an image and looks
through windows of all widths; what they agree on, and what none of them cuts off, is an object. Its edges are the image's own.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import torch

from zeroseg.attention.readout import Readout
from zeroseg.interaction.head import CANDIDATES, PromptHead, Window
from zeroseg.interaction.promptable import Event, Session, agreement, all_widths, keep_marked, obey, over

CLICKS = 5
"""Clicks a side, one at random in each cell of a grid."""
AGREED, KNOWN = 0.45, 0.6
"""Least agreement of an object, and that from which on it is not clicked again."""
CUT, RIM = 0.1, 1.2
"""Most pixels of a mask on the edges of its window, and of an object on the image's, in roots of its area."""
STEADY = 0.6
"""Least share of the area at logits above -1 that is left above 1."""
ALIKE, OVERLAP = 0.7, 0.03
"""IoU from which on two objects are one, and share of an object that may lie on others of the same map."""
SMALLEST, LARGEST = 20, 0.7
"""Pixels of an object at least, and share of the image at most."""
FLAT = 4
"""Deviation of the grey values below which an image shows nothing; the head would still answer something around every click."""
AIR = -500
"""A scan with values below it is CT."""
CT_WINDOWS = ((40, 400), (40, 80), (300, 1500), (-400, 1400), (50, 250))
"""Centre and width in HU."""


@lru_cache(maxsize=12)
def _scan(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values (X, Y, Z) and spacing in mm."""
    image = nib.load(file)
    return np.asanyarray(image.dataobj).astype(np.float32), np.array(image.header.get_zooms()[:3])


def draw_slice(file: Path, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8: a slice of a scan (NIfTI) across any axis, with square pixels, in one of several windows if it is CT."""
    values, spacing = _scan(file)
    axis = int(rng.integers(3))
    part = np.take(values, int(values.shape[axis] * rng.uniform(0.2, 0.8)), axis)
    sides = np.delete(spacing, axis) / np.delete(spacing, axis).min() * part.shape
    part = cv2.resize(part, tuple(max(8, round(s)) for s in sides[::-1]), interpolation=cv2.INTER_LINEAR)
    if values.min() < AIR:
        centre, width = CT_WINDOWS[rng.integers(len(CT_WINDOWS))]
        low, high = centre - width / 2, centre + width / 2
    else:
        low, high = np.quantile(values[::4, ::4, ::4], [0.01, rng.uniform(0.98, 0.999)])
    grey = np.clip((part - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((grey * 255).astype(np.uint8)[..., None], 3, -1)


def own_objects(
    image: np.ndarray, readout: Readout | None, head: PromptHead, rng: np.random.Generator, maps: int
) -> np.ndarray:
    """The objects of an image, those that overlap in different maps.

    Args:
        image: (S, S, 3) uint8.
        readout: of the frozen model, or None to go without.
        head: trained already.
        rng: where it is clicked.
        maps: how many maps.

    Returns:
        (maps, S, S) uint8, numbered from 1; the surest objects in the first map. All 0 where nothing is agreed on.
    """
    size = len(image)
    if image.std() < FLAT:
        return np.zeros((maps, size, size), np.uint8)
    session = Session(head, torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, readout)
    found: list[tuple[float, np.ndarray]] = []
    for cell in rng.permutation(CLICKS**2):
        row, column = (int((k + rng.random()) * size / CLICKS) for k in divmod(int(cell), CLICKS))
        if not any(score > KNOWN and mask[row, column] for score, mask in found):
            answer = _agreed(session, row, column)
            if answer is not None:
                found.append(answer)
    out, kept = np.zeros((maps, size, size), np.uint8), []
    for _, mask in sorted(found, key=lambda answer: -answer[0]):
        if any(np.count_nonzero(mask & other) >= ALIKE * np.count_nonzero(mask | other) for other in kept):
            continue
        kept.append(mask)
        free = (k for k in range(maps) if np.count_nonzero(out[k][mask]) < OVERLAP * np.count_nonzero(mask))
        k = next(free, None)
        if k is not None:
            out[k][mask & (out[k] == 0)] = out[k].max() + 1
    return out


def _agreed(session: Session, row: int, column: int) -> tuple[float, np.ndarray] | None:
    """What windows of all widths agree on around a click: the agreement and the mask; None where that is no object."""
    size = session.image.shape[1]
    marks = np.zeros((size, size), np.uint8)
    marks[row, column] = 1
    windows = all_widths((size, size), (row, column, row + 1, column + 1))
    logits, quality = session.look_through([Event(((row, column, 1),))], marks, None, None, windows)
    said, estimates, steady = [], [], []
    for k, window in enumerate(windows):
        full = over(logits[k], window).numpy()
        for c in range(CANDIDATES):
            local = marks[window.slices]
            part = keep_marked(obey(full[c] > 0, local), local)
            if _cut_off(part, window, size):
                continue
            mask = np.zeros((size, size), bool)
            mask[window.slices] = part
            said.append(mask)
            estimates.append(quality[k, c])
            steady.append(np.count_nonzero(full[c] > 1) >= STEADY * np.count_nonzero(full[c] > -1))
    if not said:
        return None
    flat = np.stack(said).reshape(len(said), -1).astype(np.float32)
    scores = agreement(flat, flat, torch.stack(estimates))
    best = int(scores.argmax())
    mask, area = said[best], np.count_nonzero(said[best])
    rim = sum(_on_edges(mask))
    sensible = SMALLEST <= area <= LARGEST * mask.size and rim <= RIM * area**0.5
    return (float(scores[best]), mask) if sensible and steady[best] and scores[best] >= AGREED else None


def _cut_off(part: np.ndarray, window: Window, size: int) -> bool:
    """Whether a mask within a window goes on outside of it."""
    inner = window.top > 0, window.bottom < size, window.left > 0, window.right < size
    return float(np.dot(_on_edges(part), inner)) > CUT * np.count_nonzero(part) ** 0.5 + 1


def _on_edges(mask: np.ndarray) -> list[int]:
    """How many pixels of a mask lie on the top, bottom, left and right edge of its array."""
    return [np.count_nonzero(edge) for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])]
