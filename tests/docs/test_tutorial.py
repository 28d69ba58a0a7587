"""The tutorial runs, and shows what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image

from bad_inputs import color

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.py"


def test_the_tutorial(tiny_pipeline, tmp_path):
    Image.fromarray(color(64, 80)).save(tmp_path / "photo.png")
    tutorial = runpy.run_path(str(TUTORIAL))["tutorial"]
    seconds = tutorial(tmp_path / "photo.png", tmp_path / "out", str(tiny_pipeline))
    assert next(iter(seconds)) == "encode" and len(seconds) == 6
    assert Image.open(tmp_path / "out" / "tutorial.png").width > 5 * 64
