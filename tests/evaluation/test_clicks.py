"""The simulated annotator, and what is counted of its clicks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from zeroseg.cli import main
from zeroseg.evaluation.annotator import next_click, next_click_3d, scribble
from zeroseg.evaluation.baselines import grabcut_marks, random_walker_marks
from zeroseg.evaluation.clicks import Curve, click_curve, scribble_pair, summarise_curves
from zeroseg.regions import innermost

SIZE = (60, 80)


def disc(row: int, column: int, radius: int, size=SIZE) -> np.ndarray:
    y, x = np.ogrid[: size[0], : size[1]]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def test_the_first_click_is_innermost_and_the_next_in_the_deeper_error():
    truth = disc(30, 40, 15)
    assert next_click(np.zeros(SIZE, bool), truth) == ((30, 40), 1)
    assert next_click(truth | disc(30, 70, 7), truth) == ((30, 70), 0)
    assert next_click(truth & ~disc(30, 40, 6), truth) == ((30, 40), 1)
    assert next_click(truth, truth) is None


def test_random_clicks_lie_in_the_error_and_repeat():
    truth = disc(30, 40, 15)
    first = next_click(np.zeros(SIZE, bool), truth, np.random.default_rng(1))
    assert truth[first[0]] and first == next_click(np.zeros(SIZE, bool), truth, np.random.default_rng(1))


def test_in_volumes_the_largest_component_is_clicked():
    truth = np.zeros((10, 12, 14), bool)
    truth[2:8, 2:9, 2:9] = True
    mask = truth.copy()
    mask[0, 0, 0], mask[3:6, 3:6, 3:6] = True, False
    assert next_click_3d(mask, truth) == ((4, 4, 4), 1)


@pytest.mark.parametrize("kind", ["centre", "contour", "walk"])
def test_strokes_stay_inside(kind):
    region = disc(30, 40, 18) & ~disc(30, 40, 8)
    stroke = scribble(region, kind, np.random.default_rng(0))
    assert stroke.any() and not (stroke & ~region).any() and stroke.sum() < region.sum() / 2
    pair = scribble_pair(disc(30, 40, 15), kind, np.random.default_rng(0))
    assert (
        (pair[disc(30, 40, 15)] != 2).all() and (pair[~disc(30, 40, 15)] != 1).all() and {1, 2} <= set(np.unique(pair))
    )


def test_a_curve_of_an_annotator_who_draws_it_himself():
    truth = disc(30, 40, 15)
    answers = iter([disc(30, 40, 8), disc(30, 40, 12), disc(30, 40, 6), truth])
    curve = click_curve(lambda points, labels: next(answers), truth, 6)
    assert curve.clicks == 4 and curve.dice[3:].tolist() == [1, 1, 1] and len(curve.seconds) == 4
    summary = summarise_curves([curve])
    assert summary["lossy"] == pytest.approx(1 / 3) and summary["further_clicks"] == 3
    assert summary["noc_dice"]["0.90"] == {"clicks": 4.0, "failures": 0}


def test_failures_count_as_all_clicks():
    curves = [
        Curve(np.full(5, 0.5), np.full(5, 0.33), [0.1] * 5, 5),
        Curve(np.full(5, 0.95), np.full(5, 0.9), [0.1], 1),
    ]
    assert summarise_curves(curves)["noc_iou"]["0.85"] == {"clicks": 3.0, "failures": 1}


@pytest.mark.parametrize("method", [grabcut_marks, random_walker_marks])
def test_baselines_take_marks(method):
    truth = disc(30, 40, 15)
    image = np.where(truth, 0.8, 0.2)[None].repeat(3, 0).astype(np.float32)
    image += 0.02 * np.random.default_rng(0).standard_normal(image.shape).astype(np.float32)
    marks = np.zeros(SIZE, np.uint8)
    marks[30, 40], marks[5, 5] = 1, 2
    mask = method(image, marks)
    assert mask[30, 40] and not mask[5, 5] and 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    assert innermost(truth) == (30, 40)


@pytest.mark.slow
def test_the_command_line_runs_the_interactive_protocols(tmp_path, tiny_pipeline):
    truth = disc(30, 40, 15)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.where(truth, 200, 50).astype(np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray((truth * 255).astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    where = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "out")]
    model = ["--backbone", str(tiny_pipeline), "--clicks", "3"]
    protocols = "clicks,clicks_random,box+clicks,scribbles"
    assert main(["evaluate", *where, *model, "--protocol", protocols]) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["interaction"]
    assert {"clicks", "clicks_random", "box+clicks", "scribbles_centre", "scribbles_contour", "scribbles_walk"} == set(
        found
    )
    assert {"zeroseg", "zeroseg, refiner rules", "GrabCut", "random walker", "oracle_best_of_three (zeroseg)"} == set(
        found["clicks"]
    )
    assert set(found["clicks"]["zeroseg"]["dice"]) == {"1", "2", "3"}
    assert (tmp_path / "out" / "clicks.png").is_file() and "lossy" in (tmp_path / "out" / "interaction.md").read_text()
    assert main(["evaluate", *where, *model, "--protocol", "clicks,nonsense"]) == 2
    assert main(["evaluate", *where, "--clicks", "0", "--protocol", "clicks"]) == 2
