"""Stored values to [0, 1]: windows, 8 bits as they are, percentiles for the rest."""

import numpy as np
import pytest

from bad_inputs import bundled, gray, write_odd
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image, to_unit_range


def image(values, **fields):
    return Image(np.asarray(values, dtype=np.float32), **fields)


def test_ct_goes_through_the_soft_tissue_window():
    ct = image([[[-1000, -160, 40, 240, 3000]]], modality="CT")
    np.testing.assert_allclose(to_unit_range(ct), [[[0, 0, 0.5, 1, 1]]])


def test_a_given_window_applies_to_anything():
    np.testing.assert_allclose(to_unit_range(image([[[0, 50, 100]]], bits=8), window=(50, 100)), [[[0, 0.5, 1]]])
    lung = image([[[-1350, -600, 150]]], modality="CT")
    np.testing.assert_allclose(to_unit_range(lung, window=(-600, 1500)), [[[0, 0.5, 1]]])


@pytest.mark.parametrize("window", [(40, 0), (40, -1), (np.nan, 4), (40,), "wide", 5])
def test_bad_windows(window):
    with pytest.raises(ZeroSegError, match="window"):
        to_unit_range(image([[[0, 1]]]), window=window)


def test_eight_bits_are_divided_by_255_whatever_the_values():
    dim = image([[[0, 1, 51]]], bits=8)
    np.testing.assert_allclose(to_unit_range(dim), [[[0, 1 / 255, 0.2]]], rtol=1e-6)
    color_volume = image(np.full((3, 2, 2, 2), 51), bits=8, modality="RGB")
    np.testing.assert_allclose(to_unit_range(color_volume), 0.2, rtol=1e-6)


def test_the_same_values_without_a_scale_are_stretched():
    assert to_unit_range(image([[[0, 1, 51]]])).max() == 1
    gray_volume = image(np.arange(8).reshape(1, 2, 2, 2), bits=8)  # e.g. an MR stored as uint8
    assert to_unit_range(gray_volume).max() == 1


def test_hot_pixels_do_not_darken_the_rest():
    values = gray(100, 100)[None].astype(np.float32)
    values[0, 3, :5] = 1e6
    unit = to_unit_range(image(values, bits=16))
    assert unit[0, 50, 50] > 0.9 and unit.min() == 0 and unit.max() == 1


def test_a_rare_object_on_an_even_ground_survives():
    values = np.full((1, 100, 100), 7.0)
    values[0, 40:44, 40:44] = 9  # 0.16 % of the pixels: both percentiles are the ground
    unit = to_unit_range(image(values))
    assert unit[0, 41, 41] == 1 and unit[0, 0, 0] == 0


def test_constant_images():
    assert (to_unit_range(image(np.full((1, 4, 4), 1234.5))) == 0).all()
    assert (to_unit_range(image(np.full((1, 1, 1), 102), bits=8)) == np.float32(0.4)).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e6, 1e30, 1e37])
def test_any_range_of_values(scale):
    values = np.random.default_rng(0).normal(5, 2, (1, 32, 32)) * scale
    unit = to_unit_range(image(values))
    assert unit.dtype == np.float32 and unit.min() == 0 and 1 - 1e-6 < unit.max() <= 1
    assert np.corrcoef(unit.ravel(), values.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "anatomical.nii", "0.dcm", "image_dfl.dcm"])
def test_real_files(name):
    (case,) = find_cases(bundled(name))
    read = read_image(case)
    before = read.array.copy()
    unit = to_unit_range(read)
    assert unit.shape == read.array.shape and unit.dtype == np.float32
    assert unit.min() >= 0 and unit.max() <= 1 and unit.std() > 0.05
    np.testing.assert_array_equal(read.array, before)  # the image itself is left alone


def test_16_bits_of_the_same_picture_look_alike(tmp_path):
    deep = read_image(find_cases(write_odd("16_bit_png", tmp_path))[0])
    shallow = Image(gray()[None].astype(np.float32))
    np.testing.assert_allclose(to_unit_range(deep), to_unit_range(shallow), atol=1e-6)
