"""Volumes: geometry and prompts with a real backbone, following with a 2-D rule that is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from zeroseg.attention import Segmentation
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer

SHAPE = (20, 24, 28)


def ball(center=(9, 12, 14), radius: float = 6.0) -> np.ndarray:
    """(X, Y, Z) bool."""
    x, y, z = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 + (z - center[2]) ** 2 < radius**2


class Threshold(AttentionSegmentationInferer):
    """The volume logic over a 2-D rule whose answers are known: bright parts that hold a click, or all of them."""

    def __init__(self, **settings):
        super().__init__(refiner="rules", **settings)
        self.seen: list[dict] = []

    def check(self):
        pass

    def encode_prepared(self, full):
        return full[0].numpy() > 0.5

    def predict(self, encoded, select=None, points=None, labels=None, box=None, text=None):
        self.seen.append({"rule": select, "points": points, "labels": labels, "box": box, "size": encoded.shape})
        mask, absent = encoded.copy(), False
        if select == "points":
            parts, _ = ndimage.label(encoded)
            hit = {parts[round(y), round(x)] for (x, y), kind in zip(points, labels, strict=True) if kind} - {0}
            mask = np.isin(parts, list(hit)) if hit else np.zeros_like(encoded)
            for (x, y), kind in zip(points, labels, strict=True):
                mask[round(y), round(x)] = bool(kind)
        elif select == "box":
            inside = np.zeros_like(mask)
            x0, y0, x1, y1 = (round(v) for v in box)
            inside[y0 : y1 + 1, x0 : x1 + 1] = True
            mask &= inside
        elif select == "segments":
            mask = ndimage.label(encoded)[0]
        elif select == "text":
            absent = not mask.any()
        confidence = np.full(encoded.shape, 0.75, np.float32)
        return Segmentation(mask.astype(np.uint8), confidence, [], select, absent, {"encode": 0.5}, {"text": text})


@pytest.fixture(scope="module")
def tiny(tiny_backbone):
    def make(**settings):
        return AttentionSegmentationInferer(tiny_backbone, resolution=64, **settings)

    return make


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("rule", ["auto", "segments", "points", "box"])
def test_a_real_backbone_along_every_axis(tiny, axis, rule):
    shape = (5, 6, 7)
    volume = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    volume[:, 1:4, 2:5, 2:6] += 2
    prompt = {"points": {"points": [[2, 3, 4]]}, "box": {"box": [1, 2, 2, 3, 4, 5]}}.get(rule, {})
    result = tiny(slice_axis=axis).segment(volume, rule, **prompt)
    assert result.labels.shape == result.confidence.shape == shape
    assert result.labels.dtype == np.uint8 and result.confidence.dtype == np.float32
    assert result.confidence.min() >= 0 and result.confidence.max() <= 1
    assert result.rule == rule and not result.absent
    assert len(result.scores) == result.labels.max()
    assert all(0 <= s <= 1 for s in result.scores)
    assert sum(result.seconds.values()) > 0
    if rule == "points":
        assert result.labels[2, 3, 4] == 1
    if rule == "box":
        outside = np.ones(shape, bool)
        outside[1:4, 2:5, 2:6] = False
        assert not result.labels[outside].any()
    if rule == "segments":
        assert (result.labels > 0).all(), "every voxel carries its segment"


def test_the_same_volume_gives_the_same_result(tiny):
    volume = np.random.default_rng(0).random((2, 5, 6, 3)).astype(np.float32)
    first, second = (tiny().segment(volume, "segments") for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.confidence, second.confidence)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"points": [[2, 3]]}, "must have 3 numbers: x, y, z"),
        ({"points": [[2, 3, 7]]}, r"outside the image: x 0..4, y 0..5, z 0..6"),
        ({"points": [[-1, 3, 3]]}, "outside the image"),
        ({"labels": [1]}, "labels are given without points"),
        ({"points": [[2, 3, 4]], "labels": [0]}, "at least one click with label 1"),
        ({"points": [[2, 3, 4]], "labels": [1, 0]}, "labels must hold one 0 or 1 for each of the 1 points"),
        ({"box": [1, 2, 3, 4]}, "box must be 6 numbers"),
        ({"box": [1, 2, 2, 3, 9, 5]}, "inside the image"),
        ({"box": [3, 2, 2, 1, 4, 5]}, "low corner first"),
        ({"select": "text"}, "needs a prompt"),
        ({"select": "everything"}, "unknown select"),
        ({"text": " "}, "must be words"),
    ],
)
def test_prompts_that_do_not_fit(tiny, prompt, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        tiny().segment(np.random.default_rng(0).random((1, 5, 6, 7)), **prompt)
    assert "\n" not in str(error.value)


def test_contrast_is_stretched_over_the_whole_volume():
    volume = np.where(ball(), 1.0, 0.0)[None]
    seen = []

    class Watching(Threshold):
        def encode_prepared(self, full):
            seen.append(float(full.max()))
            return super().encode_prepared(full)

    Watching().segment(volume, "auto")
    assert seen[0] == 0 and seen[14] == 1, "an empty slice stays empty"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_points_follow_the_object_to_its_ends_and_no_further(axis):
    wanted, other = ball(), ball((16, 20, 25), 3.0)
    inferer = Threshold(slice_axis=axis)
    result = inferer.segment((wanted | other)[None].astype(np.float32), points=[[9, 12, 14]])
    inside = np.flatnonzero(wanted.any(tuple(a for a in range(3) if a != axis)))
    assert result.details["clicked_slices"] == [(9, 12, 14)[axis]]
    found = result.details["slices"]
    assert found == list(range(found[0], found[-1] + 1)), "one run of slices"
    # The caps change size by more than the growth limit from one slice to the next, so one slice may be left out.
    assert set(inside[1:-1]) <= set(found) <= set(inside)
    assert not (result.labels.astype(bool) & ~wanted).any()
    run = np.take(wanted, found, axis)
    assert np.array_equal(np.take(result.labels, found, axis).astype(bool), run)
    assert len(inferer.seen) <= len(found) + 2, "only the slices it needs, and one beyond each end"


def test_following_stops_where_the_object_explodes():
    volume = np.zeros(SHAPE)
    volume[8:12, 10:14, 5:15] = 1
    volume[:, :, 15:] = 1  # four times the size, all at once
    result = Threshold().segment(volume[None], points=[[9, 11, 8]])
    assert result.details["slices"] == list(range(5, 15))


def test_two_clicked_slices_meet_between():
    volume = np.zeros(SHAPE)
    volume[8:12, 10:14, 3:20] = 1
    inferer = Threshold()
    result = inferer.segment(volume[None], points=[[9, 11, 5], [9, 11, 16]])
    assert result.details["clicked_slices"] == [5, 16]
    assert np.array_equal(result.labels, volume.astype(np.uint8))
    assert result.scores == [pytest.approx(0.75)]


def test_a_negative_click_counts_in_its_own_slice():
    volume = np.zeros(SHAPE)
    volume[8:12, 10:14, 3:9] = 1
    result = Threshold().segment(volume[None], points=[[9, 11, 5], [8, 10, 7]], labels=[1, 0])
    assert result.labels[8, 10, 7] == 0 and result.labels[8, 10, 6] == 1
    assert result.details["clicked_slices"] == [5], "a slice with only negative clicks starts nothing"


def test_clicks_and_boxes_reach_the_slice_as_column_and_row():
    volume = ball()[None].astype(np.float32)
    for axis, point, box in ((2, [12, 9], [7, 5, 15, 13]), (1, [14, 9], [9, 5, 18, 13]), (0, [14, 12], [9, 7, 18, 15])):
        inferer = Threshold(slice_axis=axis)
        inferer.segment(volume, points=[[9, 12, 14]])
        assert [list(p) for p in inferer.seen[0]["points"]] == [point]
        assert inferer.seen[0]["size"] == tuple(n for i, n in enumerate(SHAPE) if i != axis)
        inferer = Threshold(slice_axis=axis)
        result = inferer.segment(volume, box=[5, 7, 9, 13, 15, 18])
        assert list(inferer.seen[0]["box"]) == box
        low, high = (5, 7, 9)[axis], (13, 15, 18)[axis]
        assert len(inferer.seen) == high - low + 1
        expected = np.zeros(SHAPE, bool)
        expected[5:14, 7:16, 9:19] = ball()[5:14, 7:16, 9:19]
        assert np.array_equal(result.labels.astype(bool), expected)


def test_a_box_and_clicks_by_the_rules(tiny):
    """The box bounds every slice; a click counts in its own, a background click where nothing else was clicked too."""
    volume = np.random.default_rng(0).random((1, 8, 9, 7)).astype(np.float32)
    volume[:, 2:6, 2:7, 2:6] += 2
    box = [1, 1, 2, 6, 7, 5]
    outside = np.ones(volume.shape[1:], bool)
    outside[1:7, 1:8, 2:6] = False
    plain = tiny(refiner="rules").segment(volume, box=box)
    for points, labels in (([[3, 4, 4]], [1]), ([[3, 4, 4]], [0]), ([[3, 4, 4], [4, 5, 6]], [0, 1])):
        result = tiny(refiner="rules").segment(volume, "points", points=points, labels=labels, box=box)
        assert [int(result.labels[tuple(p)]) for p in points] == labels and result.rule == "points"
        clicked = np.zeros(outside.shape, bool)
        clicked[tuple(np.transpose(points))] = True
        assert not result.labels[outside & ~clicked].any()
        others = [k for k in range(2, 6) if k not in {p[2] for p in points}]
        assert np.array_equal(result.labels[:, :, others], plain.labels[:, :, others])


def test_segments_keep_their_label_through_the_slices():
    first, second = ball((5, 6, 10), 4.5), ball((13, 17, 14), 5.5)
    result = Threshold().segment((first | second)[None].astype(np.float32), "segments")
    assert np.array_equal(result.labels == 1, second), "the larger one is ranked first"
    assert np.array_equal(result.labels == 2, first)


def test_text_is_absent_only_if_no_slice_has_it():
    inferer = Threshold()
    present = inferer.segment(ball()[None].astype(np.float32), text="polyp")
    assert not present.absent and np.array_equal(present.labels.astype(bool), ball())
    assert [s["index"] for s in present.details["slices"]] == list(range(SHAPE[2]))
    absent = inferer.segment(np.zeros((1, *SHAPE), np.float32), text="polyp")
    assert absent.absent and not absent.labels.any() and absent.scores == []


def test_seconds_add_up():
    result = Threshold().segment(ball()[None].astype(np.float32), "auto")
    assert result.seconds == {"encode": 0.5 * SHAPE[2]}


def test_a_single_slice_is_a_volume_too(tiny):
    result = tiny().segment(torch.rand(1, 9, 9, 1, generator=torch.Generator().manual_seed(0)), points=[[4, 4, 0]])
    assert result.labels.shape == (9, 9, 1) and result.labels[4, 4, 0] == 1


@pytest.mark.parametrize("prompt", [{"points": [[9, 12, 0]]}, {"box": [3, 6, 0, 15, 18, 0]}])
def test_the_only_slice_of_a_volume_has_candidates_as_an_image_has(tiny_backbone, prompt):
    slice_ = ball()[:, :, 14].astype(np.float32) + np.random.default_rng(0).normal(0, 0.1, SHAPE[:2]).astype(np.float32)
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    flat = {k: [[v[0][1], v[0][0]]] if k == "points" else [v[1], v[0], v[4], v[3]] for k, v in prompt.items()}
    for candidate in (1, 2, 3):
        whole = inferer.segment(slice_[None, :, :, None], **prompt, candidate=candidate)
        image = inferer.segment(slice_[None], **flat, candidate=candidate)
        np.testing.assert_array_equal(whole.labels[..., 0], image.labels)
        assert (
            whole.details["candidate"] == candidate and whole.details["estimated_iou"] == image.details["estimated_iou"]
        )
    rules = inferer.replace(refiner="rules").segment(slice_[None, :, :, None], **prompt, candidate=2)
    assert any("candidate is ignored" in note for note in rules.notes)


def test_rules_obey_strokes_in_slices_that_were_not_clicked():
    class Stroked(Threshold):
        def predict(self, encoded, select=None, scribbles=None, **prompt):
            return super().predict(encoded, select, **prompt)

    strokes = np.zeros(SHAPE, np.uint8)
    strokes[8:11, 11:14, 16] = 2
    result = Stroked().segment(ball()[None].astype(np.float32), points=[[9, 12, 14]], scribbles=strokes)
    assert result.labels[9, 12, 15] == 1 and result.labels[9, 16, 16] == 1
    assert not result.labels[strokes == 2].any()
