"""The same input, settings and weights give the same mask, in another process as well, and a manifest is enough for it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bad_inputs import OBLIQUE, color, ct_series, gray, write_nifti
from zeroseg.cases import CaseDataset
from zeroseg.cli import main
from zeroseg.cli.main import build_parser
from zeroseg.cohort import rerun
from zeroseg.configs import build_runner, find_config, parse_settings
from zeroseg.errors import ZeroSegError
from zeroseg.places import BUNDLE


def first_run(config: str, images: Path, out: Path, prompts: dict | None = None, **settings) -> dict:
    """Segment ``images`` as the bundle does; returns the manifest."""
    runner = build_runner(find_config(config), {"device": "cpu"} | settings, out)
    runner.dataset = CaseDataset(images)
    if prompts:
        runner.prompts = out.parent / "prompts.json"
        runner.prompts.write_text(json.dumps(prompts))
    runner.run()
    return json.loads((out / "manifest.json").read_text())


def again(manifest: Path, images: Path, out: Path, *options: object) -> tuple[int, int]:
    given = [manifest, "--dataset_dir", images, "--output_dir", out, *options]
    args = build_parser(["rerun"]).parse_args(["rerun", *map(str, given)])
    settings = parse_settings(args.set)
    return rerun.run(args.manifest, args.dataset_dir, args.output_dir, args.case, args.compare, settings)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(color()).save(folder / "first.png")
    Image.fromarray(gray(30, 50)).save(folder / "second.png")
    Image.fromarray(gray(40, 40)).save(folder / "sub" / "second.png")
    ct_series(folder / "abdomen", count=3)
    return folder


@pytest.fixture
def manifest(tiny_pipeline, images, tmp_path):
    """Path of the manifest of a run with settings that are not the defaults."""
    prompts = {"first": {"points": [[30, 20], [2, 2]], "labels": [1, 0]}, "abdomen": {"points": [[64, 64, 1]]}}
    special = {"resolution": 64, "noise_draws": 1, "seed": 7, "window": [40, 400], "inferer#working_size": 48}
    first_run("inference.yaml", images, tmp_path / "one", prompts, backbone=str(tiny_pipeline), **special)
    return tmp_path / "one" / "manifest.json"


def weights(tiny_pipeline: Path) -> list[str]:
    return ["--set", f"backbone={tiny_pipeline}", "--set", "device=cpu"]


@pytest.mark.slow
def test_two_processes_with_the_embedded_weights(tmp_path):
    """As a user does it: the bundle's command, then this one, each a fresh process."""
    images, one, two = (tmp_path / name for name in ("images", "one", "two"))
    images.mkdir()
    Image.fromarray(color(64, 64)).save(images / "photo.png")
    environment = os.environ | {"PYTHONPATH": str(BUNDLE), "HF_HUB_OFFLINE": "1"}

    def run(*command: object) -> str:
        given = [sys.executable, *map(str, command)]
        return subprocess.run(given, capture_output=True, text=True, env=environment, check=True, timeout=300).stdout

    bundle = ["--bundle_root", BUNDLE, "--config_file", BUNDLE / "configs" / "inference.yaml"]
    options = ["--resolution", 64, "--affinity", "both", "--noise_draws", 1, "--device", "cpu"]
    run("-m", "monai.bundle", "run", *bundle, "--dataset_dir", images, "--output_dir", one, *options)
    folders = ["--dataset_dir", images, "--output_dir", two]
    printed = run("-m", "zeroseg", "rerun", one / "manifest.json", *folders, "--compare", "--set", "device=cpu")
    assert printed == "photo: the mask is the same bit for bit\n"
    for name in ("photo_seg.png", "photo_confidence.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert np.asarray(Image.open(two / "photo_seg.png")).any()


@pytest.mark.slow
def test_every_case_again(tiny_pipeline, manifest, images, tmp_path, capsys):
    assert again(manifest, images, tmp_path / "two", "--compare", *weights(tiny_pipeline)) == (0, 0)
    then, now = (json.loads(p.read_text()) for p in (manifest, tmp_path / "two" / "manifest.json"))
    assert capsys.readouterr().out.splitlines() == [
        f"{entry['case']}: the mask is the same bit for bit" for entry in then["cases"]
    ]
    assert len(then["cases"]) == 4 and now["settings"] == then["settings"]
    assert now["settings"]["working_size"] == 48 and now["settings"]["window"] == [40, 400]
    for before, after in zip(then["cases"], now["cases"], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
        for name in before["files"][:2]:
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_one_case(tiny_pipeline, manifest, images, tmp_path):
    again(manifest, images, tmp_path / "two", "--case", "sub_second", *weights(tiny_pipeline))
    assert {p.name.split("_seg")[0] for p in (tmp_path / "two").glob("*_seg*")} == {"sub_second"}


@pytest.mark.slow
def test_a_tumour_model(tiny_tumor_model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write_nifti(images / "scan.nii.gz", np.random.default_rng(0).integers(-200, 300, (12, 11, 9)).astype("i2"), OBLIQUE)
    model = str(tiny_tumor_model)
    folders = {"backbone": model, "adapters": model, "text_encoder": f"{model}/text"}
    special = {"organ": "liver", "steps": 2, "presence": 0, "evidence": False, "modality": "ct"}
    then = first_run("inference_tumor.yaml", images, tmp_path / "one", **folders, **special)
    assert then["cases"][0]["status"] == "done"
    given = [part for name, folder in folders.items() for part in ("--set", f"{name}={folder}")]
    path = tmp_path / "one" / "manifest.json"
    assert again(path, images, tmp_path / "two", "--compare", "--set", "device=cpu", *given) == (0, 0)
    now = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert now["settings"] == then["settings"] and now["cases"][0]["files"] == then["cases"][0]["files"]


@pytest.mark.slow
def test_a_mask_that_differs_is_told(tiny_pipeline, manifest, images, tmp_path, capsys):
    content = json.loads(manifest.read_text())
    content["cases"][1]["mask_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    folders = ["--dataset_dir", images, "--output_dir", tmp_path / "two"]
    assert main([*map(str, ("rerun", manifest, *folders, "--compare", *weights(tiny_pipeline)))]) == 1
    assert "first: the mask DIFFERS" in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_that_fails_again(tiny_pipeline, images, tmp_path, capsys):
    (images / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        first_run("inference.yaml", images, tmp_path / "one", backbone=str(tiny_pipeline), resolution=64)
    path, out = tmp_path / "one" / "manifest.json", tmp_path / "two"
    assert again(path, images, out, "--case", "bad", *weights(tiny_pipeline)) == (1, 0)
    assert "bad: " in capsys.readouterr().out


def change(manifest: Path, edit) -> None:
    content = json.loads(manifest.read_text())
    edit(content)
    manifest.write_text(json.dumps(content))


def refused(message: str, *arguments) -> None:
    with pytest.raises(ZeroSegError) as error:
        again(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_what_is_not_the_same_is_not_run(tiny_pipeline, tiny_tumor_model, manifest, images, tmp_path):
    out, here = tmp_path / "two", weights(tiny_pipeline)
    refused("backbone sha256 is not that of the manifest", manifest, images, out, "--set", "device=cpu")
    refused("setting seed is not that of the manifest", manifest, images, out, *here, "--set", "seed=8")
    refused("lists no case third", manifest, images, out, "--case", "third", *here)
    refused("give another folder", manifest, images, manifest.parent, *here)
    shutil.move(images / "first.png", images / "other.png")
    refused("first: no image in dataset_dir is made of first.png", manifest, images, out, *here)
    Image.fromarray(gray()).save(images / "first.png")
    refused("first: first.png is not what it was", manifest, images, out, *here)
    assert not out.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("inferer"), "is no manifest that this version"),
        (lambda m: m.update(inferer="os.system"), "is no manifest that this version"),
        (lambda m: m.update(cases=3), "is no manifest that this version"),
        (lambda m: m["cases"][0].update(case="../../outside"), "is no manifest that this version"),
        (lambda m: m["cases"][0]["inputs"][0].update(file=None), "is no manifest that this version"),
        (lambda m: m["cases"][0].update(prompt={"backbone": "x"}), "unknown prompt key 'backbone'"),
        (lambda m: m["settings"].update(select="$__import__('os').mkdir('executed')"), "unknown select "),
        (lambda m: m["settings"].update(grid=None), "grid must be a positive number"),
        (lambda m: m["settings"].update(invented=1), "setting invented is not that of the manifest"),
        (lambda m: m["backbone"].update(dtype="$1/0"), "backbone dtype is not that of the manifest"),
    ],
)
@pytest.mark.slow
def test_a_manifest_is_data_from_anyone(tiny_pipeline, manifest, images, tmp_path, monkeypatch, edit, message):
    monkeypatch.chdir(tmp_path)
    change(manifest, edit)
    refused(message, manifest, images, tmp_path / "two", *weights(tiny_pipeline))
    assert not (tmp_path / "executed").exists()


def test_a_manifest_that_cannot_be_read(tmp_path, images):
    refused("cannot read", tmp_path / "none.json", images, tmp_path / "two")
    (tmp_path / "half.json").write_text('{"cases": [')
    refused("half.json is not valid JSON", tmp_path / "half.json", images, tmp_path / "two")


def test_what_may_change_the_last_bits_is_said():
    then = {"versions": {"torch": "2.6.0", "numpy": "1"}, "backbone": {"device": "cuda:0"}, "threads": 8}
    now = copy.deepcopy(then) | {"threads": 2}
    now["versions"] = {"torch": "2.13.0", "numpy": "1"}
    assert rerun.differences(then, now) == [("torch", "2.6.0", "2.13.0"), ("threads", 8, 2)]
    assert rerun.differences(then, then) == []
