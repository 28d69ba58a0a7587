"""One identity per segment from slice to slice."""

from __future__ import annotations

import numpy as np
import pytest

from zeroseg.attention.linking import MAX_LABEL, link_slices


def test_a_moving_segment_keeps_its_label_whatever_it_was_called():
    a, b = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    a[2:12, 2:12], a[14:18, 14:18] = 1, 2
    b[3:13, 3:13], b[14:18, 13:17] = 2, 1
    first, second = link_slices([a, b])
    assert first[5, 5] == second[8, 8] == 1, "the largest by volume comes first"
    assert first[15, 15] == second[15, 15] == 2
    assert first.dtype == second.dtype == np.uint8


def test_a_segment_without_partner_gets_a_new_label():
    a, b = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    a[:4, :4], b[6:, 6:] = 1, 1
    first, second = link_slices([a, b])
    assert first.max() != second.max()
    assert {first.max(), second.max()} == {1, 2}


@pytest.mark.parametrize(("min_iou", "linked"), [(0.33, True), (0.34, False)])
def test_the_least_iou_decides(min_iou, linked):
    a, b = np.zeros((1, 12), np.uint8), np.zeros((1, 12), np.uint8)
    a[0, :6], b[0, 3:9] = 1, 1  # IoU 3 / 9
    first, second = link_slices([a, b], min_iou)
    assert (first.max() == second.max()) == linked


def test_matching_is_one_to_one_and_best_overall():
    a, b = np.zeros((1, 20), np.uint8), np.zeros((1, 20), np.uint8)
    a[0, :10] = 1
    b[0, :6], b[0, 6:10] = 1, 2  # a split: the larger part goes on, the other is new
    first, second = link_slices([a, b])
    assert second[0, 0] == first[0, 0]
    assert second[0, 8] not in (0, first[0, 0])


def test_a_gap_ends_an_identity():
    a, empty = np.zeros((5, 5), np.uint8), np.zeros((5, 5), np.uint8)
    a[:3, :3] = 1
    first, gap, last = link_slices([a, empty, a])
    assert not gap.any()
    assert first.max() != last.max()


def test_background_is_never_linked_and_labels_have_no_gaps():
    rng = np.random.default_rng(0)
    slices = [rng.integers(0, 6, (9, 9)).astype(np.uint8) for _ in range(5)]
    linked = link_slices(slices)
    for before, after in zip(slices, linked, strict=True):
        assert np.array_equal(before == 0, after == 0)
        assert len(np.unique(before)) == len(np.unique(after)), "segments of one slice stay apart"
    used = np.unique(np.stack(linked))
    assert used.tolist() == list(range(len(used)))
    volumes = np.bincount(np.stack(linked).ravel())[1:]
    assert (np.diff(volumes) <= 0).all(), "ranked by volume"


def test_too_many_segments_lose_the_smallest():
    first = np.arange(1, 201, dtype=np.uint8).repeat(2).reshape(1, 400)
    second = np.zeros((1, 400), np.uint8)
    second[0, :100] = np.arange(1, 101)  # 100 of one pixel, where the first slice has pairs (IoU 1/2 or less)
    linked = link_slices([first, second], min_iou=0.9)
    assert max(s.max() for s in linked) == MAX_LABEL
    assert (linked[0] > 0).all(), "the 200 larger ones stay"
    assert len(np.unique(linked[1])) - 1 == MAX_LABEL - 200


def test_nothing_to_link():
    assert link_slices([]) == []
    assert not link_slices([np.zeros((3, 3), np.uint8)])[0].any()
