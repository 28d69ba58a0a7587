"""Where a region is thickest, its largest part, and how far everything lies from some places."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from zeroseg.regions import FEW, depth_inside, distance_to, innermost, largest_component


def test_of_two_parts_the_larger_one_is_kept_and_its_middle_is_innermost():
    mask = np.zeros((20, 20), bool)
    mask[2:9, 3:10], mask[15:18, 15:18] = True, True
    part = largest_component(mask)
    assert part[5, 6] and not part[16, 16]
    assert innermost(part) == (5, 6) and depth_inside(part)[5, 6] == 4


@pytest.mark.parametrize("spacing", [None, (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
def test_distances_are_those_of_the_transform_however_many_places(count, spacing):
    shape = (20, 18, 7)
    places = np.random.default_rng(0).integers(0, shape, (count, 3))
    elsewhere = np.ones(shape, bool)
    elsewhere[tuple(places.T)] = False
    wanted = ndimage.distance_transform_edt(elsewhere, sampling=spacing)
    np.testing.assert_allclose(distance_to(places, shape, spacing), wanted, rtol=1e-12)


def test_pixels_lie_a_whole_number_of_steps_away_and_without_places_nowhere_is_near():
    assert distance_to(np.array([[1, 2]]), (4, 6))[1].tolist() == [2, 1, 0, 1, 2, 3]
    assert np.isinf(distance_to(np.zeros((0, 2), int), (4, 6))).all()
