"""zeroseg learn, segment --learned and --exemplar, and the protocol few-shot."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from phantoms3d import write_volumes
from zeroseg.cli import main
from zeroseg.learning import volumes


def draw(folder: Path, names: str, value: int = 255) -> None:
    """Pictures of a bright disc, and their masks."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:64, :64]
    for k, name in enumerate(names):
        mask = (y - 24 - 3 * k) ** 2 + (x - 36 + 4 * k) ** 2 < 120
        Image.fromarray(np.where(mask, 200, 60).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray((mask * value).astype(np.uint8)).save(folder / "masks" / f"{name}.png")


def draw_balls(folder: Path, names: str) -> None:
    """Volumes of a bright ball, and their masks."""
    x, y, z = np.indices((40, 24, 22))
    for k, name in enumerate(names):
        ball = (x - 12 - 4 * k) ** 2 + (y - 12) ** 2 + (z - 11) ** 2 < 36
        for kind, values in (("images", np.where(ball, 200, 60)), ("masks", ball)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values.astype(np.uint8), np.eye(4)), folder / kind / f"{name}.nii.gz")


@pytest.fixture
def tiny(tiny_pipeline) -> list[str]:
    return ["--backbone", str(tiny_pipeline), "--resolution", "64", "--device", "cpu"]


def run(*argv: object) -> int:
    return main([*map(str, argv)])


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zeroseg: ")]
    return line


@pytest.fixture
def learned(tmp_path, tiny) -> Path:
    draw(tmp_path, "ab")
    folders = "--images", tmp_path / "images", "--labels", tmp_path / "masks"
    assert (
        run("learn", *folders, "--output_dir", tmp_path / "head", "--seconds", "1", "--label", "cell=255", *tiny) == 0
    )
    return tmp_path / "head"


def test_learn_and_segment(learned, tiny, tmp_path):
    manifest = json.loads((learned / "manifest.json").read_text())
    assert manifest["head"]["labels"] == {"cell": 255} and manifest["head"]["shots"] == 2
    assert [case["case"] for case in manifest["cases"]] == ["a", "b"] and len(manifest["backbone"]["sha256"]) == 64
    assert run("segment", tmp_path / "images", "--learned", learned, "--output-dir", tmp_path / "out", *tiny) == 0
    (first, _) = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"]
    assert first["select"] == "learned" and first["details"]["labels"] == {"cell": 255}
    assert set(np.unique(np.asarray(Image.open(tmp_path / "out" / "a_seg.png")))) <= {0, 255}
    assert (tmp_path / "out" / "a_overlay.png").is_file() and 0 <= first["details"]["expected_dice"] <= 1


def test_learning_goes_on(learned, tiny, tmp_path):
    folders = "--images", tmp_path / "images", "--labels", tmp_path / "masks", "--label", "cell=255"
    before = json.loads((learned / "config.json").read_text())["weights"]["sha256"]
    assert run("learn", *folders, "--output-dir", learned, "--seconds", "1", "--resume", *tiny) == 0
    assert json.loads((learned / "config.json").read_text())["weights"]["sha256"] != before
    assert json.loads((learned / "manifest.json").read_text())["settings"]["resumed"] is True


def test_a_head_keeps_its_window(tiny, tmp_path, capsys):
    draw(tmp_path, "ab")
    head, out = tmp_path / "head", tmp_path / "out"
    learn = ["learn", "--images", tmp_path / "images", "--labels", tmp_path / "masks", "--seconds", "1"]
    learn += ["--output-dir", head]
    assert run(*learn, "--window", "130,140", *tiny) == 0
    segment = ["segment", tmp_path / "images", "--learned", head, "--output-dir", out, *tiny]
    for same in ([], ["--window", "130,140"]):
        assert run(*segment, *same) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["settings"]["window"] == manifest["settings"]["learned"]["window"] == [130, 140]
    other = "--window", "40,400"
    message = "was learned with --window 130,140 and is asked with another: leave --window out, or learn again"
    assert message in refused(capsys, *segment, *other)
    assert message in refused(capsys, *learn, "--resume", *other, *tiny)
    assert run(*learn, "--resume", *tiny) == 0
    assert json.loads((head / "manifest.json").read_text())["settings"]["window"] == [130, 140]
    config = json.loads((head / "config.json").read_text())
    # As heads of before, which do not know theirs.
    del config["facts"]["window"]
    (head / "config.json").write_text(json.dumps(config))
    assert run(*segment, *other) == 0
    assert json.loads((out / "manifest.json").read_text())["settings"]["window"] == [40, 400]


def test_a_head_learned_without_a_window_is_asked_without_one(learned, tiny, tmp_path, capsys):
    segment = ["segment", tmp_path / "images", "--learned", learned, "--output-dir", tmp_path / "out", *tiny]
    assert "was learned without --window" in refused(capsys, *segment, "--window", "40,400")


@pytest.mark.slow
def test_mistakes_are_one_line(learned, tiny, tmp_path, capsys):
    images, masks = tmp_path / "images", tmp_path / "masks"
    learn = ["learn", "--images", images, "--labels", masks, "--output-dir", tmp_path / "new", *tiny]
    assert "NAME=VALUE" in refused(capsys, *learn, "--label", "cell")
    assert "holds the value 255" in refused(capsys, *learn, "--label", "cell=1")
    assert "holds no learned head" in refused(capsys, *learn, "--resume")
    assert "--seconds" in refused(capsys, *learn, "--seconds", "0")
    assert "--organ" in refused(capsys, *learn, "--adapters")
    assert "no such file" in refused(capsys, *learn, "--labels", tmp_path / "none")
    draw(tmp_path / "other", "xyz")
    assert "has the name" in refused(capsys, *learn, "--labels", tmp_path / "other" / "masks")
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(masks / "a.png")
    assert "must be equal" in refused(capsys, *learn)
    segment = ["segment", images, "--output-dir", tmp_path / "out", *tiny]
    assert "does not go with" in refused(capsys, *segment, "--learned", learned, "--select", "auto")
    assert "does not go with" in refused(capsys, *segment, "--learned", learned, "--exemplar", "a,b")
    assert "another resolution" in refused(capsys, *segment[:4], *tiny[:2], "--resolution", "128", "--learned", learned)
    assert "IMAGE,MASK" in refused(capsys, *segment, "--exemplar", "a.png")
    assert "learned head" in refused(capsys, *segment, "--learned", tmp_path / "none")


def test_an_exemplar_labels_a_folder(tiny, tmp_path):
    draw(tmp_path, "ab")
    draw(tmp_path / "one", "q")
    pair = f"{tmp_path / 'one/images/q.png'},{tmp_path / 'one/masks/q.png'}"
    assert run("segment", tmp_path / "images", "--exemplar", pair, "--output_dir", tmp_path / "out", *tiny) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {case["select"] for case in manifest["cases"]} == {"exemplar"}
    assert manifest["settings"]["exemplar"] == {"labels": {"object": 1}}


def test_a_mask_in_another_orientation_is_refused(tiny, tmp_path, capsys):
    draw_balls(tmp_path, "a")
    mask = tmp_path / "masks" / "a.nii.gz"
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = 39
    nib.save(nib.Nifti1Image(np.asarray(nib.load(mask).dataobj)[::-1], mirrored), mask)
    folders = "--images", tmp_path / "images", "--labels", tmp_path / "masks"
    said = refused(capsys, "learn", *folders, "--output-dir", tmp_path / "head", *tiny)
    assert "the mask a.nii.gz has another affine" in said and "save it in the image's own geometry" in said
    pair = f"{tmp_path / 'images/a.nii.gz'},{mask}"
    said = refused(capsys, "segment", tmp_path / "images", "--exemplar", pair, "--output-dir", tmp_path / "out", *tiny)
    assert "another affine" in said


@pytest.mark.slow
def test_few_shot_is_measured(tiny_pipeline, tmp_path, capsys):
    draw(tmp_path, "abcde")
    folders = ["--images", tmp_path / "images", "--masks", tmp_path / "masks", "--cache", tmp_path / "cache"]
    options = ["--protocol", "few-shot", "--shots", "1,2,20", "--choices", "2", "--seconds", "0.01"]
    command = ["evaluate", *folders, *options, "--unet-times", "1,2", "--unet-shots", "2", "--out", tmp_path / "out"]
    command += ["--backbone", tiny_pipeline, "--device", "cpu", "--select-settings", "resolution=64"]
    assert run(*command) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["few_shot"]["images"]
    unets = {"BasicUNet", "BasicUNet, 2 times as long"}
    assert set(found) == {"learned", "auto", "exemplar", "colour neighbours", *unets}
    assert set(found["learned"]) == {"1", "2"} and set(found["exemplar"]) == {"1"}
    assert found["colour neighbours"]["2"]["dice"] > 0.95 and found["learned"]["1"]["choices"] == 2
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert "| learned | 2 |" in (tmp_path / "out" / "table.md").read_text()
    assert "by itself" in refused(capsys, *command, "--protocol", "few-shot,auto")
    assert "positive" in refused(capsys, *command, "--shots", "0")


@pytest.mark.slow
def test_few_shot_is_measured_in_volumes_beside_images(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "VOXELS", 32 * 32 * 64)
    suite = tmp_path / "suite"
    draw_balls(suite / "scans", "abcd")
    (suite / "scans" / "masks" / "zzz.nii.gz").write_bytes(b"")
    (suite / "scans" / "images" / "zzz.nii.gz").write_bytes(b"")
    draw(suite / "discs", "abc")
    options = ["--protocol", "few-shot", "--shots", "1", "--choices", "1", "--seconds", "0.01"]
    model = ["--backbone", tiny_pipeline, "--device", "cpu", "--select-settings", "resolution=64"]
    assert run("evaluate", "--suite", suite, *options, "--out", tmp_path / "out", *model) == 2
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    scans, discs = written["few_shot"]["scans"], written["few_shot"]["discs"]
    assert set(scans) == {"learned", "Otsu", "value neighbours", "BasicUNet"}
    assert set(scans["learned"]) == set(discs["learned"]) == {"1"}
    assert scans["Otsu"]["1"]["dice"] == scans["value neighbours"]["1"]["dice"] == 1
    assert [fault["case"] for fault in written["settings"]["failed"]] == ["zzz"]
    assert "| discs | scans | mean |" in (tmp_path / "out" / "table.md").read_text()


def test_adapters_of_the_tumour_model_are_learned_from_a_folder(tiny_tumor_model, tmp_path, capsys):
    write_volumes(tmp_path / "mr", 2, first_seed=60, largest=24, lesion=True, modality="mr", scene="limb")
    folders = ["--images", tmp_path / "mr" / "images", "--labels", tmp_path / "mr" / "masks"]
    what = ["--adapters", "--organ", "limb", "--modality", "mr", "--output_dir", tmp_path / "out"]
    quick = {"steps": 2, "volumes": 2, "voxels": 32, "variants": 1, "crop": 16, "fusion_volumes": 0}
    quick |= {"text_encoder": tiny_tumor_model / "text"}
    options = [word for name, value in quick.items() for word in ("--set", f"{name}={value}")]
    model = ["--backbone", tiny_tumor_model, "--device", "cpu", "--dtype", "fp32"]
    assert run("learn", *folders, *what, *options, *model) == 0
    assert (tmp_path / "out" / "adapters.safetensors").is_file()
    assert run("learn", *folders, *what, *options, *model) == 0, "it goes on, wherever its copies of the volumes lie"
    endless = ["--set", "steps=1000000", "--seconds", "1"]
    assert run("learn", *folders, *what, *options, *model, *endless) == 0, "the seconds are over"
    said = refused(capsys, "learn", *folders, *what, *options, *model, "--organ", "brain")
    assert "differs in cases, organ: give another folder" in said


@pytest.fixture
def to_adapt(tmp_path, tiny_tumor_model) -> list[object]:
    """A command that learns adapters, of two volumes of one name in two folders, in no steps."""
    for kind in ("images", "masks"):
        for patient in ("p", "q"):
            (tmp_path / kind / patient).mkdir(parents=True)
    for patient, value in (("p", 1), ("q", 7)):
        values = np.full((24, 24, 24), 100, np.float32)
        values[8:14, 8:14, 8:14] += value
        for kind, stored in (("images", values), ("masks", (values > 100).astype(np.uint8))):
            nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / kind / patient / "ct.nii.gz")
    folders = ["--images", tmp_path / "images", "--labels", tmp_path / "masks", "--output-dir", tmp_path / "out"]
    sets = {"steps": 0, "fusion_volumes": 0, "initial": tiny_tumor_model, "text_encoder": tiny_tumor_model / "text"}
    options = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    model = ["--backbone", tiny_tumor_model, "--device", "cpu", "--dtype", "fp32"]
    return ["learn", "--adapters", "--organ", "liver", "--modality", "ct", *folders, *options, *model]


def test_volumes_of_one_name_are_two_cases_and_json_is_the_record(to_adapt, capsys):
    assert run(*to_adapt, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["fusion"]["real"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "stpes=5"], "train_tumor.yaml has no setting 'stpes'"),
        (["--set", "steps=abc"], "steps must be a whole number, not 'abc'"),
        (["--set", "lr=fast"], "lr must be a number, not 'fast'"),
        (["--set", "crop=7"], "crop must be a multiple of"),
        (["--backbone", "/nowhere"], "/nowhere holds no readable config.json"),
        (["--dtype", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_mistakes_about_adapters_are_one_line(to_adapt, capsys, options, message):
    assert message in refused(capsys, *to_adapt, *options)


def test_masks_of_adapters_are_volumes_of_their_images_grid(to_adapt, tmp_path, capsys):
    mask = tmp_path / "masks" / "p" / "ct.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.uint8), np.eye(4)), mask)
    assert "has the shape (9, 9, 9)" in refused(capsys, *to_adapt)
    mask.write_bytes(mask.read_bytes()[:60])
    assert "ct.nii.gz: cannot be read" in refused(capsys, *to_adapt)
    for path in (tmp_path / "masks").rglob("*.nii.gz"):
        path.unlink()
        Image.new("L", (24, 24)).save(path.with_name("ct.png"))
    assert "ct.png is no volume" in refused(capsys, *to_adapt)
