#!/usr/bin/env python
"""Grow one lesion of some millilitres, deep in the body, into each of several readings of real volumes.

    python scripts/training/grow_lesions.py FOLDER --modality mr --bright "*FLAIR*,*T2*" --out OUT

FOLDER holds ``images/`` and ``masks/`` as ``gather_lesions.py`` writes them; what is marked there stays marked. A grown lesion differs from
what was there by 8 % of the range of grey values or more; in the volumes of --bright, where lesions of that sequence are bright, it
is brighter by 12 % or more. Written are grey values of 0 to 1000 on voxels of --spacing mm, in RAS order.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from zeroseg.backbones.maisi import COMPACT
from zeroseg.errors import ZeroSegError
from zeroseg.tumor.prepare import prepare
from zeroseg.tumor.prompts import MODALITIES
from zeroseg.tumor.training.cases import TrainingCase, read_cases
from zeroseg.tumor.training.lesions import grow_lesion

TRIES = 400
"""Lesions drawn for a volume, most of which are too small, too faint or not deep enough."""
DEPTH_MM = 14.0
"""Of a lesion's voxels below the body's surface, on average."""
RIM_MM = 2.0
"""Of its outermost voxel."""


def grown_into(
    case: TrainingCase, count: int, spacing_mm: float, millilitres: tuple[float, float], bright: bool, seed: int
) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Readings of one volume with a lesion each, and their masks; fewer than ``count`` where too few places suit."""
    values, affine, marked = case.load()
    prepared = prepare(values, affine, case.modality, [spacing_mm] * 3, 1, COMPACT["ct_window"])
    volume, known = prepared.volume[0, 0].numpy(), prepared.from_input(marked).numpy() > 0
    body = ndimage.binary_fill_holes(ndimage.gaussian_filter(volume, 1.0) > 0.04)
    depth = ndimage.distance_transform_edt(body, sampling=prepared.spacing)
    voxel_ml, found = np.prod(prepared.spacing) / 1000, []
    for draw in range(TRIES):
        if len(found) == count:
            break
        grown = grow_lesion(volume, prepared.spacing, np.random.default_rng([seed, draw]), case.modality)
        if grown is None:
            continue
        image, mask = grown
        step = float(image[mask].mean() - volume[mask].mean())
        shows = step >= 0.12 if bright else abs(step) >= 0.08
        deep = depth[mask].mean() >= DEPTH_MM and depth[mask].min() >= RIM_MM
        if shows and deep and millilitres[0] <= mask.sum() * voxel_ml <= millilitres[1]:
            grid = np.diag([*prepared.spacing, 1.0])
            grey = nib.Nifti1Image((image * 1000).round().astype(np.int16), grid)
            found.append((grey, nib.Nifti1Image((mask | known).astype(np.uint8), grid)))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--modality", choices=MODALITIES, required=True)
    parser.add_argument("--bright", default="", help="comma-separated patterns of stems whose lesions are brighter")
    parser.add_argument("--each", type=int, default=6, help="readings of a volume")
    parser.add_argument("--ml", type=float, nargs=2, default=(4.0, 150.0), help="least and most of a lesion")
    parser.add_argument("--spacing", type=float, default=2.0, help="mm of a voxel")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first volume; one more for each further one")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        # What organ it is nobody asks here.
        cases = read_cases(args.folder, "body", args.modality)
    except ZeroSegError as error:
        parser.error(str(error))
    for part in ("images", "masks"):
        (args.out / part).mkdir(parents=True, exist_ok=True)
    patterns = args.bright.split(",")
    for number, case in enumerate(tqdm(cases, desc="volumes")):
        bright = any(fnmatch(case.stem, pattern) for pattern in patterns)
        seed = args.first_seed + number
        for n, (image, mask) in enumerate(grown_into(case, args.each, args.spacing, args.ml, bright, seed)):
            nib.save(image, args.out / "images" / f"{case.stem}_{n}.nii.gz")
            nib.save(mask, args.out / "masks" / f"{case.stem}_{n}.nii.gz")


if __name__ == "__main__":
    main()
