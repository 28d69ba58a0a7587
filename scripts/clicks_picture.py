#!/usr/bin/env python
"""docs/clicks.jpg: phantoms nobody trained on, and what one, three and five simulated clicks give.

python scripts/clicks_picture.py --out docs/clicks.jpg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zeroseg.evaluation.annotator import next_click
from zeroseg.evaluation.clicks import overlap
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import draw_overlay
from zeroseg.regions import largest_component

sys.path.insert(0, str(Path(__file__).parent / "training"))
from phantoms import make_phantom

SCENES = (
    ("ct_abdomen", "liver"),
    ("ultrasound", "breast tumour"),
    ("dermoscopy", "skin lesion"),
    ("mr_brain", "brain tumour"),
)
SHOWN = (0, 1, 3, 5)
SIZE = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/clicks.jpg"))
    args = parser.parse_args()
    inferer, rows = AttentionSegmentationInferer(), []
    for kind, name in SCENES:
        seed = next(s for s in range(70_000, 70_100) if name in make_phantom(s, SIZE, kind).masks)
        phantom = make_phantom(seed, SIZE, kind)
        truth = largest_component(phantom.masks[name])
        encoded = inferer.encode(torch.from_numpy(phantom.image.copy()).permute(2, 0, 1).float())
        mask, points, labels, row = np.zeros(truth.shape, bool), [], [], []
        for clicks in range(max(SHOWN) + 1):
            if clicks in SHOWN:
                picture = draw_overlay(
                    phantom.image.transpose(2, 0, 1) / 255,
                    mask.astype(np.uint8),
                    points=points or None,
                    point_labels=labels or None,
                )
                row.append(np.asarray(picture.resize((SIZE, SIZE))))
                print(f"{kind}: {clicks} clicks, Dice {overlap(mask, truth)[0]:.3f}")
            following = next_click(mask, truth)
            if following is not None:
                (y, x), label = following
                points.append([float(x), float(y)])
                labels.append(label)
                mask = inferer.predict(encoded, points=points, labels=labels).labels > 0
        rows.append(np.hstack(row))
    Image.fromarray(np.vstack(rows)).save(args.out, quality=88)
    return 0


if __name__ == "__main__":
    sys.exit(main())
