"""The tumour bundle as a user starts it, in a process of its own: volumes in, masks and evidence out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from monai.bundle import ConfigParser
from PIL import Image
from scipy import ndimage

from bad_inputs import OBLIQUE, ct_series, write_nifti
from zeroseg.cases import load_prompts
from zeroseg.errors import ZeroSegError
from zeroseg.tumor import TumorSegmentationInferer
from zeroseg.tumor.prompts import DICOM_MODALITIES

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"
CONFIG = BUNDLE / "configs" / "inference_tumor.yaml"
EVIDENCE = ("aova", "healthy", "pixel_residual", "feature_residual")


def run(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file", CONFIG, *options]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    given = [str(part) for part in command]
    return subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300)


def messages(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("zeroseg: ")]


def tiny(folder: Path) -> list[object]:
    """Options that put the tiny random model in the embedded one's place; it never looks like anything, so that rule is off."""
    return [
        "--backbone",
        folder,
        "--text_encoder",
        folder / "text",
        "--adapters",
        folder,
        "--device",
        "cpu",
        "--presence",
        0,
    ]


def scan(shape=(24, 22, 9)) -> np.ndarray:
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 2)
    return (values / values.std() * 150).astype(np.int16)


@pytest.mark.slow
def test_every_kind_of_case_in_one_run(tiny_tumor_model, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    write_nifti(images / "oblique.nii.gz", scan(), OBLIQUE)
    write_nifti(images / "thick.nii.gz", scan((60, 60, 3)), np.diag([0.5, 0.5, 8, 1]))
    write_nifti(images / "tiny.nii.gz", scan((4, 3, 3)), np.diag([2.0, 2, 2, 1]))
    write_nifti(images / "magnitude.nii.gz", np.abs(scan()) * 5, np.diag([2.0, 2, 2, 1]))
    ct_series(images / "abdomen", count=3)
    Image.fromarray((np.abs(scan((40, 30, 3))[..., 0]) % 255).astype(np.uint8)).save(images / "slice.png")
    write_nifti(images / "series.nii.gz", np.stack([scan()] * 4, -1))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"tiny": {"tumor": "purple bicycle"}, "thick": {"organ": "kidny", "modality": "ct"}}))

    options = ["--organ", "liver", "--tumor", "liver tumour", "--modality", "ct", "--steps", 2, "--prompts", prompts]
    done = run("--dataset_dir", images, "--output_dir", out, *tiny(tiny_tumor_model), *options)
    assert done.returncode == 2, done.stderr
    assert "6 of 7 cases segmented" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    cases = {case["case"]: case for case in manifest["cases"]}
    assert "series" in [name for name, case in cases.items() if case["status"] == "failed"]
    done_cases = {name: case for name, case in cases.items() if case["status"] == "done"}
    assert set(done_cases) == {"oblique", "thick", "tiny", "magnitude", "abdomen", "slice"}

    for name in ("oblique", "thick", "tiny", "magnitude"):
        source = nib.load(images / f"{name}.nii.gz")
        mask = nib.load(out / f"{name}_seg.nii.gz")
        assert mask.shape == source.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, source.affine, atol=1e-5)
        for evidence in EVIDENCE:
            map_ = nib.load(out / f"{name}_{evidence}.nii.gz")
            assert map_.shape == source.shape and map_.get_data_dtype() == np.float32
            np.testing.assert_allclose(map_.affine, source.affine, atol=1e-5)
    assert np.asarray(nib.load(out / "oblique_seg.nii.gz").dataobj).any()
    assert Image.open(out / "slice_seg.png").size == (30, 40)
    assert all(tifffile.imread(out / f"slice_{e}.tif").shape == (40, 30) for e in EVIDENCE)
    if not cases["abdomen"]["absent"]:
        assert pydicom.dcmread(out / "abdomen_seg.dcm").Modality == "SEG"
    assert {p.name for p in out.iterdir()} == {"manifest.json", *(f for c in done_cases.values() for f in c["files"])}

    assert cases["tiny"]["absent"] and "knows none of the words" in cases["tiny"]["absent_because"]
    assert not np.asarray(nib.load(out / "tiny_seg.nii.gz").dataobj).any()
    assert any("is it MR?" in note for note in cases["magnitude"]["notes"])
    assert any("did you mean 'kidney'" in note for note in cases["thick"]["notes"])
    assert cases["thick"]["prompt"] == {"organ": "kidny", "tumor": None, "modality": "ct"}
    assert cases["oblique"]["prompt"] == {"organ": "liver", "tumor": "liver tumour", "modality": "ct"}
    printed = messages(done)
    assert any(line.startswith("zeroseg: magnitude: warning: given as CT") for line in printed)
    assert any(line.startswith("zeroseg: series: ") and "warning" not in line for line in printed)
    assert manifest["settings"]["stages"] == ["aova", "inpaint", "pixel", "feature", "lungs", "head"]
    assert manifest["backbone"]["source"] == "model"
    assert str(tiny_tumor_model.parent) not in json.dumps(manifest), "folders of this machine are nobody's business"


@pytest.mark.slow
def test_an_ablation_is_one_option(tiny_tumor_model, tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", scan(), np.diag([2.0, 2, 2, 1]))
    options = ["--stages", "['aova','inpaint','pixel']", "--steps", 2, "--modality", "mr", "--organ", "liver"]
    done = run(
        "--dataset_dir", tmp_path / "scan.nii.gz", "--output_dir", tmp_path / "out", *tiny(tiny_tumor_model), *options
    )
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "scan_pixel_residual.nii.gz" in names and "scan_feature_residual.nii.gz" not in names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organ": " "}, "organ must be words"),
        ({"modality": "xray"}, "modality must be ct, mr or pet"),
        ({"stages": ["aova", "feature"]}, "need inpaint"),
        ({"strength": 2}, "strength must"),
        ({"backbone": "/nowhere"}, "holds no readable config.json"),
    ],
)
def test_wrong_settings_end_in_one_line(tiny_tumor_model, tmp_path, capsys, options, message):
    write_nifti(tmp_path / "scan.nii.gz", scan())
    parser = ConfigParser()
    parser.read_config(CONFIG)
    given = dict(zip([o[2:] for o in tiny(tiny_tumor_model)[::2]], tiny(tiny_tumor_model)[1::2], strict=True))
    for name, value in {
        **given,
        "dataset_dir": tmp_path / "scan.nii.gz",
        "output_dir": tmp_path / "out",
        **options,
    }.items():
        parser[name] = str(value) if isinstance(value, Path) else value
    with pytest.raises(SystemExit) as end:
        parser.get_parsed_content("evaluator").run()
    printed = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in printed
    assert printed.startswith("zeroseg: ") and message in printed


def test_prompt_files_of_the_tumour_task(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"a": {"text": "tumour"}}))
    with pytest.raises(ZeroSegError, match="unknown key 'text'; use organ, tumor, modality"):
        load_prompts(path, ("organ", "tumor", "modality"))
    assert set(DICOM_MODALITIES.values()) == {"ct", "mr", "pet"}


def test_the_config_builds_the_inferer_with_its_own_defaults():
    """What the file says and what the class defaults to are one thing."""
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser["progress"] = False
    inferer = parser.get_parsed_content("inferer")
    assert isinstance(inferer, TumorSegmentationInferer)
    fresh = TumorSegmentationInferer()
    for name in ("organ", "tumor", "modality", "steps", "strength", "resample", "dilation_mm", "suspicion"):
        assert getattr(inferer, name) == getattr(fresh, name), name
    for name in ("threshold", "presence", "min_volume_ml", "max_components", "fusion", "rescale", "seed", "adapters"):
        assert getattr(inferer, name) == getattr(fresh, name), name
    assert list(inferer.stages) == list(fresh.stages)
    assert inferer.backbone.source == inferer.text_encoder.source == "embedded"
