"""Clicks, boxes, strokes and corrections in volumes by the head for volumes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.interaction.volume_head import CELLS, Cube, VolumeHead, cube_around, see, see_inside, unsee
from zeroseg.interaction.volume_session import (
    VolumeEvent,
    VolumeSession,
    VolumeSessions,
    load_volume_head,
    mend_volume,
    spacing_of,
)

SHAPE = (40, 44, 36)
FIRST, SECOND = ((14, 16, 17), (7, 8, 6)), ((29, 30, 18), (7, 6, 8))


def ellipsoid(centre, radii, shape=SHAPE) -> np.ndarray:
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


def scan(*objects: np.ndarray, noise: float = 0.1) -> np.ndarray:
    """(1, X, Y, Z): bright objects on darker ground, with noise."""
    image = np.random.default_rng(0).normal(0, noise, objects[0].shape)
    return (image + np.any(objects, 0))[None].astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture
def inferer(tiny_backbone) -> AttentionSegmentationInferer:
    return AttentionSegmentationInferer(tiny_backbone)


# What the head sees.


def test_a_cube_is_seen_and_put_back():
    places = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in SHAPE), indexing="ij")).sum(0)[None]
    cube = cube_around((20, 22, 18), 24, (1, 1, 2))
    assert cube.sides == (24, 24, 12)
    part = cube.part(SHAPE)
    assert part == (slice(8, 32), slice(10, 34), slice(12, 24))
    back = unsee(see(places, cube), cube, SHAPE)
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    assert (back - places[(slice(None), *part)])[inner].abs().max() < 0.6


def test_a_cube_may_reach_out_of_the_scan():
    cube = Cube((-10, -10, -10), (20, 20, 20))
    inside = see_inside(cube, SHAPE)
    assert inside.sum() == (CELLS / 2) ** 3 and inside[-1, -1, -1] == 1 and inside[0, 0, 0] == 0
    assert cube.cells(np.array([[0, 0, 0], [-10, 9, 30]])).tolist()[1][0] == 0
    assert see(torch.rand(1, *SHAPE), cube).shape == (1, CELLS, CELLS, CELLS)


def test_candidates_are_nested():
    torch.manual_seed(0)
    logits, quality = VolumeHead((8, 8, 8), (1, 1, 1))(torch.rand(2, 9, CELLS, CELLS, CELLS))
    assert logits.shape == (2, 3, CELLS, CELLS, CELLS) and quality.shape == (2, 3)
    assert (logits.diff(dim=1) >= 0).all()


# Answers.


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 5.0), (2.0, 2.0, 2.0)])
def test_a_click_gives_the_volume(inferer, spacing):
    # A ball in mm, whatever the voxels.
    radii = [max(2.5, 8 / s * min(spacing[:2])) for s in spacing]
    truth = ellipsoid((20, 22, 18), radii)
    result = inferer.segment(scan(truth), affine=np.diag([*spacing, 1]), points=[[20, 22, 18]])
    assert dice(result.labels > 0, truth) > 0.6
    assert result.labels.shape == result.confidence.shape == SHAPE and result.rule == "points"
    assert result.confidence.min() >= 0 and result.confidence.max() <= 1
    assert result.details["spacing_mm"] == list(spacing) and len(result.details["candidates"]) == 3


def test_a_box_and_a_stroke_and_a_metatensor(inferer):
    truth = ellipsoid(*FIRST)
    image = scan(truth)
    box = [7, 8, 11, 21, 24, 23]
    inside = np.zeros(SHAPE, bool)
    inside[7:22, 8:25, 11:24] = True
    boxed = inferer.segment(image, box=box).labels > 0
    assert dice(boxed, truth) > 0.6 and not (boxed & ~inside).any()
    strokes = np.zeros(SHAPE, np.uint8)
    strokes[10:19, 16, 17], strokes[30:36, 40, 5] = 1, 2
    drawn = inferer.segment(MetaTensor(image, affine=np.diag([2.0, 2.0, 2.0, 1.0])), scribbles=strokes)
    assert dice(drawn.labels > 0, truth) > 0.6 and drawn.details["spacing_mm"] == [2, 2, 2]
    assert (drawn.labels[strokes == 1] == 1).all() and (drawn.labels[strokes == 2] == 0).all()
    flat = inferer.segment(image, box=[7, 8, 17, 21, 24, 17])
    assert flat.labels.any()


def test_one_of_two_touching_objects_can_be_had(inferer):
    first, second = ellipsoid((14, 16, 17), (7, 8, 7)), ellipsoid((14, 31, 17), (7, 8, 7))
    image = scan(first, second)
    points, labels = [[14, 16, 17]], [1]
    mask = inferer.segment(image, points=points).labels > 0
    if mask[14, 31, 17]:
        points, labels = [*points, [14, 31, 17]], [1, 0]
        mask = inferer.segment(image, points=points, labels=labels).labels > 0
    assert dice(mask, first & ~second) > 0.6 and not mask[14, 31, 17]


def test_a_correction_in_another_slice_reaches_its_neighbours_and_nothing_else(inferer):
    truth, far = ellipsoid(*FIRST), ellipsoid(*SECOND)
    image = scan(truth, far)
    start = truth.copy()
    start[:, :, 19:] = False
    mask = inferer.segment(image, mask=start, points=[[14, 16, 21]], labels=[1]).labels > 0
    added = mask & ~start
    assert mask[14, 16, 21] and added.any((0, 1)).sum() >= 2, "more than the clicked slice"
    assert dice(mask, truth) > dice(start, truth)
    assert not (added & far).any()
    start = truth | far
    mask = inferer.segment(image, mask=start, points=[[29, 30, 18]], labels=[0]).labels > 0
    assert not mask[29, 30, 18] and (mask & truth).sum() >= 0.95 * truth.sum(), "the accepted object stays"
    assert (mask & far).sum() < 0.8 * far.sum()


def test_a_mark_of_the_background_on_what_is_far_too_large_finds_a_small_thing_in_a_large_one():
    """A faint ball in a ball ninety times as large, which a first click takes for the object."""
    shape = (64, 64, 48)
    small, large = ellipsoid((24, 30, 24), (5, 5, 5), shape), ellipsoid((32, 32, 24), (26, 24, 18), shape)
    image = 0.1 + 0.4 * large + 0.03 * small + np.random.default_rng(0).normal(0, 0.02, shape)
    wanted, unwanted = VolumeEvent(((24, 30, 24, 1),)), VolumeEvent(((44, 34, 24, 2),))

    def session() -> VolumeSession:
        return VolumeSession(load_volume_head(), torch.from_numpy(image.clip(0, 1).astype(np.float32)), (1, 1, 1))

    first = session().answer([wanted]).whole(shape)
    assert dice(first, large) > 0.8
    assert dice(session().answer([wanted, unwanted]).whole(shape), small) > 0.6
    # What the user began with is mended, and no more.
    mended = session().answer([wanted, unwanted], start=first).whole(shape)
    assert np.count_nonzero(mended) > 0.5 * np.count_nonzero(first)


def test_an_answer_depends_on_the_ordered_prompts_alone(tiny_backbone):
    image = scan(ellipsoid(*FIRST), ellipsoid(*SECOND))
    points, labels = [[14, 16, 17], [29, 30, 18], [14, 16, 22]], [1, 0, 1]
    one = AttentionSegmentationInferer(tiny_backbone)
    steps = [one.segment(image, points=points[:k], labels=labels[:k]).labels for k in (1, 2, 3)]
    fresh = AttentionSegmentationInferer(tiny_backbone).segment(image, points=points, labels=labels).labels
    assert np.array_equal(fresh, steps[2])
    assert np.array_equal(one.segment(image, points=points[:1]).labels, steps[0]), "undo"
    assert np.array_equal(one.segment(image, points=points, labels=labels).labels, steps[2]), "redo"


@pytest.mark.parametrize("seed", range(3))
def test_every_mark_has_its_label(inferer, seed):
    rng = np.random.default_rng(seed)
    image = scan(ellipsoid(*FIRST))
    points = rng.integers(0, SHAPE, (6, 3)).tolist()
    labels = [1, *rng.integers(0, 2, 5).tolist()]
    result = inferer.segment(image, points=points, labels=labels)
    assert [int(result.labels[tuple(p)]) for p in points] == labels


def test_candidates_of_the_first_click_are_nested(inferer):
    image = scan(ellipsoid(*FIRST))
    masks = [inferer.segment(image, points=[[14, 16, 17]], candidate=k).labels > 0 for k in (1, 2, 3)]
    assert not (masks[0] & ~masks[1]).any() and not (masks[1] & ~masks[2]).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice(inferer, axis):
    shape = [40, 40, 40]
    shape[axis] = 1
    centre = [0 if a == axis else 20 for a in range(3)]
    truth = ellipsoid(centre, [9] * 3, tuple(shape))
    result = inferer.segment(scan(truth), points=[centre])
    assert result.labels.shape == tuple(shape) and result.labels[tuple(centre)] == 1


def test_clicks_in_air_and_on_nothing_are_answered(inferer):
    image = scan(ellipsoid(*FIRST), noise=0.0)
    result = inferer.segment(image, points=[[36, 3, 3]])
    assert result.labels[36, 3, 3] == 1
    constant = inferer.segment(np.full((1, *SHAPE), 3.0, np.float32), points=[[20, 20, 20]])
    assert constant.labels[20, 20, 20] == 1


def test_bad_input_is_one_line(inferer):
    image = scan(ellipsoid(*FIRST))
    broken = image.copy()
    broken[0, 3, 3, 3] = np.nan
    for volume, prompt, message in (
        (broken, {}, "NaN or infinite"),
        (image[None], {}, r"expected \(C, H, W\) or \(C, X, Y, Z\)"),
        (image, {"points": [[40, 0, 0]]}, "outside the image"),
        (image, {"affine": np.eye(3)}, "4 x 4"),
        (image, {"affine": np.zeros((4, 4))}, "no extent"),
        (image, {"mask": np.zeros((3, 3, 3), bool)}, "image's shape"),
        (image, {"candidate": 4}, "candidate must be"),
    ):
        with pytest.raises(ZeroSegError, match=message) as error:
            inferer.segment(volume, **{"points": [[14, 16, 17]], **prompt})
        assert "\n" not in str(error.value)


def test_contradictory_marks_are_said(inferer):
    result = inferer.segment(scan(ellipsoid(*FIRST)), points=[[14, 16, 17], [14, 16, 17]], labels=[1, 0])
    assert result.labels[14, 16, 17] == 0 and any("later mark stands" in note for note in result.notes)


# Memory.


def test_sessions_stay_below_their_limit():
    sessions = VolumeSessions(limit=3 * 4 * 1000)
    for k in range(5):
        sessions.get(torch.full((10, 10, 10), float(k)), (1.0, 1.0, 1.0))
    assert len(sessions) == 3
    first = sessions.get(torch.full((10, 10, 10), 4.0), (1.0, 1.0, 1.0))
    assert sessions.get(torch.full((10, 10, 10), 4.0), (1.0, 1.0, 1.0)) is first
    assert sessions.get(torch.full((10, 10, 10), 4.0), (1.0, 1.0, 2.0)) is not first
    sessions.get(torch.zeros(20, 20, 20), (1.0, 1.0, 1.0))
    assert len(sessions) == 0, "one that is larger than the limit is not kept"


def test_cost_follows_the_object_and_not_the_scan():
    head = VolumeHead((8, 8, 8), (1, 1, 1)).eval()
    session = VolumeSession(head, torch.rand(300, 300, 60), (0.5, 0.5, 3.0))
    start = np.zeros(session.shape, bool)
    start[100:120, 100:120, 20:24] = True
    answer = session.answer([VolumeEvent(((110, 110, 25, 1),))], start)
    assert answer.mask.size < 0.1 * start.size


@pytest.mark.parametrize("kind", [1, 2])
def test_the_memory_of_a_correction_is_a_few_numbers_a_voxel(kind):
    before = np.zeros((120, 110, 80), bool)
    before[20:90, 20:90, 20:60] = True
    proposed = np.stack([before ^ (np.arange(80) > 50)] * 3)
    at = [50, 50, 70] if kind == 1 else [50, 50, 55]
    marks = np.array([[50, 50, 30, 1], [5, 5, 5, 2], [*at, kind]])
    tracemalloc.start()
    masks = mend_volume(before, proposed, marks[-1:], marks, (0.8, 0.8, 2.5), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (masks[:, *at] == (kind == 1)).all() and (masks != before).any()
    assert peak < 50 * before.size, peak / before.size


def test_who_waits_no_more_stops_it():
    def gone():
        raise InterruptedError

    session = VolumeSession(VolumeHead((8, 8, 8), (1, 1, 1)).eval(), torch.rand(20, 20, 20), (1.0, 1.0, 1.0))
    with pytest.raises(InterruptedError):
        session.answer([VolumeEvent(((10, 10, 10, 1),))], pause=gone)


# Mending.


def test_a_mend_is_connected_and_nearer_to_its_mark_than_to_the_other_kind_in_mm():
    before = np.zeros((20, 20, 20), bool)
    proposed = np.ones((1, 20, 20, 20), bool)
    newest = np.array([[5, 10, 10, 1]])
    marks = np.array([[15, 10, 10, 2], [5, 10, 10, 1]])
    mask = mend_volume(before, proposed, newest, marks, (1.0, 1.0, 1.0), 2)[0]
    assert mask[:10].all() and not mask[11:].any()
    mask = mend_volume(before, proposed, newest, np.array([[5, 10, 2, 2], [5, 10, 10, 1]]), (1.0, 1.0, 5.0), 2)[0]
    assert not mask[:, :, :6].any()
    proposed[:, :, :, 15] = False
    mask = mend_volume(before, proposed, newest, newest, (1.0, 1.0, 1.0), 1)[0]
    assert not mask[:, :, 16:].any(), "not connected to the mark"


def test_spacing_of_an_affine():
    turned = np.array([[0, 2.0, 0, 5], [3.0, 0, 0, 1], [0, 0, 4.0, 2], [0, 0, 0, 1]])
    assert spacing_of(turned) == (3, 2, 4) and spacing_of(None) == (1, 1, 1)
