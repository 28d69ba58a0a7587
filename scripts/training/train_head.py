#!/usr/bin/env python
"""Train the promptable head on encoded scenes (``encode_scenes.py``), with a simulated annotator in the loop; no human mask is read.

    python scripts/training/encode_scenes.py --unlabelled DIR --training DIR --work runs/interaction/shards --count 3000
    python scripts/training/train_head.py --shards runs/interaction/shards --work runs/interaction/head --minutes 100

An episode takes one object of one scene: a first prompt (click at the innermost or at any pixel, box, stroke, or a spoilt mask to
start from), then corrections where the shown answer errs. Every answer gives a gradient. The window seen follows the same rule as
in use. One episode in four sees no attention, so that the same network serves as its own control. The run resumes from ``--work``.

    python scripts/training/train_head.py --shards runs/interaction/shards --work runs/interaction/head --export bundle/models/interaction
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from skimage.morphology import skeletonize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prompt_training import PromptTraining, add_arguments, export
from scenes import Scene
from zeroseg.attention.readout import Readout
from zeroseg.interaction.head import WINDOW, PromptHead, Window, assemble

SIZE = 256
BATCH = 16
AVERAGE = 0.998
"""Of the exponential moving average over steps that is exported."""
BLIND = 0.25
"""Share of episodes that see no attention."""


class Shards:
    """The encoded scenes in memory; new shards are taken in as they appear.

    Args:
        folder: that ``encode_scenes.py`` writes to; it must hold one shard at least.
    """

    def __init__(self, folder: Path):
        self.folder, self.items, self.known = folder, [], set()
        self.refresh()
        if not self.items:
            raise SystemExit(f"--shards {folder} holds no encoded scenes: give the --work folder of encode_scenes.py")

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("shard_?????.npz")):
            if path.name in self.known:
                continue
            self.known.add(path.name)
            with np.load(path) as stored:
                data = {k: stored[k] for k in stored.files}
            for i in range(len(data["image"])):
                self.items.append({k: v[i] for k, v in data.items()})


def inner(mask: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the outside of a bool mask; the image's edge counts as outside."""
    padded = np.pad(mask.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]


def spoil(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask as another model, a neighbour slice or a hasty hand would give it."""
    out = mask.astype(np.uint8)
    if rng.random() < 0.6:
        k = int(rng.integers(1, 12))
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * k + 1, 2 * k + 1))
        out = (cv2.dilate if rng.random() < 0.5 else cv2.erode)(out, kernel)
    if rng.random() < 0.6:
        scale = rng.uniform(0.02, 0.12) * np.sqrt(max(mask.sum(), 16))
        n = int(rng.integers(3, 9))
        flow = [cv2.resize(rng.standard_normal((n, n)).astype(np.float32) * scale, (SIZE, SIZE)) for _ in range(2)]
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        out = cv2.remap(out, x + flow[0], y + flow[1], cv2.INTER_NEAREST)
    if rng.random() < 0.3:
        y, x, r = *rng.integers(0, SIZE, 2), int(rng.integers(5, 40))
        cv2.circle(out, (int(x), int(y)), r, int(rng.random() < 0.5), -1)
    return out > 0


class NothingToAskFor(Exception):
    """A scene has no object of sensible size."""


class Episode:
    """One object, prompted several times.

    ``input`` and ``answer`` speak in windows; the last answer and the marks are kept at full size.
    """

    def __init__(self, item: dict, rng: np.random.Generator):
        self.rng = rng
        drawn = (self._object(item) for _ in range(50))
        found = next((truth for truth in drawn if truth is not None), None)
        if found is None:
            raise NothingToAskFor
        self.truth = found
        image = item["image"].astype(np.float32) / 255
        if rng.random() < 0.5:
            image = image ** np.exp(rng.normal(0, 0.3))
        if rng.random() < 0.2:
            image = 1 - image
        if rng.random() < 0.3:
            image = image[..., rng.permutation(3)]
        if rng.random() < 0.15:
            image = np.repeat(image.mean(-1, keepdims=True), 3, -1)
        if rng.random() < 0.3:
            image = image + rng.uniform(0, 0.06) * rng.standard_normal(image.shape).astype(np.float32)
        self.image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))
        self.readout = None
        if rng.random() >= BLIND:
            side = len(item["salience"]) ** 0.5
            self.readout = Readout(
                round(side),
                item["steps"].astype(np.float32),
                item["coordinates"].astype(np.float32),
                item["salience"].astype(np.float32),
            )
        self.marks = np.zeros((SIZE, SIZE), np.uint8)
        self.tokens: list[set[int]] = [set(), set()]
        self.maps = None
        self.box = None
        self.last: np.ndarray | None = None
        self.turn, self.flip = int(rng.integers(4)), bool(rng.random() < 0.5)
        self.window = self._first_window()
        self._first_prompt()

    def _object(self, item: dict) -> np.ndarray | None:
        """A connected object to ask for, or None where the draw gave nothing sensible."""
        rng = self.rng
        maps = [m for m in item["maps"] if m.any()]
        if not maps:
            maps = [np.pad(np.ones((60, 60), np.uint8), 98)]
        pieces = maps[rng.integers(len(maps))]
        present = np.unique(pieces)
        present = present[present > 0]
        if rng.random() < 0.5:
            piece = int(rng.choice(present))
        else:
            piece = int(pieces[rng.integers(SIZE), rng.integers(SIZE)])
            if piece == 0 and rng.random() < 0.9:
                return None
        mask = pieces == piece
        if piece and item["kind"] == "scene" and rng.random() < 0.6:
            mask = Scene(item["image"], pieces, item["parents"].astype(int)).target(piece, True)
        count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
        best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        if count > 2 and rng.random() < 0.3:
            best = int(rng.integers(1, count))
        mask = parts == best
        if item["kind"] != "scene" and rng.random() < 0.5:
            outside = np.pad(mask.astype(np.uint8), 1)
            cv2.floodFill(outside, np.zeros((SIZE + 4, SIZE + 4), np.uint8), (0, 0), 2)
            mask = outside[1:-1, 1:-1] != 2
        area = np.count_nonzero(mask)
        return mask if 12 <= area <= 0.8 * mask.size else None

    def _first_window(self) -> Window:
        if self.rng.random() < 0.45:
            return Window(0, 0, SIZE, SIZE)
        return self._around(self.truth, np.exp(self.rng.uniform(np.log(1.25), np.log(5))))

    def _around(self, mask: np.ndarray, scale: float) -> Window:
        """A window of ``scale`` times the mask's box, at least 32 pixels wide, shifted by chance, within the image."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        ends = []
        sides = [max(32, scale * (v[-1] - v[0] + 1)) for v in (rows, columns)]
        mean = (sides[0] * sides[1]) ** 0.5
        for values, side in zip((rows, columns), sides, strict=True):
            side = int(min(SIZE, max(side, 0.75 * mean)))
            low, high = values[-1] + 1 - side, values[0]
            start = self.rng.integers(low, high + 1) if high >= low else (low + high) // 2
            start = int(np.clip(0.5 * start + 0.5 * (low + high) / 2, 0, SIZE - side))
            ends.append((start, start + side))
        return Window(ends[0][0], ends[1][0], ends[0][1], ends[1][1])

    def _first_prompt(self) -> None:
        draw = self.rng.random()
        inside = np.zeros_like(self.truth)
        inside[self.window.slices] = self.truth[self.window.slices]
        if not inside.any():
            self.window = Window(0, 0, SIZE, SIZE)
            inside = self.truth
        if draw < 0.12:
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            slack = self.rng.integers(-2, 6, 4) if self.rng.random() < 0.6 else np.zeros(4, int)
            self.box = (
                max(0, int(rows[0] - slack[0])),
                max(0, int(columns[0] - slack[1])),
                min(SIZE, int(rows[-1] + 1 + slack[2])),
                min(SIZE, int(columns[-1] + 1 + slack[3])),
            )
            if self.rng.random() < 0.6:
                return
        elif draw < 0.22:
            self.last = spoil(self.truth, self.rng)
            if self.last.any() and (self.last != self.truth).any():
                # A mask alone is a prompt too: a neighbour slice's, to be moved to where the object is here.
                if self.rng.random() < 0.6:
                    self.correct()
                return
            self.last = None
        elif draw < 0.44:
            self._stroke(inside, 1)
            if self.rng.random() < 0.75:
                around = cv2.dilate(inside.astype(np.uint8), np.ones((25, 25), np.uint8)) > 0
                outside = np.zeros_like(inside)
                outside[self.window.slices] = (around & ~self.truth)[self.window.slices]
                self._stroke(outside, 2)
            return
        self._click(inside, 1)

    def _click(self, region: np.ndarray, kind: int) -> None:
        depth = inner(region)
        if self.rng.random() < 0.55:
            y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        else:
            places = np.argwhere(depth >= min(self.rng.choice([1.0, 2.0, 4.0]), float(depth.max())))
            y, x = places[self.rng.integers(len(places))]
        self.mark(np.array([[y, x]]), kind)

    def _stroke(self, region: np.ndarray, kind: int) -> None:
        """A line drawn by a hurried hand: a walk inside of a region, along its middle, or along its edge."""
        depth = inner(region)
        draw = self.rng.random()
        if draw < 0.35:
            line = skeletonize(region)
        elif draw < 0.6:
            far = min(self.rng.uniform(2, 6), float(depth.max()))
            line = (depth >= far) & (depth < far + 1.5)
        else:
            line = np.zeros_like(region)
        if np.count_nonzero(line) < 3:
            path = self._walk(region, depth)
        else:
            # A piece of the line: what lies around one of its pixels.
            places = np.argwhere(line)
            apart = np.linalg.norm(places - places[self.rng.integers(len(places))], axis=1)
            path = places[apart <= np.exp(self.rng.uniform(np.log(6), np.log(150)))]
        if not len(path):
            return
        if self.rng.random() < 0.4:
            drawn = np.zeros(region.shape, np.uint8)
            drawn[path[:, 0], path[:, 1]] = 1
            width = int(self.rng.integers(2, 6))
            wide = cv2.dilate(drawn, np.ones((width, width), np.uint8)) > 0
            path = np.argwhere(wide & region)
        self.mark(path, kind)

    def _walk(self, region: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """(N, 2) pixels of a random walk that stays inside of a region."""
        places = np.argwhere(depth >= min(3.0, float(depth.max())))
        if not len(places):
            return places
        y, x = places[self.rng.integers(len(places))].astype(float)
        heading, path = self.rng.uniform(0, 2 * np.pi), []
        for _ in range(int(self.rng.integers(5, 90))):
            path.append((round(y), round(x)))
            for _ in range(6):
                ny, nx = y + np.sin(heading), x + np.cos(heading)
                if 0 <= round(ny) < SIZE and 0 <= round(nx) < SIZE and region[round(ny), round(nx)]:
                    y, x = ny, nx
                    heading += self.rng.normal(0, 0.25)
                    break
                heading += self.rng.normal(0, 1.2)
        return np.array(path)

    def mark(self, places: np.ndarray, kind: int) -> None:
        self.marks[places[:, 0], places[:, 1]] = kind
        if self.readout is None:
            return
        side = self.readout.side
        keep = np.linspace(0, len(places) - 1, min(4, len(places))).round().astype(int)
        if self.maps is None:
            self.maps = np.zeros((6, side * side), np.float32)
            self.maps[4], self.maps[5] = self.readout.salience, self.readout.edges
        for y, x in places[keep]:
            near, alike = self.readout.relevance(int(y * side // SIZE) * side + int(x * side // SIZE))
            np.maximum(self.maps[kind - 1], near, out=self.maps[kind - 1])
            np.maximum(self.maps[kind + 1], alike, out=self.maps[kind + 1])

    def attention(self) -> torch.Tensor | None:
        if self.readout is None:
            return None
        if self.maps is None:
            self.maps = np.zeros((6, self.readout.side**2), np.float32)
            self.maps[4], self.maps[5] = self.readout.salience, self.readout.edges
        return torch.from_numpy(self.maps.reshape(6, self.readout.side, self.readout.side))

    def _turned(self, maps: torch.Tensor, back: bool = False) -> torch.Tensor:
        if back:
            maps = maps.flip(-1) if self.flip else maps
            return torch.rot90(maps, -self.turn, (-2, -1))
        maps = torch.rot90(maps, self.turn, (-2, -1))
        return maps.flip(-1) if self.flip else maps

    def input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's input and the truth in its window, both turned by this episode's own symmetry."""
        last = None if self.last is None else torch.from_numpy(self.last)
        x = assemble(self.image, torch.from_numpy(self.marks), self.box, last, self.attention(), self.window)
        part = torch.from_numpy(self.truth)[self.window.slices].float()
        target = F.interpolate(part[None, None], (WINDOW, WINDOW), mode="bilinear", antialias=True)[0, 0] >= 0.5
        return self._turned(x), self._turned(target)

    def answer(self, logits: torch.Tensor) -> None:
        """Keep an answer (WINDOW, WINDOW), and prompt again where it errs."""
        logits = self._turned(logits, back=True)
        w = self.window
        part = F.interpolate(logits[None, None], (w.bottom - w.top, w.right - w.left), mode="bilinear")[0, 0] > 0
        # Outside of the window nothing is known yet: the answer before holds, or nothing.
        last = np.zeros_like(self.truth) if self.last is None else self.last.copy()
        last[w.slices] = part.numpy()
        self.last = last
        self.correct()

    def correct(self) -> None:
        """A click or a stroke in the larger error (RITM's rule, or a random place of it)."""
        if self.last is not None and self.rng.random() < 0.35:
            both = self.last | self.truth
            self.window = (
                self._around(both, self.rng.uniform(1.2, 2.5)) if self.rng.random() < 0.7 else Window(0, 0, SIZE, SIZE)
            )
        missed, added = np.zeros_like(self.truth), np.zeros_like(self.truth)
        s = self.window.slices
        missed[s], added[s] = (self.truth & ~self.last)[s], (self.last & ~self.truth)[s]
        depth = inner(missed).max(), inner(added).max()
        if max(depth) == 0:
            return
        region, kind = (missed, 1) if depth[0] >= depth[1] else (added, 2)
        if self.rng.random() < 0.12:
            self._stroke(region, kind)
        else:
            self._click(region, kind)


def draw_episode(items: list[dict], rng: np.random.Generator) -> Episode:
    """An episode on a scene that has an object to ask for."""
    while True:
        try:
            return Episode(items[rng.integers(len(items))], np.random.default_rng(rng.integers(2**62)))
        except NothingToAskFor:
            continue


def losses(
    logits: torch.Tensor, quality: torch.Tensor, target: torch.Tensor, x: torch.Tensor, first: bool
) -> dict[str, torch.Tensor]:
    """Best-of-three cross-entropy and Dice, obedience at the marks, error of the estimated IoU."""
    marks = x[:, 3:5]
    one = target[:, None].float()
    t = one.expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    # Pixels at the edge decide the Dice of a nearly right mask.
    edge = F.max_pool2d(one, 5, 1, 2) - (1 - F.max_pool2d(1 - one, 5, 1, 2))
    bce = (bce * (1 + 2 * edge)).mean((2, 3))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
    each = bce + dice
    share = 0.8 if first else 0.6
    shape = share * each.amin(1) + (1 - share) * each.mean(1)
    wanted = marks.amax(1, keepdim=True)
    asked = F.binary_cross_entropy_with_logits(logits, marks[:, :1].expand_as(logits), reduction="none")
    clear = wanted * (marks[:, :1] == t[:, :1]).float()
    obey = (asked * clear).sum((1, 2, 3)) / (3 * clear.sum((1, 2, 3)) + 1)
    with torch.no_grad():
        hard = logits > 0
        truth = target[:, None]
        iou = (hard & truth).sum((2, 3)) / ((hard | truth).sum((2, 3)) + 1e-6)
    guess = F.binary_cross_entropy_with_logits(quality, iou)
    return {"shape": shape.mean(), "obey": obey.mean(), "quality": guess, "iou": iou}


def seen(episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's input and the truth."""
    inputs, truths = zip(*(e.input() for e in episodes), strict=True)
    return torch.stack(inputs), torch.stack(truths)


def widened(start: dict[str, torch.Tensor], net: PromptHead) -> dict[str, torch.Tensor]:
    """The weights of a narrower head for a wider one, which answers just the same until it learns more.

    What was there does not hear the new channels, which hear everything, by chance (after Net2Net, Chen et al. 2016). The
    normalisation's groups have eight channels at either width, so that none mixes old and new.
    """
    narrow, wide = ((len(w["stem.weight"]), len(w["context.0.weight"])) for w in (start, net.state_dict()))
    # The estimate of the IoU hears features of the first level, of the last one, and three numbers, side by side.
    heard = torch.cat([torch.arange(narrow[0]), torch.arange(narrow[1]) + wide[0], torch.arange(3) + sum(wide)])
    out = {}
    for name, value in net.state_dict().items():
        old, value = start[name], value.clone()
        if old.ndim == 1:
            value[: len(old)] = old
        else:
            value[: len(old)] = 0
            value[: len(old), heard if name == "quality.0.weight" else torch.arange(old.shape[1])] = old
        out[name] = value
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True, help="folder that encode_scenes.py writes to")
    add_arguments(parser, 100, "the last two fifths of --steps or --minutes, whichever ends first")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--widths",
        type=int,
        nargs=4,
        help="channels per level, no fewer than those of --start, which are taken where none are given",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="where the processor has it, a step takes three fifths of the time"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    shape = {} if args.start is None else json.loads((args.start / "config.json").read_text())
    net = PromptHead(**shape | ({"widths": args.widths} if args.widths else {}))
    start = None
    if args.start is not None:
        start = widened(load_file(args.start / "head.safetensors"), net)
        net.load_state_dict(start)
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    shards = Shards(args.shards)
    if args.export is not None:
        facts = {"batch": BATCH, "scenes": len(shards.items)}
        export(mean, args.work, args.export, lambda stored: facts, start, args.share)
        return 0
    training = PromptTraining(net, mean, args.work, args.rate, {}, args.bf16)
    rng = np.random.default_rng([11, training.step])
    begun = time.monotonic()

    def left() -> float:
        return min(1 - training.step / args.steps, 1 - (time.monotonic() - begun) / (60 * args.minutes))

    def noted() -> dict[str, int]:
        known = len(shards.items)
        shards.refresh()
        return {"scenes": known}

    training.run(
        left=left,
        draw=lambda: [draw_episode(shards.items, rng) for _ in range(BATCH)],
        see=seen,
        losses=losses,
        warm_up=200,
        decay=0.4,
        log_every=100,
        save_every=500,
        noted=noted,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
