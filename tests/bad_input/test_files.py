"""Files that attack who reads them, and files with random bytes changed: one clear line, no memory, no crash."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bad_input.hostile import HOSTILE
from bad_inputs import bundled, color, ct_series, dicom, gray, write_nifti
from zeroseg.cases import CaseDataset, CaseRunner
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import find_cases, read_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom and others, about the very damage

READ = """
import resource, sys
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        for case in find_cases(folder):
            read_image(case)
        print("read")
    except ZeroSegError as error:
        print(str(error).replace(folder, ""))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Every hostile input in a folder of its own."""
    root = tmp_path_factory.mktemp("hostile")
    for number, (make, _) in enumerate(HOSTILE.values()):
        (root / f"{number}" / "in").mkdir(parents=True)
        make(root / f"{number}" / "in")
    return root


@pytest.fixture(scope="module")
def answers(hostile) -> tuple[dict[str, str], int]:
    """What a process of its own says to each, and how many MB it took in the end."""
    folders = [str(hostile / f"{number}" / "in") for number in range(len(HOSTILE))]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders], capture_output=True, text=True, env={**os.environ, **path}, timeout=120
    )
    assert done.returncode == 0, f"the process died ({done.returncode}):\n{done.stderr[-2000:]}"
    *lines, megabytes = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE), "one line for each"
    return dict(zip(HOSTILE, lines, strict=True)), int(megabytes)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(answers, name):
    line = answers[0][name]
    assert line != "read" and line.isprintable() and 20 < len(line) < 400
    assert re.search(HOSTILE[name][1], line), line


def test_no_hostile_file_takes_memory(answers):
    assert answers[1] < 150, "MB"


@pytest.mark.slow
def test_a_run_over_all_of_them_writes_nothing_but_the_one_sound_case(hostile, tiny_backbone, tmp_path, capsys):
    Image.fromarray(color()).save(hostile / "good.png")
    with pytest.raises(SystemExit) as end:
        inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
        CaseRunner(inferer, CaseDataset(hostile), tmp_path / "out").run()
    assert end.value.code == 2
    cases = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"]
    done = [case for case in cases if case["status"] == "done" and case["case"] == "good"]
    failed = [case for case in cases if case["status"] == "failed"]
    assert len(done) == 1 and len(failed) > 20  # the DICOM files share a series, which is one case
    assert all(case["reason"].isprintable() for case in failed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zeroseg: ")]
    assert len(lines) == len(failed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        *(name for case in cases if case["status"] == "done" for name in case["files"]),
    }


@pytest.mark.parametrize(
    "uid", ["../../../evil", "/etc/evil", "..\\..\\evil", "a\nb\x1b[2J", "." * 40, "x" * 64], ids=range(6)
)
def test_a_series_uid_names_no_path(tmp_path, uid, tiny_backbone):
    """A case is named after its series where nothing else tells two apart: the header writes file names then."""
    folder = tmp_path / "deep" / "in"
    for seed in (1, 2):
        paths = ct_series(tmp_path / f"s{seed}", 2, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        for k, path in enumerate(paths):
            dataset = pydicom.dcmread(path)
            del dataset.SeriesNumber
            dataset.add_new("SeriesInstanceUID", "UI", f"{uid}{seed}")
            dataset.save_as(folder / f"{seed}{k}.dcm")
    cases = find_cases(folder)
    assert len(cases) == 2
    for case in cases:
        assert Path(case.stem).name == case.stem and case.stem.isprintable() and case.stem[0] != "."
    before = {p for p in tmp_path.rglob("*") if "out" not in p.parts}
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64, select="segments")
    CaseRunner(inferer, CaseDataset(folder), tmp_path / "deep" / "out", dicom_seg=False).run()
    assert {p for p in tmp_path.rglob("*") if "out" not in p.parts} == before, "nothing outside the output folder"
    assert not list(Path("/etc").glob("evil*"))


@pytest.mark.parametrize("name", [b"\xff\xfe.png", b"a\nb.png", b"a\x1b[31m.png", b"x" * 250 + b".png", b"-rf.png"])
def test_odd_file_names(tiny_backbone, tmp_path, capsys, name):
    """No UTF-8, line breaks, escape sequences, too long for a suffix, and what looks like an option."""
    (tmp_path / "in").mkdir()
    path = os.path.join(os.fsencode(tmp_path / "in"), name)
    with open(path, "wb") as file:
        Image.fromarray(gray()).save(file, "PNG")
    long = len(name) > 200
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    runner = CaseRunner(inferer, CaseDataset(tmp_path / "in"), tmp_path / "out")
    if long:
        with pytest.raises(SystemExit):
            runner.run()
    else:
        runner.run()
    (case,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"]
    assert os.fsencode(case["inputs"][0]["file"]) == name, "the manifest knows the very name"
    assert case["status"] == ("failed" if long else "done") and case["case"].isprintable()
    assert len(list((tmp_path / "out").iterdir())) == (1 if long else 4)
    assert not long or "name too long" in case["reason"]


@pytest.mark.parametrize(("variable", "file"), [("ZEROSEG_MAX_VOXELS", "a.nii.gz"), ("ZEROSEG_MAX_PIXELS", "a.png")])
def test_limits_can_be_moved(tmp_path, monkeypatch, variable, file):
    write_nifti(tmp_path / "a.nii.gz", np.zeros((10, 10, 10), np.int16))
    Image.fromarray(gray(40, 50)).save(tmp_path / "a.png")
    (case,) = find_cases(tmp_path / file)
    assert read_image(case).array.size >= 1000
    monkeypatch.setenv(variable, "999")
    with pytest.raises(ZeroSegError, match=f"million .* accepted.*{variable}"):
        read_image(case)
    monkeypatch.setenv(variable, "2000")
    assert read_image(case).array.size >= 1000
    for wrong in ("many", "-5", "0", "1e6"):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(ZeroSegError, match="positive whole number"):
            read_image(case)


# Random changes -------------------------------------------------------------------------------------------------------


@cache
def sound(kind: str) -> tuple[str, bytes]:
    """Name and bytes of a small sound file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind.partition(' ')[0]}"
        volume = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
        if path.suffix in (".png", ".jpg", ".bmp"):
            Image.fromarray(color(12, 14)).save(path)
        elif kind == "tif":
            Image.fromarray(color(12, 14)).save(path, compression="tiff_lzw")
        elif kind == "tif deep":
            tifffile.imwrite(path, np.arange(168, dtype=np.float64).reshape(12, 14))
        elif kind.startswith("nii"):
            write_nifti(path, volume)
        elif path.suffix in (".nrrd", ".mha"):
            sitk.WriteImage(sitk.GetImageFromArray(volume), str(path), useCompression="zipped" in kind)
        elif kind == "dcm":
            dicom("CT_small.dcm").save_as(path)
        else:
            path.write_bytes(bundled({"dcm jpeg": "JPEG-lossy.dcm", "dcm rle": "SC_rgb_rle.dcm"}[kind]).read_bytes())
        return path.name, path.read_bytes()


KINDS = ["png", "jpg", "bmp", "tif", "tif deep", "nii", "nii.gz", "nrrd", "nrrd zipped", "mha", "mha zipped"]
KINDS += ["dcm", "dcm jpeg", "dcm rle"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_changes_are_read_or_refused(kind, data):
    """Bytes changed, cut off, doubled or put in: an image of finite values, or one line. Never anything else."""
    name, raw = sound(kind)
    changed = bytearray(raw)
    head = min(len(raw), 1500) - 1
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, head) | st.integers(0, len(raw) - 1))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]) | st.binary(max_size=8))
        how = data.draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if how == "cut":
            del changed[max(1, at) :]
        elif how == "delete":
            del changed[at : at + len(value)]
        else:
            changed[at : at + len(value) * (how == "replace")] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(changed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            for case in find_cases(Path(folder)):
                image = read_image(case)
                assert np.isfinite(image.array).all() and image.array.size and len(image.array) in (1, 3)
        except ZeroSegError as error:
            assert str(error).isprintable() and len(str(error)) < 500 + len(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "2 GB in KB"
