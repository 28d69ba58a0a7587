"""The measure of clicks in volumes, and the baselines that are driven alike."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from zeroseg.cli import main
from zeroseg.evaluation.clicks3d import VolumeCurve, box_of, object_of, summarise_volume_curves, volume_curve
from zeroseg.evaluation.volume_baselines import random_walker_marks, region_growing_marks
from zeroseg.evaluation.volume_metrics import score_volume, surface_dice

SHAPE = (24, 26, 20)


def ball(centre, radius, shape=SHAPE) -> np.ndarray:
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2


def test_a_curve_of_an_annotator_who_draws_it_himself():
    truth = ball((12, 13, 10), 6)
    answers = [ball((12, 13, 10), 3), truth]
    seen = []

    def answer(points, labels):
        seen.append((points[-1], labels[-1]))
        return answers[len(points) - 1]

    curve = volume_curve(answer, truth, (1.0, 1.0, 2.0))
    assert seen[0] == ([12, 13, 10], 1) and len(curve.seconds) == 2, "nothing is clicked where nothing is wrong"
    assert curve.dice[1:].tolist() == [1] * 4 and curve.nsd[-1] == 1
    assert curve.auc == pytest.approx((curve.dice[0] + 1) / 2 / 4 + 0.75)


def test_what_is_counted():
    curves = [
        VolumeCurve(np.array([0.5, 0.7, 0.6]), np.array([0.1, 0.2, 0.3]), [2.0, 1.0, 1.0]),
        VolumeCurve(np.array([0.9, 1.0, 1.0]), np.array([0.9, 1.0, 1.0]), [4.0, 3.0]),
    ]
    found = summarise_volume_curves(curves)
    assert found["dice"] == [0.7, 0.85, 0.8] and found["further_clicks"] == 3
    assert found["lossy"] == pytest.approx(1 / 3) and found["seconds_first"] == 3
    assert found["auc"] == pytest.approx((0.625 + 0.975) / 2)


def test_object_and_box():
    truth = ball((8, 8, 8), 5) | ball((20, 20, 15), 3)
    assert np.array_equal(object_of(truth), ball((8, 8, 8), 5))
    assert box_of(ball((8, 8, 8), 5)) == [4, 4, 4, 12, 12, 12]


def test_the_surface_distance_alone_is_that_of_all_metrics():
    truth, mask = ball((10, 12, 9), 6), ball((11, 13, 10), 6)
    spacing = (1.0, 1.0, 2.5)
    assert surface_dice(mask, truth, spacing, 2.0) == pytest.approx(score_volume(mask, truth, spacing, 2.0)["nsd"])
    assert surface_dice(np.zeros_like(truth), truth, spacing, 2.0) == 0


@pytest.mark.parametrize("method", [region_growing_marks, random_walker_marks])
def test_baselines_find_what_is_plain_to_see(method):
    truth = ball((12, 13, 10), 6)
    volume = np.where(truth, 5.0, 1.0) + np.random.default_rng(0).normal(0, 0.1, SHAPE)
    marks = np.zeros(SHAPE, np.uint8)
    marks[12, 13, 10], marks[1, 1, 1] = 1, 2
    mask = method(volume, marks, (1.0, 1.0, 2.0))
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    assert mask[12, 13, 10] and not mask[1, 1, 1]
    constant = method(np.ones(SHAPE), marks, (1.0, 1.0, 2.0))
    assert constant[12, 13, 10] and not constant[1, 1, 1]


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    truth = ball((12, 13, 10), 6)
    volume = (truth + np.random.default_rng(0).normal(0, 0.1, SHAPE)).astype(np.float32)
    for folder, array in (("images", volume), ("masks", truth.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "set" / folder / "a.nii.gz")
    out = tmp_path / "out"
    command = ["evaluate", "--suite", str(tmp_path), "--out", str(out), "--clicks", "2"]
    assert main([*command, "--protocol", "clicks3d,box+clicks3d"]) == 0
    found = json.loads((out / "set" / "summary.json").read_text())["interaction"]
    assert set(found["clicks3d"]) == {"zeroseg", "zeroseg, refiner rules", "region growing", "random walker"}
    assert len(found["clicks3d"]["zeroseg"]["dice"]) == 2 and "zeroseg" in found["box+clicks3d"]
    assert "Dice@2" in (out / "table.md").read_text() and "random walker" in capsys.readouterr().out
    assert main([*command, "--protocol", "clicks3d,points"]) == 2
    assert "clicks3d is for volumes" in capsys.readouterr().err
