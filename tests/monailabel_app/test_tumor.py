"""The tumour task in a real server process, asked by the client 3D Slicer uses."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("monailabel")

from monailabel.client.client import MONAILabelClient, MONAILabelClientException

from phantom_studies import picture
from phantoms3d import SPACING, Volume, make_volume
from serving import serving
from zeroseg.backbones.weights import MODELS
from zeroseg.io import find_cases, read_image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODELS / "tumor").is_dir(), reason="the bundle holds no tumour model"),
]

UNSEEN = 10_000_000  # training drew its phantoms from seeds far below
AFFINE = np.array([[-SPACING, 0, 0, 20], [0, SPACING, 0, -35], [0, 0, SPACING, 110], [0, 0, 0, 1.0]])
ASK = {"organ": "limb", "text": "soft tissue sarcoma", "modality": "pet", "result_extension": ".nii.gz"}


def easy_pet() -> Volume:
    """A limb with a solid lesion of at least a tenth of the volume."""
    volumes = (make_volume(seed, ("solid",), "pet", "limb", True, 48) for seed in range(UNSEEN, UNSEEN + 50))
    return next(v for v in volumes if v.mask.mean() > 0.1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return easy_pet()


@pytest.fixture(scope="module")
def client(volume, tmp_path_factory) -> MONAILabelClient:
    folder: Path = tmp_path_factory.mktemp("tumor")
    studies = folder / "studies"
    studies.mkdir()
    nib.save(nib.Nifti1Image(volume.image.squeeze().astype(np.float32), AFFINE), studies / "pet.nii.gz")
    Image.fromarray(picture()).save(studies / "photo.png")
    with serving(studies, folder) as server:
        yield MONAILabelClient(server.url, str(folder))


def test_info_lists_the_task_with_its_text_boxes(client):
    task = client.info()["models"]["tumor"]
    assert task["type"] == "segmentation" and task["dimension"] == 3
    assert isinstance(task["config"]["organ"], str) and task["config"]["text"] == ""
    assert task["config"]["modality"] == ["auto", "ct", "mr", "pet"]


def test_the_lesion_is_found_on_the_grid_of_the_input(client, volume):
    path, params = client.infer("tumor", "pet", ASK)
    image = read_image(find_cases(path)[0])
    mask, truth = image.array[0] > 0, volume.mask.squeeze()
    assert mask.shape == truth.shape
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert dice > 0.3, (dice, params)
    assert params["absent"] is False and params["label_names"] == {ASK["text"]: 1}


def test_nonsense_is_answered_by_an_empty_mask_and_the_reason(client):
    path, params = client.infer("tumor", "pet", {**ASK, "text": "zqxv plomf wug", "absent": "empty mask"})
    assert not read_image(find_cases(path)[0]).array.any()
    assert params["absent"] is True and params["label_names"] == {} and params["absent_because"]


def test_other_words_need_no_new_encoding(client):
    client.infer("tumor", "pet", {**ASK, "absent": "empty mask"})
    _, params = client.infer("tumor", "pet", {**ASK, "text": "muscle tumour", "absent": "empty mask"})
    assert "aova" in params["seconds"] and "encode" not in params["seconds"]
    _, params = client.infer("tumor", "pet", {**ASK, "organ": "elbow", "modality": "mr", "absent": "empty mask"})
    assert "encode" in params["seconds"] and any("elbow" in note for note in params["notes"])


def test_doubts_about_the_input_are_noted(client):
    _, params = client.infer("tumor", "pet", {**ASK, "modality": "ct", "text": "zqxv sarcoma", "absent": "empty mask"})
    assert any("given as CT" in note for note in params["notes"])
    assert any("does not know: zqxv" in note for note in params["notes"])


def test_without_a_text_the_organs_usual_tumour_is_meant(client):
    _, params = client.infer("tumor", "pet", {**ASK, "text": " ", "absent": "empty mask"})
    assert params["details"]["tumor"] == "soft tissue sarcoma"
    nowhere = {**ASK, "organ": "zqxv", "text": " "}
    with pytest.raises(MONAILabelClientException) as refused:
        client.infer("tumor", "pet", {**nowhere, "modality": "ct"})
    assert "Status: 422" in refused.value.msg and "zqxv tumour" in refused.value.msg


def test_a_colour_picture_is_refused_with_the_reason(client):
    with pytest.raises(MONAILabelClientException) as refused:
        client.infer("tumor", "photo", {**ASK, "result_extension": ".png"})
    assert "Status: 422" in refused.value.msg and "needs a CT, MR or PET volume" in refused.value.msg


def test_absent_says_why(client):
    with pytest.raises(MONAILabelClientException) as refused:
        client.infer("tumor", "pet", {**ASK, "text": "zqxv plomf"})
    assert "Status: 422" in refused.value.msg and "knows none of the words" in refused.value.msg


@pytest.mark.parametrize("wrong", [{"organ": " "}, {"organ": 3}, {"modality": "xray"}])
def test_bad_options_are_refused_with_the_reason(client, wrong):
    with pytest.raises(MONAILabelClientException) as refused:
        client.infer("tumor", "pet", {**ASK, **wrong})
    assert "Status: 422" in refused.value.msg and "detail" in refused.value.msg
