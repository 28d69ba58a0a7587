"""From a folder to files and a manifest, in this process, with the tiny backbone."""

from __future__ import annotations

import hashlib
import json
import logging
import re

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from bad_inputs import OBLIQUE, bundled, color, ct_series, gray, write_nifti
from zeroseg.cases import CaseDataset, CaseRunner, load_prompts
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer


@pytest.fixture
def images(tmp_path):
    """A folder with two pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(color()).save(folder / "first.png")
    Image.fromarray(gray(30, 50)).save(folder / "second.png")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def inferer(tiny_backbone):
    return AttentionSegmentationInferer(tiny_backbone, resolution=64)


def run(inferer, images, out, **options) -> dict:
    """Run and return the manifest."""
    CaseRunner(inferer, CaseDataset(images), out, **options).run()
    return manifest_of(out)


def manifest_of(out) -> dict:
    return json.loads((out / "manifest.json").read_text())


def prompts(tmp_path, content) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def exits(code: int, *arguments, **options) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments, **options)
    assert end.value.code == code


def test_pictures(inferer, images, out, tmp_path, capsys):
    manifest = run(inferer, images, out, prompts=prompts(tmp_path, {"first": {"points": [[30, 20]]}}))
    first, second = manifest["cases"]
    assert (first["case"], first["select"], first["status"]) == ("first", "points", "done")
    assert (second["case"], second["select"], second["status"]) == ("second", "auto", "done")
    assert first["shape"] == [40, 60] and first["modality"] == "RGB"
    assert first["prompt"] == {"points": [[30, 20]]} and second["prompt"] == {}
    for case in (first, second):
        assert case["files"] == [f"{case['case']}_{kind}.png" for kind in ("seg", "confidence", "overlay")]
        mask = Image.open(out / case["files"][0])
        assert mask.mode in ("L", "P") and list(mask.size) == case["shape"][::-1]
        assert Image.open(out / case["files"][1]).size == mask.size
        file = images / f"{case['case']}.png"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert case["inputs"] == [{"file": file.name, "sha256": digest}]
        assert len(case["scores"]) == np.asarray(mask).max() and not case["absent"]
        assert case["seconds"]["total"] >= case["seconds"]["encode"] > 0
    assert np.asarray(Image.open(out / "first_seg.png"))[20, 30] == 1
    written = {p.name for p in out.iterdir()}
    assert written == {"manifest.json", *first["files"], *second["files"]}, "and nothing else"
    assert "2 of 2 cases segmented" in capsys.readouterr().out


def test_manifest_says_what_made_the_masks(inferer, images, out, tiny_backbone):
    manifest = run(inferer, images, out, window=[100, 200])
    assert manifest["backbone"]["sha256"] == tiny_backbone.fingerprint
    assert manifest["settings"]["resolution"] == 64 and manifest["settings"]["window"] == [100, 200]
    assert {"zeroseg", "python", "torch", "monai", "diffusers"} <= set(manifest["versions"])
    assert manifest["zeroseg"] == manifest["versions"]["zeroseg"]
    assert manifest["started"].endswith("Z")
    assert str(images.parent) not in (out / "manifest.json").read_text(), "no folder of this machine"


def test_a_second_run_gives_the_same_files(inferer, images, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        run(inferer, images, folder)
    for file in one.glob("*.png"):
        assert file.read_bytes() == (two / file.name).read_bytes()


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([-2.0, -2, 3, 1]), np.diag([2.0, -1, -3, 1])])
def test_volumes_keep_shape_and_affine(inferer, tmp_path, out, affine):
    images = tmp_path / "images"
    images.mkdir()
    volume = np.random.default_rng(0).integers(0, 900, (9, 8, 4)).astype(np.int16)
    write_nifti(images / "scan.nii.gz", volume, affine)
    case = run(inferer, images, out, prompts=prompts(tmp_path, {"scan": {"points": [[4, 3, 2]]}}))["cases"][0]
    assert case["files"] == ["scan_seg.nii.gz", "scan_confidence.nii.gz", "scan_overlay.png"]
    mask, confidence = (nib.load(out / name) for name in case["files"][:2])
    for written in (mask, confidence):
        assert written.shape == (9, 8, 4)
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert mask.get_data_dtype() == np.uint8
    assert mask.dataobj[4, 3, 2] == 1
    assert confidence.get_fdata().min() >= 0 and confidence.get_fdata().max() <= 1


def test_dicom_gets_a_dicom_seg(inferer, tmp_path, out):
    images = tmp_path / "images"
    images.mkdir()
    source = images / "CT_small.dcm"
    source.write_bytes(bundled("CT_small.dcm").read_bytes())
    ct_series(images / "abdomen", count=3)
    clicks = {"CT_small": {"points": [[64, 64]]}, "abdomen": {"points": [[64, 64, 1]]}}
    manifest = run(inferer, images, out, prompts=prompts(tmp_path, clicks))
    by_name = {case["case"]: case for case in manifest["cases"]}
    assert by_name["CT_small"]["files"][-1] == "CT_small_seg.dcm"
    assert by_name["abdomen"]["shape"] == [128, 128, 3] and by_name["abdomen"]["files"][-1] == "abdomen_seg.dcm"
    assert len(by_name["abdomen"]["inputs"]) == 3
    original = pydicom.dcmread(source)
    written = pydicom.dcmread(out / "CT_small_seg.dcm")
    assert written.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert written.StudyInstanceUID == original.StudyInstanceUID
    assert written.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert np.array_equal(written.pixel_array > 0, np.asarray(Image.open(out / "CT_small_seg.png")) > 0)
    without = run(inferer, source, tmp_path / "plain", dicom_seg=False)
    assert not [f for f in without["cases"][0]["files"] if f.endswith(".dcm")]


@pytest.mark.slow
def test_a_picture_of_64_million_pixels(inferer, tmp_path, out):
    picture = Image.new("1", (8000, 8000))
    picture.paste(1, (1000, 2000, 5000, 6000))
    picture.save(tmp_path / "large.png")
    clicks = {"large": {"points": [[3000, 4000]]}}
    case = run(inferer, tmp_path / "large.png", out, prompts=prompts(tmp_path, clicks))["cases"][0]
    assert case["status"] == "done" and case["shape"] == [8000, 8000]
    mask = Image.open(out / "large_seg.png")
    assert mask.size == (8000, 8000) and mask.getpixel((3000, 4000)) == 1


def test_a_dicom_that_cannot_carry_a_seg_is_still_segmented(inferer, tmp_path, out):
    source = tmp_path / "us.dcm"
    source.write_bytes(bundled("SC_rgb_rle.dcm").read_bytes())
    case = run(inferer, source, out, prompts=prompts(tmp_path, {"us": {"points": [[5, 5]]}}))["cases"][0]
    assert case["status"] == "done" and case["files"][0] == "us_seg.png"
    assert any(note.startswith("no DICOM SEG") for note in case["notes"])


def test_text_for_all_leaves_prompts_of_their_own_alone(inferer, images, out, tmp_path):
    manifest = run(inferer, images, out, text="cells", prompts=prompts(tmp_path, {"first": {"points": [[30, 20]]}}))
    assert [case["select"] for case in manifest["cases"]] == ["points", "text"]
    assert manifest["cases"][1]["prompt"] == {"text": "cells"} and manifest["settings"]["text"] == "cells"


def test_an_absent_object_is_an_empty_mask_with_a_title(inferer, images, out):
    inferer = inferer.replace(text_certainty=1e9)
    case = run(inferer, images / "first.png", out, text="cells")["cases"][0]
    assert case["absent"] and case["scores"] == []
    assert not np.asarray(Image.open(out / "first_seg.png")).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must map case names to prompts"),
        ('{"first": [1, 2]}', "must map case names to prompts"),
        ('{"first": {"point": [1, 2]}}', "first: unknown key 'point'; use select, points, labels, box, text"),
    ],
)
def test_a_prompts_file_of_another_form(inferer, images, out, tmp_path, capsys, content, message):
    path = prompts(tmp_path, content)
    with pytest.raises(ZeroSegError, match=r"prompts\.json") as error:
        load_prompts(path)
    assert message in str(error.value)
    exits(2, inferer, images, out, prompts=path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("zeroseg: prompts prompts.json")
    assert not out.exists(), "nothing was begun"


def test_a_missing_prompts_file(tmp_path):
    with pytest.raises(ZeroSegError, match=r"cannot read prompts none.json: No such file"):
        load_prompts(tmp_path / "none.json")
    assert load_prompts(None) == {}


def test_prompts_that_match_no_case_are_named(inferer, images, out, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        manifest = run(inferer, images, out, prompts=prompts(tmp_path, {"frist": {"points": [[1, 1]]}}))
    assert manifest["unused_prompts"] == ["frist"]
    assert "prompts for frist match no case" in caplog.text


def test_a_bad_case_does_not_stop_the_others(inferer, images, out, tmp_path, capsys):
    (images / "bad.png").write_bytes(b"no picture")
    (images / "empty.nii").write_bytes(b"")
    wrong = {"second": {"points": [[900, 900]]}}
    exits(2, inferer, images, out, prompts=prompts(tmp_path, wrong))
    captured = capsys.readouterr()
    cases = {case["case"]: case for case in manifest_of(out)["cases"]}
    assert {name: case["status"] for name, case in cases.items()} == {
        **{"bad": "failed", "empty": "failed", "second": "failed"},
        "first": "done",
    }
    assert "lies outside the image: x 0..49, y 0..29" in cases["second"]["reason"]
    assert all(len(cases[n]["inputs"][0]["sha256"]) == 64 for n in cases)
    lines = [line for line in captured.err.splitlines() if line.startswith("zeroseg: ")]
    assert lines == [f"zeroseg: {n}: {cases[n]['reason']}" for n in ("bad", "empty", "second")]
    assert "1 of 4 cases segmented" in captured.out
    assert {p.name for p in out.iterdir()} == {"manifest.json", *cases["first"]["files"]}


def test_results_inside_the_images_folder_are_no_images(inferer, images):
    first = run(inferer, images, images / "results")
    again = run(inferer, images, images / "results")
    assert [c["case"] for c in first["cases"]] == [c["case"] for c in again["cases"]] == ["first", "second"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no input: give --dataset_dir"),
        ({"images": "nowhere"}, "no such file or folder"),
        ({"out": None}, "no output: give --output_dir"),
        ({"select": "everything"}, "unknown select 'everything'"),
        ({"window": "wide"}, "give two numbers"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(inferer, images, out, capsys, change, message):
    inferer = inferer.replace(select=change.pop("select", None))
    given = {"images": images / "first.png", "out": out, **change}
    with pytest.raises(SystemExit) as end:
        CaseRunner(inferer, CaseDataset(given.pop("images")), given.pop("out"), **given).run()
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("zeroseg: ") and message in lines[0]


def test_an_output_folder_that_cannot_be_made(inferer, images, out, capsys):
    out.write_text("a file")
    exits(2, inferer, images, out)
    assert "cannot create the output folder" in capsys.readouterr().err


def test_an_empty_folder(inferer, tmp_path, out, capsys):
    (tmp_path / "empty").mkdir()
    exits(2, inferer, tmp_path / "empty", out)
    assert "no image found" in capsys.readouterr().err


def faulty(tiny_backbone, error: BaseException) -> AttentionSegmentationInferer:
    """An inferer that raises ``error`` on every image but the first."""

    class Faulty(AttentionSegmentationInferer):
        calls = 0

        def segment(self, image, select=None, **prompt):
            Faulty.calls += 1
            if Faulty.calls > 1:
                raise error
            return super().segment(image, select, **prompt)

    return Faulty(tiny_backbone, resolution=64)


def test_an_interrupt_leaves_a_manifest_of_what_is_done(tiny_backbone, images, out, capsys):
    exits(130, faulty(tiny_backbone, KeyboardInterrupt()), images, out)
    assert [(c["case"], c["status"]) for c in manifest_of(out)["cases"]] == [("first", "done")]
    assert "zeroseg: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")])
def test_too_little_memory_fails_the_case_alone(tiny_backbone, images, out, error):
    exits(2, faulty(tiny_backbone, error), images, out)
    first, second = manifest_of(out)["cases"]
    assert (first["status"], second["status"]) == ("done", "failed")
    assert "not enough memory" in second["reason"]


def test_a_defect_of_the_program_is_not_hidden(tiny_backbone, images, out):
    with pytest.raises(RuntimeError, match="a bug"):
        run(faulty(tiny_backbone, RuntimeError("a bug")), images, out)
    assert [c["case"] for c in manifest_of(out)["cases"]] == ["first"]


def test_the_dataset_lists_and_reads(images):
    dataset = CaseDataset(images)
    assert len(dataset) == 2
    assert dataset[1].array.shape == (1, 30, 50)


def drawings(tmp_path, shape=(30, 50)):
    """A folder with strokes and a mask for an image of 30 x 50 pixels."""
    strokes = np.zeros(shape, np.uint8)
    strokes[10, 10:30], strokes[2, 2:40] = 1, 2
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    Image.fromarray(((np.indices(shape)[1] > 20) * 255).astype(np.uint8)).save(tmp_path / "draft.png")
    return strokes


def test_drawn_prompts_come_from_files_beside_the_prompts_file(inferer, images, out, tmp_path):
    strokes = drawings(tmp_path)
    given = {"second": {"scribbles": "strokes.png", "mask": "draft.png", "candidate": 2}}
    manifest = run(inferer, images, out, prompts=prompts(tmp_path, given))
    entry = manifest["cases"][1]
    # Names alone: the folders of a machine stay on it.
    assert (entry["status"], entry["prompt"]) == ("done", given["second"])
    labels = np.asarray(Image.open(out / "second_seg.png"))
    assert labels[strokes == 1].all() and not labels[strokes == 2].any()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ({"scribbles": "none.png"}, "scribbles none.png: no such file"),
        ({"scribbles": "draft.png"}, "must hold 1 .object., 2 .background. and 0"),
        ({"mask": "other.png"}, "has the shape"),
        ({"mask": "broken.png"}, "broken.png"),
        ({"mask": "draft.png", "candidate": 4}, "candidate must be 1, 2 or 3"),
    ],
)
def test_drawings_that_do_not_fit_fail_their_case_alone(inferer, images, out, tmp_path, prompt, reason):
    drawings(tmp_path)
    Image.fromarray(gray(8, 8)).save(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    exits(2, inferer, images, out, prompts=prompts(tmp_path, {"second": prompt}))
    first, second = manifest_of(out)["cases"]
    assert first["status"] == "done" and second["status"] == "failed"
    assert re.search(reason, second["reason"])


def test_drawings_of_a_volume_have_its_affine(inferer, out, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    volume = np.random.default_rng(0).random((16, 20, 3)).astype(np.float32)
    draft = np.zeros(volume.shape, np.uint8)
    draft[4:9, 5:12, 1] = 1
    write_nifti(images / "scan.nii.gz", volume, OBLIQUE)
    for name, affine in (("fits.nii.gz", OBLIQUE), ("moved.nii.gz", OBLIQUE + np.eye(4)[:, [3, 0, 1, 2]])):
        write_nifti(tmp_path / name, draft, affine)
    given = prompts(tmp_path, {"scan": {"mask": "fits.nii.gz"}})
    assert run(inferer, images, out, prompts=given)["cases"][0]["status"] == "done"
    np.testing.assert_array_equal(np.asanyarray(nib.load(out / "scan_seg.nii.gz").dataobj), draft)
    exits(2, inferer, images, out, prompts=prompts(tmp_path, {"scan": {"mask": "moved.nii.gz"}}))
    assert "another affine" in manifest_of(out)["cases"][0]["reason"]


def test_a_drawing_is_named_not_loaded_by_a_prompts_file(tmp_path):
    with pytest.raises(ZeroSegError, match="scribbles must be the name of an image file"):
        load_prompts(prompts(tmp_path, {"a": {"scribbles": [[0, 1]]}}))


def test_of_an_earlier_answer_nothing_stays_beside_the_new_one(inferer, images, out):
    run(inferer, images, out)
    for name in ("first_seg.dcm", "first_seg.nii.gz", "first_confidence.tif", "third_seg.dcm", "first_notes.txt"):
        (out / name).write_bytes(b"of an earlier run")
    run(inferer, images, out)
    left = {path.name for path in out.iterdir()}
    assert {"first_seg.png", "third_seg.dcm", "first_notes.txt"} <= left
    assert not {"first_seg.dcm", "first_seg.nii.gz", "first_confidence.tif"} & left
