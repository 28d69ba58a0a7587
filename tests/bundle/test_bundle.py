"""The bundle as a user starts it, ``python -m monai.bundle run`` in a process of its own, and its metadata."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
import torch
from jsonschema import ValidationError, validate
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata
from PIL import Image

from bad_inputs import BAD, OBLIQUE, bundled, color, ct_series, gray, write_bad, write_nifti

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundle"
METADATA = BUNDLE / "configs" / "metadata.json"
SCHEMA = ROOT / "tests" / "meta_schema.json"


def run(*options: object, bundle: Path = BUNDLE, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The command of the README; nothing of this test process reaches it but the interpreter."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", bundle]
    command += ["--config_file", bundle / "configs" / "inference.yaml", *options]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    given = [str(part) for part in command]
    return subprocess.run(given, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def messages(done: subprocess.CompletedProcess) -> list[str]:
    """What the program itself said on stderr, one entry a line."""
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("zeroseg: ")]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
def test_many_formats_in_one_run(tiny_pipeline, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.fromarray(color()).save(images / "photo.png")
    Image.fromarray(color()).save(images / "photo.jpg")
    Image.fromarray(gray()).save(images / "gray.bmp")
    tifffile.imwrite(images / "deep.tif", gray().astype(np.uint16) * 257)
    volume = np.random.default_rng(0).integers(0, 900, (9, 8, 4)).astype(np.int16)
    affines = {"oblique": OBLIQUE, "flipped": np.diag([-2.0, -2, 3, 1])}
    for name, affine in affines.items():
        write_nifti(images / f"{name}.nii.gz", volume, affine)
    for name in ("scan.nrrd", "scan.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(images / name))
    (images / "slice.dcm").write_bytes(bundled("CT_small.dcm").read_bytes())
    ct_series(images / "abdomen", count=3)
    prompts = tmp_path / "prompts.json"
    clicks = {"oblique": [4, 3, 2], "slice": [64, 64], "abdomen": [64, 64, 1], "deep": [30, 20]}
    given = {name: {"points": [point]} for name, point in clicks.items()}
    prompts.write_text(json.dumps(given | {"gray": {"box": [10, 5, 50, 35]}, "flipped": {"select": "segments"}}))

    options = ["--backbone", tiny_pipeline, "--resolution", 64, "--prompts", prompts, "--device", "cpu"]
    done = run("--dataset_dir", images, "--output_dir", out, *options)
    assert done.returncode == 0, done.stderr
    assert not messages(done)
    assert "10 of 10 cases segmented" in done.stdout

    manifest = manifest_of(out)
    cases = {case["case"]: case for case in manifest["cases"]}
    names = {"photo_png", "photo_jpg", "scan_nrrd", "scan_mha", "gray", "flipped", *clicks}
    assert set(cases) == names
    assert all(case["status"] == "done" for case in cases.values())
    rules = {"gray": "box", "flipped": "segments", **dict.fromkeys(clicks, "points")}
    assert {name: case["select"] for name, case in cases.items()} == {n: rules.get(n, "auto") for n in names}
    assert {p.name for p in out.iterdir()} == {"manifest.json", *(f for c in cases.values() for f in c["files"])}
    for name, affine in affines.items():
        mask = nib.load(out / f"{name}_seg.nii.gz")
        assert mask.shape == volume.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
    source = sitk.ReadImage(str(images / "scan.nrrd"))
    mask = sitk.ReadImage(str(out / "scan_nrrd_seg.nii.gz"))
    assert mask.GetSize() == source.GetSize()
    np.testing.assert_allclose(mask.GetDirection(), source.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(mask.GetOrigin(), source.GetOrigin(), atol=1e-6)
    assert Image.open(out / "photo_png_seg.png").size == (60, 40)
    for name in ("slice", "abdomen"):
        assert pydicom.dcmread(out / f"{name}_seg.dcm").Modality == "SEG"
    assert all(Image.open(out / f"{name}_overlay.png").size > (30, 30) for name in names)
    assert manifest["backbone"]["source"] == "pipeline" and len(manifest["backbone"]["sha256"]) == 64
    assert manifest["settings"]["resolution"] == 64


@pytest.mark.slow
def test_every_bad_input_in_one_run(tiny_pipeline, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    for name in BAD:  # each in a folder of its own, as if from different people
        (images / name).mkdir(parents=True)
        write_bad(name, images / name)
    Image.fromarray(color()).save(images / "good.png")
    done = run("--dataset_dir", images, "--output_dir", out, "--backbone", tiny_pipeline, "--resolution", 64)
    assert done.returncode == 2
    cases = manifest_of(out)["cases"]
    good = [case for case in cases if case["status"] == "done"]
    failed = [case for case in cases if case["status"] == "failed"]
    assert [case["case"] for case in good] == ["good"] and len(good) + len(failed) == len(cases)
    assert (out / "good_seg.png").is_file()
    listed = {file["file"] for case in failed for file in case["inputs"]}
    assert listed == {entry.file for entry in BAD.values()}, "none is passed over in silence"
    assert all(case["reason"] and "\n" not in case["reason"] for case in failed)
    assert messages(done) == [f"zeroseg: {case['case']}: {case['reason']}" for case in failed]
    assert f"1 of {len(cases)} cases segmented" in done.stdout
    assert {p.name for p in out.iterdir()} == {"manifest.json", *good[0]["files"]}


@pytest.mark.slow
def test_a_wrong_setting_is_one_line(tiny_pipeline, tmp_path):
    Image.fromarray(gray()).save(tmp_path / "a.png")
    options = ["--dataset_dir", tmp_path / "a.png", "--output_dir", tmp_path / "out", "--backbone", tiny_pipeline]
    done = run(*options, "--select", "everything")
    assert done.returncode == 2
    assert messages(done) == ["zeroseg: unknown select 'everything': use one of segments, auto, points, box, text"]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The bundle folder copied alone, without the backbone's weights, its version changed so that it can be told from the original."""
    copy = tmp_path_factory.mktemp("elsewhere") / "copied bundle"
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors", "model_index.json")
    shutil.copytree(BUNDLE, copy, ignore=left_out)
    shutil.copy(BUNDLE / "models" / "interaction" / "head.safetensors", copy / "models" / "interaction")
    package = copy / "zeroseg" / "__init__.py"
    package.write_text(re.sub(r'__version__ = "[^"]+"', '__version__ = "9.9.9"', package.read_text()))
    return copy


@pytest.mark.slow
def test_a_copy_of_the_bundle_runs_alone_from_another_folder(copied, tiny_pipeline, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(color()).save(tmp_path / "images" / "a.png")
    options = ["--dataset_dir", "images", "--output_dir", "out", "--backbone", tiny_pipeline, "--resolution", 64]
    done = run(*options, bundle=copied, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest_of(tmp_path / "out")["zeroseg"] == "9.9.9", "the copied package ran, not another one"
    assert (tmp_path / "out" / "a_seg.png").is_file()


@pytest.mark.slow
def test_missing_weights_name_the_remedy(copied, tmp_path):
    Image.fromarray(gray()).save(tmp_path / "a.png")
    done = run("--dataset_dir", "a.png", "--output_dir", "out", bundle=copied, cwd=tmp_path)
    assert done.returncode == 2
    (message,) = messages(done)
    assert message.startswith("zeroseg: the embedded weights are missing in models/attention: restore that folder")
    assert not (tmp_path / "out").exists()


# Metadata and layout --------------------------------------------------------------------------------------------------


def described() -> dict:
    return json.loads(METADATA.read_text())


def test_metadata_is_valid_offline():
    before = SCHEMA.read_bytes()
    verify_metadata(meta_file=str(METADATA), filepath=str(SCHEMA))
    assert SCHEMA.read_bytes() == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.pop("required_packages_version"),
        lambda m: m.update(version=1),
        lambda m: m["network_data_format"].pop("outputs"),
        lambda m: m["network_data_format"]["inputs"]["image"].pop("value_range"),
        lambda m: m["network_data_format"]["outputs"]["pred"].update(num_channels="1"),
        lambda m: m.update(encoder_data_format={"inputs": {}}),
    ],
)
def test_the_schema_tells_right_from_wrong(spoil):
    schema, content = json.loads(SCHEMA.read_text()), described()
    validate(content, schema)
    spoil(content)
    with pytest.raises(ValidationError):
        validate(content, schema)


def test_versions_agree():
    import zeroseg

    content = described()
    assert content["version"] == zeroseg.__version__
    assert content["version"] in content["changelog"]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    asked = {**content["required_packages_version"], "monai": content["monai_version"]}
    asked["numpy"] = content["numpy_version"]
    assert asked == {name: pins[name] for name in asked}


EXTRAS = ("cli", "cohort", "evaluation")
"""Folders of the package that a bundle's run does not need; pyproject.toml says what they do."""


def imports_of(file: Path) -> set[str]:
    """The foreign packages that a module imports."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    return {name for name in imported - sys.stdlib_module_names if name != "zeroseg"}


def test_every_package_the_bundle_imports_is_required():
    content, owners = described(), metadata.packages_distributions()
    root = BUNDLE / "zeroseg"
    inside = [file for file in root.rglob("*.py") if file.relative_to(root).parts[0] not in EXTRAS]
    foreign = set().union(*map(imports_of, inside))
    given = {name.lower() for name in ("torch", "numpy", "monai", *content["required_packages_version"])}
    assert {name for name in foreign if not given & {owner.lower() for owner in owners[name]}} == set()


def test_layout_of_the_model_zoo():
    for name in ("LICENSE", "configs/metadata.json", "docs/README.md", "docs/data_license.txt"):
        assert (BUNDLE / name).stat().st_size > 100
    large = [p for p in BUNDLE.rglob("*") if p.is_file() and p.stat().st_size > 24e6]
    assert not large, "no file above the Model Zoo's limit"
    pickles = [p for p in (BUNDLE / "models").rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    # The specification and MONAI Label's bundle task ask for model.pt: the state of network_def, which is an Identity.
    assert pickles == [BUNDLE / "models" / "model.pt"] and torch.load(pickles[0], weights_only=True) == {}


def test_the_config_has_what_monai_asks_of_an_inference_workflow(tiny_pipeline, tmp_path):
    Image.fromarray(gray()).save(tmp_path / "a.png")
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "inference.yaml"),
        meta_file=str(METADATA),
        logging_file=str(BUNDLE / "configs" / "logging.conf"),
        workflow_type="inference",
        bundle_root=str(BUNDLE),
        dataset_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        backbone=str(tiny_pipeline),
        resolution=64,
    )
    workflow.initialize()
    assert workflow.check_properties() in (None, [])
    workflow.run()
    assert manifest_of(tmp_path / "out")["cases"][0]["status"] == "done"


def test_every_setting_of_the_inferer_can_be_given():
    import dataclasses

    from zeroseg.interaction.settings import Settings

    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    given = {k: v for k, v in parser["inferer"].items() if not k.startswith("_")}
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {"refiner", "refine", "select"} <= set(given) - {"backbone", "preset"} <= set(defaults)
    for name in set(given) - {"backbone", "progress", "preset"}:
        assert given[name] == f"@{name}"
        assert parser[name] == defaults[name], f"{name}: the config's default is the class's"
