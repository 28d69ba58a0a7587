"""A simulated annotator: where it clicks, scribbles and boxes, knowing the truth, as people are simulated in the literature."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy import ndimage

from zeroseg.regions import depth_inside, innermost


def anywhere(region: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Index of a random pixel, two or more from the boundary where there are such (RClicks, arXiv 2410.11722, in spirit)."""
    places = _off_the_edge(region)
    return tuple(int(i) for i in places[rng.integers(len(places))])


def _off_the_edge(region: np.ndarray) -> np.ndarray:
    """Indices of the pixels two or more from the boundary; of the deepest ones where there are no such."""
    depth = depth_inside(region)
    return np.argwhere(depth >= min(2.0, float(depth.max())))


def next_click(
    mask: np.ndarray, truth: np.ndarray, rng: np.random.Generator | None = None
) -> tuple[tuple[int, ...], int] | None:
    """The next click on an answer (RITM, Sofiiuk et al. 2022): in that of missed and wrongly added pixels which reaches deeper.

    Args:
        mask: (H, W) bool, the answer; all False before the first click.
        truth: (H, W) bool.
        rng: None clicks the deepest pixel of that region; a generator a random one.

    Returns:
        index and label (1 object, 0 not the object); None where nothing is wrong.
    """
    missed, added = truth & ~mask, mask & ~truth
    depths = depth_inside(missed).max(), depth_inside(added).max()
    if max(depths) == 0:
        return None
    region, label = (missed, 1) if depths[0] >= depths[1] else (added, 0)
    return (innermost(region) if rng is None else anywhere(region, rng)), label


def next_click_3d(mask: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, ...], int] | None:
    """The next click in a volume, by the rule of the CVPR 2025 challenge: the centre of the largest error component.

    Missed and wrongly added voxels form 26-connected components together; the click is the innermost voxel of the largest.
    """
    parts, count = ndimage.label(mask != truth, np.ones((3,) * truth.ndim))
    if not count:
        return None
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    at = innermost(parts == largest)
    return at, int(truth[at])


def scribble(region: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(H, W) bool stroke inside of a region, drawn by program.

    ``centre``: its centre line; ``contour``: along its boundary, a little inside, about a third of the way round; ``walk``: a random walk.

    Raises:
        ValueError: the kind is unknown.
    """
    out = np.zeros(region.shape, bool)
    depth = depth_inside(region)
    if kind == "centre":
        from skimage.morphology import skeletonize

        out = skeletonize(region) & (depth >= min(2.0, float(depth.max())))
    elif kind == "contour":
        level = min(3.0, float(depth.max()))
        band = np.argwhere((depth >= level) & (depth < level + 1.0))
        middle = band.mean(0)
        angle = np.arctan2(*(band - middle).T)
        start = rng.uniform(-np.pi, np.pi)
        kept = band[(angle - start) % (2 * np.pi) < 2 * np.pi / 3]
        out[tuple((kept if len(kept) else band[:1]).T)] = True
    elif kind == "walk":
        place = np.array(anywhere(region, rng), float)
        heading = rng.uniform(0, 2 * np.pi)
        for _ in range(int(2 * region.sum() ** 0.5) + 5):
            out[tuple(place.round().astype(int))] = True
            for _ in range(8):
                step = place + np.array([np.sin(heading), np.cos(heading)])
                at = tuple(step.round().astype(int))
                if all(0 <= a < n for a, n in zip(at, region.shape, strict=True)) and region[at]:
                    place, heading = step, heading + rng.normal(0, 0.25)
                    break
                heading += rng.normal(0, 1.2)
    else:
        raise ValueError(f"unknown kind of scribble {kind!r}: use centre, contour or walk")
    if not out.any():
        out[innermost(region)] = True
    return out


def innermost_point(component: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel furthest from the boundary, see ``innermost``."""
    y, x = innermost(component)
    return x, y


def any_point(component: np.ndarray, stem: str) -> tuple[int, int]:
    """(x, y) of a pixel drawn evenly by a hash of the case's name; two pixels or more from the boundary where there are such."""
    candidates = _off_the_edge(component)
    y, x = candidates[int(hashlib.sha256(f"click {stem}".encode()).hexdigest(), 16) % len(candidates)]
    return int(x), int(y)


def bounding_box(component: np.ndarray) -> list[int]:
    """[x0, y0, x1, y1] of the outermost pixels, both included; two pixels wide at least, as a box must be."""
    corners = []
    for axis in (0, 1):  # columns give x, rows y
        line = component.any(axis=axis)
        low, high = np.flatnonzero(line)[[0, -1]].tolist()
        if low == high:
            low, high = (low, high + 1) if high + 1 < len(line) else (max(low - 1, 0), high)
        corners.append((low, high))
    (x0, x1), (y0, y1) = corners
    return [x0, y0, x1, y1]
