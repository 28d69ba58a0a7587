"""Synthetic volumes whose every object is known, to train the promptable head for volumes without a human mask.

As ``scenes.py`` in three dimensions: shapes painted over and into each other (nested blobs, packed cells, tissue regions, a limb of
muscle bellies or a trunk with organs and lesions, tubes, layers), then values, textures, blur, a bias field, noise and thick
slices at random. ``pseudo_object`` cuts objects out of real unlabelled scans by their values alone: their texture is real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from scenes import offspring

SIDE = 64
"""Voxels along a side of a scene; voxels are cubes."""
MOST_PIECES = 120


@dataclass
class Scene3d:
    """A volume and what it is made of.

    Attributes:
        image: (X, Y, Z) float32.
        pieces: (X, Y, Z) uint8, which piece is visible at a voxel; 0 is the ground.
        parents: parents[p] is the piece that p was painted inside of, 0 for none.
    """

    image: np.ndarray
    pieces: np.ndarray
    parents: np.ndarray

    def target(self, piece: int, whole: bool) -> np.ndarray:
        """(X, Y, Z) bool: a piece as it is visible, or with everything painted inside of it."""
        return offspring(self.parents, piece)[self.pieces] if whole else self.pieces == piece


class _Painter:
    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.places = np.stack(np.meshgrid(*[np.arange(SIDE, dtype=np.float32) / SIDE] * 3, indexing="ij"))
        warp, scale = rng.uniform(0, 0.03), rng.uniform(0.12, 0.4)
        self.warped = self.places + np.float32(warp) * np.stack([self.smooth(scale) for _ in range(3)])
        self.pieces = np.zeros((SIDE,) * 3, np.uint8)
        self.parents, self.groups = [0], [0]

    def smooth(self, scale: float) -> np.ndarray:
        """Smooth noise of unit spread; ``scale`` is its feature size as a share of the side."""
        n = max(2, round(1 / scale) + 2)
        small = torch.from_numpy(self.rng.standard_normal((1, 1, n, n, n)).astype(np.float32))
        out = F.interpolate(small, (SIDE,) * 3, mode="trilinear", align_corners=False)[0, 0].numpy()
        return (out - out.mean()) / (out.std() + 1e-6)

    def blob(self, centre: np.ndarray, radii: np.ndarray, wobble: float) -> np.ndarray:
        """Bool mask of a turned ellipsoid with a bumpy surface, warped as the whole scene is."""
        turn, _ = np.linalg.qr(self.rng.standard_normal((3, 3)))
        reach = float(max(radii)) * (1 + 2 * wobble) + 0.05
        span = tuple(slice(max(0, int((c - reach) * SIDE)), max(1, int((c + reach) * SIDE) + 1)) for c in centre)
        away = self.warped[(slice(None), *span)] - np.asarray(centre, np.float32)[:, None, None, None]
        u = np.tensordot((turn / np.asarray(radii)[:, None]).astype(np.float32), away, 1)
        size = np.sqrt((u**2).sum(0))
        if wobble:
            n = int(self.rng.integers(3, 6))
            bumps = torch.from_numpy(self.rng.standard_normal((1, 1, n, n, n)).astype(np.float32))
            size = size + wobble * F.interpolate(bumps, size.shape, mode="trilinear", align_corners=True)[0, 0].numpy()
        out = np.zeros((SIDE,) * 3, bool)
        out[span] = size < 1
        return out

    def tube(self, thickness: float, length: float) -> np.ndarray:
        """Bool mask of a wandering tube, or of a tree where it branches."""
        out = np.zeros((SIDE,) * 3, bool)
        at, heading = self.rng.uniform(0, 1, 3), self.rng.standard_normal(3)
        starts = [(at, heading)]
        for _ in range(max(4, int(length * SIDE))):
            heading = heading / np.linalg.norm(heading) + 0.25 * self.rng.standard_normal(3)
            at = at + heading / np.linalg.norm(heading) / SIDE
            if (at < 0).any() or (at >= 1).any():
                at, heading = starts[self.rng.integers(len(starts))]
                heading = self.rng.standard_normal(3)
                continue
            out[tuple((at * SIDE).astype(int))] = True
            if self.rng.random() < 0.1:
                starts.append((at, heading))
        return ndimage.distance_transform_edt(~out) <= thickness * SIDE

    def paint(self, mask: np.ndarray, parent: int = 0, group: int = 0) -> int:
        """Lay a piece over what is there, within its parent; returns its number, or 0 if nothing of it shows."""
        if parent:
            mask = mask & self.family(parent)
        if len(self.parents) >= MOST_PIECES or np.count_nonzero(mask) < 20:
            return 0
        self.pieces[mask] = len(self.parents)
        self.parents.append(parent)
        self.groups.append(group or len(self.groups))
        return len(self.parents) - 1

    def family(self, piece: int) -> np.ndarray:
        return offspring(self.parents, piece)[self.pieces]


def _radii(rng: np.random.Generator, low: float, high: float, flat: float = 0.45) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high))) * rng.uniform(flat, 1, 3)


def _blobs(p: _Painter) -> None:
    rng = p.rng
    for _ in range(int(np.exp(rng.uniform(0, np.log(14))))):
        radii, centre = _radii(rng, 0.05, 0.4), rng.uniform(0.05, 0.95, 3)
        outer = p.paint(p.blob(centre, radii, rng.uniform(0, 0.35)))
        while outer and rng.random() < 0.5:
            radii = radii * rng.uniform(0.3, 0.8)
            centre = centre + rng.normal(0, radii.min() / 2, 3)
            outer = p.paint(p.blob(centre, radii, rng.uniform(0, 0.35)), outer)


def _cells(p: _Painter) -> None:
    rng = p.rng
    r, packed = np.exp(rng.uniform(np.log(0.06), np.log(0.2))), rng.uniform(0.8, 1.3)
    placed: list[np.ndarray] = []
    for _ in range(min(80, int(0.5 / r**3))):
        centre = rng.uniform(0, 1, 3)
        if any(np.linalg.norm(centre - other) < 1.8 * packed * r for other in placed):
            continue
        placed.append(centre)
        cell = p.paint(p.blob(centre, r * rng.uniform(0.65, 1.2, 3), rng.uniform(0, 0.25)), group=200)
        if cell and rng.random() < 0.4:
            p.paint(p.blob(centre, r * rng.uniform(0.3, 0.6, 3), rng.uniform(0, 0.3)), cell, 210)


def _regions(p: _Painter) -> None:
    count, scale = int(p.rng.integers(2, 6)), np.exp(p.rng.uniform(np.log(0.12), np.log(0.6)))
    owner = np.stack([p.smooth(scale) for _ in range(count)]).argmax(0)
    for k in range(1, count):
        parts, _ = ndimage.label(owner == k)
        for part in 1 + np.argsort(-np.bincount(parts.ravel())[1:])[:8]:
            p.paint(parts == part, group=220 + k)
    _lesions(p, p.rng.integers(0, 4))


def _lesions(p: _Painter, count: int) -> None:
    for _ in range(count):
        radii, centre = _radii(p.rng, 0.03, 0.3), p.rng.uniform(0.15, 0.85, 3)
        parent = int(p.pieces[tuple((centre * SIDE).astype(int))]) if p.rng.random() < 0.6 else 0
        outer = p.paint(p.blob(centre, radii, p.rng.uniform(0.05, 0.45)), parent, 230 + int(p.rng.integers(3)))
        if outer and p.rng.random() < 0.4:
            for _ in range(p.rng.integers(1, 4)):
                inner = centre + p.rng.normal(0, 0.3, 3) * radii
                p.paint(p.blob(inner, radii * p.rng.uniform(0.2, 0.7, 3), p.rng.uniform(0.1, 0.4)), outer, 234)


def _bellies(p: _Painter, where: np.ndarray, parent: int) -> None:
    """Fill a part with muscle bellies that look alike, with thin walls between them."""
    rng = p.rng
    count, gap = int(rng.integers(4, 16)), rng.uniform(0, 0.035)
    long = rng.integers(3) if rng.random() < 0.7 else -1
    seeds = rng.uniform(0, 1, (count, 3)).astype(np.float32)
    first = np.full(p.pieces.shape, np.inf, np.float32)
    second, owner = first.copy(), np.zeros(p.pieces.shape, np.uint8)
    for k, seed in enumerate(seeds):
        away = p.warped - seed[:, None, None, None]
        if long >= 0:
            away[long] *= 0.15
        d = np.sqrt((away**2).sum(0))
        second = np.minimum(second, np.maximum(first, d))
        owner[d < first] = k
        first = np.minimum(first, d)
    for k in range(count):
        p.paint(where & (owner == k) & (second - first > gap), parent, 240)


def _limb(p: _Painter) -> None:
    rng = p.rng
    axis = int(rng.integers(3))
    radii = np.full(3, rng.uniform(0.3, 0.9))
    radii[axis] = 5.0
    middle = rng.uniform(0.2, 0.8, 3)
    turned = p.warped - middle.astype(np.float32)[:, None, None, None]
    size = np.sqrt(((turned / radii[:, None, None, None].astype(np.float32)) ** 2).sum(0))
    outer = p.paint(size < 1)
    inner = (size < rng.uniform(0.6, 0.97)) & (p.pieces == outer)
    if outer:
        _bellies(p, inner, outer)
    bone = rng.uniform(-0.3, 0.3, 3) * radii[0] + middle
    away = p.warped - bone.astype(np.float32)[:, None, None, None]
    away[axis] = 0
    r, d = rng.uniform(0.05, 0.13), np.sqrt((away**2).sum(0))
    hard = p.paint((d < r) & (size < 1))
    if hard:
        p.paint(d < r * 0.6, hard)
    for _ in range(rng.integers(0, 4)):
        p.paint(p.tube(rng.uniform(0.01, 0.03), rng.uniform(0.5, 1.5)) & (size < 1))
    # A mass among the bellies: it pushes through their walls, and looks much like them or not.
    for _ in range(rng.integers(1, 3)):
        mass = p.blob(rng.uniform(0.25, 0.75, 3), _radii(rng, 0.08, 0.35), rng.uniform(0.02, 0.3)) & (size < 1)
        if hard:
            mass &= d > r
        rim = ndimage.binary_erosion(mass) if rng.random() < 0.3 else None
        lump = p.paint(mass, group=230)
        if lump and rim is not None:
            p.paint(rim, lump, 231)
        if lump and rng.random() < 0.4:
            places = np.argwhere(mass)
            for _ in range(rng.integers(1, 4)):
                at = places[rng.integers(len(places))] / SIDE
                p.paint(p.blob(at, _radii(rng, 0.03, 0.15), 0.3), lump, 234)


def _trunk(p: _Painter) -> None:
    rng = p.rng
    body = p.paint(p.blob(rng.uniform(0.3, 0.7, 3), rng.uniform(0.4, 1.0, 3), rng.uniform(0, 0.1)))
    if body and rng.random() < 0.6:
        body = p.paint(ndimage.binary_erosion(p.pieces == body, iterations=int(rng.integers(1, 5))), body) or body
    for _ in range(rng.integers(2, 9)):
        p.paint(p.blob(rng.uniform(0.1, 0.9, 3), _radii(rng, 0.07, 0.35), rng.uniform(0, 0.3)), body)
    if rng.random() < 0.3:
        p.paint(p.tube(rng.uniform(0.015, 0.06), rng.uniform(0.5, 2)), body)
    _lesions(p, rng.integers(1, 5))


def _lungs(p: _Painter) -> None:
    """A dark organ with bright branches, and a lesion that may touch them or the wall."""
    rng = p.rng
    organ = p.paint(p.blob(rng.uniform(0.2, 0.8, 3), rng.uniform(0.4, 0.9, 3), rng.uniform(0, 0.2)))
    for _ in range(rng.integers(2, 6)):
        p.paint(p.tube(np.exp(rng.uniform(np.log(0.006), np.log(0.035))), rng.uniform(1, 4)), organ, 250)
    for _ in range(rng.integers(1, 4)):
        radii = _radii(rng, 0.04, 0.22)
        p.paint(p.blob(rng.uniform(0.2, 0.8, 3), radii, rng.uniform(0.05, 0.5)), 0, int(rng.choice([230, 250])))


def _layers(p: _Painter) -> None:
    rng = p.rng
    direction = rng.standard_normal(3).astype(np.float32)
    along = np.tensordot(direction / np.linalg.norm(direction), p.warped, 1) + rng.uniform(0, 0.1) * p.smooth(0.5)
    top = along.min()
    while top < along.max():
        thick = np.exp(rng.uniform(np.log(0.04), np.log(0.4)))
        if rng.random() < 0.8:
            p.paint((along >= top) & (along < top + thick))
        top += thick
    _lesions(p, rng.integers(1, 4))


_LAYOUTS = ((_blobs, 0.22), (_cells, 0.12), (_regions, 0.12), (_limb, 0.2), (_trunk, 0.16), (_lungs, 0.1), (_layers, 0.08))  # fmt: skip


def make_scene3d(seed: int | Sequence[int]) -> Scene3d:
    """Paint a scene; the same seed gives the same one."""
    rng = np.random.default_rng(seed)
    painter = _Painter(rng)
    layouts, weights = zip(*_LAYOUTS, strict=True)
    layouts[rng.choice(len(layouts), p=weights)](painter)
    image, contrast = _value(painter)
    return Scene3d(_degrade(painter, image, contrast), painter.pieces, np.array(painter.parents))


def _value(p: _Painter) -> tuple[np.ndarray, float]:
    """A value and a texture for each piece; those of a group look alike. Returns the image and the contrast."""
    rng, count = p.rng, len(p.parents)
    contrast = float(np.exp(rng.uniform(np.log(0.12), np.log(0.7))))
    rough = contrast * rng.choice([0, rng.uniform(0, 0.25), rng.uniform(0.2, 0.5)], p=[0.2, 0.6, 0.2])
    values = np.zeros(count, np.float32)
    values[0] = rng.random()
    looks: dict[int, float] = {}
    for k in range(1, count):
        group = p.groups[k]
        if group not in looks:
            step = rng.choice([-1.0, 1.0]) * contrast * rng.uniform(0.4, 1.4)
            base = values[p.parents[k]]
            looks[group] = base - step if not 0 <= base + step <= 1 else base + step
        values[k] = looks[group] + (rng.normal(0, 0.06 * contrast) if group >= 200 else 0)
    fields = np.stack([p.smooth(np.exp(rng.uniform(np.log(0.02), np.log(0.3)))) for _ in range(2)])
    which, level = rng.integers(2, size=count), (rough * rng.uniform(0.2, 1.5, count)).astype(np.float32)
    image = values[p.pieces] + level[p.pieces] * np.take_along_axis(fields, which[p.pieces][None], 0)[0]
    if rng.random() < 0.3:
        depth = ndimage.distance_transform_edt(p.pieces == p.pieces[tuple(rng.integers(0, SIDE, 3))])
        image = image + np.float32(rng.uniform(-0.5, 0.5) * contrast) * (depth / (depth.max() + 1e-6)).astype(
            np.float32
        )
    return image, contrast


def _degrade(p: _Painter, image: np.ndarray, contrast: float) -> np.ndarray:
    """Blur, bias field, noise, thick slices: what scanners do."""
    rng = p.rng
    if rng.random() < 0.85:
        image = ndimage.gaussian_filter(image, np.exp(rng.uniform(np.log(0.3), np.log(1.8))))
    if rng.random() < 0.4:
        image = image * (1 + rng.uniform(0, 0.25) * p.smooth(rng.uniform(0.4, 0.9)))
    noise = contrast * rng.choice([0, rng.uniform(0, 0.15), rng.uniform(0.1, 0.4)], p=[0.3, 0.5, 0.2])
    grain = rng.standard_normal(image.shape).astype(np.float32)
    if rng.random() < 0.5:
        grain = ndimage.gaussian_filter(grain, rng.uniform(0.4, 0.9))
    image = image + noise * grain / grain.std()
    return thick_slices(image, rng) if rng.random() < 0.5 else image.astype(np.float32)


def thick_slices(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As slices of several voxels along one axis would show it."""
    axis, step = int(rng.integers(3)), rng.uniform(1.3, 4)
    sides = [max(4, round(n / (step if a == axis else 1))) for a, n in enumerate(image.shape)]
    small = F.interpolate(torch.from_numpy(image.astype(np.float32))[None, None], sides, mode="area")
    return F.interpolate(small, image.shape, mode="trilinear", align_corners=False)[0, 0].numpy()


def pseudo_object(image: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """(X, Y, Z) bool: the part of a real scan around a random voxel that has about its value; None where nothing sensible is."""
    smooth = ndimage.gaussian_filter(image, rng.uniform(0.6, 2.0))
    at = tuple(rng.integers(n // 8, n - n // 8) for n in image.shape)
    band = np.abs(smooth - smooth[at]) < rng.uniform(0.15, 0.7) * (smooth.std() + 1e-6)
    band = ndimage.binary_opening(band, iterations=int(rng.integers(1, 3))) if rng.random() < 0.8 else band
    parts, _ = ndimage.label(band)
    if not parts[at]:
        return None
    mask = parts == parts[at]
    mask = ndimage.binary_fill_holes(mask) if rng.random() < 0.5 else mask
    # What only fills its own box badly is a net of leaks, not an object.
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    filled = np.count_nonzero(mask) / np.prod([s.stop - s.start for s in box])
    return mask if filled > 0.3 else None


def read_scan(path: Path) -> np.ndarray:
    """(X, Y, Z) float32: a real scan (NIfTI) on voxels that are cubes, about; values clipped to their middle 99 %."""
    image = nib.load(path)
    values = np.asarray(image.dataobj, np.float32)
    values = values[..., 0] if values.ndim == 4 else values
    zooms = np.array(image.header.get_zooms()[:3])
    side = max(float(zooms.min()), float(np.prod(zooms) ** (1 / 3)) * 0.8)
    values = ndimage.zoom(values, np.minimum(zooms / side, 3), order=1)
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip(values, low, high)
