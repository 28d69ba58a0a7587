"""Objects that the promptable head for volumes finds itself, and how its training takes them."""

from __future__ import annotations

import numpy as np
import pytest

from own_volumes import _sensible, own_volume_objects
from train_volume_head import Pool, around_object, read_own
from zeroseg.interaction.volume_session import VolumeAnswer, load_volume_head


def ball(x: float, y: float, z: float, radius: float) -> np.ndarray:
    at = np.mgrid[:56, :48, :40]
    return sum((a - c) ** 2 for a, c in zip(at, (x, y, z), strict=True)) <= radius**2


@pytest.fixture(scope="module")
def scan():
    """Two balls, one bright and one dark, in noise."""
    values = np.full((56, 48, 40), 0.45) + np.random.default_rng(0).standard_normal((56, 48, 40)) * 0.02
    values[ball(18, 20, 20, 9)] = 0.9
    values[ball(42, 30, 18, 7)] = 0.1
    return values.clip(0, 1).astype(np.float32)


def test_balls_are_found_and_the_ground_is_none(scan):
    found = own_volume_objects(scan, load_volume_head(), np.random.default_rng(0), clicks=30)
    masks = []
    for part, mask in found:
        masks.append(np.zeros(scan.shape, bool))
        masks[-1][part] = mask
    for wanted in (ball(18, 20, 20, 9), ball(42, 30, 18, 7)):
        assert max(np.count_nonzero(m & wanted) / np.count_nonzero(m | wanted) for m in masks) > 0.7
    assert all(np.count_nonzero(m) < 0.3 * scan.size for m in masks)


def answer(mask: np.ndarray, start: int, probability: float = 0.9) -> VolumeAnswer:
    part = tuple(slice(start, start + n) for n in mask.shape)
    shown = np.where(mask, probability, 0.01).astype(np.float16)
    return VolumeAnswer((part[0], part[1], part[2]), np.stack([mask] * 3), shown, (0.9,) * 3, 0)


def test_what_is_small_unsteady_or_cut_off_is_no_object():
    whole, cut = np.zeros((2, 20, 20, 20), bool)
    whole[5:13, 5:13, 5:13] = True
    cut[:10, 5:15, 5:15] = True
    assert _sensible(answer(whole, 10), (60, 60, 60))
    assert not _sensible(answer(whole, 10, 0.5), (60, 60, 60)), "its edge is not steady"
    assert not _sensible(answer(whole, 0), (8, 9, 10)), "most of the scan"
    assert not _sensible(answer(cut, 10), (60, 60, 60)), "goes on beyond the cube"
    assert _sensible(answer(cut, 0), (60, 60, 60)), "ends with the scan"
    assert not _sensible(answer(np.zeros((20, 20, 20), bool), 10), (60, 60, 60))


def test_training_takes_objects_folder_by_folder_with_what_is_around(scan, tmp_path):
    mask = np.zeros((12, 12, 12), bool)
    mask[2:8, 3:9, 2:8] = True
    for name in ("one-a", "one-b", "two-a"):
        np.savez(tmp_path / f"{name}.npz", scan=scan.astype(np.float16), starts=np.array([[20, 18, 12]]), mask_0=mask)
    np.savez(tmp_path / "two-b.npz", scan=scan.astype(np.float16), starts=np.zeros((0, 3), int))
    groups = read_own(tmp_path)
    assert [len(group) for group in groups] == [2, 1]
    image, there = around_object(*groups[0][0])
    assert image.shape == there.shape == (38, 38, 36) and image.dtype == np.float32
    np.testing.assert_array_equal(there[16:22, 16:22, 14:20], True)
    assert np.count_nonzero(there) == np.count_nonzero(mask)
    np.testing.assert_allclose(image, scan[6:44, 5:43, 0:36], atol=1e-3)
    pool = Pool(np.random.default_rng(0), None, tmp_path)
    assert any(np.array_equal(found, there) for _, found in (pool._paint() for _ in range(30)) if isinstance(found, np.ndarray))  # fmt: skip
