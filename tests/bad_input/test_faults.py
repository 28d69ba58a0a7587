"""Full and read-only disks, signals, memory that runs out, clocks that are wrong, two runs at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bad_inputs import color, ct_series, gray, write_nifti
from zeroseg.cases import CaseDataset, CaseRunner
from zeroseg.errors import MemoryShortage, ZeroSegError, is_out_of_memory
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import atomic_path, sole_writer, staged
from zeroseg.io.writing import UNFINISHED

RUN = """
import os, resource, sys, time
import torch
torch.set_num_threads(1)
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.cases import CaseDataset, CaseRunner

class Slow(CaseRunner):
    def _write(self, *given):
        written = super()._write(*given)
        print("written", flush=True)
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return written

images, out, weights = sys.argv[1:4]
backbone = StableDiffusionBackbone(weights, device="cpu").load()
exec(os.environ.get("LIMIT", ""))
inferer = AttentionSegmentationInferer(backbone, resolution=int(os.environ.get("RESOLUTION", 64)))
Slow(inferer, CaseDataset(images), out).run()
"""


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(color()).save(folder / "first.png")
    Image.fromarray(gray(30, 50)).save(folder / "second.png")
    return folder


@pytest.fixture
def inferer(tiny_backbone):
    return AttentionSegmentationInferer(tiny_backbone, resolution=64)


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def start(images: Path, out: Path, weights: Path, **environment: str) -> subprocess.Popen:
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(images), str(out), str(weights)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own, **environment},
    )


# Disks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str):
    """A file system of its own on a folder; skips where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def exit_of(inferer, images: Path, out: Path) -> int:
    with pytest.raises(SystemExit) as end:
        CaseRunner(inferer, CaseDataset(images), out).run()
    return end.value.code


def test_a_disk_that_is_full_from_the_start(inferer, images, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "full").write_bytes(bytes(56 << 10))
        assert exit_of(inferer, images, disk) == 2
        assert not list(disk.glob("*_*")) and not list(disk.glob(".zeroseg*"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("zeroseg: ") and "cannot write" in last and "No space left on device" in last


def test_a_disk_that_fills_up_keeps_the_finished_case_and_nothing_of_the_other(inferer, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(gray(16, 16)).save(images / "a.png")
    write_nifti(images / "b.nii.gz", np.random.default_rng(0).normal(size=(48, 48, 3)).astype(np.float32))
    with mounted(tmp_path / "disk", "size=44k") as disk:
        assert exit_of(inferer, images, disk) == 2
        first, second = manifest_of(disk)["cases"]
        assert first["status"] == "done" and second["status"] == "failed"
        assert "No space left on device" in second["reason"] and ".zeroseg" not in second["reason"]
        assert names(disk) == {"manifest.json", *first["files"]}


def test_a_limit_on_the_size_of_files(inferer, images, tmp_path):
    """As a quota is felt: EFBIG in the middle of a file."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)).save(images / "large.png")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert exit_of(inferer, images, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    cases = {case["case"]: case for case in manifest_of(tmp_path / "out")["cases"]}
    assert "File too large" in cases["large"]["reason"] and cases["first"]["status"] == "done"
    assert not list((tmp_path / "out").glob("large*")) and not list((tmp_path / "out").glob(".zeroseg*"))


def test_a_read_only_disk(inferer, images, tmp_path, capsys):
    with mounted(tmp_path / "disk", "ro") as disk:
        for out in (disk, disk / "new"):
            assert exit_of(inferer, images, out) == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("zeroseg: cannot") and "Read-only file system" in last


def test_an_output_that_can_hold_no_files(inferer, images, capsys):
    assert exit_of(inferer, images, Path("/proc/zeroseg")) == 2
    assert "cannot create the output folder" in capsys.readouterr().err


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_while_writing_leaves_finished_cases_and_a_manifest(images, tmp_path, tiny_pipeline):
    """As ctrl-C does, see tests/test_cases.py."""
    process = start(images, tmp_path / "out", tiny_pipeline, PAUSE="1")
    for _ in range(2):  # in the pause after the second case's files are written, before they are in place
        assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "zeroseg: interrupted" in errors and "Traceback" not in errors
    (case,) = manifest_of(tmp_path / "out")["cases"]
    assert case["case"] == "first" and case["status"] == "done"
    assert names(tmp_path / "out") == {"manifest.json", *case["files"]}


@pytest.mark.slow
def test_one_run_at_a_time_and_what_sigkill_leaves(inferer, images, tmp_path, tiny_pipeline, capsys):
    """A second run into the same folder is refused; when the first is killed, the second may, and clears up after it."""
    out = tmp_path / "out"
    process = start(images, out, tiny_pipeline, PAUSE="2")
    for _ in range(2):
        assert process.stdout.readline() == "written\n"
    assert exit_of(inferer, images, out) == 2
    assert "another run writes into" in capsys.readouterr().err
    process.kill()
    process.communicate()
    left = names(out)
    assert {name for name in left if name.startswith("first")} == {
        f"first_{kind}.png" for kind in ("seg", "confidence", "overlay")
    }
    assert not any(name.startswith("second") for name in left)
    for name in left - {path.name for path in out.glob(".*")}:
        Image.open(out / name).load()
    assert list(out.glob(UNFINISHED)), "what was being written when the process died"
    CaseRunner(inferer, CaseDataset(images), out).run()
    assert not list(out.glob(".*")) and len(manifest_of(out)["cases"]) == 2


def test_a_signal_during_the_manifest_waits_for_it(inferer, images, tmp_path, monkeypatch):
    import zeroseg.cases

    write = zeroseg.cases.write_json

    def interrupted(path, content):
        signal.raise_signal(signal.SIGTERM)
        return write(path, content)

    monkeypatch.setattr(zeroseg.cases, "write_json", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert exit_of(inferer, images, tmp_path / "out") == 143
    assert len(manifest_of(tmp_path / "out")["cases"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_case_leaves_the_files_of_an_earlier_run(inferer, images, tmp_path, monkeypatch):
    CaseRunner(inferer, CaseDataset(images), tmp_path / "out").run()
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")}

    def full(*_, **__):
        raise ZeroSegError("cannot write")

    monkeypatch.setattr("zeroseg.cases.write_confidence", full)  # after the mask has been written
    assert exit_of(inferer, images, tmp_path / "out") == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")} == before


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_that_really_runs_out_fails_the_case_alone(images, tmp_path, tiny_pipeline):
    """A process whose address space is limited once the model is loaded, and a picture its passes do not fit for."""
    limit = "import psutil; top = psutil.Process().memory_info().vms + (700 << 20); "
    limit += "resource.setrlimit(resource.RLIMIT_AS, (top, top))"
    process = start(images, tmp_path / "out", tiny_pipeline, LIMIT=limit, RESOLUTION="2048")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    cases = manifest_of(tmp_path / "out")["cases"]
    assert [case["status"] for case in cases] == ["failed", "failed"]
    assert all("not enough memory" in case["reason"] for case in cases)
    assert names(tmp_path / "out") == {"manifest.json"}


def errors_of_memory():
    """What torch, numpy, Python and SimpleITK themselves raise."""
    import SimpleITK as sitk

    yield lambda: torch.empty(1 << 55)
    yield lambda: np.empty(1 << 55)
    yield lambda: bytes(1 << 60)
    yield lambda: sitk.Image([60_000, 60_000, 60_000], sitk.sitkFloat64)


@pytest.mark.parametrize("cause", errors_of_memory(), ids=["torch", "numpy", "python", "itk"])
def test_every_library_says_it_in_its_own_way(cause):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        cause()
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_model_that_does_not_fit_is_one_line(inferer, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(inferer), "check", lambda self: torch.empty(1 << 55))
    assert exit_of(inferer, images, tmp_path / "out") == 2
    assert "not enough memory for the model" in capsys.readouterr().err and not (tmp_path / "out").exists()


# Two writers ----------------------------------------------------------------------------------------------------------


def test_two_writers_of_one_file_leave_one_of_theirs(tmp_path):
    """Without the hold, as on network disks: every file is whole all the same."""
    target, stop, torn = tmp_path / "a.bin", threading.Event(), []

    def write(letter: bytes) -> None:
        while not stop.is_set():
            with staged(tmp_path) as stage, atomic_path(stage / "a.bin") as part:
                part.write_bytes(letter * (1 << 16))

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        if target.exists():
            content = target.read_bytes()
            torn += [content] if len(content) != 1 << 16 or len(set(content)) != 1 else []
    stop.set()
    for writer in writers:
        writer.join()
    assert not torn and names(tmp_path) == {"a.bin"}


def test_a_hold_ends_with_its_block_and_clears_leftovers_only_when_held(tmp_path):
    (tmp_path / ".zeroseg-0123456789abcdef").mkdir()
    (tmp_path / ".zeroseg-0123456789abcdef" / "a.png").touch()
    (tmp_path / ".zeroseg-0123456789abcdef.png").touch()
    (tmp_path / ".zeroseg-batch").mkdir()
    with sole_writer(tmp_path):
        assert names(tmp_path) == {".zeroseg-batch"}
        with pytest.raises(ZeroSegError, match="another run"), sole_writer(tmp_path):
            pass
    with sole_writer(tmp_path):
        pass


# Clocks ---------------------------------------------------------------------------------------------------------------


FUTURE, PAST = 4_000_000_000, 1


@pytest.fixture
def engine(tiny_backbone):
    pytest.importorskip("monailabel")
    from lib.engine import Engine

    return Engine(tiny_backbone, cache_bytes=64 << 20, resolution=64)


@pytest.mark.parametrize("how", ["replace", "in place"])
@pytest.mark.parametrize("when", [FUTURE, PAST])
def test_an_image_replaced_at_the_same_time_and_size_is_read_anew(engine, tmp_path, how, when):
    """Another patient's image of the same length under the same name, with the same time of modification."""
    path = tmp_path / "a.bmp"
    values = []
    for value in (10, 200):
        source = tmp_path / "new.bmp" if how == "replace" else path
        Image.new("L", (16, 16), value).save(source)
        os.utime(source, (when, when))
        source.replace(path)
        entry = engine.open(str(path))
        assert engine.open(str(path)) is entry, "kept while nothing changes"
        values.append(float(entry.image.array.mean()))
        time.sleep(0.02)  # the kernel's clock ticks in steps of some ms
    assert values == [10, 200]


@pytest.mark.parametrize("when", [FUTURE, PAST])
def test_a_dicom_folder_that_changes_gets_a_new_twin_whatever_the_clock_says(tmp_path, when):
    pytest.importorskip("monailabel")
    import nibabel as nib

    from lib.datastore import FolderDatastore

    (tmp_path / "studies").mkdir()
    slices = ct_series(tmp_path / "studies" / "s", 3)
    later = slices[-1].rename(tmp_path / "later")
    for path in slices[:-1]:
        os.utime(path, (when, when))
    store = FolderDatastore(str(tmp_path / "studies"), auto_reload=False)
    twin = Path(store.get_image_uri("s"))
    assert nib.load(twin).shape[2] == 2
    made = twin.stat().st_mtime_ns
    assert Path(store.get_image_uri("s")).stat().st_mtime_ns == made, "kept while nothing changes"
    os.utime(later, (when, when))
    later.rename(slices[-1])
    assert nib.load(store.get_image_uri("s")).shape[2] == 3


def test_a_reading_that_runs_out_of_memory_says_so(tmp_path, monkeypatch):
    from zeroseg.io import find_cases, read_image

    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr("zeroseg.io.picture.channels_first", lambda pixels: np.empty(1 << 55))
    with pytest.raises(MemoryShortage, match="not enough memory to read it"):
        read_image(find_cases(tmp_path)[0])
