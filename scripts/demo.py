#!/usr/bin/env python
"""Run the bundle on real images that arrive inside the installed packages, and make a page to look at.

Microscopy, histology and retinal photographs from scikit-image, a CT and an MR slice from pydicom, a brain MR volume
from nibabel. Each is segmented automatically, and again from one click, through ``python -m monai.bundle run``.

    python scripts/demo.py --output_dir out/demo
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from zeroseg.io import contact_html, contact_sheet
from zeroseg.places import BUNDLE
from zeroseg.samples import sample_files

# One click per image, (x, y) in its own pixels ((x, y, z) in the volume): placed by eye on something a person would ask for.
CLICKS = {
    "cell": [[414, 377]],
    "ihc": [[215, 238]],
    "microaneurysms": [[51, 51]],
    "retina": [[244, 644]],
    "CT_small": [[64, 64]],
    "MR_small": [[53, 57]],
    "anatomical": [[16, 20, 12]],
}


def run_bundle(images: Path, output: Path, *options: str) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(BUNDLE)]
    command += ["--config_file", str(BUNDLE / "configs" / "inference.yaml"), "--dataset_dir", str(images)]
    subprocess.run([*command, "--output_dir", str(output), *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="out/demo", help="results and index.html go here (default out/demo)")
    args = parser.parse_args()
    output = Path(args.output_dir)
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file in sample_files():
        shutil.copy(file, images / file.name)
    prompts = output / "prompts.json"
    prompts.write_text(json.dumps({stem: {"points": points} for stem, points in CLICKS.items()}, indent=1))
    run_bundle(images, output / "auto")
    run_bundle(images, output / "segments", "--select", "segments")
    run_bundle(images, output / "points", "--prompts", str(prompts))

    entries = [
        (f"{stem}: {mode}", Image.open(output / mode / f"{stem}_overlay.png").convert("RGB"))
        for mode in ("segments", "auto", "points")
        for stem in CLICKS
        if (output / mode / f"{stem}_overlay.png").is_file()
    ]
    contact_sheet(entries, output / "index.png", columns=len(CLICKS))
    contact_html(entries, output / "index.html", title="ZeroSeg demo")
    print(f"\nlook at {output / 'index.html'} or {output / 'index.png'}")


if __name__ == "__main__":
    main()
