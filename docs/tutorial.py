#!/usr/bin/env python
"""Encode once, predict often: a tutorial to run, and to read from top to bottom.

    python docs/tutorial.py                            out/tutorial/tutorial.png, on an image that comes with scikit-image
    python docs/tutorial.py --image cell.png --out FOLDER

The frozen diffusion model looks at an image once (``encode``); every further question (``predict``) reuses what it saw and
takes a fraction of the time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image

from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.io import contact_sheet, draw_overlay, find_cases, read_image, to_unit_range
from zeroseg.samples import sample_files


def tutorial(image_file: Path, out: Path, backbone: str = "embedded") -> dict[str, float]:
    """Ask one image five questions and draw the answers.

    Args:
        image_file: a 2-D image, at least 32 pixels a side.
        out: folder for ``tutorial.png``.
        backbone: embedded, or the folder of a Stable Diffusion pipeline.

    Returns:
        what was asked -> seconds it took.
    """
    seconds: dict[str, float] = {}
    pictures: list[tuple[str, Image.Image]] = []

    # 1. Read. Any format the bundle reads; (C, H, W) in [0, 1], CT windowed, 8-bit as it is.
    image = to_unit_range(read_image(find_cases(image_file)[0]))
    height, width = image.shape[1:]

    # 2. Encode: the only time the diffusion model's UNet sees the image.
    inferer = AttentionSegmentationInferer(StableDiffusionBackbone(backbone, device="cpu"))
    inferer.check()  # loads the weights and checks their SHA-256, so that the clock does not count it
    start = time.perf_counter()
    encoded = inferer.encode(image)
    seconds["encode"] = time.perf_counter() - start

    # 3. Ask, as often as you like. Points are (x, y) in pixels of the image.
    middle, corner = [width // 2, height // 2], [4, 4]
    questions = {
        "all segments": {"select": "segments"},
        "what differs from the frame": {"select": "auto"},
        "one click": {"points": [middle]},
        "a second click, not this": {"points": [middle, corner], "labels": [1, 0]},
        "a box": {"box": [width // 4, height // 4, 3 * width // 4, 3 * height // 4]},
    }
    for name, prompt in questions.items():
        start = time.perf_counter()
        result = inferer.predict(encoded, **prompt)
        seconds[name] = time.perf_counter() - start

        # 4. An answer: labels (H, W), 0 background; confidence (H, W) in [0, 1]; a score per segment; the rule that chose.
        score = f"{result.scores[0]:.2f}" if result.scores else "-"
        title = f"{name}: {result.labels.max()} segments, score {score}, {seconds[name]:.2f} s"
        clicks = {"points": prompt.get("points"), "point_labels": prompt.get("labels"), "box": prompt.get("box")}
        pictures.append((title, draw_overlay(image, result.labels, **clicks)))

    # 5. Look.
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, out / "tutorial.png", columns=len(pictures))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a 2-D image (default: a cell, of scikit-image)")
    parser.add_argument("--out", type=Path, default=Path("out/tutorial"), help="folder (default out/tutorial)")
    args = parser.parse_args()
    for name, passed in tutorial(args.image or sample_files()[0], args.out).items():
        print(f"{name:<30}{passed:6.2f} s")
    print(f"look at {args.out / 'tutorial.png'}")


if __name__ == "__main__":
    main()
