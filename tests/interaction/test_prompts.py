"""Prompts are checked in one place, for images and volumes alike, without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import check_prompts, check_values, from_viewer

SHAPE = (20, 30)


def strokes(value: int = 1, shape=SHAPE, dtype=np.uint8) -> np.ndarray:
    drawn = np.zeros(shape, dtype)
    drawn.flat[5] = value
    return drawn


def test_needs_no_torch():
    code = "import sys, zeroseg.interaction.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, "auto"),
        ({"points": [[29, 19]]}, "points"),
        ({"points": np.array([[1.5, 2]])}, "points"),
        ({"scribbles": strokes()}, "points"),
        ({"scribbles": strokes().astype(np.int64), "box": [0, 0, 5, 5]}, "points"),
        ({"mask": strokes().astype(bool), "points": [[1, 1]], "labels": [0]}, "points"),
        ({"box": [0, 0, 29, 19]}, "box"),
        ({"text": " cells "}, "text"),
        ({"text": "cells", "select": "segments"}, "segments"),
    ],
)
def test_the_rule_follows_from_the_prompts(given, rule):
    assert check_prompts(SHAPE, **given).rule == rule


def test_what_comes_out_is_checked_and_of_one_form():
    prompts = check_prompts(
        SHAPE, points=np.array([[3, 4], [5, 6]]), labels=np.array([1, 0]), mask=strokes(), candidate=np.int64(2)
    )
    assert prompts.points == ((3.0, 4.0), (5.0, 6.0)) and prompts.labels == (1, 0) and prompts.candidate == 2
    assert prompts.mask.dtype == bool and prompts.mask.sum() == 1
    assert check_prompts(SHAPE, text=" cells ").text == "cells"
    volume = check_prompts((4, 5, 6), points=[[3, 4, 5]], scribbles=strokes(2, (4, 5, 6)))
    assert volume.scribbles.dtype == np.uint8 and volume.scribbles.max() == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"points": [[30, 1]]}, "x 0..29, y 0..19"),
        ({"points": [[1, float("nan")]]}, "outside the image"),
        ({"points": [[1, 10**400]]}, "points must be a list"),
        ({"points": "ab"}, "points must be a list"),
        ({"points": [[1, 1]], "labels": [[1]]}, "one 0 or 1"),
        ({"points": [[1, 1]], "labels": [1, 0]}, "one 0 or 1 for each of the 1 points"),
        ({"box": [5, 5, 1, 1]}, "low corner first"),
        ({"scribbles": strokes(shape=(30, 20))}, r"scribbles must have the image's shape \(20, 30\), not \(30, 20\)"),
        ({"scribbles": strokes(0)}, "scribbles are empty"),
        ({"scribbles": strokes(3)}, "only, not 3"),
        ({"scribbles": strokes(-1, dtype=np.int8)}, "only, not -1"),
        ({"scribbles": strokes().astype(np.float32)}, "whole numbers"),
        ({"scribbles": strokes().astype(bool)}, "whole numbers"),
        ({"scribbles": [[1], [1, 2]]}, "scribbles must be an array"),
        ({"scribbles": strokes(2)}, "at least one click with label 1"),
        ({"mask": np.ones((20, 31), bool)}, "mask must have the image's shape"),
        ({"mask": np.full(SHAPE, 2)}, "0 and 1, only"),
        ({"mask": np.full(SHAPE, 0.5)}, "0 and 1, only"),
        ({"mask": np.full(SHAPE, "x")}, "0 and 1, only"),
        ({"mask": np.zeros(SHAPE, bool)}, "at least one click with label 1"),
        *(({"points": [[1, 1]], "candidate": c}, "candidate must be 1, 2 or 3") for c in (0, 4, 1.5, "2", True, [1])),
    ],
)
def test_what_does_not_fit_is_one_line(given, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        check_prompts(SHAPE, **given)
    assert "\n" not in str(error.value)


def test_viewers_send_voxel_indices():
    assert from_viewer([[3, 4, 0]], [[5, 6]], None, False) == {"points": [[3, 4], [5, 6]], "labels": [1, 0]}
    assert from_viewer([], None, [1, 2, 3, 4, 5, 6], True) == {"box": [1, 2, 3, 4, 5, 6]}
    assert from_viewer([], [[5, 6]], None, False, drawn=True) == {"points": [[5, 6]], "labels": [0]}
    assert from_viewer(None, None, None, True, drawn=True) == {}
    for given, message in (
        (([], [[1, 2, 3]], None, True), "no click was given"),
        (([[1, 2]], [], None, True), "i, j, k in a volume"),
        (([[1, 2, 1]], [], None, False), "k must be 0"),
        (([[1, True, 1]], [], None, True), "numbers only"),
        (([], [], [1, 2], True), "list of 6"),
    ):
        with pytest.raises(ZeroSegError, match=message):
            from_viewer(*given)


def test_values_no_image_and_no_tokenizer_takes():
    with pytest.raises(ZeroSegError, match="points: a number of 31 digits"):
        check_values({"points": [[10**30, 1]]})
    with pytest.raises(ZeroSegError, match="text: the text is no valid Unicode"):
        check_values({"text": "\ud800"})
