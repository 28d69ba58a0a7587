"""What strokes say of all other pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.attention.readout import Readout
from zeroseg.interaction.promptable import Event, Session, load_head
from zeroseg.interaction.strokes import stroke_odds

SIDE = 96


def disc(radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    return rows**2 + columns**2 <= radius**2


def noisy(values: np.ndarray) -> torch.Tensor:
    """(H, W) grey values -> (3, H, W) in [0, 1] with noise."""
    noise = np.random.default_rng(0).normal(0, 0.03, values.shape)
    return torch.from_numpy((values + noise).clip(0, 1)).float().expand(3, -1, -1)


def drawn(**strokes: tuple) -> np.ndarray:
    marks = np.zeros((SIDE, SIDE), np.uint8)
    for kind, place in (("object", 1), ("background", 2)):
        marks[strokes[kind]] = place
    return marks


def test_pixels_like_an_objects_stroke_are_more_likely_than_not():
    image = noisy(np.where(disc(24), 0.7, 0.4))
    odds = stroke_odds(image, None, drawn(object=np.s_[48, 38:58], background=np.s_[10, 20:80]))
    assert odds.shape == (SIDE, SIDE) and np.isfinite(odds).all()
    assert (odds[disc(20)] > 0).mean() > 0.95 and (odds[~disc(28)] < 0).mean() > 0.95


def test_attention_tells_what_looks_alike():
    image = noisy(np.full((SIDE, SIDE), 0.5))
    coordinates = np.zeros((12, 16 * 16), np.float32)
    coordinates[0] = np.repeat([[0.0] * 8 + [1.0] * 8], 16, 0).ravel()
    readout = Readout(16, np.ones(1, np.float32), coordinates, np.zeros(256, np.float32))
    odds = stroke_odds(image, readout, drawn(object=np.s_[20:60, 80], background=np.s_[20:60, 16]))
    assert (odds[:, 52:] > 0).mean() > 0.8 and (odds[:, :44] < 0).mean() > 0.8


@pytest.mark.parametrize("kind", [1, 2])
def test_strokes_of_one_kind_tell_nothing(kind):
    marks = np.zeros((SIDE, SIDE), np.uint8)
    marks[40, 40:50] = kind
    assert stroke_odds(noisy(disc(24) * 0.5), None, marks) is None


def test_strokes_say_which_of_two_nested_things_is_meant():
    core, whole = disc(13), disc(30)
    image = noisy(np.where(core, 0.85, np.where(whole, 0.6, 0.25)))
    outside = np.s_[6, 10:86]

    def found(**strokes) -> np.ndarray:
        marks = drawn(**strokes)
        event = Event(tuple((int(r), int(c), int(marks[r, c])) for r, c in np.argwhere(marks)))
        return Session(load_head(), image, None).answer([event]).mask

    for truth, strokes in (
        (whole, {"object": np.s_[48, 22:74], "background": outside}),
        (core, {"object": np.s_[48, 40:56], "background": np.s_[28, 40:56]}),
    ):
        mask = found(**strokes)
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
