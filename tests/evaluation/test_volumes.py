import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tumor_model import save_tiny_model
from zeroseg.cli import main
from zeroseg.cli.main import run as run_command
from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.pairs import find_pairs
from zeroseg.evaluation.volume_baselines import (
    all_foreground,
    border_rule,
    kmeans2,
    kmeans2_bright,
    otsu,
    otsu_bright,
    suv40,
)
from zeroseg.evaluation.volume_metrics import lesions, score_volume, tolerance_of
from zeroseg.evaluation.volumes import absent_rates, load_volume
from zeroseg.tumor.inferer import STAGES


def block(shape, *corners) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(low, high) for low, high in corners)] = True
    return mask


# Metrics.


def test_a_perfect_mask_and_an_empty_one():
    truth = block((12, 14, 10), (3, 8), (4, 9), (2, 7))
    best = score_volume(truth, truth, (2.0, 2.0, 3.0), 2.0)
    assert best.pop("hd95") == 0 and set(best.values()) == {1.0}
    worst = score_volume(np.zeros_like(truth), truth, (2.0, 2.0, 3.0), 2.0)
    assert worst.pop("hd95") == pytest.approx(np.linalg.norm([24, 28, 30]))
    assert set(worst.values()) == {0.0}


def test_distances_are_in_mm_along_each_axis():
    truth = block((20, 20, 20), (4, 10), (4, 10), (4, 10))
    shifted = np.roll(truth, 2, axis=2)  # 2 voxels along z
    assert score_volume(shifted, truth, (1.0, 1.0, 4.0), 1.0)["hd95"] == pytest.approx(8.0)
    assert score_volume(shifted, truth, (1.0, 1.0, 4.0), 8.0)["nsd"] == 1.0
    assert 0 < score_volume(shifted, truth, (1.0, 1.0, 4.0), 1.0)["nsd"] < 1
    assert score_volume(shifted, truth, (1.0, 1.0, 4.0), 1.0)["dice"] == pytest.approx(2 / 3)


def test_a_slice_is_scored_in_its_plane():
    truth = block((16, 16, 1), (4, 10), (4, 10), (0, 1))
    result = score_volume(np.roll(truth, 3, axis=0), truth, (2.0, 2.0, 1.0), 1.0)
    assert result["hd95"] == pytest.approx(6.0) and result["dice"] == pytest.approx(0.5)


def test_lesions_are_counted_not_weighed():
    shape = (30, 10, 10)
    truth = block(shape, (0, 10), (0, 10), (0, 10)) | block(shape, (20, 22), (0, 2), (0, 2))
    large = block(shape, (0, 5), (0, 10), (0, 10))
    assert lesions(large, truth) == pytest.approx({"lesion_recall": 0.5, "lesion_precision": 1.0, "lesion_f1": 2 / 3})
    stray = large | block(shape, (26, 28), (8, 10), (8, 10)) | block(shape, (26, 28), (0, 2), (8, 10))
    assert lesions(stray, truth)["lesion_precision"] == pytest.approx(1 / 3)
    assert lesions(block(shape, (0, 9), (0, 1), (0, 1)), truth)["lesion_recall"] == 0  # 9 of 1000 voxels find nothing


def test_default_tolerance_is_two_voxels():
    assert tolerance_of((2.0, 2.0, 2.0)) == pytest.approx(4.0)
    assert tolerance_of((1.0, 1.0, 8.0)) == pytest.approx(4.0)


# Baselines.


@pytest.mark.parametrize("inside, outside", [(100.0, 20.0), (-80.0, 40.0)])
@pytest.mark.parametrize("method", [otsu, kmeans2])
def test_two_classes_are_found_whatever_the_polarity(method, inside, outside):
    truth = block((20, 22, 18), (5, 14), (6, 15), (4, 12))
    values = np.where(truth, inside, outside) + np.random.default_rng(0).normal(0, 5, truth.shape)
    assert (method(values) == truth).mean() > 0.99


def test_border_rule_in_a_volume_and_in_a_slice():
    for shape in ((9, 9, 9), (9, 9, 1)):
        middle = block(shape, (3, 6), (3, 6), (0, shape[2]))
        middle[..., 0] = shape[2] == 1 and middle[..., 0]
        assert np.array_equal(border_rule(middle), middle)
        assert np.array_equal(border_rule(~middle), middle)


def test_fixed_uptake_threshold_and_constant_volumes():
    values = np.array([0.0, 3.9, 4.0, 10.0]).reshape(1, 2, 2)
    assert suv40(values).ravel().tolist() == [False, False, True, True]
    flat = np.zeros((4, 4, 4))
    assert not suv40(flat).any() and not otsu_bright(flat).any() and not kmeans2_bright(flat).any()
    assert all_foreground(flat).all()


# The whole program, with the real inferer on a tiny random model.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tumor") / "model")


@pytest.fixture
def dataset(tmp_path):
    """Three noise volumes of 24^3 voxels of 3 mm; the last is healthy."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    for stem in ("a", "b", "healthy"):
        mask = block((24, 24, 24), (6, 15), (6, 15), (6, 15)) & (stem != "healthy")
        values = random.normal(0, 120, mask.shape) + 60 * mask
        nib.save(nib.Nifti1Image(values.astype(np.float32), affine), tmp_path / "images" / f"{stem}.nii.gz")
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), tmp_path / "masks" / f"{stem}.nii.gz")
    return tmp_path


def run(dataset, model, out, *more) -> int:
    folders = ("--images", dataset / "images", "--masks", dataset / "masks", "--out", out)
    words = ("--organ", "liver", "--text", "liver tumour", "--modality", "ct", "--device", "cpu")
    return main(["evaluate", *map(str, ("--inferer", "tumor", "--backbone", model, *folders, *words)), *more])


@pytest.mark.slow
def test_a_folder_of_volumes_is_evaluated(dataset, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(dataset, model, out, "--ablation", "--nonsense", "--steps", "1,2") == 0
    summary = json.loads((out / "summary.json").read_text())
    rows = ["tumor", "tumor_aova", "tumor_pixel", "tumor_feature", "tumor_words", "tumor_steps_1", "tumor_steps_2"]
    assert list(summary["protocols"]) == rows == summary["settings"]["protocols"]
    assert all(p["n"] == 2 and 0 <= p["dice"] <= 1 and p["seconds"] > 0 for p in summary["protocols"].values())
    assert summary["baselines"]["all_foreground"]["dice"] == pytest.approx(2 * 9**3 / (9**3 + 24**3))
    assert "suv40" not in summary["baselines"]
    assert summary["absent"]["healthy"]["n"] == 1 and summary["absent"]["tumor"]["n"] == 2
    assert summary["absent"]["nonsense"] == {"n": 3, "absent": 3, "rate": 1.0}  # the vocabulary lacks these words
    with open(out / "cases.csv") as file:
        cases = list(csv.DictReader(file))
    assert {row["case"] for row in cases} == {"a", "b"}
    of_tumor = [float(row["dice"]) for row in cases if row["protocol"] == "tumor"]
    assert summary["protocols"]["tumor"]["dice"] == pytest.approx(np.mean(of_tumor))
    for name in ("absent.csv", "table.md", "report.html", "report.png", "steps.csv", "steps.png"):
        assert (out / name).stat().st_size > 0
    assert "answered absent" in capsys.readouterr().out
    # The ablation left no trace.
    assert summary["settings"]["inferer"]["stages"] == list(STAGES)


def test_healthy_scans_alone_give_rates_only(dataset, model, tmp_path):
    for stem in ("a", "b"):
        (dataset / "images" / f"{stem}.nii.gz").unlink()
    assert run(dataset, model, tmp_path / "out", "--stages", "aova") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["protocols"] == summary["baselines"] == {} and set(summary["absent"]) == {"healthy"}


@pytest.mark.slow
def test_a_case_can_be_asked_for_words_of_its_own(dataset, model, tmp_path, capsys):
    words = {"a": {"organ": "brain", "tumor": "glioma", "seed": 7}, "b": {"modality": "mr"}, "elsewhere": {}}
    (tmp_path / "cases.json").write_text(json.dumps(words))
    assert run(dataset, model, tmp_path / "out", "--stages", "aova", "--prompts", str(tmp_path / "cases.json")) == 0
    with open(tmp_path / "out" / "absent.csv") as file:
        asked = {row["case"]: row["text"] for row in csv.DictReader(file)}
    assert asked == {"a": "glioma", "b": "liver tumour", "healthy": "liver tumour"}
    (tmp_path / "cases.json").write_text("[1]")
    assert run(dataset, model, tmp_path / "out", "--prompts", str(tmp_path / "cases.json")) == 2
    assert "--prompts must be" in capsys.readouterr().err


def test_pictures_are_volumes_of_one_slice(model, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (40, 32), dtype=np.uint8)
    for name, array in (("images", values), ("masks", block((40, 32), (10, 20), (5, 25)).astype(np.uint8) * 255)):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "slice.png")
    assert run(tmp_path, model, tmp_path / "out", "--stages", "aova", "--modality", "mr") == 0
    (pair,), _ = find_pairs(tmp_path / "images", tmp_path / "masks", tmp_path / "out")
    volume = load_volume(*pair, "mr")
    assert volume.truth.shape == (40, 32, 1) and np.array_equal(volume.values[0, ..., 0], values)


def test_a_bad_case_is_reported_and_the_others_are_evaluated(dataset, model, tmp_path, capsys):
    nib.save(nib.Nifti1Image(np.zeros((5, 5, 5), np.uint8), np.eye(4)), dataset / "masks" / "a.nii.gz")
    assert run(dataset, model, tmp_path / "out", "--stages", "aova") == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [f["case"] for f in summary["settings"]["failed"]] == ["a"] and summary["protocols"]["tumor"]["n"] == 1
    assert "has the shape (5, 5, 5), the image (24, 24, 24)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--tolerance", "-1"], "--tolerance"),
        (["--limit", "0"], "--limit"),
        (["--modality", "sonar"], "modality must be"),
        (["--stages", "magic"], "unknown stage 'magic'"),
        (["--backbone", "nowhere"], "nowhere"),
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--nonsuch"], "--nonsuch"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(change, message, dataset, model, tmp_path, capsys):
    assert run(dataset, model, tmp_path / "out", *change) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_folders_are_refused():
    with pytest.raises(ZeroSegError, match="--images"):
        run_command(["evaluate", "--inferer", "tumor", "--out", "x"])


def test_rates_by_kind():
    answers = [{"kind": "healthy", "absent": True}, {"kind": "healthy", "absent": False}]
    assert absent_rates(answers) == {"healthy": {"n": 2, "absent": 1, "rate": 0.5}}


def test_a_mask_that_lies_elsewhere_is_not_scored(dataset):
    pair = find_pairs(dataset / "images", dataset / "masks", dataset / "out")[0][0]
    path = pair[1].paths[0]
    mask = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), np.diag([-1.0, 1, 1, 1]) @ mask.affine), path)
    with pytest.raises(ZeroSegError, match="another affine"):
        load_volume(*pair, "ct")
