"""Cohorts: one worker in this process, and the whole program on Ray with everything in it killed at some moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import dicom_series
from bad_inputs import OBLIQUE, color, gray, write_nifti
from orthanc import missing, orthanc
from zeroseg.cases import PROMPT_KEYS, CaseDataset, CaseRunner
from zeroseg.cli.main import run
from zeroseg.cohort import batch
from zeroseg.cohort.jobs import FileJob, list_jobs
from zeroseg.cohort.records import RECORDS, read_record, sole_writer
from zeroseg.cohort.worker import CaseWorker
from zeroseg.configs import build_runner, find_config, parse_settings
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.tumor.cases import TUMOR_PROMPT_KEYS

TESTS = Path(__file__).parents[1]
CONFIG = find_config("inference.yaml")


def draw(folder: Path, count: int) -> Path:
    """Discs at different places, 96 x 96."""
    folder.mkdir()
    y, x = np.mgrid[:96, :96]
    for i in range(count):
        disc = np.hypot(x - 20 - 6 * i, y - 48) < 18
        Image.fromarray(np.where(disc, 200, 40).astype(np.uint8)).save(folder / f"disc{i}.png")
    return folder


# One worker in this process --------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(color()).save(folder / "first.png")
    Image.fromarray(gray(30, 50)).save(folder / "second.png")
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def worker(tiny_pipeline, out):
    """Makes workers; settings are added to those of the tiny model."""

    def make(retry_failed: bool = False, **settings) -> CaseWorker:
        tiny = {"backbone": str(tiny_pipeline), "resolution": 64, "device": "cpu"}
        return CaseWorker(CONFIG, tiny | settings, out, retry_failed)

    return make


def jobs_of(source: Path, prompts=None, keys=PROMPT_KEYS) -> list:
    return list_jobs(str(source), prompts, keys)[0]


def test_files_and_entries_are_the_bundles(worker, images, out, tmp_path, tiny_backbone):
    results = [worker().work(job) for job in jobs_of(images)]
    inferer = AttentionSegmentationInferer(tiny_backbone, resolution=64)
    CaseRunner(inferer, CaseDataset(images), tmp_path / "bundle").run()
    expected = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["cases"]
    varying = ("seconds",)
    entries = [json.loads(json.dumps(entry)) for result in results for entry in result["entries"]]
    assert [{k: v for k, v in e.items() if k not in varying} for e in entries] == [
        {k: v for k, v in e.items() if k not in varying} for e in expected
    ]
    assert {p.name for p in out.iterdir()} == {RECORDS, *(f for e in expected for f in e["files"])}
    for file in (tmp_path / "bundle").glob("*.png"):
        assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_what_is_done_is_skipped_until_something_about_it_changes(worker, images, out):
    first, second = jobs_of(images)
    assert not worker().work(first)["skipped"]
    again = worker()
    result = again.work(first)
    assert result["skipped"] and result["entries"] == read_record(out, "first")["entries"]
    moved = worker(device="auto")
    assert moved.work(first)["skipped"], "the device is where, not what"
    assert not worker(refine="none").work(first)["skipped"]
    assert not again.work(first)["skipped"], "the files are those of the other settings now"
    assert not again.work(FileJob(first.stem, first.path, first.case, prompt={"points": [[30, 20]]}))["skipped"]
    assert not again.work(first)["skipped"]
    (out / "first_overlay.png").unlink()
    assert not again.work(first)["skipped"]
    shutil.copy(second.path, first.path)
    assert not again.work(first)["skipped"]
    (out / RECORDS / "first.json").write_text('{"key": ')
    assert not again.work(first)["skipped"], "a record that cannot be read is none"
    assert again.work(first)["skipped"]


def test_a_drawing_that_was_redrawn_is_another_one(worker, images, out, tmp_path):
    first, _ = jobs_of(images)
    strokes = tmp_path / "strokes.png"

    def draw(rows: slice) -> FileJob:
        marks = np.zeros(color().shape[:2], np.uint8)
        marks[rows, 8:20] = 1
        Image.fromarray(marks).save(strokes)
        return FileJob(first.stem, first.path, first.case, prompt={"scribbles": str(strokes)})

    again = worker()
    assert not again.work(draw(np.s_[4:8]))["skipped"]
    assert again.work(draw(np.s_[4:8]))["skipped"]
    assert not again.work(draw(np.s_[20:24]))["skipped"]


def test_a_failure_stays_until_it_is_retried(worker, images):
    (images / "bad.png").write_bytes(b"no picture")
    bad = jobs_of(images)[0]
    result = worker().work(bad)
    assert result["entries"][0]["status"] == "failed" and not result["skipped"]
    assert worker().work(bad)["skipped"]
    assert not worker(retry_failed=True).work(bad)["skipped"]
    Image.fromarray(gray()).save(bad.path)
    assert worker().work(bad)["entries"][0]["status"] == "done", "a mended file needs no asking"


def test_an_input_out_of_reach_does_not_undo_what_is_done(worker, images, out):
    job = jobs_of(images)[0]
    worker().work(job)
    record = (out / RECORDS / "first.json").read_bytes()
    job.path.rename(images / "away")
    (entry,) = worker().work(job)["entries"]
    assert (entry["status"], entry["reason"]) == ("failed", "cannot read or write: No such file or directory")
    assert (out / RECORDS / "first.json").read_bytes() == record


def test_a_defect_of_the_program_fails_its_case_and_is_shown(worker, images, monkeypatch):
    one = worker()
    monkeypatch.setattr(one.runner.inferer, "segment", lambda *_, **__: 1 / 0)
    result = one.work(jobs_of(images)[0])
    assert "ZeroDivisionError" in result["defect"] and "Traceback" in result["defect"]
    assert result["entries"][0]["reason"].startswith("a fault of the program, please report it: ZeroDivisionError")


def test_tumours(tiny_tumor_model, tmp_path, out):
    volume = np.random.default_rng(0).integers(-200, 300, (12, 11, 9)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", volume, OBLIQUE)
    (tmp_path / "cohort.csv").write_text("path,organ,modality\nscan.nii.gz,kidney,ct\n")
    model = str(tiny_tumor_model)
    given = ["organ=liver", "steps=2", "presence=0", "stages=[aova,inpaint]", "inferer#dilation_mm=3", "device=cpu"]
    given += [f"backbone={model}", f"adapters={model}", f"text_encoder={model}/text"]
    one = CaseWorker(find_config("inference_tumor.yaml"), parse_settings(given), out)
    settings = one.load()["header"]["settings"]
    assert (settings["organ"], settings["stages"], settings["dilation_mm"]) == ("liver", ["aova", "inpaint"], 3)
    (job,) = jobs_of(tmp_path / "cohort.csv", keys=TUMOR_PROMPT_KEYS)
    (entry,) = one.work(job)["entries"]
    assert entry["status"] == "done" and entry["prompt"] == {"organ": "kidney", "tumor": None, "modality": "ct"}
    assert {"scan_seg.nii.gz", "scan_aova.nii.gz", "scan_healthy.nii.gz"} <= set(entry["files"])
    assert one.work(job)["skipped"]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_dicomweb_server(worker, tmp_path, out):
    with orthanc(tmp_path / "orthanc") as server:
        ct = dicom_series.ct(tmp_path / "ct", size=64, slices=3)
        server.push(ct.folder)
        (job,) = jobs_of(server.dicom_web)
        (entry,) = worker().work(job)["entries"]
        assert entry["status"] == "done" and entry["case"] == ct.uid and entry["shape"] == [64, 64, 3]
        assert {i["file"] for i in entry["inputs"]} == {f"{uid}.dcm" for uid in ct.instances}
        assert f"{ct.uid}_seg.dcm" in entry["files"]
        assert worker().work(job)["skipped"]
    (entry,) = worker().work(job)["entries"]
    assert entry["status"] == "failed" and "cannot be reached" in entry["reason"]


def test_workers_with_other_weights_are_refused(worker, images, out):
    report = batch.Report(batch.Cohort(str(images), out), out, jobs_of(images), [])
    report.add(None, worker().load())
    report.add(None, worker(device="auto").load())
    with pytest.raises(ZeroSegError, match="workers loaded different weights or versions"):
        report.add(None, worker(untrained=True).load())


def test_settings_are_the_bundles():
    assert parse_settings(["a=None", "b=[1, 2.5]", "c=[x,y]", "d=liver lesion", "e=1e-3", "f=a=b"]) == {
        **{"a": None, "b": [1, 2.5], "c": ["x", "y"], "d": "liver lesion"},
        **{"e": 1e-3, "f": "a=b"},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file or folder"),
        (["{images}", "--config", "none.yaml"], "no config none.yaml: give a path, or one of the bundle's: inference"),
        (["{images}", "--set", "organ=liver"], "inference.yaml has no setting 'organ'"),
        (["{images}", "--set", "inferer#speed=9"], "inference.yaml with these settings: "),
        (["{images}", "--set", "select"], "--set takes KEY=VALUE"),
        (["{images}", "--set", "output_dir=x"], "has an option of its own"),
        (["{images}", "--workers", "0"], "--workers must be at least 1"),
        (
            ["{images}", "--workers", "many"],
            "argument --workers: invalid int value: 'many'; --help explains the options",
        ),
        (["{images}", "--modality", "CT"], "only go with the URL of a DICOMweb server"),
        (["{images}", "--filter", "CT"], "--filter takes KEYWORD=VALUE"),
        (["{images}", "--prompts", "none.json"], "cannot read prompts none.json"),
        (["{images}", "--address", "nowhere"], "--address takes HOST:PORT of a Ray cluster"),
        (["{images}", "--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9: Connection refused"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(images, tmp_path, arguments, message):
    given = [a.format(images=images) for a in arguments]
    with pytest.raises(ZeroSegError) as error:
        run(["batch", *given, "--output_dir", str(tmp_path / "results")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_two_runs_never_write_the_same_folder(images, out):
    with sole_writer(out), pytest.raises(ZeroSegError, match="another run writes into"):
        batch.run(batch.Cohort(str(images), out))
    with pytest.raises(ZeroSegError, match="output_dir is the input folder"):
        batch.run(batch.Cohort(str(images), images))


def test_a_setting_of_the_config_reaches_inside_an_object(tmp_path):
    runner = build_runner(CONFIG, parse_settings(["inferer#working_size=64", "affinity=both"]), tmp_path)
    assert (runner.inferer.working_size, runner.inferer.affinity) == (64, "both")
    assert runner.output_dir == str(tmp_path)


# The whole program on Ray -----------------------------------------------------------------------------------------------


@contextmanager
def running(tiny_pipeline: Path, images: Path, out: Path, *options: object) -> Iterator[subprocess.Popen]:
    """The program in a process group of its own, with two workers."""
    tiny = ["--set", f"backbone={tiny_pipeline}", "--set", "resolution=64", "--set", "device=cpu"]
    command = [
        "-m",
        "zeroseg",
        "batch",
        images,
        "--output_dir",
        out,
        "--workers",
        2,
        "--cpus-per-worker",
        1,
        *tiny,
        *options,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])
    }
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # A shell's background jobs, as tests may be, ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "ray::CaseWorker" in _name(p)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _alive(process: psutil.Process) -> bool:
    """Whether it runs; a dead one that nobody has collected does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def done_of(out: Path) -> dict[str, dict]:
    """The records of finished jobs, each of which must be whole."""
    return {p.stem: json.loads(p.read_text()) for p in (out / RECORDS).glob("[!.]*.json")}


def wait_for(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while len(done_of(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, what it printed, and what it said on stderr, a line each."""
    printed, said = process.communicate(timeout=600)
    assert "Traceback" not in said, said
    return process.returncode, printed, [line for line in said.splitlines() if line.startswith("zeroseg: ")]


def check_whole(out: Path) -> None:
    """No visible file is half a file, and every finished job has all of its files."""
    for path in out.glob("*.png"):
        Image.open(path).load()
    for record in done_of(out).values():
        assert all((out / name).is_file() for entry in record["entries"] for name in entry.get("files", ()))


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def leftovers(out: Path) -> list[str]:
    return [p.name for folder in (out, out / RECORDS) for p in folder.iterdir() if p.name.startswith(".zeroseg-0")]


@pytest.mark.slow
def test_killed_workers(tiny_pipeline, tmp_path):
    """One worker is killed from outside, and one case kills its worker whenever it is tried."""
    images, out = draw(tmp_path / "images", 8), tmp_path / "out"
    shutil.copy(images / "disc0.png", images / "poison.png")
    (images / "bad.png").write_bytes(b"no picture")
    with running(tiny_pipeline, images, out, "--set", "evaluator#_target_=poison_runner.PoisonRunner") as process:
        wait_for(out, 3, process)
        workers_of(process)[0].kill()
        code, printed, said = ended(process)
    check_whole(out)
    assert code == 2 and "8 of 10 cases segmented" in printed
    entries = {entry["case"]: entry for entry in manifest_of(out)["cases"]}
    assert list(entries) == ["bad", *(f"disc{i}" for i in range(8)), "poison"]
    assert {name for name, entry in entries.items() if entry["status"] == "failed"} == {"bad", "poison"}
    assert "the worker died at this case, twice" in entries["poison"]["reason"]
    assert sorted(said) == [f"zeroseg: {name}: {entries[name]['reason']}" for name in ("bad", "poison")]
    assert not leftovers(out)
    assert {p.name for p in out.iterdir()} == {
        *("manifest.json", RECORDS),
        *(f for e in entries.values() for f in e.get("files", ())),
    }


@pytest.mark.slow
def test_a_killed_driver(tiny_pipeline, tmp_path):
    images, out = draw(tmp_path / "images", 8), tmp_path / "out"
    with running(tiny_pipeline, images, out) as process:
        wait_for(out, 2, process)
        workers, family = workers_of(process), psutil.Process(process.pid).children(recursive=True)
        folders = {part.split("=")[1] for p in family for part in _name(p).split() if part.startswith("--temp-dir=")}
        assert len(workers) == 2 and len(folders) == 1
        process.kill()
        deadline = time.monotonic() + 60
        while any(map(_alive, workers)):
            assert time.monotonic() < deadline, "the workers go with it"
            time.sleep(0.05)
    check_whole(out)
    before = done_of(out)
    assert 2 <= len(before) < 8 and not (out / "manifest.json").exists()
    written = {f: (out / f).stat().st_mtime_ns for r in before.values() for e in r["entries"] for f in e["files"]}
    with running(tiny_pipeline, images, out) as process:
        code, printed, said = ended(process)
    assert (code, said) == (0, []) and f"8 of 8 cases segmented ({len(before)} known from before)" in printed
    assert {f: (out / f).stat().st_mtime_ns for f in written} == written, "what was finished was not touched"
    manifest = manifest_of(out)
    assert [entry["case"] for entry in manifest["cases"]] == [f"disc{i}" for i in range(8)]
    assert manifest["batch"]["skipped"] == len(before) and not leftovers(out)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_ctrl_c(tiny_pipeline, tmp_path):
    images, out = draw(tmp_path / "images", 80), tmp_path / "out"
    with running(tiny_pipeline, images, out) as process:
        wait_for(out, 2, process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"}
        os.killpg(process.pid, signal.SIGINT)
        code, _, said = ended(process)
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert code == 130 and said == ["zeroseg: interrupted; finished cases are complete, the same command goes on"]
    check_whole(out)
    assert [entry["case"] for entry in manifest_of(out)["cases"]] == sorted(done_of(out)) and not leftovers(out)


@pytest.mark.slow
def test_resources_that_are_not_there(tiny_pipeline, tmp_path):
    images, out = draw(tmp_path / "images", 1), tmp_path / "out"
    with running(tiny_pipeline, images, out, "--gpus-per-worker", 99) as process:
        code, _, said = ended(process)
    assert code == 2 and len(said) == 1 and said[0].startswith("zeroseg: 2 workers need 198 GPUs, there are ")
