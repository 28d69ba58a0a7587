"""Synthetic scenes whose every object is known, to train the promptable head without a human mask.

A scene is painted from shapes of many kinds (blobs within blobs, cells with nuclei, tissue regions, vessels, layers, a body with
organs and a lesion), then gets colours, textures, blur, a bias field and noise at random (domain randomisation: Billot et al. 2023,
SynthSeg; Dey et al. 2024, AnyStar). Nothing looks like a particular organ, so nothing particular is learned but where objects end.
``pseudo_objects`` finds regions of real unlabelled images by colour alone: their edges are the image's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage
from skimage.segmentation import felzenszwalb

MOST_PIECES = 250
"""Pieces a scene may hold, so that their map is uint8."""


def offspring(parents: Sequence[int] | np.ndarray, piece: int) -> np.ndarray:
    """(P,) bool over the pieces: one, and everything painted inside of it."""
    wanted = np.zeros(len(parents), bool)
    wanted[piece] = True
    # A parent is always painted before its children, so one pass in order reaches all descendants.
    for child in range(1, len(parents)):
        wanted[child] |= wanted[parents[child]] and parents[child] != 0
    return wanted


@dataclass
class Scene:
    """An image and what it is made of.

    Attributes:
        image: (H, W, 3) uint8.
        pieces: (H, W) uint8, which piece is visible at a pixel; 0 is the ground.
        parents: parents[p] is the piece that p was painted inside of, 0 for none; parents[0] is 0.
    """

    image: np.ndarray
    pieces: np.ndarray
    parents: np.ndarray

    def target(self, piece: int, whole: bool) -> np.ndarray:
        """(H, W) bool: a piece as it is visible, or with everything painted inside of it."""
        return offspring(self.parents, piece)[self.pieces] if whole else self.pieces == piece


class _Painter:
    """Paints shapes over each other and remembers which lies inside which."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32) / size
        self.pieces = np.zeros((size, size), np.uint8)
        self.parents = [0]
        self.groups = [0]
        warp = rng.uniform(0, 0.03)
        self.dx, self.dy = (warp * self.smooth(rng.uniform(0.04, 0.3)) for _ in range(2))

    def smooth(self, scale: float, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Smooth noise of unit spread; ``scale`` is its feature size as a share of the image."""
        n = max(2, round(1 / scale) + 2)
        small = self.rng.standard_normal((*shape, n, n)).astype(np.float32)
        flat = small.reshape(-1, n, n)
        out = np.stack([cv2.resize(f, (self.size, self.size), interpolation=cv2.INTER_CUBIC) for f in flat])
        return (out / (out.std() + 1e-6)).reshape(*shape, self.size, self.size)

    def blob(self, cx: float, cy: float, rx: float, ry: float, wobble: float) -> np.ndarray:
        """Bool mask of an ellipse whose radius is modulated by random harmonics, warped as the whole scene is."""
        angle = self.rng.uniform(0, np.pi)
        dx, dy = self.x + self.dx - cx, self.y + self.dy - cy
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / rx
        v = (-dx * np.sin(angle) + dy * np.cos(angle)) / ry
        theta = np.arctan2(v, u)
        radius = 1.0
        for k in range(2, 9):
            radius = radius + wobble / k * self.rng.standard_normal() * np.cos(
                k * theta + self.rng.uniform(0, 2 * np.pi)
            )
        return np.hypot(u, v) < radius

    def stroke(self, thickness: float, length: float) -> np.ndarray:
        """Bool mask of a wandering line."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        x, y, heading = *self.rng.uniform(0, 1, 2), self.rng.uniform(0, 2 * np.pi)
        points = []
        for _ in range(max(2, int(length * 40))):
            points.append((int(x * self.size), int(y * self.size)))
            heading += 0.35 * self.rng.standard_normal()
            x, y = x + np.cos(heading) / 40, y + np.sin(heading) / 40
        cv2.polylines(canvas, [np.array(points, np.int32)], False, 1, max(1, round(thickness * self.size)))
        return canvas > 0

    def paint(self, mask: np.ndarray, parent: int = 0, group: int = 0) -> int:
        """Lay a piece over what is there, within its parent; returns its number, or 0 if nothing of it shows."""
        if parent:
            mask = mask & self.family(parent)
        if len(self.parents) >= MOST_PIECES or np.count_nonzero(mask) < 6:
            return 0
        self.pieces[mask] = len(self.parents)
        self.parents.append(parent)
        self.groups.append(group or len(self.groups))
        return len(self.parents) - 1

    def family(self, piece: int) -> np.ndarray:
        return offspring(self.parents, piece)[self.pieces]


def _blobs(p: _Painter) -> None:
    rng = p.rng
    for _ in range(int(np.exp(rng.uniform(0, np.log(16))))):
        r = np.exp(rng.uniform(np.log(0.02), np.log(0.4)))
        cx, cy = rng.uniform(0.02, 0.98, 2)
        outer = p.paint(p.blob(cx, cy, r, r * rng.uniform(0.4, 1), rng.uniform(0, 0.6)))
        while outer and rng.random() < 0.5:
            r *= rng.uniform(0.25, 0.75)
            cx, cy = cx + rng.normal(0, r / 2), cy + rng.normal(0, r / 2)
            outer = p.paint(p.blob(cx, cy, r, r * rng.uniform(0.5, 1), rng.uniform(0, 0.6)), parent=outer)


def _cells(p: _Painter) -> None:
    rng = p.rng
    r = np.exp(rng.uniform(np.log(0.025), np.log(0.16)))
    packed, kinds = rng.uniform(0.7, 1.3), rng.integers(1, 4)
    nucleus = rng.uniform(0.3, 0.8) if rng.random() < 0.6 else 0
    placed: list[tuple[float, float]] = []
    for _ in range(min(100, int(0.6 / r**2))):
        cx, cy = rng.uniform(-0.02, 1.02, 2)
        if any(np.hypot(cx - a, cy - b) < 1.9 * packed * r for a, b in placed):
            continue
        placed.append((cx, cy))
        kind = int(rng.integers(kinds))
        size = r * rng.uniform(0.75, 1.2) * (1 + 0.3 * kind)
        cell = p.paint(p.blob(cx, cy, size, size * rng.uniform(0.65, 1), rng.uniform(0, 0.35)), group=200 + kind)
        if cell and nucleus and rng.random() < 0.9:
            n = size * nucleus * rng.uniform(0.8, 1.1)
            at = rng.normal(0, 0.25 * size, 2)
            p.paint(p.blob(cx + at[0], cy + at[1], n, n * rng.uniform(0.6, 1), rng.uniform(0, 0.5)), cell, 210 + kind)
            if rng.random() < 0.2:
                p.paint(p.blob(cx - at[0], cy - at[1], n * 0.6, n * 0.5, rng.uniform(0, 0.4)), cell, 210 + kind)


def _regions(p: _Painter) -> None:
    count = int(p.rng.integers(2, 7))
    field = p.smooth(np.exp(p.rng.uniform(np.log(0.06), np.log(0.5))), (count,))
    owner = field.argmax(0)
    for k in range(1, count):
        parts, _ = ndimage.label(owner == k)
        for part in 1 + np.argsort(-np.bincount(parts.ravel())[1:])[:12]:
            p.paint(parts == part, group=220 + k)
    _lesions(p, p.rng.integers(0, 3))


def _lesions(p: _Painter, count: int) -> None:
    for _ in range(count):
        r = np.exp(p.rng.uniform(np.log(0.012), np.log(0.12)))
        cx, cy = p.rng.uniform(0.1, 0.9, 2)
        parent = int(p.pieces[int(cy * p.size), int(cx * p.size)])
        rim = p.rng.random() < 0.35
        outer = p.paint(p.blob(cx, cy, r, r * p.rng.uniform(0.5, 1), p.rng.uniform(0.1, 0.7)), parent, 230)
        if outer and rim:
            p.paint(p.blob(cx, cy, r * 0.6, r * 0.5, p.rng.uniform(0.1, 0.7)), outer, 231)


def _body(p: _Painter) -> None:
    rng = p.rng
    body = p.paint(p.blob(0.5, 0.5, rng.uniform(0.35, 0.52), rng.uniform(0.28, 0.46), rng.uniform(0, 0.15)))
    if body and rng.random() < 0.6:
        wall = ndimage.binary_erosion(p.pieces == body, iterations=int(rng.integers(3, 14)))
        body = p.paint(wall, body) or body
    for _ in range(rng.integers(2, 10)):
        r = np.exp(rng.uniform(np.log(0.03), np.log(0.2)))
        cx, cy = 0.5 + rng.uniform(-0.33, 0.33), 0.5 + rng.uniform(-0.28, 0.28)
        p.paint(p.blob(cx, cy, r, r * rng.uniform(0.4, 1), rng.uniform(0, 0.5)), body)
    _lesions(p, rng.integers(1, 4))


def _vessels(p: _Painter) -> None:
    if p.rng.random() < 0.5:
        _blobs(p)
    for _ in range(p.rng.integers(1, 8)):
        mask = p.stroke(np.exp(p.rng.uniform(np.log(0.006), np.log(0.08))), p.rng.uniform(0.3, 1.5))
        p.paint(mask, group=240)
    if p.rng.random() < 0.5:
        _lesions(p, 2)


def _layers(p: _Painter) -> None:
    rng = p.rng
    angle = rng.uniform(0, np.pi) if rng.random() < 0.5 else np.pi / 2
    along = (p.x + p.dx * 2) * np.cos(angle) + (p.y + p.dy * 2) * np.sin(angle) + rng.uniform(0.01, 0.1) * p.smooth(0.5)
    top = along.min()
    while top < along.max():
        thick = np.exp(rng.uniform(np.log(0.02), np.log(0.4)))
        if rng.random() < 0.8:
            p.paint((along >= top) & (along < top + thick))
        top += thick
    _lesions(p, rng.integers(0, 4))
    if rng.random() < 0.5:
        r = rng.uniform(0.05, 0.25)
        cx, cy = rng.uniform(0.2, 0.8, 2)
        p.paint(p.blob(cx, cy, r, r * rng.uniform(0.4, 1), rng.uniform(0, 0.5)))


_LAYOUTS = ((_blobs, 0.28), (_cells, 0.22), (_regions, 0.14), (_body, 0.16), (_vessels, 0.08), (_layers, 0.12))


def make_scene(seed: int | Sequence[int], size: int = 256, textures: Sequence[np.ndarray] = ()) -> Scene:
    """Paint a scene.

    Args:
        seed: the same one gives the same scene.
        size: side in pixels.
        textures: (h, w, 3) uint8 real images, of which crops fill some of the pieces; none by default.
    """
    rng = np.random.default_rng(seed)
    painter = _Painter(rng, size)
    layouts, weights = zip(*_LAYOUTS, strict=True)
    layouts[rng.choice(len(layouts), p=weights)](painter)
    pieces, parents = painter.pieces, np.array(painter.parents)
    image, contrast = _colour(painter, textures)
    return Scene(_degrade(image, contrast, rng), pieces, parents)


def _colour(p: _Painter, textures: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """(H, W, 3) float, and the contrast: a colour and a texture for each piece; those of a group look alike, a child resembles its parent."""
    rng, count = p.rng, len(p.parents)
    grey = rng.random() < 0.55
    contrast = np.exp(rng.uniform(np.log(0.08), np.log(0.6)))
    # Relative to the contrast, so that most objects can be seen by somebody who is told where to look.
    texture_level = contrast * rng.choice([0, rng.uniform(0, 0.25), rng.uniform(0.2, 0.8)], p=[0.2, 0.5, 0.3])
    colours = np.zeros((count, 3), np.float32)
    colours[0] = rng.uniform(0, 1, 3) * (rng.random() if rng.random() < 0.6 else 1)
    looks: dict[int, np.ndarray] = {}
    fields = [p.smooth(np.exp(rng.uniform(np.log(0.006), np.log(0.2)))) for _ in range(3)]
    if len(textures) and rng.random() < 0.5:
        fields[:2] = [_crop(textures[rng.integers(len(textures))], rng, p.size) for _ in range(2)]
    which, level = rng.integers(len(fields), size=count), texture_level * rng.uniform(0.2, 1.5, count)
    for k in range(1, count):
        group = p.groups[k]
        if group not in looks:
            step = rng.standard_normal(3).astype(np.float32)
            step = np.full(3, rng.choice([-1.0, 1.0])) * 0.7 + 0.5 * step
            step = step / (np.abs(step).max() + 1e-6) * contrast * rng.uniform(0.4, 1.3)
            base = colours[p.parents[k]]
            look = base + step
            # Out of range would be clipped and vanish against its parent: go the other way.
            flip = (look < 0) | (look > 1)
            looks[group] = np.where(flip, base - step, look)
        colours[k] = looks[group] + rng.normal(0, 0.03 if group >= 200 else 0, 3)
        if group >= 200:
            which[k], level[k] = which[group % count], level[group % count]
    if grey:
        colours[:] = colours.mean(1, keepdims=True)
    image = colours[p.pieces]
    stack = np.stack(fields)
    image = image + (level[p.pieces] * np.take_along_axis(stack, which[p.pieces][None], 0)[0])[..., None]
    if rng.random() < 0.3:
        # A shade inside of pieces: brighter or darker towards their middle, as volumes and cells are.
        depth = np.zeros((p.size, p.size), np.float32)
        for k in range(1, min(count, 40)):
            mask = (p.pieces == k).astype(np.uint8)
            inner = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
            depth += inner / (inner.max() + 1e-6)
        image = image + rng.uniform(-0.25, 0.25) * depth[..., None]
    if not grey and rng.random() < 0.5:
        image = image * rng.uniform(0.6, 1.1, 3)
    return image, float(contrast)


def _crop(texture: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) grey crop of a real image, fine structure only, mean 0 and spread 1."""
    h, w = texture.shape[:2]
    side = int(min(h, w) * rng.uniform(0.3, 1))
    y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
    crop = texture[y : y + side, x : x + side].mean(-1).astype(np.float32)
    crop = cv2.resize(np.rot90(crop, rng.integers(4)).copy(), (size, size), interpolation=cv2.INTER_LINEAR)
    crop = crop - cv2.GaussianBlur(crop, (0, 0), size / 8)
    return crop / (crop.std() + 1e-6)


def _degrade(image: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Blur, bias field, clutter, noise, speckle, tone: what cameras and scanners do; -> uint8."""
    size = image.shape[0]
    image = image.astype(np.float32)
    if rng.random() < 0.8:
        image = cv2.GaussianBlur(image, (0, 0), np.exp(rng.uniform(np.log(0.3), np.log(3.0))))
    if rng.random() < 0.5:
        n = int(rng.integers(2, 5))
        field = cv2.resize(rng.standard_normal((n, n)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        image = image * (1 + rng.uniform(0, 0.35) * field)[..., None]
    if rng.random() < 0.25:
        sigma = rng.uniform(0.5, 1.8)
        speckle = cv2.GaussianBlur(rng.rayleigh(1.0, (size, size)).astype(np.float32), (0, 0), sigma)
        image = image * (speckle / speckle.mean())[..., None] ** rng.uniform(0.3, 1.2)
    noise = contrast * rng.choice([0, rng.uniform(0, 0.15), rng.uniform(0.1, 0.5)], p=[0.3, 0.5, 0.2])
    shape = (size, size, 1) if rng.random() < 0.7 else (size, size, 3)
    grain = rng.standard_normal(shape).astype(np.float32)
    if rng.random() < 0.5:
        grain = cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.4, 1.2)).reshape(shape)
    image = image + noise * grain
    for _ in range(rng.integers(0, 6) if rng.random() < 0.15 else 0):
        canvas = np.zeros((size, size), np.float32)
        ends = rng.integers(0, size, 4).tolist()
        cv2.line(canvas, ends[:2], ends[2:], 1.0, int(rng.integers(1, 3)))
        image = image * (1 - 0.7 * canvas[..., None])
    low, high = np.quantile(image[::4, ::4], [rng.uniform(0, 0.02), rng.uniform(0.98, 1)])
    image = np.clip((image - low) / max(high - low, 1e-3), 0, 1) ** np.exp(rng.normal(0, 0.25))
    if rng.random() < 0.15:
        image = 1 - image
    if rng.random() < 0.2:
        n = int(size * rng.uniform(0.35, 0.8))
        image = cv2.resize(
            cv2.resize(image, (n, n), interpolation=cv2.INTER_AREA), (size, size), interpolation=cv2.INTER_LINEAR
        )
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(size, size, 3))


def pseudo_objects(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) uint8 regions of a real (H, W, 3) uint8 image, found by colour alone (Felzenszwalb and Huttenlocher 2004).

    Very coarse to very fine by chance. Regions that are too small, or everything, are left as ground.
    """
    scale, sigma = np.exp(rng.uniform(np.log(60), np.log(1500))), rng.uniform(0.8, 3.0)
    parts = felzenszwalb(image, scale=scale, sigma=sigma, min_size=int(np.exp(rng.uniform(np.log(30), np.log(600)))))
    sizes = np.bincount(parts.ravel())
    keep = [k for k in np.argsort(-sizes) if 30 <= sizes[k] <= 0.7 * parts.size][: MOST_PIECES - 1]
    table = np.zeros(len(sizes), np.uint8)
    table[keep] = np.arange(1, len(keep) + 1)
    return table[parts]
