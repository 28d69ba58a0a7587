"""Clicks by rules: an answer edits the one before it, and the user's word stands."""

from __future__ import annotations

import numpy as np
import pytest

from attention_maps import three_squares
from zeroseg.attention import EncodedImage, rules
from zeroseg.interaction.clicks import answer_clicks
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.interaction.prompts import check_prompts
from zeroseg.interaction.settings import Settings

SIDE, SIZE = 16, (64, 64)


@pytest.fixture(scope="module")
def encoded() -> EncodedImage:
    return three_squares()


def answer(encoded, points, labels=None, **given):
    return answer_clicks(encoded, check_prompts(SIZE, points=points, labels=labels, **given), Settings())[0]


FIRST, TOUCHING, ALONE = [14, 18], [32, 18], [48, 48]


def test_one_click_is_the_steepest_contour_around_it(encoded):
    relevance = rules.click_relevance(encoded.paths, [rules.token_at(*FIRST, SIZE, SIDE)])
    full = encoded.upsample(relevance[None], "guided")[0].numpy()
    assert np.array_equal(answer(encoded, [FIRST]), rules.cut(full, [(18, 14)])[0])


def test_a_correction_changes_what_it_points_at_and_nothing_else(encoded):
    one = answer(encoded, [FIRST])
    two = answer(encoded, [FIRST, ALONE])
    assert two[48, 48] and (two >= one).all(), "a click on the object adds"
    assert two[40:56, 40:56].mean() > 0.8
    back = answer(encoded, [FIRST, ALONE, [44, 44]], [1, 1, 0])
    assert not back[44, 44] and back[48, 48]
    assert np.array_equal(back[:32], two[:32]), "the rest stays"
    assert (back <= two).all(), "a click on the background takes away"


def test_a_click_that_agrees_changes_nothing(encoded):
    one = answer(encoded, [FIRST])
    assert np.array_equal(answer(encoded, [FIRST, [15, 20]]), one)
    assert np.array_equal(answer(encoded, [FIRST, [60, 4]], [1, 0]), one)


@pytest.mark.parametrize("seed", range(5))
def test_every_clicked_pixel_has_its_label(encoded, seed):
    rng = np.random.default_rng(seed)
    points, labels = rng.integers(0, 64, (8, 2)).tolist(), [1, *rng.integers(0, 2, 7).tolist()]
    mask = answer(encoded, points, labels)
    wanted = {(x, y): kind for (x, y), kind in zip(points, labels, strict=True)}
    assert all(mask[y, x] == kind for (x, y), kind in wanted.items())
    assert np.array_equal(mask, answer(encoded, points, labels)), "replayed, the same"


def test_a_background_click_before_the_object_bounds_it(encoded):
    mask = answer(encoded, [TOUCHING, FIRST], [0, 1])
    assert mask[18, 14] and not mask[18, 32]


def test_a_mask_given_is_corrected(encoded):
    given = np.zeros(SIZE, bool)
    given[40:56, 40:56] = given[0, 60] = True
    mask = answer(encoded, [FIRST], mask=given)
    assert mask[18, 14] and (mask >= given).all()
    mask = answer(encoded, [[60, 0]], [0], mask=given)
    assert not mask[0, 60] and mask[40:56, 40:56].all()


def test_strokes_are_clicks_of_many_pixels(encoded):
    scribbles = np.zeros(SIZE, np.uint8)
    scribbles[12:24, 14], scribbles[46:50, 48], scribbles[16:20, 32] = 1, 1, 2
    mask = answer(encoded, None, scribbles=scribbles)
    assert mask[scribbles == 1].all() and not mask[scribbles == 2].any()
    assert mask[10:26, 10:22].mean() > 0.8 and mask[42:54, 42:54].mean() > 0.8


def test_clicks_hold_in_pixels_of_the_original_however_small_the_working_grid(tiny_backbone):
    image = np.random.default_rng(0).random((1, 150, 90))
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64, working_size=20)
    points, labels = [[40, 52], [41, 52], [80, 140], [81, 140]], [1, 0, 1, 0]
    result = inferer.segment(image, points=points, labels=labels)
    assert [result.labels[y, x] for x, y in points] == labels
    drawn = np.zeros((150, 90), np.uint8)
    drawn[70, 10:60], drawn[72, 10:60] = 1, 2
    result = inferer.segment(image, scribbles=drawn)
    assert result.labels[drawn == 1].all() and not result.labels[drawn == 2].any()
