#!/usr/bin/env python
"""Objects that the promptable head for volumes finds itself in real scans, to train it further without a human mask.

    python scripts/training/own_volumes.py --scans DIR --out runs/interaction/own_volumes

As for images (``own_objects.py``): the head is clicked all over a scan, and at all its values, and looks through cubes of all widths; what they agree on, and what
is not cut off, is an object. DIR holds folders with ``images`` (NIfTI); of no other folder anything is read. Each scan gives one file.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scenes3d import read_scan
from zeroseg.interaction.promptable import load_head
from zeroseg.interaction.volume_head import VolumeHead
from zeroseg.interaction.volume_session import VOLUME_HEAD, VolumeAnswer, VolumeSession

CLICKS = 60
"""Clicks in a scan."""
AGREED, KNOWN = 0.42, 0.55
"""Least agreement of an object, and that from which on it is not clicked again."""
CUT = 0.1
"""Most voxels on inner faces of the cube that was looked at, in roots of the volume to the power of two thirds."""
STEADY = 0.35
"""Least share of the voxels above a probability of .27 that is left above .73."""
ALIKE = 0.7
"""IoU from which on two objects are one."""
SMALLEST, LARGEST = 40, 0.3
"""Voxels of an object at least, and share of the scan at most."""
LEVELS = 16
"""Every second click is on one of so many ranges of values that the scan has, each as likely: small things are often bright or dark."""


def own_volume_objects(
    scan: np.ndarray, head: VolumeHead, rng: np.random.Generator, clicks: int = CLICKS
) -> list[tuple[tuple[slice, slice, slice], np.ndarray]]:
    """The objects of a scan, which may overlap.

    Args:
        scan: (X, Y, Z) float32 in [0, 1], voxels about as long each way.
        head: trained already.
        rng: where it is clicked.
        clicks: how often.

    Returns:
        where each lies, and its (x, y, z) bool mask there; the surest first.
    """
    session = VolumeSession(head, torch.from_numpy(scan), (1.0, 1.0, 1.0))
    found: list[tuple[float, tuple[slice, slice, slice], np.ndarray]] = []
    for _ in range(clicks):
        place = _place(scan, rng)
        if any(score > KNOWN and _holds(part, mask, place) for score, part, mask in found):
            continue
        answer, score = session.find_agreed(np.array([(*place, 1)]))
        if score >= AGREED and _sensible(answer, scan.shape):
            found.append((score, answer.part, answer.mask))
    kept: list[tuple[tuple[slice, slice, slice], np.ndarray]] = []
    for _, part, mask in sorted(found, key=lambda one: -one[0]):
        whole = np.zeros(scan.shape, bool)
        whole[part] = mask
        others = ((np.count_nonzero(whole[p] & m), np.count_nonzero(m)) for p, m in kept)
        size = np.count_nonzero(mask)
        if all(common < ALIKE * (size + other - common) for common, other in others):
            kept.append((part, mask))
    return kept


def _place(scan: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """A voxel to click: any one, or any one of a value."""
    if rng.random() < 0.5:
        levels = (scan * LEVELS).astype(int)
        places = np.argwhere(levels == rng.choice(np.unique(levels)))
        return tuple(int(i) for i in places[rng.integers(len(places))])
    return tuple(int(rng.integers(n)) for n in scan.shape)


def _holds(part: tuple[slice, slice, slice], mask: np.ndarray, place: tuple[int, ...]) -> bool:
    inner = tuple(p - s.start for p, s in zip(place, part, strict=True))
    return all(0 <= i < n for i, n in zip(inner, mask.shape, strict=True)) and bool(mask[inner])


def _sensible(answer: VolumeAnswer, shape: tuple[int, ...]) -> bool:
    """Whether an answer has the size of an object, a steady edge, and is not cut off by the cube that was looked at."""
    mask, size = answer.mask, np.count_nonzero(answer.mask)
    if not SMALLEST <= size <= LARGEST * np.prod(shape):
        return False
    inner, outer = (np.count_nonzero(answer.probability > p) for p in (0.73, 0.27))
    if inner < STEADY * outer:
        return False
    cut = 0
    for axis, (span, side) in enumerate(zip(answer.part, shape, strict=True)):
        faces = np.moveaxis(mask, axis, 0)
        cut += np.count_nonzero(faces[0]) * (span.start > 0) + np.count_nonzero(faces[-1]) * (span.stop < side)
    return cut <= CUT * size ** (2 / 3) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=Path, required=True, help="folder of folders with images/ of scans (NIfTI)")
    parser.add_argument("--out", type=Path, required=True, help="one file a scan is written here; what is there stays")
    parser.add_argument("--head", type=Path, default=VOLUME_HEAD, help="folder of the head that finds them")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = load_head(args.head, VolumeHead)
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for file in (bar := tqdm(sorted(args.scans.rglob("images/*.nii*")))):
        target = args.out / f"{file.parent.parent.name}-{file.name.partition('.')[0]}.npz"
        if target.exists():
            continue
        scan = read_scan(file)
        scan = (scan - scan.min()) / (np.ptp(scan) + 1e-6)
        rng = np.random.default_rng(int(hashlib.sha256(target.name.encode()).hexdigest()[:16], 16))
        objects = own_volume_objects(scan.astype(np.float32), head, rng)
        total += len(objects)
        bar.set_postfix(objects=total)
        columns = {f"mask_{k}": mask for k, (_, mask) in enumerate(objects)}
        starts = np.array([[s.start for s in part] for part, _ in objects], np.int32).reshape(-1, 3)
        partial = target.with_suffix(".part.npz")
        np.savez_compressed(partial, scan=scan.astype(np.float16), starts=starts, **columns)
        partial.rename(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
