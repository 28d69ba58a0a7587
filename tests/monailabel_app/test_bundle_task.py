"""The bundle folder, unchanged, in MONAI Label's own bundle task (the way of its `monaibundle` app)."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from phantom_studies import oblique, phantom

pytest.importorskip("monailabel")

from zeroseg.backbones.weights import MODELS
from zeroseg.io import find_cases, read_image


@pytest.fixture
def task():
    try:
        from monailabel.tasks.infer.bundle import BundleInferTask
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        pytest.skip(f"MONAI Label's bundle task needs a torchvision that works with this torch: {error}")
    return BundleInferTask(str(MODELS.parent), {})


def test_the_stock_bundle_task_segments_with_the_bundle_as_it_is(task, tmp_path):
    nib.save(nib.Nifti1Image(phantom()[:, :, 2:4].astype(np.int16), oblique()), tmp_path / "scan.nii.gz")
    assert task.is_valid() and task.labels == {"object": 1}
    path, params = task({"image": str(tmp_path / "scan.nii.gz"), "device": "cpu", "result_extension": ".nii.gz"})
    mask = read_image(find_cases(path)[0])
    assert mask.shape == (48, 40, 2) and set(np.unique(mask.array)) == {0, 1}
    np.testing.assert_allclose(mask.affine, oblique(), atol=1e-3)
    assert params["label_names"] == {"object": 1}


def test_a_pictures_mask_has_the_pictures_rows_and_columns(task, tmp_path):
    y, x = np.mgrid[:80, :120]
    disc = (x - 85) ** 2 + (y - 25) ** 2 < 15**2
    Image.fromarray(np.where(disc, 210, 50).astype(np.uint8)).save(tmp_path / "picture.png")
    path, _ = task({"image": str(tmp_path / "picture.png"), "device": "cpu"})
    mask = np.asarray(Image.open(path)) > 0
    assert mask.shape == disc.shape
    assert 2 * (mask & disc).sum() / (mask.sum() + disc.sum()) > 0.9
