#!/usr/bin/env python
"""Train the promptable head for volumes on drawn scenes, with a simulated annotator in the loop; no human mask is read.

    python scripts/training/train_volume_head.py --work runs/interaction/volume_head --minutes 60

An episode takes one object of one scene (``scenes3d.py``), of one phantom (``phantoms3d.py``), with ``--unlabelled`` one region that
values alone cut out of a real scan, or with ``--own`` one that the head found itself in one (``own_volumes.py``), sees it in a cube of random width, and is prompted several times: a click at the innermost or at
any voxel, a box, a stroke, or a spoilt mask to start from; then corrections where the shown answer errs. Every answer gives a gradient.
The run resumes from ``--work``.

    python scripts/training/train_volume_head.py --work runs/interaction/volume_head --export bundle/models/interaction_volume

With ``--start FOLDER`` a new run begins with the weights of that folder, and ``--export`` may go only a ``--share`` of the way from them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch.optim.swa_utils import AveragedModel

from phantoms3d import make_volume
from prompt_training import PromptTraining, add_arguments, export
from scenes3d import SIDE, Scene3d, make_scene3d, pseudo_object, read_scan, thick_slices
from zeroseg.interaction.volume_head import CELLS, Cube, VolumeHead, assemble, see, see_inside

BATCH = 8
AVERAGE = 0.995
"""Of the exponential moving average over steps that is exported; shorter at first."""
POOL, USES = 96, 24
"""Scenes in memory, and episodes drawn from one before it is painted anew."""
PHANTOMS, REAL, OWN = 0.22, 0.15, 0.25
"""Share of the pool's scenes that are phantoms, regions of real scans, and objects found in them, where some are given."""
AROUND = 1.5
"""What is seen around an object that was found, in times its width, and at least ``SIDE`` / 4 voxels."""
FAR_OFF = 0.3
"""Share of the cubes that are far too narrow or too wide."""
SEEDS = 5_000_000
"""Of the first phantom; those drawn to measure with have lower ones."""


class Pool:
    """Scenes to draw episodes from: (image, objects) where objects are bool masks or a painted scene."""

    def __init__(self, rng: np.random.Generator, unlabelled: Path | None, own: Path | None = None):
        self.rng = rng
        self.scans = [read_scan(p) for p in sorted(unlabelled.rglob("images/*.nii*"))] if unlabelled else []
        self.own = read_own(own) if own else []
        self.items: list = []
        self.left: list[int] = []

    def _paint(self):
        draw = self.rng.random()
        if draw < PHANTOMS:
            seed = SEEDS + int(self.rng.integers(1_000_000))
            volume = make_volume(seed, lesion=True)
            return volume.image, volume.mask
        if draw < PHANTOMS + REAL and self.scans:
            for _ in range(20):
                scan = self.scans[self.rng.integers(len(self.scans))]
                start = [int(self.rng.integers(max(1, n - SIDE + 1))) for n in scan.shape]
                part = scan[tuple(slice(s, s + SIDE) for s in start)]
                mask = pseudo_object(part, self.rng) if min(part.shape) > 8 and np.ptp(part) > 0 else None
                if mask is not None and 20 <= mask.sum() < 0.5 * mask.size:
                    return part, mask
        if draw > 1 - OWN and self.own:
            group = self.own[self.rng.integers(len(self.own))]
            return around_object(*group[self.rng.integers(len(group))])
        scene = make_scene3d(int(self.rng.integers(2**62)))
        return scene.image, scene

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """An image and a bool object in it, both (X, Y, Z)."""
        while True:
            if len(self.items) < POOL:
                self.items.append(self._paint())
                self.left.append(USES)
                k = len(self.items) - 1
            else:
                k = int(self.rng.integers(POOL))
                self.left[k] -= 1
                if self.left[k] < 0:
                    self.items[k], self.left[k] = self._paint(), USES
            image, found = self.items[k]
            mask = self._of(found) if isinstance(found, Scene3d) else found
            if mask is not None and 20 <= np.count_nonzero(mask) < 0.6 * mask.size:
                return image, mask

    def _of(self, scene: Scene3d) -> np.ndarray | None:
        present = np.unique(scene.pieces)
        present = present[present > 0]
        if not len(present):
            return None
        piece = int(self.rng.choice(present))
        mask = scene.target(piece, self.rng.random() < 0.7)
        parts, count = ndimage.label(mask)
        return mask if count == 1 else parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def read_own(folder: Path) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """What ``own_volumes.py`` wrote, by the folder that a scan came from: scan, where the mask begins, mask."""
    groups: dict[str, list] = {}
    for file in sorted(folder.glob("*.npz")):
        if file.name.endswith(".part.npz"):
            continue
        with np.load(file) as stored:
            scan = stored["scan"]
            for k, start in enumerate(stored["starts"]):
                groups.setdefault(file.name.partition("-")[0], []).append((scan, start, stored[f"mask_{k}"]))
    return list(groups.values())


def around_object(scan: np.ndarray, start: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a scan around an object, float32, and the object's bool mask in it."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    low, high = start + [s.start for s in box], start + [s.stop for s in box]
    room = max(SIDE // 4, int(AROUND * (high - low).max()))
    first, last = np.maximum(0, low - room), np.minimum(scan.shape, high + room)
    out = np.zeros(last - first, bool)
    out[tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))] = mask[box]
    return scan[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].astype(np.float32), out


class Episode:
    """One object in one cube, prompted several times; everything is kept in the cube's cells."""

    def __init__(self, pool: Pool, rng: np.random.Generator):
        self.rng = rng
        while True:
            image, mask = pool.draw()
            cube = self._cube(mask)
            both = torch.stack([torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (image, mask)])
            seen = see(both, cube)
            self.inside = see_inside(cube, mask.shape)
            self.truth = self._turned(((seen[1] > 0.5) & (self.inside > 0)).numpy(), *self._symmetry())
            within = np.count_nonzero(self.truth)
            if within >= 8:
                break
        # Of the object, in cells, what the cube leaves out.
        self.outside = max(0.0, np.count_nonzero(mask) * CELLS**3 / float(np.prod(cube.sides)) - within)
        image = seen[0].numpy()
        if rng.random() < 0.4:
            image = thick_slices(image, rng)
        low, high = image.min(), image.max()
        image = (image - low) / (high - low + 1e-6)
        if rng.random() < 0.5:
            image = image ** np.exp(rng.normal(0, 0.35))
        if rng.random() < 0.2:
            image = 1 - image
        if rng.random() < 0.3:
            image = image + rng.uniform(0, 0.05) * rng.standard_normal(image.shape)
        self.image = torch.from_numpy(self._turned(image.astype(np.float32), *self._way))
        self.inside = torch.from_numpy(self._turned(self.inside.numpy(), *self._way))
        self.marks: tuple[list, list] = ([], [])
        self.box: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self._first_prompt()

    def _symmetry(self):
        self._way = tuple(self.rng.permutation(3)), tuple(int(a) for a in np.flatnonzero(self.rng.random(3) < 0.5))
        return self._way

    @staticmethod
    def _turned(cells: np.ndarray, order, flips) -> np.ndarray:
        return np.ascontiguousarray(np.flip(cells.transpose(order), flips))

    def _cube(self, mask: np.ndarray) -> Cube:
        """As wide as the object and some more, shifted by chance; a corner of a large object at times."""
        box = ndimage.find_objects(mask.astype(np.uint8))[0]
        wide = max(s.stop - s.start for s in box)
        side = float(np.clip(wide * np.exp(self.rng.uniform(np.log(1.15), np.log(4.5))), 14, 110))
        draw = self.rng.random()
        if draw < 0.1:
            side = max(12.0, wide * self.rng.uniform(0.6, 1.1))
        elif draw < 0.1 + FAR_OFF:
            # The first look tries all widths, and the estimated IoU has to say which of them fits.
            side = float(np.clip(wide * np.exp(self.rng.uniform(np.log(0.2), np.log(12))), 8, 160))
        if self.rng.random() < 0.6:
            middle = np.array([(s.start + s.stop) / 2 for s in box])
        else:
            places = np.argwhere(mask)
            middle = places[self.rng.integers(len(places))] + 0.5
        middle = middle + self.rng.uniform(-1, 1, 3) * max(0.0, side - wide) * 0.25
        low = middle - side / 2
        # Voxels of a real scan are seldom cubes: neither is what a cell holds.
        sides = side * np.exp(self.rng.normal(0, 0.05, 3))
        return Cube((float(low[0]), float(low[1]), float(low[2])), (float(sides[0]), float(sides[1]), float(sides[2])))

    def _first_prompt(self) -> None:
        draw = self.rng.random()
        if draw < 0.14:
            self._box()
            if self.rng.random() < 0.5:
                return
        elif draw < 0.28:
            spoilt = spoil(self.truth, self.rng)
            if spoilt.any() and (spoilt != self.truth).any():
                self.last = torch.from_numpy(spoilt.astype(np.float32))
                self.correct()
                return
        elif draw < 0.36:
            self._stroke(self.truth, 0)
            return
        self._click(self.truth, 0)

    def _box(self) -> None:
        spans = ndimage.find_objects(self.truth.astype(np.uint8))[0]
        slack = self.rng.integers(-1, 3, (3, 2)) if self.rng.random() < 0.6 else np.zeros((3, 2), int)
        self.box = torch.zeros(CELLS, CELLS, CELLS)
        ends = [
            slice(max(0, s.start - a), min(CELLS, max(s.start - a + 1, s.stop + b)))
            for s, (a, b) in zip(spans, slack, strict=True)
        ]
        self.box[tuple(ends)] = 1

    def _click(self, region: np.ndarray, kind: int) -> None:
        depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1, 1:-1]
        if self.rng.random() < 0.65:
            at = np.unravel_index(int(depth.argmax()), depth.shape)
        else:
            places = np.argwhere(depth >= min(2.0, float(depth.max())))
            at = places[self.rng.integers(len(places))]
        self.marks[kind].append(np.array(at))

    def _stroke(self, region: np.ndarray, kind: int) -> None:
        """A walk that stays inside of a region, in one plane."""
        places = np.argwhere(region)
        at, flat = places[self.rng.integers(len(places))].astype(float), int(self.rng.integers(3))
        heading = self.rng.standard_normal(3)
        for _ in range(int(self.rng.integers(3, 19))):
            self.marks[kind].append(at.round().astype(int))
            for _ in range(5):
                heading[flat] = 0
                step = at + heading / (np.linalg.norm(heading) + 1e-6)
                cell = step.round().astype(int)
                if (cell >= 0).all() and (cell < CELLS).all() and region[tuple(cell)]:
                    at = step
                    heading = heading / (np.linalg.norm(heading) + 1e-6) + 0.3 * self.rng.standard_normal(3)
                    break
                heading = self.rng.standard_normal(3)

    def input(self) -> torch.Tensor:
        wanted, unwanted = (np.array(m).reshape(-1, 3) for m in self.marks)
        return assemble(self.image, self.inside, wanted, unwanted, self.box, self.last)

    def answer(self, logits: torch.Tensor) -> None:
        """Keep an answer (CELLS, CELLS, CELLS), and prompt again where it errs."""
        self.last = ((logits > 0) & (self.inside > 0)).float()
        self.correct()

    def correct(self) -> None:
        """In the largest connected part of what is wrong, or in a random one of the large ones."""
        assert self.last is not None
        wrong = (self.last.numpy() > 0) != self.truth
        wrong &= self.inside.numpy() > 0
        parts, count = ndimage.label(wrong, np.ones((3, 3, 3)))
        if not count:
            return
        sizes = np.bincount(parts.ravel())[1:].astype(float)
        k = int(sizes.argmax()) if self.rng.random() < 0.7 else int(self.rng.choice(count, p=sizes / sizes.sum()))
        region = parts == k + 1
        # Missed and added parts touch: what the click lies in decides.
        kind = 0 if self.rng.random() < np.count_nonzero(region & self.truth) / np.count_nonzero(region) else 1
        region &= self.truth if kind == 0 else ~self.truth
        (self._stroke if self.rng.random() < 0.1 else self._click)(region, kind)


def spoil(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask as another model, a coarser look or a hasty hand would give it."""
    out = mask
    if rng.random() < 0.6:
        change = ndimage.binary_dilation if rng.random() < 0.5 else ndimage.binary_erosion
        out = change(out, iterations=int(rng.integers(1, 3)))
    if rng.random() < 0.6:
        bumps = torch.from_numpy(rng.standard_normal((1, 1, 5, 5, 5)).astype(np.float32))
        bumps = F.interpolate(bumps, mask.shape, mode="trilinear", align_corners=True)[0, 0].numpy()
        signed = ndimage.distance_transform_edt(out) - ndimage.distance_transform_edt(~out)
        out = signed + rng.uniform(1, 4) * bumps > 0
    if rng.random() < 0.35:
        at, r = rng.integers(0, CELLS, 3), rng.uniform(2, 7)
        near = sum((x - c) ** 2 for x, c in zip(np.ogrid[:CELLS, :CELLS, :CELLS], at, strict=True)) < r * r
        out = (out | near) if rng.random() < 0.5 else (out & ~near)
    return out


def losses(logits: torch.Tensor, quality: torch.Tensor, seen: tuple, x: torch.Tensor, first: bool) -> dict:
    """Best-of-three cross-entropy and Dice within the scan, obedience at the marks, error of the estimated IoU.

    The IoU is with the whole object: what the cube leaves out counts as missed, so that the estimates of several cubes compare.
    """
    target, outside = seen
    t = target[:, None].float().expand_as(logits)
    inside = x[:, 1:2]
    bce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    edge = F.max_pool3d(t[:, :1], 3, 1, 1) + F.max_pool3d(1 - t[:, :1], 3, 1, 1) - 1
    weight = inside * (1 + 2 * edge)
    bce = (bce * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4))
    p = logits.sigmoid() * inside
    dice = 1 - (2 * (p * t).sum((2, 3, 4)) + 1) / (p.sum((2, 3, 4)) + t.sum((2, 3, 4)) + 1)
    each = bce + dice
    share = 0.8 if first else 0.6
    shape = share * each.amin(1) + (1 - share) * each.mean(1)
    wanted = x[:, 2:4].amax(1, keepdim=True)
    asked = F.binary_cross_entropy_with_logits(logits, x[:, 2:3].expand_as(logits), reduction="none")
    clear = wanted * (x[:, 2:3] == t[:, :1]).float()
    obey = (asked * clear).sum((1, 2, 3, 4)) / (3 * clear.sum((1, 2, 3, 4)) + 1)
    with torch.no_grad():
        hard, truth = (logits > 0) & (inside > 0), target[:, None]
        iou = (hard & truth).sum((2, 3, 4)) / ((hard | truth).sum((2, 3, 4)) + outside[:, None] + 1e-6)
    return {"shape": shape.mean(), "obey": obey.mean(), "quality": F.binary_cross_entropy_with_logits(quality, iou), "iou": iou}  # fmt: skip


def average(means: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor | int) -> None:
    """The moving average of ``AveragedModel``, in place."""
    kept = min(AVERAGE, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(means, current, 1 - kept)


def seen(episodes: list[Episode]) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The network's input; the truth, and how many cells of it lie outside of the cube."""
    truth = torch.from_numpy(np.stack([e.truth for e in episodes]))
    return torch.stack([e.input() for e in episodes]), (truth, torch.tensor([e.outside for e in episodes]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, 60, "its last third")
    parser.add_argument("--unlabelled", type=Path, help="folder with real scans (NIfTI) in folders named images")
    parser.add_argument("--own", type=Path, help="folder of objects that own_volumes.py found")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = VolumeHead()
    start = None
    if args.start is not None:
        start = load_file(args.start / "head.safetensors")
        net.load_state_dict(start)
    net = net.to(memory_format=torch.channels_last_3d)
    mean = AveragedModel(net, multi_avg_fn=average)
    if args.export is not None:
        export(
            mean,
            args.work,
            args.export,
            lambda stored: {"batch": BATCH, "scans": stored["scans"], "own": stored.get("own", 0)},
            start,
            args.share,
        )
        return 0
    training = PromptTraining(net, mean, args.work, args.rate, {})
    rng = np.random.default_rng([17, training.step])
    pool = Pool(rng, args.unlabelled, args.own)
    training.facts |= {"scans": len(pool.scans), "own": sum(map(len, pool.own))}
    begun = time.monotonic()
    training.run(
        left=lambda: 1 - (time.monotonic() - begun) / (60 * args.minutes),
        draw=lambda: [Episode(pool, np.random.default_rng(rng.integers(2**62))) for _ in range(BATCH)],
        see=seen,
        losses=losses,
        warm_up=100,
        decay=1 / 3,
        log_every=40,
        save_every=200,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
