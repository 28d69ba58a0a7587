"""Prompts answered by the head: replay, obedience, corrections that stay where they are made."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention_maps import three_squares
from zeroseg.attention import EncodedImage
from zeroseg.backbones.weights import MODELS
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.interaction.head import Window
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.interaction.promptable import Event, Session, events_of, find_whole, load_head, mend
from zeroseg.interaction.prompts import check_prompts
from zeroseg.interaction.settings import Settings

SIZE = (64, 64)
WHOLE = Window(0, 0, *SIZE)


@pytest.fixture(scope="module")
def encoded() -> EncodedImage:
    return three_squares()


@pytest.fixture(scope="module")
def inferer(tiny_backbone) -> AttentionSegmentationInferer:
    return AttentionSegmentationInferer(tiny_backbone, refiner="head")


ALONE, TOUCHING, GROUND = [48, 48], [16, 18], [4, 60]


def truth(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_a_click_gives_the_object(encoded, inferer):
    mask = inferer.predict(encoded.fresh(), points=[ALONE]).labels > 0
    assert dice(mask, truth(np.s_[40:56], np.s_[40:56])) > 0.8


def test_an_answer_depends_on_the_ordered_prompts_alone(encoded, inferer):
    points, labels = [ALONE, [16, 18], GROUND, [41, 41]], [1, 1, 0, 0]
    fresh = encoded.fresh()
    steps = [inferer.predict(fresh, points=points[:k], labels=labels[:k]).labels for k in (1, 2, 3, 4)]
    assert np.array_equal(inferer.predict(encoded.fresh(), points=points, labels=labels).labels, steps[3])
    assert np.array_equal(inferer.predict(fresh, points=points[:2], labels=labels[:2]).labels, steps[1]), "undo"
    assert np.array_equal(inferer.predict(fresh, points=points, labels=labels).labels, steps[3]), "redo"


@pytest.mark.parametrize("seed", range(4))
def test_every_mark_has_its_label(encoded, inferer, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 64, (12, 2))
    points = points[np.unique(points @ [64, 1], return_index=True)[1]]
    labels = [1, *rng.integers(0, 2, len(points) - 1)]
    result = inferer.predict(encoded.fresh(), points=points.tolist(), labels=[int(v) for v in labels])
    for (x, y), label in zip(points, labels, strict=True):
        assert result.labels[y, x] == label


def test_a_correction_far_from_an_edge_does_not_move_it(encoded, inferer):
    one = inferer.predict(encoded.fresh(), points=[ALONE]).labels > 0
    two = inferer.predict(encoded.fresh(), points=[ALONE, [30, 18]]).labels > 0
    assert two[18, 30]
    changed = np.argwhere(one != two)
    assert len(changed) and np.array_equal(one[44:52, 44:52], two[44:52, 44:52])


@pytest.mark.parametrize("region", [np.s_[40:56, 40:56], np.s_[43:53, 42:55]], ids=["whole", "a part"])
def test_a_region_points_at_its_object(encoded, region):
    answer, details = find_whole(encoded.fresh(), truth(*region), Settings())
    assert details["by"] == "head" and min(details["click"]) >= 45 and max(details["click"]) <= 50
    assert 0 < details["estimated_iou"] <= 1 and 0 < details["agreement"] <= 1
    assert dice(answer.mask, truth(np.s_[40:56], np.s_[40:56])) > 0.9
    assert answer.confidence.dtype == np.float32 and answer.confidence.min() >= 0 and answer.confidence.max() <= 1


@pytest.mark.parametrize(
    ("regions", "asked"),
    [
        ([], False),
        # Two alike: neither is the object alone.
        ([np.s_[8:24, 8:24], np.s_[40:56, 40:56]], False),
        ([np.s_[0:64, 0:6]], True),
    ],
    ids=["nothing", "two objects", "no object"],
)
def test_a_region_that_is_no_one_object_stands(encoded, regions, asked):
    region = np.zeros(SIZE, bool)
    for part in regions:
        region[part] = True
    answer, details = find_whole(encoded.fresh(), region, Settings())
    assert answer is None and details["by"] == "rules" and ("click" in details) == asked


def test_the_automatic_mask_by_head_and_by_rules(encoded, inferer):
    by_head, by_rules = (i.predict(encoded.fresh(), "auto") for i in (inferer, inferer.replace(refiner="rules")))
    assert by_head.details["mask"]["by"] in ("head", "rules")
    assert by_rules.details.keys() == {"threshold"}, "no head takes part"
    if by_head.details["mask"]["by"] == "rules":
        assert np.array_equal(by_head.labels, by_rules.labels)


def test_a_mark_that_the_network_ignores_changes_a_disc():
    before = truth(np.s_[16:48], np.s_[16:48])
    marks = np.zeros(SIZE, np.uint8)
    marks[32, 32] = 2
    stubborn = np.where(before, 9.0, -9.0).astype(np.float32)
    after = mend(before, stubborn[None], WHOLE, [(32, 32, 2)], marks)[0]
    assert not after[32, 32] and after[17, 17] and 50 < np.count_nonzero(before & ~after) < 700


def test_only_what_is_connected_to_the_mark_changes():
    before, wish = truth(np.s_[10:30], np.s_[10:30]), truth(np.s_[10:40], np.s_[10:30])
    wish[50:60, 50:60] = True
    marks = np.zeros(SIZE, np.uint8)
    marks[20, 20] = marks[35, 20] = 1
    logits = np.where(wish, 5.0, -5.0).astype(np.float32)
    after = mend(before, logits[None], WHOLE, [(35, 20, 1)], marks)[0]
    assert np.array_equal(after, truth(np.s_[10:40], np.s_[10:30]))


def test_a_change_stops_where_a_mark_of_the_other_kind_is_nearer():
    before = np.zeros(SIZE, bool)
    before[:, :20] = True
    marks = np.zeros(SIZE, np.uint8)
    marks[32, 60], marks[32, 25] = 2, 1
    logits = np.full(SIZE, 5.0, np.float32)
    after = mend(before, logits[None], WHOLE, [(32, 25, 1)], marks)[0]
    assert after[32, 40] and not after[32, 44]


def test_candidates_are_nested_and_the_best_is_shown(encoded, inferer):
    result = inferer.predict(encoded.fresh(), points=[TOUCHING])
    each = [inferer.predict(encoded.fresh(), points=[TOUCHING], candidate=k).labels > 0 for k in (1, 2, 3)]
    assert (each[0] <= each[1]).all() and (each[1] <= each[2]).all()
    assert np.array_equal(each[result.details["candidate"] - 1], result.labels > 0)
    assert len(result.details["candidates"]) == 3 and 0 <= result.details["estimated_iou"] <= 1
    with pytest.raises(ZeroSegError, match="candidate must be 1, 2 or 3"):
        inferer.predict(encoded.fresh(), points=[TOUCHING], candidate=4)


def test_scribbles_box_and_a_mask_to_start_from(encoded, inferer):
    square = truth(np.s_[40:56], np.s_[40:56])
    strokes = np.zeros(SIZE, np.int32)
    strokes[48, 43:53], strokes[36, 36:60] = 1, 2
    drawn = inferer.predict(encoded.fresh(), scribbles=strokes).labels > 0
    assert drawn[strokes == 1].all() and not drawn[strokes == 2].any() and dice(drawn, square) > 0.7
    boxed = inferer.predict(encoded.fresh(), box=[40, 40, 55, 55]).labels > 0
    assert dice(boxed, square) > 0.7
    given = truth(np.s_[40:56], np.s_[40:56])
    given[8:28, 8:24] = True
    assert np.array_equal(inferer.predict(encoded.fresh(), mask=given).labels > 0, given), (
        "nothing asked, nothing changed"
    )
    less = inferer.predict(encoded.fresh(), mask=given, points=[TOUCHING], labels=[0]).labels > 0
    assert not less[18, 16] and np.array_equal(less[40:], given[40:])


def test_contradictions_are_said_and_the_later_mark_stands(encoded, inferer):
    result = inferer.predict(encoded.fresh(), points=[ALONE, ALONE], labels=[1, 0])
    assert result.labels[48, 48] == 0 and any("later mark stands" in note for note in result.notes)


def test_background_clicks_wait_for_the_object(encoded, inferer):
    late = inferer.predict(encoded.fresh(), points=[GROUND, ALONE], labels=[0, 1]).labels
    assert late[48, 48] and not late[60, 4]


def test_a_thousand_clicks(encoded, inferer):
    rng = np.random.default_rng(0)
    points = [ALONE, *rng.integers(0, 64, (999, 2)).tolist()]
    square = truth(np.s_[40:56], np.s_[40:56])
    labels = [int(square[y, x]) for x, y in points]
    mask = inferer.predict(encoded.fresh(), points=points, labels=labels).labels > 0
    assert all(mask[y, x] == label for (x, y), label in zip(points, labels, strict=True))


def test_a_session_answers_only_what_is_new(encoded):
    head, calls = load_head(), []
    session = Session(head, encoded.image, encoded.readout)
    events = [Event(((48, 48, 1),)), Event(((60, 4, 2),)), Event(((41, 41, 2),))]
    inner = session._next
    session._next = lambda *given: calls.append(1) or inner(*given)
    session.answer(events[:2])
    session.answer(events)
    assert len(calls) == 3
    session.answer(events)
    assert len(calls) == 3


def test_damaged_weights_are_refused(tmp_path):
    folder = shutil.copytree(MODELS / "interaction", tmp_path / "interaction")
    data = bytearray((folder / "head.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "head.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"head\.safetensors"):
        load_head(folder)
    with pytest.raises(WeightsError, match="refiner rules"):
        load_head(tmp_path / "nowhere")


def test_a_mark_of_the_background_on_the_wrong_object_finds_a_small_thing_in_a_large_one():
    """A faint disc in one seventy times as large, which a first click takes for the object."""
    rows, columns = np.ogrid[:256, :256]
    large = (rows - 128) ** 2 + (columns - 128) ** 2 < 100**2
    small = (rows - 110) ** 2 + (columns - 100) ** 2 < 12**2
    gray = 0.1 + 0.4 * large + 0.03 * small + np.random.default_rng(0).normal(0, 0.02, large.shape)
    image = torch.from_numpy(gray.clip(0, 1).astype(np.float32)).expand(3, -1, -1)
    wanted, unwanted = Event(((110, 100, 1),)), Event(((150, 170, 2),))

    def session() -> Session:
        return Session(load_head(), image, None)

    first = session().answer([wanted]).mask
    assert dice(first, large) > 0.9
    assert dice(session().answer([wanted, unwanted]).mask, small) > 0.7
    # What the user began with is mended, and no more.
    assert np.count_nonzero(session().answer([wanted, unwanted], start=first).mask) > 0.5 * np.count_nonzero(first)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(("mended", "found", "anew"), [(0.5, 0.7, True), (0.5, 0.4, False), (0.7, 0.9, False)])
def test_an_unsure_answer_is_looked_for_anew_whatever_was_marked(monkeypatch, kind, mended, found, anew):
    session = Session(load_head(), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), None)
    first, second = Event(((20, 20, 1),)), Event(((40, 40, kind),))
    before = session.answer([first])
    ways = {"_mend": (mended, np.ones(SIZE, bool)), "_find_by_agreement": (found, np.zeros(SIZE, bool))}
    for way, (estimate, mask) in ways.items():
        answer = replace(before, mask=mask, estimates=(estimate,) * 3)
        monkeypatch.setattr(session, way, lambda *_, answer=answer: answer)
    assert bool(session.answer([first, second]).mask.all()) is not anew


def test_strokes_on_the_background_wait_for_an_object(encoded, inferer):
    strokes = np.zeros(SIZE, np.uint8)
    strokes[2:6, 20:60] = 2
    asked = {"points": [ALONE], "scribbles": strokes}
    events = events_of(encoded, check_prompts(SIZE, **asked))
    assert len(events) == 1 and {kind for *_, kind in events[0].marks} == {1, 2}
    answer = inferer.predict(encoded.fresh(), **asked).labels > 0
    assert dice(answer, truth(np.s_[40:56], np.s_[40:56])) > 0.8 and not answer[strokes == 2].any()


def test_an_empty_mask_says_nothing(encoded, inferer):
    empty, box = np.zeros(SIZE, bool), [38, 38, 57, 57]
    for asked in ({"points": [ALONE]}, {"box": box}):
        plain = inferer.predict(encoded.fresh(), **asked).labels
        assert np.array_equal(inferer.predict(encoded.fresh(), mask=empty, **asked).labels, plain)
    with pytest.raises(ZeroSegError, match="at least one click"):
        inferer.predict(encoded, mask=empty)


def test_a_draft_that_the_working_grid_loses_says_nothing(encoded, inferer, monkeypatch):
    draft = np.zeros(SIZE, bool)
    draft[5, 5] = True
    plain = inferer.predict(encoded.fresh(), points=[ALONE]).labels
    monkeypatch.setattr("zeroseg.interaction.promptable.resized", lambda mask, size: np.zeros(size, bool))
    assert np.array_equal(inferer.predict(encoded.fresh(), points=[ALONE], mask=draft).labels, plain)


def test_an_answer_that_failed_is_not_taken_for_the_one_before(encoded, monkeypatch):
    session = Session(load_head(), encoded.image, encoded.readout)
    one, other = Event(((48, 48, 1),)), Event(((44, 30, 1),))
    first = session.answer([one])
    session.answer([one, other])
    with monkeypatch.context() as patch:
        patch.setattr(session, "_next", lambda *given: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            session.answer([one, Event(((20, 50, 1),))])
    assert np.array_equal(session.answer([one]).mask, first.mask)
