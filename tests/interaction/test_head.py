"""The network of the promptable head, and what it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.interaction.head import (
    ATTENTION,
    CANDIDATES,
    CHANNELS,
    WINDOW,
    PromptHead,
    Window,
    assemble,
    see_marks,
    see_tokens,
)
from zeroseg.interaction.promptable import load_head

WHOLE = Window(0, 0, 200, 300)


def test_candidates_are_nested_and_estimated():
    torch.manual_seed(0)
    head = PromptHead((8, 8, 16), (1, 1, 1)).eval()
    with torch.inference_mode():
        logits, quality = head(torch.randn(2, len(CHANNELS), WINDOW, WINDOW))
    assert logits.shape == (2, CANDIDATES, WINDOW, WINDOW) and quality.shape == (2, CANDIDATES)
    assert (logits.diff(dim=1) >= 0).all(), "each candidate holds the one before"


def test_no_mark_is_lost_in_a_large_window():
    marks = torch.zeros(900, 700, dtype=torch.uint8)
    places = torch.from_numpy(np.random.default_rng(0).integers(0, 700, (20, 2)))
    marks[places[:, 0], places[:, 1]] = 1
    seen = see_marks(marks, Window(0, 0, 900, 700))
    for row, column in places:
        assert seen[0, int(row * WINDOW / 900), int(column * WINDOW / 700)] == 1
    assert not seen[1].any()


def test_token_maps_lie_where_their_pixels_lie():
    maps = torch.zeros(1, 10, 10)
    maps[0, 2, 7] = 1
    seen = see_tokens(maps, WHOLE, (200, 300))
    row, column = np.unravel_index(int(seen[0].argmax()), (WINDOW, WINDOW))
    assert abs(row / WINDOW - 0.25) < 0.02 and abs(column / WINDOW - 0.75) < 0.02
    part = see_tokens(maps, Window(40, 210, 60, 240), (200, 300))
    assert part.mean() > 0.5, "the window of that token alone shows it everywhere"


def test_without_attention_its_channels_are_empty():
    image, marks = torch.rand(3, 200, 300), torch.zeros(200, 300, dtype=torch.uint8)
    marks[100, 150] = 1
    blind = assemble(image, marks, None, None, None, WHOLE)
    assert not blind[ATTENTION].any()
    seen = assemble(
        image, marks, (50, 60, 150, 260), torch.ones(200, 300, dtype=torch.bool), torch.rand(6, 8, 8), WHOLE
    )
    assert torch.equal(seen[:3], blind[:3]) and seen[ATTENTION].any()
    assert seen[5, 64, 64] == 1 and seen[5, 5, 5] == 0, "the box"
    assert torch.allclose(seen[6:8], torch.ones(())), "the last mask, and that there is one"


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_constant_image_stays_finite(value):
    marks = torch.zeros(64, 64, dtype=torch.uint8)
    marks[10, 10], marks[40, 40] = 1, 2
    seen = assemble(torch.full((3, 64, 64), value), marks, None, None, None, Window(0, 0, 64, 64))
    assert torch.isfinite(seen).all()


def test_the_embedded_head_is_small_and_checked():
    head = load_head()
    assert sum(p.numel() for p in head.parameters()) * 4 < 10e6
    assert not any(p.requires_grad for p in head.parameters())
