#!/usr/bin/env python
"""Encode the scenes that the promptable head trains on: what the frozen model reads out of each, once.

    python scripts/training/encode_scenes.py --unlabelled DIR --training DIR --work runs/interaction/shards --count 3000

Three sources take turns: synthetic scenes (``scenes.py``), the drawn phantoms of the backbone's training (``phantoms.py``), and real
unlabelled images whose terms allow it, with pseudo-objects found by colour. No mask drawn by a human is read: of the folders only
``images`` are opened. Each shard ``shard_00000.npz`` holds 50 encoded images; the run goes on where it ended.

With a head that was trained on these, real images alone, and slices of scans, with the objects that it finds itself (``own_objects.py``):

    python scripts/training/encode_scenes.py --unlabelled DIR --training DIR --volumes DIR --own bundle/models/interaction \
        --work runs/interaction/shards --first 200 --count 1200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from own_objects import draw_slice, own_objects
from phantoms import make_phantom
from scenes import MOST_PIECES, make_scene, pseudo_objects
from train_backbone import licensed
from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.attention.readout import Readout
from zeroseg.interaction.promptable import load_head

SIZE = 256
MAPS = 3
RESOLUTION = 192
"""Side at which scenes are encoded: a third of the cost of 256, and 48 tokens a side in place of 64 to a head that reads maps."""
SMALLEST_CROP = 64
"""Side in pixels of a part of an image at least."""
UNLABELLED = ("blood_bccd", "nuclei_dsb2018", "cxr_ieee8023")
"""Folders of unlabelled images whose terms (MIT, CC0, row by row) allow training; the others state none, or others."""


def real_images(unlabelled: Path | None, training: Path | None, volumes: Path | None = None) -> list[list[Path]]:
    """Image files by folder, and scans; chest X-rays only where their row's licence allows it."""
    folders = []
    if unlabelled is not None:
        for name in UNLABELLED:
            files = sorted((unlabelled / name).iterdir())
            rows = unlabelled / f"{name}_licences.csv"
            if rows.is_file():
                files = licensed(files, rows)
            folders.append(files)
    for root in filter(None, (training, volumes)):
        folders += [sorted((d / "images").iterdir()) for d in sorted(root.iterdir()) if (d / "images").is_dir()]
    return [f for f in folders if f]


def pieces_of_phantom(masks: dict[str, np.ndarray]) -> np.ndarray:
    pieces, count = np.zeros((SIZE, SIZE), np.uint8), 0
    for mask in masks.values():
        parts, n = ndimage.label(mask)
        for part in range(1, n + 1):
            if count < MOST_PIECES and np.count_nonzero(parts == part) >= 12:
                count += 1
                pieces[parts == part] = count
    return pieces


def real_crop(folders: list[list[Path]], rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: an image of any folder alike, or a slice where it holds scans, as a whole or a part of it, turned."""
    folder = folders[rng.integers(len(folders))]
    file = folder[rng.integers(len(folder))]
    scan = file.name.endswith((".nii", ".nii.gz"))
    image = draw_slice(file, rng) if scan else np.asarray(Image.open(file).convert("RGB"))
    h, w = image.shape[:2]
    if rng.random() < 0.5:
        side = max(min(h, w, SMALLEST_CROP), int(min(h, w) * rng.uniform(0.4, 1)))
        y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
        image = image[y : y + side, x : x + side]
    image = cv2.resize(
        image, (SIZE, SIZE), interpolation=cv2.INTER_AREA if min(image.shape[:2]) > SIZE else cv2.INTER_LINEAR
    )
    return np.ascontiguousarray(np.rot90(image, rng.integers(4))[:, :: rng.choice([-1, 1])])


def draw(index: int, folders: list[list[Path]], textures: list[np.ndarray]):
    """Image (SIZE, SIZE, 3) uint8, (MAPS, SIZE, SIZE) uint8 maps of pieces (unused ones 0), parents, kind."""
    rng = np.random.default_rng([7, index])
    maps, parents = np.zeros((MAPS, SIZE, SIZE), np.uint8), np.zeros(MOST_PIECES + 1, np.uint8)
    turn = index % 8
    if turn in (0, 1, 2, 3) or not folders:
        scene = make_scene([7, index], SIZE, textures)
        maps[0], parents[: len(scene.parents)] = scene.pieces, scene.parents
        return scene.image, maps, parents, "scene"
    if turn in (4, 5):
        phantom = make_phantom(900_000 + index // 8 * 2 + turn - 4, SIZE)
        maps[0] = pieces_of_phantom(phantom.masks)
        if maps[0].any():
            return phantom.image, maps, parents, "phantom"
        maps[0] = pseudo_objects(phantom.image, rng)
        return phantom.image, maps, parents, "phantom"
    image = real_crop(folders, rng)
    for k in range(MAPS):
        maps[k] = pseudo_objects(image, rng)
    return image, maps, parents, "real"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unlabelled", type=Path, help="folder of folders of unlabelled images")
    parser.add_argument(
        "--training", type=Path, help="folder of folders with images/ of further openly licensed images"
    )
    parser.add_argument("--volumes", type=Path, help="folder of folders with images/ of scans (NIfTI), for --own")
    parser.add_argument(
        "--own", type=Path, help="folder of a trained head that finds the objects of real images itself"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/interaction/shards"), help="folder of the shards")
    parser.add_argument("--first", type=int, default=0, help="number of the first shard")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--part", default="0/1", help="this process's share, e.g. 0/2 and 1/2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--untrained", action="store_true", help="with the untrained backbone, for the control")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    from zeroseg.backbones import StableDiffusionBackbone

    inferer = AttentionSegmentationInferer(StableDiffusionBackbone(untrained=args.untrained), resolution=RESOLUTION)
    folders = real_images(args.unlabelled, args.training, args.volumes if args.own else None)
    rng = np.random.default_rng(5)
    head = load_head(args.own) if args.own else None
    textures: list[np.ndarray] = []
    if head is None:
        textures = [np.asarray(Image.open(f[rng.integers(len(f))]).convert("RGB")) for f in folders for _ in range(6)]

    def read_image(image: np.ndarray) -> Readout:
        return inferer.encode(torch.from_numpy(image.copy()).permute(2, 0, 1).float()).readout

    args.work.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    for shard in tqdm(range(args.first + part, args.first + args.count // 50, parts)):
        target = args.work / f"shard_{shard:05d}.npz"
        if target.exists():
            continue
        columns: dict[str, list[np.ndarray]] = {
            k: [] for k in ("image", "maps", "parents", "kind", "steps", "coordinates", "salience")
        }
        for index in range(shard * 50, shard * 50 + 50):
            if head is None:
                image, maps, parents, kind = draw(index, folders, textures)
                read = read_image(image)
            else:
                chance = np.random.default_rng([17, index])
                image, parents, kind = real_crop(folders, chance), np.zeros(MOST_PIECES + 1, np.uint8), "own"
                read = read_image(image)
                maps = own_objects(image, read, head, chance, MAPS)
                if not maps.any():
                    continue
            for name, value in zip(
                columns,
                (
                    image,
                    maps,
                    parents,
                    kind,
                    read.steps.astype(np.float16),
                    read.coordinates.astype(np.float16),
                    read.salience.astype(np.float16),
                ),
                strict=True,
            ):
                columns[name].append(value)
        partial = target.with_suffix(".part.npz")
        np.savez(partial, **{k: np.stack(v) if k != "kind" else np.array(v) for k, v in columns.items()})
        partial.rename(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
