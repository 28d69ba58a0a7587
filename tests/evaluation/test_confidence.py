import numpy as np
import pytest
from PIL import Image

from zeroseg.attention import Segmentation
from zeroseg.evaluation.confidence import (
    BINS,
    aurc,
    image_score,
    pixel_bins,
    reliability,
    reliability_bins,
    reliability_diagram,
    spearman,
    summarise_confidence,
)


def test_aurc_of_known_curves():
    risks = [0.0, 0.3, 0.6]
    assert aurc([3, 2, 1], risks) == pytest.approx((0 + 0.15 + 0.3) / 3)
    assert aurc([1, 2, 3], risks) == pytest.approx((0.6 + 0.45 + 0.3) / 3)
    assert aurc([5], [0.2]) == pytest.approx(0.2)


def test_a_score_that_says_nothing_has_the_mean_risk_whatever_the_order():
    risks = np.array([0.9, 0.1, 0.4, 0.2])
    assert [aurc(np.ones(4), order) for order in (risks, risks[::-1])] == pytest.approx([risks.mean()] * 2)


def test_tied_scores_have_the_mean_of_their_possible_orders():
    risks = [0.8, 0.0, 0.5]
    one, other = aurc([3, 2, 1], risks), aurc([2, 3, 1], risks)
    assert aurc([2, 2, 1], risks) == pytest.approx((one + other) / 2)


def test_no_score_is_better_than_the_risk_itself():
    rng = np.random.default_rng(0)
    risks = rng.uniform(size=30)
    best, worst = aurc(-risks, risks), aurc(risks, risks)
    assert all(best < aurc(rng.uniform(size=30), risks) < worst for _ in range(50))


def test_spearman_counts_ranks_only_and_needs_something_to_rank():
    assert spearman([0.1, 0.2, 0.3], [0.01, 0.02, 0.9]) == pytest.approx(1)
    assert spearman([0.1, 0.2, 0.3], [0.9, 0.5, 0.1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([0.1, 0.2], [0.1, 0.2]) is None
    assert spearman([0.5] * 5, range(5)) is None and spearman(range(5), [0.5] * 5) is None


def test_bins_hold_their_upper_edge_and_shares_of_all_pixels():
    share, confidence, correct = reliability_bins(np.array([0.0, 0.1, 0.11, 1.0]), np.array([True, False, True, True]))
    assert share.tolist() == [0.5, 0.25, *[0] * (BINS - 3), 0.25]
    assert confidence[[0, 1, -1]] == pytest.approx([0.1 / 4, 0.11 / 4, 1 / 4])
    assert correct[[0, 1, -1]].tolist() == [0.25, 0.25, 0.25]


def test_pixels_that_are_right_as_often_as_they_say_have_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(400, 400))
    draw = rng.uniform(size=confidence.shape)
    honest = reliability([reliability_bins(confidence, draw < confidence)])
    assert honest["ece"] < 0.01 and honest["ece_margin"] == pytest.approx(0.25, abs=0.01)
    assert honest["accuracy"] == pytest.approx(honest["confidence"], abs=0.02)
    margin = reliability([reliability_bins(confidence, draw < (1 + confidence) / 2)])
    assert margin["ece_margin"] < 0.01 and margin["ece"] == pytest.approx(0.25, abs=0.01)


def test_calibration_error_of_pixels_that_are_sure_and_wrong():
    values = reliability([reliability_bins(np.ones(9), np.zeros(9, bool))])
    assert values["ece"] == values["ece_margin"] == 1
    assert values["accuracy"] == [None] * (BINS - 1) + [0]


def test_every_image_weighs_the_same():
    large, small = reliability_bins(np.full(900, 0.5), np.ones(900, bool)), reliability_bins([0.5], np.array([False]))
    values = reliability([large, small])
    assert values["accuracy"][4] == pytest.approx(0.5) and values["ece"] == pytest.approx(0)


def test_no_pixels_have_no_error_and_change_no_other():
    none = reliability_bins(np.empty(0), np.empty(0, bool))
    assert reliability([none])["ece"] is None
    some = reliability_bins(np.full(4, 0.95), np.ones(4, bool))
    assert reliability([none, some]) == reliability([some])


@pytest.fixture
def result() -> Segmentation:
    labels = np.array([[1, 1, 0, 0]], np.uint8)
    return Segmentation(labels, np.array([[0.9, 0.5, 0.3, 0.1]], np.float32), [0.7], "points")


def test_pixels_of_the_mask_are_judged_apart(result):
    bins = pixel_bins(result, np.array([[True, False, False, True]]))
    assert bins["image"].sum(axis=1) == pytest.approx([1, 0.45, 0.5])
    assert bins["mask"].sum(axis=1) == pytest.approx([1, 0.7, 0.5])
    assert bins["mask"][2, 8] == 0.5 and bins["mask"][2, 4] == 0  # .9 is right, .5 is wrong


def test_an_absent_object_is_as_sure_as_its_pixels(result):
    assert image_score(result) == 0.7
    absent = Segmentation(np.zeros((2, 2), np.uint8), np.full((2, 2), 0.25, np.float32), [], "text", absent=True)
    assert image_score(absent) == 0.25


def test_summary_and_diagram(result, tmp_path):
    truths = [np.array([row]) for row in ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1])]
    rows = [
        {"dice": dice, "score": score, "bins": pixel_bins(result, truth > 0)}
        for dice, score, truth in zip((1.0, 2 / 3, 0.0), (0.9, 0.5, 0.6), truths, strict=True)
    ]
    summary = summarise_confidence(rows)
    assert summary["spearman"] == pytest.approx(0.5)
    assert summary["aurc_best"] == pytest.approx((0 + 1 / 6 + 4 / 9) / 3)
    assert summary["aurc"] == pytest.approx((0 + 1 / 2 + 4 / 9) / 3)
    assert summary["reliability"]["mask"]["accuracy"][8] == pytest.approx(2 / 3)
    path = tmp_path / "reliability.png"
    reliability_diagram({"points": summary, "auto": summary}, path, "three cases")
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
