#!/usr/bin/env python
"""Bring folders of slices and volumes, with lesions or healthy, into the form ``configs/train_tumor.yaml`` reads.

    python scripts/training/gather_lesions.py FOLDER [--healthy] --out OUT

FOLDER holds ``images/`` and, unless --healthy, ``masks/`` of the same stems: NIfTI volumes, or PNG and JPEG slices, which become
volumes of one slice and 1 mm. Whoever gives a folder has read its terms.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from zeroseg.errors import ZeroSegError
from zeroseg.io import check_same_grid


def read(path: Path) -> nib.Nifti1Image:
    """A volume as it is; a picture as grey values of one slice."""
    if path.name.endswith((".nii", ".nii.gz")):
        return nib.load(path)
    values = np.asarray(Image.open(path).convert("L")).T[:, ::-1, None]
    return nib.Nifti1Image(np.ascontiguousarray(values), np.eye(4))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--healthy", action="store_true", help="nothing in it is a lesion: masks are written empty")
    parser.add_argument("--skip", default="", help="comma-separated stems to leave out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for part in ("images", "masks"):
        (args.out / part).mkdir(parents=True, exist_ok=True)
    skipped = set(args.skip.split(","))
    for path in sorted((args.folder / "images").iterdir()):
        stem = path.name.split(".")[0]
        if stem in skipped:
            continue
        image = read(path)
        if args.healthy:
            mask = np.zeros(image.shape[:3], np.uint8)
        else:
            (found,) = (args.folder / "masks").glob(f"{stem}.*")
            drawn = read(found)
            mask = (np.asarray(drawn.dataobj) > 0).astype(np.uint8)
            try:
                check_same_grid(str(found), mask.shape, drawn.affine, image.shape[:3], image.affine)
            except ZeroSegError as error:
                raise SystemExit(str(error)) from None
        nib.save(image, args.out / "images" / f"{stem}.nii.gz")
        nib.save(nib.Nifti1Image(mask, image.affine), args.out / "masks" / f"{stem}.nii.gz")


if __name__ == "__main__":
    main()
