"""Wrong settings and wrong prompts at the bundle's entry point: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bad_inputs import color, write_nifti
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.cases import CaseDataset, CaseRunner, load_prompts
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(color()).save(path)
    return path


def refused(capsys, runner: CaseRunner) -> str:
    """Run, and return the one line of the refusal."""
    with pytest.raises(SystemExit) as end:
        runner.run()
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zeroseg: ")]
    assert line.isprintable() and len(line) < 600
    return line


SETTINGS = {
    "resolution of words": ({"resolution": "large"}, "resolution"),
    "resolution of zero": ({"resolution": 0}, "resolution"),
    "resolution below zero": ({"resolution": -64}, "resolution"),
    "resolution not a number": ({"resolution": math.nan}, "resolution"),
    "grid of zero": ({"grid": 0}, "grid"),
    "grid of words": ({"grid": "fine"}, "grid"),
    "timestep beyond the schedule": ({"timestep": 5000}, "timestep"),
    "timestep of words": ({"timestep": "late"}, "timestep"),
    "noise draws below zero": ({"noise_draws": -1}, "noise_draws"),
    "thresholds of words": ({"thresholds": "low"}, "thresholds"),
    "thresholds not a number": ({"thresholds": [math.nan]}, "thresholds"),
    "thresholds below zero": ({"thresholds": [-1.0]}, "thresholds"),
    "segments of none": ({"max_segments": 0}, "max_segments"),
    "unknown rule": ({"select": "magic"}, "select"),
    "rule of a number": ({"select": 7}, "select"),
    "unknown refinement": ({"refine": "magic"}, "refine"),
    "unknown affinity": ({"affinity": "love"}, "affinity"),
    "unknown assignment": ({"assign": ["nearest"]}, "assign"),
    "axis of a fourth dimension": ({"slice_axis": 7}, "slice_axis"),
    "seed of words": ({"seed": "lucky"}, "seed"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting(tiny_backbone, picture, tmp_path, capsys, name):
    given, named = SETTINGS[name]
    inferer = AttentionSegmentationInferer(tiny_backbone, **{"resolution": 64, **given})
    assert named in refused(capsys, CaseRunner(inferer, CaseDataset(picture), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_resolution_beyond_all_memory_fails_the_case(tiny_backbone, picture, tmp_path, capsys):
    """Which one is beyond it only the machine can say; torch does, before it takes any."""
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=10**9)
    assert "not enough memory" in refused(capsys, CaseRunner(inferer, CaseDataset(picture), tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]


PROMPTS = {
    "empty": b"",
    "no JSON": b"{first",
    "bytes": bytes(range(128, 256)),
    "nested without end": b"[" * 200_000,
    "objects without end": b'{"a":' * 100_000,
    "a number": b"7",
    "null": b"null",
    "a list of prompts": b'[{"points": [[1, 1]]}]',
    "a number of 5000 digits": b'{"a": {"points": [[' + b"9" * 5000 + b", 1]]}}",
    "unknown key": b'{"a": {"__class__": "os.system"}}',
    "no prompt": b'{"a": null}',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_wrong_prompts_file(tiny_backbone, picture, tmp_path, capsys, name):
    (tmp_path / "prompts.json").write_bytes(PROMPTS[name])
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    runner = CaseRunner(inferer, CaseDataset(picture), tmp_path / "out", prompts=tmp_path / "prompts.json")
    assert "prompts.json" in refused(capsys, runner)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "/", "pipe", "large"])
def test_prompts_that_are_no_file_of_prompts(tmp_path, path):
    """A device, a folder, a pipe nobody writes to, and a file of a hundred megabytes."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ZeroSegError, match=r"no file|larger than"):
        load_prompts(tmp_path / path)


def test_prompts_as_windows_writes_them(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + '{"größe": {"text": "x"}}'.encode())
    assert load_prompts(tmp_path / "p.json") == {"größe": {"text": "x"}}


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 1e308, "", "a", "nan"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
KEYS = ["select", "points", "labels", "box", "text"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    Image.fromarray(color(24, 30)).save(folder / "a.png")
    write_nifti(folder / "b.nii.gz", np.arange(8 * 9 * 2, dtype=np.int16).reshape(8, 9, 2))
    return folder


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)
@given(entry=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
@example(entry={"points": [[1e308, 1]]})
@example(entry={"points": [[True, False]]})
@example(entry={"points": [[1, 1]], "labels": [10**400]})
@example(entry={"box": [math.nan] * 4})
@example(entry={"box": [0, 0, 10**400, 5]})
@example(entry={"text": "\0\x1b[2J\ud800"})
@example(entry={"text": "x" * 100_000})
@example(entry={"select": ["text"], "text": ["x"]})
@example(entry={"points": {}})
@example(entry={"points": [], "box": []})
def test_junk_in_a_prompt_fails_its_case_alone(tiny_backbone, sources, tmp_path_factory, entry):
    """Whatever a prompt holds, the case is done or failed with a reason, and the run comes to its end."""
    folder = tmp_path_factory.mktemp("junk")
    (folder / "p.json").write_text(json.dumps({"a": entry, "b": entry}))
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    runner = CaseRunner(inferer, CaseDataset(sources), folder / "out", prompts=folder / "p.json")
    try:
        runner.run()
    except SystemExit as end:
        assert end.code == 2
    if not (folder / "out").exists():  # a number of too many digits: refused with the file
        return
    cases = json.loads((folder / "out" / "manifest.json").read_text())["cases"]
    assert len(cases) == 2
    for case in cases:
        assert case["status"] == "done" or (case["reason"] and len(case["reason"]) < 2000)
    files = {name for case in cases if case["status"] == "done" for name in case["files"]}
    assert {p.name for p in (folder / "out").iterdir()} == {"manifest.json", *files}


@pytest.mark.parametrize("text", [5, ["a", "b"], {"a": 1}, True, "", " "], ids=str)
def test_a_text_that_is_none(tiny_backbone, picture, tmp_path, text):
    """The command line turns ``--text 5`` into a number."""
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    with pytest.raises(SystemExit) as end:
        CaseRunner(inferer, CaseDataset(picture), tmp_path / "out", text=text).run()
    assert end.value.code == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "window", ["[0", [1], [1, 2, 3], [0, 0], [0, -5], [math.nan, 1], [1, math.inf], {}, 7], ids=str
)
def test_a_window_that_is_none(tiny_backbone, picture, tmp_path, window):
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    with pytest.raises(SystemExit) as end:
        CaseRunner(inferer, CaseDataset(picture), tmp_path / "out", window=window).run()
    assert end.value.code == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_pickled_weights_are_not_unpickled(tiny_pipeline, picture, tmp_path, capsys):
    """A pickle that would write a file when loaded, in the place of every safetensors file."""
    import pickle
    import shutil

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    for weights in folder.rglob("*.safetensors"):
        pickled = {"model": "pytorch_model.bin", "diffusion_pytorch_model": "diffusion_pytorch_model.bin"}[weights.stem]
        weights.with_name(pickled).write_bytes(pickle.dumps(Bomb()))
        weights.unlink()
    backbone = StableDiffusionBackbone(folder, device="cpu")
    runner = CaseRunner(AttentionSegmentationInferer(backbone), CaseDataset(picture), tmp_path / "out")
    assert "pickle weights are refused" in refused(capsys, runner)
    assert not (tmp_path / "exploded").exists()


PROCESSES = {
    "output is a file": (["--output_dir", "{file}"], "output folder"),
    "no such device": (["--output_dir", "{out}", "--device", "quantum"], "unknown device"),
    "weights by a path upwards": (["--output_dir", "{out}", "--backbone", os.path.relpath("/etc")], "model_index.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_the_very_command(tiny_pipeline, picture, tmp_path, name):
    """As a user starts it, in a process of its own."""
    options, reason = PROCESSES[name]
    out = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(BUNDLE), "--dataset_dir", str(picture)]
    command += ["--config_file", str(BUNDLE / "configs" / "inference.yaml"), "--backbone", str(tiny_pipeline)]
    command += [option.format(out=out, file=tmp_path / "file") for option in options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("zeroseg: ")]
    assert reason in line and "Traceback" not in done.stderr and not out.exists()
