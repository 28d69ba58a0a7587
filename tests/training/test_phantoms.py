"""Phantoms: reproducible scenes whose words agree with what was drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import phantoms
from phantoms import SCENES, make_phantom

SIZE = 64
MASK_OF_WORD = {"cell nuclei": "nuclei", "red blood cells": "red blood cell", "kidneys": "kidney"}
"""Where a caption's word is not the mask's name."""


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[phantoms.Phantom]]:
    return {kind: [make_phantom(seed, SIZE, kind) for seed in range(16)] for kind in SCENES}


def words(caption: str) -> tuple[list[str], list[str]]:
    """What a caption says is there, and what not."""
    parts = caption.partition(" with ")[2].split(", ") if " with " in caption else caption.split(", ")[1:]
    return [p for p in parts if p and not p.startswith("no ")], [p[3:] for p in parts if p.startswith("no ")]


@pytest.mark.parametrize("kind", SCENES)
def test_every_kind_draws(drawn, kind):
    for phantom in drawn[kind]:
        assert phantom.image.shape == (SIZE, SIZE, 3) and phantom.image.dtype == np.uint8
        assert phantom.image.std() > 3, "something can be seen"
        assert phantom.caption and "\n" not in phantom.caption
        for mask in phantom.masks.values():
            assert mask.shape == (SIZE, SIZE) and mask.dtype == bool
    assert len({p.image.tobytes() for p in drawn[kind]}) == len(drawn[kind]), "no two alike"


@pytest.mark.parametrize("kind", SCENES)
def test_the_same_seed_draws_the_same_phantom(drawn, kind):
    again = make_phantom(3, SIZE, kind)
    assert np.array_equal(again.image, drawn[kind][3].image)
    assert again.caption == drawn[kind][3].caption
    assert all(np.array_equal(again.masks[k], drawn[kind][3].masks[k]) for k in drawn[kind][3].masks)


def test_seeds_walk_through_all_kinds():
    captions = {make_phantom(seed, 32).caption.split(",")[0].split(" with ")[0] for seed in range(len(SCENES))}
    assert len(captions) == len(SCENES)
    first = next(iter(SCENES))
    assert np.array_equal(make_phantom(0, 32).image, make_phantom(0, 32, first).image)


def test_what_a_caption_denies_was_not_drawn(drawn):
    denials = 0
    for kind, group in drawn.items():
        for phantom in group:
            for word in words(phantom.caption)[1]:
                denials += 1
                assert not [name for name in phantom.masks if word in name], f"{kind}: {phantom.caption}"
    assert denials > 20


def test_what_a_caption_names_was_drawn(drawn):
    named = 0
    for kind, group in drawn.items():
        known = {name for phantom in group for name in phantom.masks}
        for phantom in group:
            for word in words(phantom.caption)[0]:
                name = MASK_OF_WORD.get(word, word)
                if name in known:
                    named += 1
                    assert name in phantom.masks, f"{kind}: {phantom.caption}"
    assert named > 150


def test_an_objects_mask_lies_on_its_pixels():
    for seed in range(6):
        phantom = make_phantom(seed, 128, "pet")
        if "tumour" in phantom.masks and phantom.masks["tumour"].any():
            grey, mask = phantom.image.mean(-1), phantom.masks["tumour"]
            outside = grey[phantom.masks["body"]]
            assert abs(grey[mask].mean() - outside.mean()) > 2 * outside.std(), "a hot spot"
            return
    pytest.fail("no tumour among six PET phantoms")


def test_later_objects_hide_earlier_ones(drawn):
    for phantom in drawn["blood_smear"]:
        if {"red blood cell", "white blood cell"} <= set(phantom.masks):
            assert not (phantom.masks["red blood cell"] & phantom.masks["white blood cell"]).any()


def test_the_size_is_free():
    assert make_phantom(0, 48).image.shape == (48, 48, 3)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="unknown phantom kind 'x'; choose one of ct_abdomen"):
        make_phantom(0, kind="x")


def test_a_sheet_to_look_at(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    command = [sys.executable, phantoms.__file__, "--count", "13", "--size", "32", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(phantoms.__file__).parent)
    assert len(run.stdout.splitlines()) == 13
    from PIL import Image

    assert Image.open(out).size == (12 * 32, 2 * 32)
