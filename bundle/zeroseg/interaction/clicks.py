"""Clicks and scribbles answered by rules: each one edits the answer of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from zeroseg.attention import EncodedImage, rules
from zeroseg.interaction.prompts import Prompts
from zeroseg.interaction.settings import Settings


@dataclass
class _Mark:
    """A click, or one stroke of a scribble: where the user showed something, and what.

    Attributes:
        pixels: (row, column) on the working grid.
        tokens: the tokens under them.
        kind: 1 object, 0 background.
    """

    pixels: list[tuple[int, int]]
    tokens: list[int]
    kind: int


def answer_clicks(encoded: EncodedImage, prompts: Prompts, settings: Settings) -> tuple[np.ndarray, np.ndarray, dict]:
    """The mask that the clicks mean, worked out from the encoding and the ordered prompts alone.

    The first click on the object cuts it out of the relevance map, see ``rules.cut``. Each further one corrects: where the mask
    disagrees with it, the piece that holds the click, cut in the same way, is added or taken away, and the rest stays. A piece
    ends where an earlier click of the other kind is reached more easily. Strokes of a scribble are clicks of many pixels;
    they come before the clicks, and the mask given comes before both. What the user marked is as the user marked it.

    Args:
        encoded: the image.
        prompts: of rule ``points``.
        settings: ``refine`` is used.

    Returns:
        On the grid of ``encoded.image``: (h, w) bool mask; (h, w) float32 confidence in [0, 1]; and details.
    """
    shape = tuple(encoded.image.shape[1:])
    inside = inside_box(encoded, prompts.box)
    mask = np.zeros(shape, bool) if prompts.mask is None else resized(prompts.mask, shape)
    confidence = np.ones(shape, np.float32)
    thresholds: list[float] = []
    done: list[tuple[_Mark, np.ndarray]] = []
    for mark in _marks(encoded, prompts, shape):
        relevance = _relevance(encoded, mark, settings.refine)
        begun = prompts.mask is not None or any(m.kind for m, _ in done)
        # A background click has nothing to take away from before there is an object.
        if begun or mark.kind:
            wrong = [p for p in mark.pixels if mask[p] != bool(mark.kind)]
            if wrong:
                allowed = _allowed(mask, relevance, mark, [r for m, r in done if m.kind != mark.kind], inside, begun)
                piece, threshold = rules.cut(relevance, wrong, allowed)
                thresholds.append(round(threshold, 5))
                sure = certainty(relevance, piece, threshold)
                if begun:
                    confidence[piece] = sure[piece]
                    mask = mask | piece if mark.kind else mask & ~piece
                else:
                    mask, confidence = piece, sure
        done.append((mark, relevance))
        for earlier, _ in done:
            for pixel in earlier.pixels:
                mask[pixel] = bool(earlier.kind)
    details = {"threshold": thresholds[0] if thresholds else None, "corrections": max(0, len(thresholds) - 1)}
    return mask, confidence, details


def _allowed(mask, relevance, mark: _Mark, opposite: list[np.ndarray], inside, begun: bool) -> np.ndarray | None:
    """Pixels that a mark's piece may take; None for all."""
    parts = [] if inside is None else [inside]
    if begun:
        parts.append(~mask if mark.kind else mask)
    parts += [relevance > other for other in opposite]
    if not parts:
        return None
    allowed = np.logical_and.reduce(parts)
    # The guided filter may blur a click away; the user's word stands.
    for pixel in mark.pixels:
        allowed[pixel] = True
    return allowed


def _relevance(encoded: EncodedImage, mark: _Mark, refine: str) -> np.ndarray:
    tokens = rules.click_relevance(encoded.paths, mark.tokens)
    return encoded.upsample(tokens[None], refine)[0].cpu().numpy()


def _marks(encoded: EncodedImage, prompts: Prompts, shape: tuple[int, int]) -> list[_Mark]:
    """Strokes on the object, strokes on the background, then the clicks in their order."""
    marks = []
    for value, kind in ((1, 1), (2, 0)) if prompts.scribbles is not None else ():
        strokes, count = ndimage.label(prompts.scribbles == value, np.ones((3, 3)))
        for number in range(1, count + 1):
            rows, columns = np.nonzero(strokes == number)
            marks.append(_mark(encoded, list(zip(columns.tolist(), rows.tolist(), strict=True)), kind))
    marks += [_mark(encoded, [click], kind) for click, kind in zip(prompts.points, prompts.labels, strict=True)]
    return marks


def _mark(encoded: EncodedImage, clicks: Sequence[Sequence[float]], kind: int) -> _Mark:
    pixels = sorted({pixel_of(encoded, c) for c in clicks})
    return _Mark(pixels, sorted({rules.token_at(x, y, encoded.size, encoded.side) for x, y in clicks}), kind)


def resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask on another grid by nearest neighbour."""
    if mask.shape == shape:
        return mask.copy()
    full = torch.from_numpy(mask.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(full, shape, mode="nearest-exact")[0, 0].numpy() > 0


def pixel_of(encoded: EncodedImage, click: Sequence[float]) -> tuple[int, int]:
    """(row, column) on the working grid of a click (x, y) given in original pixels."""
    height, width = encoded.image.shape[1:]
    row = min(height - 1, int((click[1] + 0.5) * height / encoded.size[0]))
    return row, min(width - 1, int((click[0] + 0.5) * width / encoded.size[1]))


def inside_box(encoded: EncodedImage, corners: tuple[float, ...] | None) -> np.ndarray | None:
    """(h, w) bool on the working grid: the box; None without one."""
    if corners is None:
        return None
    (top, left), (bottom, right) = (pixel_of(encoded, c) for c in (corners[:2], corners[2:]))
    inside = np.zeros(tuple(encoded.image.shape[1:]), bool)
    inside[top : bottom + 1, left : right + 1] = True
    return inside


def certainty(relevance: np.ndarray, mask: np.ndarray, threshold: float) -> np.ndarray:
    """(h, w) float32 in [0, 1]: how far relevance lies from the threshold, as a share of the room there is on its side."""
    room = np.where(mask, max(relevance.max() - threshold, 1e-6), max(threshold - relevance.min(), 1e-6))
    return np.clip(np.abs(relevance - threshold) / room, 0, 1).astype(np.float32)
