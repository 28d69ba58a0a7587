"""Volume phantoms: reproducible, in physical units, with lesions that show and kinds that stay apart."""

from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest

import phantoms
from phantoms3d import HELD_OUT, KINDS, MODALITIES, ORGANS_OF, SCENES, make_volume
from zeroseg.tumor.prompts import ORGANS

SEED_RANGE = range(6)


def test_a_seed_draws_one_volume():
    first, again, other = make_volume(7), make_volume(7), make_volume(8)
    assert (
        np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask) and first.case == again.case
    )
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("modality", MODALITIES)
def test_values_are_in_the_modality_s_units(modality, scene):
    for seed in range(3):
        image = make_volume(seed, modality=modality, scene=scene).image
        assert image.dtype == np.float32 and np.isfinite(image).all() and max(image.shape) <= 64
        low, high = {"ct": (-1024, 3071), "mr": (0, 2000), "pet": (0, 100)}[modality]
        assert image.min() >= low and low < image.max() <= high
        assert image.std() > 0


@pytest.mark.parametrize("kind", KINDS + HELD_OUT)
def test_every_kind_of_lesion_shows(kind):
    for seed in SEED_RANGE:
        volume = make_volume(seed, kinds=(kind,), modality="pet", scene="limb", lesion=True)
        assert volume.case.kind == kind and 20 <= volume.mask.sum() < volume.mask.size / 2
        assert volume.image[volume.mask].mean() > 1.3 * np.median(volume.image[~volume.mask])


def test_a_healthy_phantom_has_no_lesion():
    for seed in SEED_RANGE:
        volume = make_volume(seed, lesion=False)
        assert not volume.mask.any() and volume.case.kind is None and volume.case.tumor is None


def test_training_never_draws_held_out_kinds():
    assert not set(KINDS) & set(HELD_OUT)
    assert {make_volume(seed, lesion=True).case.kind for seed in range(40)} == set(KINDS)
    assert make_volume(3, kinds=HELD_OUT, lesion=True).case.kind in HELD_OUT


def test_half_are_healthy_and_all_scenes_occur():
    cases = [make_volume(seed).case for seed in range(60)]
    assert 0.3 < np.mean([case.kind is None for case in cases]) < 0.7
    assert {case.scene for case in cases} == set(SCENES)
    assert {case.modality for case in cases} == set(MODALITIES)


def test_words_are_the_prompts_own():
    for organs in ORGANS_OF.values():
        assert set(organs) <= set(ORGANS)
    for seed in range(20):
        case = make_volume(seed, lesion=True).case
        assert case.tumor in ORGANS[case.organ]


def test_a_mass_pushes_muscle_aside_and_keeps_bone():
    volume = make_volume(5, kinds=("solid",), modality="ct", scene="limb", lesion=True)
    assert volume.image[volume.mask].max() < 300, "bone is not replaced by a soft-tissue mass"


def test_the_command_writes_volumes(tmp_path, monkeypatch, capsys):
    arguments = ["phantoms.py", "--volumes", "3", "--out", str(tmp_path), "--held-out", "--lesions", "all"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--first-seed", "50"])
    phantoms.main()
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert [case["seed"] for case in cases.values()] == [50, 51, 52]
    assert capsys.readouterr().out.count("\n") == 3
    for stem, case in cases.items():
        image, mask = (nib.load(tmp_path / part / f"{stem}.nii.gz") for part in ("images", "masks"))
        drawn = make_volume(case["seed"], kinds=HELD_OUT, lesion=True)
        assert image.header.get_zooms() == (3.0, 3.0, 3.0)
        assert np.array_equal(np.asarray(mask.dataobj) > 0, drawn.mask)
        assert np.abs(image.get_fdata() - drawn.image).max() < 0.001 * np.ptp(drawn.image)
