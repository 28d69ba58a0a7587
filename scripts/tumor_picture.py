#!/usr/bin/env python
"""docs/tumour.jpg: volumes with kinds of lesion nobody trained on, what the stages of DiffuGTS make of them, and the mask.

python scripts/tumor_picture.py --out docs/tumour.jpg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from zeroseg.evaluation.clicks import overlap
from zeroseg.tumor import TumorSegmentationInferer

sys.path.insert(0, str(Path(__file__).parent / "training"))
from phantoms3d import HELD_OUT, SPACING, Volume, make_volume

SHOWN = (("ct", "liver", "abdomen"), ("mr", "limb", "limb"), ("pet", "limb", "limb"))
FIRST = 70_000
"""Of each the first one is drawn whose seed is not lower."""
CT_WINDOW = (-200, 300)
"""HU that are black and white."""
MAPS = {"aova": "AOVA", "healthy": "pseudo-healthy", "pixel_residual": "pixel residual"}


def draw(modality: str, organ: str, scene: str) -> Volume:
    """The first volume with a lesion in an organ."""
    for seed in range(FIRST, FIRST + 100):
        volume = make_volume(seed, HELD_OUT, modality, scene, lesion=True)
        if volume.case.organ == organ:
            return volume
    raise ValueError(f"no lesion of the {organ} in a hundred volumes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/tumour.jpg"))
    args = parser.parse_args()
    inferer = TumorSegmentationInferer(all_evidence=True)
    figure = Figure(figsize=(11, 2.3 * len(SHOWN)), layout="constrained")
    for row, panels in zip(SHOWN, figure.subplots(len(SHOWN), 2 + len(MAPS)), strict=True):
        volume = draw(*row)
        case, affine = volume.case, np.diag([SPACING, SPACING, SPACING, 1.0])
        result = inferer.segment(volume.image[None], affine, case.modality, case.organ, case.tumor)
        mask = result.labels > 0
        dice = overlap(mask, volume.mask)[0]
        print(f"{case.caption}: Dice {dice:.3f}{', ' + result.reason if result.reason else ''}")
        z = int(volume.mask.sum((0, 1)).argmax())
        pictures = [volume.image, *(result.evidence[name] for name in MAPS), volume.image]
        titles = [case.caption, *MAPS.values(), f"mask, Dice {dice:.2f}"]
        for panel, picture, title in zip(panels, pictures, titles, strict=True):
            grey = picture is volume.image or title == MAPS["healthy"]
            low, high = CT_WINDOW if grey and case.modality == "ct" else (None, None)
            colours = "gray" if grey else "inferno"
            panel.imshow(picture[:, ::-1, z].T, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            panel.set_title(title, fontsize=7)
            panel.set_axis_off()
        for outline, colour in ((volume.mask, "deepskyblue"), (mask, "yellow")):
            if outline[..., z].any():
                panels[-1].contour(outline[:, ::-1, z].T, [0.5], colors=colour, linewidths=1)
    figure.savefig(args.out, dpi=80, pil_kwargs={"quality": 88})
    return 0


if __name__ == "__main__":
    sys.exit(main())
