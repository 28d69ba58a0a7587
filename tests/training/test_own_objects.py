"""Objects that the promptable head finds itself: whole ones, and none that a window cuts off."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from own_objects import _cut_off, draw_slice, own_objects
from zeroseg.interaction.head import Window
from zeroseg.interaction.promptable import load_head


def disc(row: int, column: int, radius: int) -> np.ndarray:
    y, x = np.mgrid[:256, :256]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


@pytest.mark.slow
def test_discs_are_found_and_numbered():
    discs = [disc(70, 70, 40), disc(180, 175, 50)]
    image = np.full((256, 256, 3), 60, np.uint8)
    for mask, grey in zip(discs, (150, 200), strict=True):
        image[mask] = grey
    found = own_objects(image, None, load_head(), np.random.default_rng(0), 3)
    assert found.shape == (3, 256, 256) and found.dtype == np.uint8
    masks = [values == k for values in found for k in range(1, values.max() + 1)]
    for wanted in discs:
        assert max(np.count_nonzero(m & wanted) / np.count_nonzero(m | wanted) for m in masks) > 0.8
    # The ground, which reaches the image's edge all around, is no object.
    assert not any(mask[0, 0] and mask[-1, 0] for mask in masks)


def test_nothing_is_found_where_nothing_is():
    image = np.full((256, 256, 3), 90, np.uint8)
    assert not own_objects(image, None, load_head(), np.random.default_rng(0), 2).any()


@pytest.mark.parametrize(("window", "cut"), [(Window(0, 0, 32, 32), False), (Window(40, 40, 72, 72), True)])
def test_a_mask_is_cut_off_by_its_window_and_not_by_the_image(window, cut):
    part = np.zeros((32, 32), bool)
    part[:10, :10] = True
    assert _cut_off(part, window, 256) is cut
    part[:] = False
    part[10:20, 10:20] = True
    assert not _cut_off(part, window, 256)


def test_a_slice_of_a_scan_has_square_pixels_and_all_grey_values(tmp_path):
    values = np.linspace(0, 800, 40 * 30 * 10, dtype=np.float32).reshape(40, 30, 10)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1, 3, 1])), tmp_path / "scan.nii.gz")
    shapes = set()
    for seed in range(12):
        image = draw_slice(tmp_path / "scan.nii.gz", np.random.default_rng(seed))
        assert image.dtype == np.uint8 and image.shape[2] == 3 and (image[..., 0] == image[..., 1]).all()
        shapes.add(image.shape[:2])
    assert shapes == {(30, 30), (40, 30)}
