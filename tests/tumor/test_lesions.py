"""Lesions grown into volumes, and folders of lesions brought into the training's form."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import gather_lesions
import grow_lesions
from zeroseg.tumor.training.lesions import grow_lesion


def body(shape=(40, 36, 12)) -> np.ndarray:
    """An even ellipsoid with some texture, in air."""
    grid = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    inside = sum(g**2 for g in grid) < 1
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 1)
    return np.where(inside, 0.5 + 0.02 * texture, 0).astype(np.float32)


@pytest.mark.parametrize("modality", ["ct", "mr", "pet"])
def test_a_grown_lesion_shows_where_its_mask_says(modality):
    volume, shown = body(), 0
    for seed in range(8):
        found = grow_lesion(volume, (3.0, 3.0, 3.0), np.random.default_rng(seed), modality)
        if found is None:
            continue
        image, mask = found
        assert image.shape == mask.shape == volume.shape and image.dtype == np.float32 and mask.any()
        assert image.min() >= 0 and (modality == "mr" or image.max() <= 1)
        change = np.abs(image - volume)
        assert change[mask].mean() > 3 * change[~mask].mean()
        shown += 1
    assert shown >= 4


def test_the_same_chance_grows_the_same_lesion():
    first, again = (grow_lesion(body(), (3.0, 3.0, 3.0), np.random.default_rng(3), "mr") for _ in range(2))
    assert first is not None and again is not None
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_air_grows_no_lesion():
    assert grow_lesion(np.zeros((20, 20, 20), np.float32), (3.0, 3.0, 3.0), np.random.default_rng(0), "ct") is None


def test_pictures_become_volumes_of_one_slice(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "in" / part).mkdir(parents=True)
    grey, mask = np.arange(48, dtype=np.uint8).reshape(6, 8), np.zeros((6, 8), np.uint8)
    mask[1, 5] = 255
    Image.fromarray(grey).save(tmp_path / "in" / "images" / "a.png")
    Image.fromarray(mask).save(tmp_path / "in" / "masks" / "a.png")
    gather_lesions.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    image, label = (nib.load(tmp_path / "out" / part / "a.nii.gz") for part in ("images", "masks"))
    assert image.shape == label.shape == (8, 6, 1)
    values, marked = np.asarray(image.dataobj), np.asarray(label.dataobj)
    assert marked.sum() == 1 and values[marked > 0] == grey[1, 5]
    gather_lesions.main([str(tmp_path / "in"), "--healthy", "--out", str(tmp_path / "healthy")])
    assert not np.asarray(nib.load(tmp_path / "healthy" / "masks" / "a.nii.gz").dataobj).any()


def test_a_mask_of_another_size_is_refused(tmp_path):
    for part, size in (("images", (6, 8)), ("masks", (6, 9))):
        (tmp_path / part).mkdir()
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / part / "a.png")
    with pytest.raises(SystemExit, match=r"a\.png"):
        gather_lesions.main([str(tmp_path), "--out", str(tmp_path / "out")])


def test_lesions_grown_into_a_folder_are_bright_deep_and_of_the_size_asked_for(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "in" / part).mkdir(parents=True)
    volume, known = body((40, 36, 30)), np.zeros((40, 36, 30), np.uint8)
    # Something as bright as it gets, or nothing could be brighter than the rest.
    volume[17:25, 15:23, 4:10] = 1
    known[20, 18, 6] = 1
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "in" / "images" / "a_FLAIR.nii.gz")
    nib.save(nib.Nifti1Image(known, affine), tmp_path / "in" / "masks" / "a_FLAIR.nii.gz")
    options = ["--modality", "mr", "--bright", "*FLAIR*", "--each", "3", "--ml", "2", "20", "--spacing", "3"]
    grow_lesions.main([str(tmp_path / "in"), *options, "--out", str(tmp_path / "out")])
    written = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.name for path in written] == [f"a_FLAIR_{n}.nii.gz" for n in range(3)]
    inside = ndimage.gaussian_filter(volume, 1.0) > 0.04
    depth = ndimage.distance_transform_edt(inside, sampling=3.0)
    for path in written:
        change = np.asarray(nib.load(path).dataobj) / 1000 - volume
        mask = np.asarray(nib.load(tmp_path / "out" / "masks" / path.name).dataobj) > 0
        assert mask[20, 18, 6]
        mask[20, 18, 6] = change[20, 18, 6] > 0.1
        assert 1.9 <= mask.sum() * 0.027 <= 20.1
        assert change[mask].mean() > 0.11
        assert depth[mask].min() >= 2


def test_a_folder_without_volumes_grows_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        grow_lesions.main([str(tmp_path), "--modality", "mr", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
