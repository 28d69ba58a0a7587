"""What the head reads of the attention: relative to the image, small, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.attention import EncodedImage
from zeroseg.attention.geodesic import neighbours
from zeroseg.attention.readout import COORDINATES, KEPT, read_out

SIDE = 12


@pytest.fixture(scope="module")
def encoded() -> EncodedImage:
    """A square that attends to itself, on a ground that does."""
    regions = np.zeros((SIDE, SIDE), np.int64)
    regions[3:8, 3:8] = 1
    label = torch.from_numpy(regions.flatten())
    maps = torch.where(label[:, None] == label[None], 6.0, 1.0)
    maps = maps / maps.sum(-1, keepdim=True)
    return EncodedImage(torch.rand(3, 48, 48), (48, 48), torch.zeros(1, 4, 6, 6), maps)


def test_shapes_and_ranges(encoded):
    read = encoded.readout
    assert read.side == SIDE and read.coordinates.shape == (COORDINATES, SIDE**2)
    assert len(read.steps) == len(neighbours(SIDE)[0]) and read.steps.mean() == pytest.approx(1, abs=1e-5)
    assert read.edges.min() >= 0 and read.edges.max() < 1


def test_edges_and_relevance_follow_the_object(encoded):
    read, inside, outside = encoded.readout, 5 * SIDE + 5, 1 * SIDE + 1
    near, alike = read.relevance(inside)
    for values in (near, alike):
        grid = values.reshape(SIDE, SIDE)
        assert values[inside] == pytest.approx(1, abs=1e-5)
        assert grid[3:8, 3:8].min() > grid[[0, -1]].max()
    assert read.edges.reshape(SIDE, SIDE)[3, 3] > read.edges[outside]


def test_reading_twice_gives_the_same(encoded):
    again = read_out(encoded.distance, encoded.paths, encoded.salience)
    assert np.array_equal(again.coordinates, encoded.readout.coordinates)
    assert np.array_equal(again.steps, encoded.readout.steps)


def test_prompted_places_are_kept_within_bounds(encoded):
    for token in range(SIDE**2):
        encoded.readout.relevance(token)
    assert len(encoded.readout._kept) == KEPT


def test_what_is_left_of_an_encoding_shares_the_readout(encoded):
    light = encoded.without_attention(lambda: encoded)
    assert light.readout is encoded.readout
