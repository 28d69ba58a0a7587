"""Values and grid: to the model's and exactly back, for every orientation and for what users get wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from zeroseg.errors import ZeroSegError
from zeroseg.tumor.prepare import WORKING_VOXELS, Intensity, intensity_of, prepare


@pytest.fixture(scope="module")
def smooth():
    """(40, 52, 30) smooth values, mean 0, spread 1."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((40, 52, 30)), 4)
    return (values / values.std()).astype(np.float32)


def hounsfield(shape=(20, 20, 20)) -> np.ndarray:
    """Muscle with a border of air and a little noise."""
    values = np.random.default_rng(0).normal(50, 10, shape).astype(np.float32)
    values[..., :4] = -1000
    return values


def affine_of(permutation, flips, sizes=(2.0, 3.0, 4.0)) -> np.ndarray:
    affine = np.zeros((4, 4))
    for axis, to in enumerate(permutation):
        affine[to, axis] = flips[axis] * sizes[axis]
    affine[3, 3] = 1
    return affine


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_every_orientation_there_and_back(smooth, permutation, flips):
    prepared = prepare(smooth[None], affine_of(permutation, flips), "mr", multiple=16)
    assert all(s % 16 == 0 for s in prepared.volume.shape[2:])
    assert prepared.volume.min() >= 0 and prepared.volume.max() <= 1
    assert prepared.spacing == pytest.approx((3, 3, 3), rel=0.05)
    values = prepared.intensity.to_values(prepared.to_input(prepared.volume[0, 0]))
    assert values.shape == smooth.shape
    kept = np.minimum(smooth, prepared.intensity.high)
    assert np.abs(values - kept)[2:-2, 2:-2, 2:-2].max() < 0.25
    assert prepared.to_input(prepared.inside).all()


def test_the_working_grid_is_ras(smooth):
    """Flipping the file's axes, and its affine with them, changes nothing in what the model sees."""
    plain = prepare(smooth[None], affine_of((0, 1, 2), (1, 1, 1)), "mr")
    flipped = prepare(smooth[None, ::-1, :, ::-1], affine_of((0, 1, 2), (-1, 1, -1)), "mr")
    turned = prepare(smooth[None].transpose(0, 3, 1, 2), affine_of((2, 0, 1), (1, 1, 1), (4.0, 2.0, 3.0)), "mr")
    torch.testing.assert_close(plain.volume, flipped.volume, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.volume, turned.volume, rtol=1e-4, atol=1e-5)


def test_masks_go_back_by_nearest_and_maps_linearly(smooth):
    prepared = prepare(smooth[None], np.diag([1.5, 1.5, 3, 1]), "mr")
    mask = torch.zeros(prepared.volume.shape[2:], dtype=torch.bool)
    mask[prepared.content] = torch.rand(mask[prepared.content].shape) > 0.5
    back = prepared.to_input(mask)
    assert back.dtype == bool and back.shape == smooth.shape
    again = back[::2, ::2]
    assert (again == mask[prepared.content].numpy()).mean() > 0.99
    soft = prepared.to_input(mask.float())
    assert soft.dtype == np.float32 and np.mean((soft > 0) & (soft < 1)) > 0


@pytest.mark.parametrize("permutation", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_masks_come_to_the_working_grid(smooth, permutation):
    prepared = prepare(smooth[None], affine_of(permutation, (1, -1, 1)), "mr")
    mask = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal(smooth.shape), 4) > 0.02
    working = prepared.from_input(mask)
    assert working.dtype == torch.bool and working.shape == prepared.volume.shape[2:]
    back = prepared.to_input(working)
    assert 2 * np.count_nonzero(back & mask) / (np.count_nonzero(back) + np.count_nonzero(mask)) > 0.9
    assert prepared.from_input(np.ones(smooth.shape)).all()


def test_the_mask_of_a_slice_is_as_deep_as_the_slice_is_shown():
    image = np.zeros((40, 40, 1), np.float32)
    image[10:30, 10:30] = 1
    prepared = prepare(image[None], np.diag([3.0, 3, 3, 1]), "mr", multiple=16)
    assert prepared.volume.shape[2:] == (48, 48, 16)
    assert torch.equal(prepared.from_input(image), prepared.volume[0, 0] > 0.5)


def test_ct_goes_through_the_models_window():
    values = np.array([-2000.0, -250, 0, 250, 3000])
    np.testing.assert_allclose(intensity_of(values, "ct", (-250, 250)).to_unit(values), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(intensity_of(values, "CT").to_unit(values), [0, 0.375, 0.5, 0.625, 1])


def test_mr_and_pet_do_not_depend_on_the_unit():
    values = np.random.default_rng(0).gamma(2, 10, 5000)
    for modality in ("mr", "pet"):
        np.testing.assert_allclose(*(intensity_of(v, modality).to_unit(v) for v in (values, values * 37)), atol=1e-6)
    pet = intensity_of(values, "pet")
    np.testing.assert_allclose(pet.to_unit(np.array([0, pet.high / 4, pet.high])), [0, 0.5, 1])


def test_intensities_invert():
    values = np.linspace(0, 9, 50)
    for intensity in (Intensity(0, 9), Intensity(0, 9, 0.5)):
        np.testing.assert_allclose(intensity.to_values(intensity.to_unit(values)), values, atol=1e-4)


@pytest.mark.parametrize("modality", ["ct", "mr", "pet"])
def test_a_constant_volume_is_noted(modality):
    prepared = prepare(np.full((1, 20, 20, 20), 7.0), np.eye(4) * 3, modality)
    assert any("constant" in note for note in prepared.notes)
    assert prepared.volume.isfinite().all() and prepared.volume.std() == 0


def test_one_slice_is_repeated():
    image = np.random.default_rng(0).random((1, 60, 70, 1)).astype(np.float32)
    prepared = prepare(image, np.diag([3, 3, 5, 1]), "mr")
    assert prepared.volume.shape == (1, 1, 64, 80, 16)
    assert torch.equal(prepared.volume, prepared.volume[..., :1].expand_as(prepared.volume))
    assert prepared.to_input(prepared.volume[0, 0]).shape == (60, 70, 1)


def test_thick_slices_are_interpolated():
    """0.5 x 0.5 x 8 mm: many pixels average, slices interpolate; extents stay."""
    volume = np.random.default_rng(0).normal(0, 100, (1, 192, 192, 6))
    prepared = prepare(volume, np.diag([0.5, 0.5, 8, 1]), "ct", (3, 3, 3))
    assert [s.stop - s.start for s in prepared.content] == [32, 32, 16]
    assert prepared.spacing == pytest.approx((3, 3, 3))
    assert prepared.to_input(prepared.inside).shape == (192, 192, 6)


def test_a_volume_smaller_than_anything():
    prepared = prepare(np.random.default_rng(0).normal(0, 100, (1, 3, 2, 2)), np.diag([1.0, 1, 1, 1]), "ct")
    assert prepared.volume.shape == (1, 1, 16, 16, 16) and "field of view is only 3 mm" in " ".join(prepared.notes)
    assert prepared.to_input(prepared.volume[0, 0]).shape == (3, 2, 2)


@pytest.mark.slow
def test_a_huge_extent_is_worked_on_coarsely():
    prepared = prepare(np.random.default_rng(0).random((1, 9, 9, 9)), np.diag([200.0, 200, 200, 1]), "mr", (3, 3, 3))
    assert prepared.volume.numel() < 1.2 * WORKING_VOXELS and any("very large" in note for note in prepared.notes)


def test_doubts_about_ct():
    def doubts(values):
        return " ".join(prepare(values[None], np.eye(4) * 3, "ct").notes)

    plain = hounsfield()
    assert doubts(plain) == ""
    magnitudes = np.random.default_rng(0).gamma(2, 200, (20, 20, 20)).astype(np.float32)
    assert "hardly HU; is it MR?" in doubts(magnitudes)
    assert "HU + 1024" in doubts(plain + 1024)
    metal = plain.copy()
    metal[5, 5, :] = 30000
    assert "lie outside HU -1024..3071 and are clipped" in doubts(metal)
    assert "picture of a soft-tissue window" in doubts(np.clip(magnitudes, 0, 255))
    quarter = prepare(np.clip(plain / 4, -250, None)[None], np.eye(4) * 3, "ct", ct_window=(-250, 250))
    assert "HU / 4" in " ".join(quarter.notes)
    torch.testing.assert_close(
        quarter.volume, prepare(plain[None], np.eye(4) * 3, "ct", ct_window=(-250, 250)).volume, rtol=0, atol=1e-3
    )


def test_lung_without_air_around_it_in_quarters_of_hu():
    rng = np.random.default_rng(0)
    lung = np.where(rng.random((20, 20, 20)) < 0.4, 40, -850) + rng.normal(0, 15, (20, 20, 20))
    quarter = prepare(np.round(lung / 4)[None], np.eye(4) * 3, "ct")
    assert quarter.to_hu == (4.0, 0.0) and quarter.volume.min() < 0.12
    # What a window cut off lies on its floor, and a belly has nothing as dark.
    for values in (np.clip(lung, -200, 250), np.where(lung < 0, -100, 40) + rng.normal(0, 25, lung.shape)):
        assert prepare(values[None], np.eye(4) * 3, "ct").to_hu == (1.0, 0.0)


def test_ct_given_as_mr_and_no_modality_at_all():
    assert "is it CT?" in " ".join(prepare(hounsfield()[None], np.eye(4) * 3, "mr").notes)
    guessed = prepare(hounsfield()[None], np.eye(4) * 3)
    assert guessed.modality == "ct" and "taken as CT" in " ".join(guessed.notes)
    assert prepare(np.abs(hounsfield())[None], np.eye(4) * 3).modality == "mr"
    assert "1 mm is assumed" in " ".join(prepare(hounsfield()[None], None, "ct").notes)


def test_rescale_brings_values_to_hu():
    values = hounsfield()
    stored = prepare((values[None] + 1024) / 2, np.eye(4) * 3, "ct", rescale=(2, -1024))
    torch.testing.assert_close(stored.volume, prepare(values[None], np.eye(4) * 3, "ct").volume, rtol=0, atol=1e-4)


def test_colour_becomes_gray():
    gray = np.random.default_rng(0).random((1, 20, 20, 1)).astype(np.float32)
    torch.testing.assert_close(
        prepare(np.repeat(gray, 3, 0), None, "mr").volume, prepare(gray, None, "mr").volume, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("volume", "affine", "message"),
    [
        (np.zeros((12, 8, 8, 8)), None, "time series"),
        (np.zeros((1, 8, 8, 8, 12)), None, "time series"),
        (np.zeros((8, 8, 8)), None, "must be .1, X, Y, Z."),
        (np.zeros((1, 8, 0, 8)), None, "not empty"),
        (np.full((1, 8, 8, 8), np.nan), None, "NaN or infinite"),
        (np.zeros((1, 8, 8, 8)), np.zeros((4, 4)), "affine must be"),
        (np.zeros((1, 8, 8, 8)), np.full((4, 4), np.inf), "affine must be"),
    ],
)
def test_what_is_no_volume_is_refused(volume, affine, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        prepare(volume, affine, "ct")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("axis", range(3))
def test_a_slice_whose_own_axis_runs_backwards(axis):
    shape, sides = [20, 18, 16], [4.0, 4.0, 4.0, 1.0]
    shape[axis], sides[axis] = 1, -4.0
    prepared = prepare(torch.rand(1, *shape), np.diag(sides), "pet")
    back = prepared.to_input(prepared.volume[0, 0])
    assert back.shape == tuple(shape) and min(back.strides) >= 0
