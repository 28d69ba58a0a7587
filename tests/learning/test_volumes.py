"""Learning from volumes as a whole: it learns, keeps left from right, is kept whole, and takes flat ones slice by slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.errors import ZeroSegError
from zeroseg.learning import Case, LearnedHead, as_volumes, fit, fitting, volumes
from zeroseg.learning.volumes import STEP, VolumeNet, change, is_volume, seen_size, squeeze_volume

LABELS = {"left": 2, "right": 5}


def scene(seed: int, shape: tuple[int, int, int] = (40, 24, 22)) -> Case:
    """Two equal bright balls in noise, of which the one at the low end of the first axis is called left."""
    rng = np.random.default_rng(seed)
    x, y, z = np.indices(shape)
    label = np.zeros(shape, np.uint8)
    for value, middle in ((2, 10), (5, 29)):
        centre = middle + rng.integers(-1, 2), 12 + rng.integers(-2, 3), 11 + rng.integers(-2, 3)
        label[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < 36] = value
    image = np.where(label > 0, 160.0, 60.0) + rng.normal(0, 8, shape)
    return Case(image[None].astype(np.float32), label)


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * int((found & truth).sum()) / int(found.sum() + truth.sum())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(volumes, "VOXELS", 32 * 32 * 64)


@pytest.fixture
def inferer(tiny_backbone):
    return AttentionSegmentationInferer(tiny_backbone, resolution=64)


@pytest.mark.slow
def test_it_learns_two_labels_that_differ_by_their_place_alone(inferer, small, tmp_path):
    seen: list[tuple[int, int, float]] = []
    cases = [scene(seed) for seed in range(3)]
    head = fit(cases, inferer, labels=LABELS, seconds=600, steps=100, progress=lambda *now: seen.append(now))
    facts = head.describe()
    assert head.of_volumes and (facts["shots"], facts["volumes"], facts["steps"]) == (3, 3, 100)
    assert [now[:2] for now in seen] == [(k, 100) for k in range(10, 101, 10)]
    other = scene(9)
    found = head.predict(other.image)
    assert found.label_map.shape == other.label.shape and set(np.unique(found.label_map)) <= {0, 2, 5}
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    for value in LABELS.values():
        assert dice(found.label_map == value, other.label == value) > 0.6
    head.save(tmp_path)
    loaded = LearnedHead.load(tmp_path, inferer.replace(timestep=10))
    assert np.array_equal(loaded.predict(other.image).label_map, found.label_map), "no backbone reads a volume"
    further = fit(cases, inferer, labels=LABELS, seconds=600, steps=1, start=loaded)
    assert further.facts["train_dice"] > 0.5


def test_reading_volumes_takes_half_of_the_time_at_most(inferer, small, monkeypatch):
    read, clock = fitting.labelled_volumes, [0.0]

    def slowly(*arguments):
        for seen in read(*arguments):
            clock[0] += 60
            yield seen

    def steps(seen, *, left, **_):
        clock[0] += 15
        shares.append(left())
        return VolumeNet(torch.tensor([0.9, 0.05, 0.05])), {}

    shares: list[float] = []
    monkeypatch.setattr(fitting, "labelled_volumes", slowly)
    monkeypatch.setattr(fitting, "fit_volumes", steps)
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: clock[0])
    fit([scene(0), scene(1)], inferer, labels=LABELS, seconds=60)
    assert shares == [0.5]


def test_flat_volumes_and_mixtures_are_slices(inferer):
    deep = scene(0)
    flat = Case(deep.image[..., 9:13], deep.label[..., 9:13])
    picture = Case(deep.image[..., 11], deep.label[..., 11])
    few = Case(deep.image, deep.label * (np.arange(22) // 2 == 5))
    empty = Case(deep.image, 0 * deep.label)
    assert as_volumes([deep, empty])
    assert not any(as_volumes([deep, other]) for other in (flat, picture, few))
    head = fit([flat], inferer, labels=LABELS, seconds=600, steps=1)
    assert not head.of_volumes and head.facts["slices"] > 0


def test_a_head_of_volumes_and_one_of_images_do_not_mix(inferer, small):
    deep = scene(0)
    picture = Case(deep.image[..., 11], deep.label[..., 11])
    head = fit([deep], inferer, labels=LABELS, seconds=600, steps=1)
    with pytest.raises(ZeroSegError, match="learned from volumes"):
        head.predict(picture.image)
    with pytest.raises(ZeroSegError, match="learn from the start"):
        fit([picture], inferer, labels=LABELS, seconds=600, steps=1, start=head)


def test_equal_seeds_give_equal_heads(inferer, small):
    one, two = (fit([scene(0)], inferer, labels=LABELS, seconds=600, steps=2, seed=3) for _ in range(2))
    for a, b in zip(one.network.state_dict().values(), two.network.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(35, 51, 35), (512, 512, 40), (9, 8, 300), (64, 64, 64), (1000, 8, 8)])
def test_a_scan_is_seen_in_its_proportions_with_bounded_work(shape):
    size = seen_size(shape)
    assert all(n % STEP == 0 and n >= STEP for n in size) and np.prod(size) <= 5 * volumes.VOXELS
    assert np.argmax(size) == np.argmax(shape)
    maps = squeeze_volume(torch.ones(2, *shape), size)
    assert maps.shape == (2, *size) and torch.allclose(maps, torch.ones(()))


def test_what_is_a_volume():
    assert is_volume((8, 9, 10)) and not is_volume((64, 64, 3)) and not is_volume((64, 64))


def test_it_begins_at_how_often_a_class_is_met():
    network = VolumeNet(torch.tensor([0.9, 0.1, 0.0])).eval()
    with torch.inference_mode():
        shares = network(torch.rand(1, 1, 32, 32, 64)).softmax(1)
    assert shares.shape == (1, 3, 32, 32, 64)
    torch.testing.assert_close(shares[0, :, 0, 0, 0], torch.tensor([0.894, 0.0993, 0.0067]), atol=2e-3, rtol=0)


def test_changes_keep_scan_and_truth_together_and_left_left():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 32)[:, None, None].expand(1, 1, 32, 32, 32)
    for _ in range(10):
        scan, truth = change(ramp, torch.cat([1 - ramp, ramp], 1), generator)
        torch.testing.assert_close(truth.sum(1), torch.ones(1, 32, 32, 32))
        assert np.corrcoef(scan.flatten(), truth[:, 1].flatten())[0, 1] > 0.9
        assert truth[0, 1, -8:].mean() > truth[0, 1, :8].mean()
