"""What the weights that ship with the bundle can do: behaviour on phantoms they were not trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import nibabel as nib
import numpy as np
import pytest

from phantoms import make_phantom
from phantoms3d import SPACING, make_volume
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import MODELS, verify_sums
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.tumor import TumorSegmentationInferer

UNSEEN = 10_000_000  # training drew its phantoms from seeds far below


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def scenes(kind: str, name: str, count: int):
    """Phantoms of a kind that show the named object, with its mask and its most central pixel."""
    found = []
    for seed in range(UNSEEN, UNSEEN + 200):
        phantom = make_phantom(seed, kind=kind)
        mask = phantom.masks.get(name)
        if mask is not None and mask.mean() > 0.02:
            rows, columns = np.nonzero(mask)
            nearest = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
            found.append((phantom.image.transpose(2, 0, 1), mask, [int(columns[nearest]), int(rows[nearest])]))
        if len(found) == count:
            return found
    raise AssertionError(f"no {kind} with {name}")


@pytest.fixture(scope="module")
def inferer(embedded_backbone):
    return AttentionSegmentationInferer(embedded_backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "least"),
    [("dermoscopy", "skin lesion", 0.75), ("endoscopy", "polyp", 0.6), ("ultrasound", "breast tumour", 0.5)],
)
def test_a_click_finds_the_object(inferer, kind, name, least):
    scores = [
        dice(inferer.segment(image, points=[click]).labels > 0, mask) for image, mask, click in scenes(kind, name, 5)
    ]
    assert np.mean(scores) > least, scores


@pytest.mark.slow
def test_auto_finds_a_lesion(inferer):
    scores = [
        dice(inferer.segment(image, "auto").labels > 0, mask)
        for image, mask, _ in scenes("dermoscopy", "skin lesion", 5)
    ]
    assert np.mean(scores) > 0.6, scores


@pytest.mark.slow
def test_attention_learned_to_tell_cells_apart(inferer):
    """The trained model's automatic mask beats the same pipeline with random UNet weights."""
    from zeroseg.backbones import StableDiffusionBackbone

    untrained = AttentionSegmentationInferer(StableDiffusionBackbone(device="cpu", untrained=True))
    cells = scenes("fluorescence", "nuclei", 4)
    trained, control = (
        np.mean([dice(model.segment(image, "auto").labels > 0, mask) for image, mask, _ in cells])
        for model in (inferer, untrained)
    )
    assert trained > control


@pytest.mark.slow
def test_words_find_a_lesion_and_wrong_words_do_not(inferer):
    scores = []
    for image, mask, _ in scenes("dermoscopy", "skin lesion", 5):
        encoded = inferer.encode(image)
        scores.append(dice(inferer.predict(encoded, text="skin lesion").labels > 0, mask))
        assert inferer.predict(encoded, text="lungs").absent
    assert np.mean(scores) > 0.5, scores


def test_a_meaningless_prompt_is_absent(inferer):
    image, _, _ = scenes("dermoscopy", "skin lesion", 1)[0]
    result = inferer.segment(image, text="zqxv plomf wug")
    assert result.absent and not result.labels.any()


def test_the_embedded_files_are_small_and_listed():
    folder = MODELS / "attention"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) < 24e6
    assert sum(p.stat().st_size for p in files) < 60e6
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {p.relative_to(folder).as_posix() for p in files if p.suffix == ".safetensors"} <= listed
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.parametrize("folder", ["tumor", "tumor_head", "tumor_limb"])
def test_the_tumour_models_are_small_and_hold_no_pickle(folder):
    files = [path for path in (MODELS / folder).rglob("*") if path.is_file()]
    sums = (MODELS / folder / "SHA256SUMS").read_text().splitlines()
    assert verify_sums(MODELS / folder).keys() <= {line.split("  ")[1] for line in sums}
    assert sum(path.stat().st_size for path in files) < 30e6 and max(path.stat().st_size for path in files) < 24e6
    assert {path.suffix for path in files if path.stat().st_size > 1e5} == {".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "least"), [("pet", 0.5), ("ct", 0.3)])
def test_words_find_unseen_lesions_and_nonsense_does_not(modality, least):
    """Large solid lesions in limbs, asked for with the shipped defaults."""
    inferer = TumorSegmentationInferer(MaisiBackbone(device="cpu"), TextEncoder(device="cpu"), organ="limb")
    drawn = (make_volume(seed, ("solid",), modality, "limb", True, 48) for seed in range(UNSEEN, UNSEEN + 100))
    large = list(islice((volume for volume in drawn if volume.mask.mean() > 0.1), 4))
    scores, nonsense = [], []
    for volume in large:
        encoded = inferer.encode(volume.image[None], np.diag([3.0, 3.0, 3.0, 1.0]), modality)
        scores.append(dice(inferer.predict(encoded).labels > 0, volume.mask))
        nonsense.append(inferer.predict(encoded, tumor="zqxv plomf wug").absent)
    assert np.mean(scores) > least, scores
    assert all(nonsense)


@pytest.mark.slow
def test_the_tumour_bundle_as_a_user_starts_it(tmp_path):
    """One lesion, asked for by its words and by nonsense; weights and settings are those of the config."""
    drawn = make_volume(UNSEEN + 3, ("solid",), "pet", "limb", True, 48)
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    scan = nib.Nifti1Image(drawn.image.astype(np.float32), np.diag([SPACING] * 3 + [1]))
    asked = {"organ": "limb", "tumor": "soft tissue sarcoma", "modality": "pet"}
    prompts = {"lesion": asked, "nonsense": {**asked, "tumor": "zqxv plomf wug"}}
    for name in prompts:
        nib.save(scan, images / f"{name}.nii.gz")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    bundle = MODELS.parent
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", bundle]
    command += ["--config_file", bundle / "configs" / "inference_tumor.yaml", "--dataset_dir", images]
    command += ["--output_dir", out, "--prompts", tmp_path / "prompts.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cases = {case["case"]: case for case in json.loads((out / "manifest.json").read_text())["cases"]}
    masks = {name: np.asarray(nib.load(out / f"{name}_seg.nii.gz").dataobj) > 0 for name in prompts}
    assert not cases["lesion"]["absent"] and dice(masks["lesion"], drawn.mask) > 0.3
    assert cases["nonsense"]["absent"] and not masks["nonsense"].any()
    assert "knows none of the words" in cases["nonsense"]["absent_because"]
