"""OHIF as MONAI Label serves it, in a real headless Chromium, on studies of a real Orthanc: what a person does and sees."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nrrd
import numpy as np
import pydicom
import pytest
import requests
from PIL import Image

pytest.importorskip("monailabel")

import dicom_series
from dicom_studies import TO_LPS, Series
from orthanc import missing, orthanc
from phantom_studies import ORGANS, correction
from phantom_studies import organs as make_organs
from serving import serving
from zeroseg.backbones.weights import MODELS

ROOT = Path(__file__).resolve().parents[2]
BROWSER = ROOT / "tests" / "browser"
ARTIFACTS = ROOT / "out" / "test-artifacts"
WORDS = ("kidneys", "spine", "aorta", "body", "abdomen")
"""What the drawn abdomen holds; which of them the model recognises is the model's affair."""
SLICE, CERTAINTY = 0, 0.5
FIRST, SECOND = 2, 3
"""Values of segment_01 and segment_02 in the page, which numbers all labels by name: object comes before them."""
VENTRICLE, PUTAMEN = [15, 25, 12], [5, 20, 12]
"""Voxels of the brain MR, placed by eye."""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def lacking() -> str | None:
    """Why OHIF cannot be driven here; None when it can."""
    if (
        chromium() is None
        or shutil.which("node") is None
        or not (BROWSER / "node_modules" / "playwright-core").is_dir()
    ):
        return "Chromium, Node.js or playwright-core is not installed: sh scripts/install_e2e.sh"
    return missing()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(lacking() is not None, reason=str(lacking()))]


@dataclass
class Visit:
    """What was done in the browser and what the page showed."""

    server: str
    ct: Series
    mr: Series
    organs: Series
    word: str
    report: dict
    stored: list[pydicom.Dataset]

    def step(self, study: str, name: str) -> dict:
        steps = next(s["steps"] for s in self.report["studies"] if s["name"] == study)
        return next(step for step in steps if step["name"] == name)


@pytest.fixture(scope="module")
def visit(tmp_path_factory) -> Visit:
    """One visit: a click, a text, an absent text and everything on a CT; what was stopped, two clicks and one slice on an MR;
    two organs clicked and corrected on another CT."""
    folder = tmp_path_factory.mktemp("ohif")
    ct, mr, organs = (
        write(folder / write.__name__) for write in (dicom_series.ct, dicom_series.mr, dicom_series.organs)
    )
    with orthanc(folder / "orthanc") as store:
        for series in (ct, mr, organs):
            store.push(series.folder)
        with serving(store.dicom_web, folder / "server", "--resolution", "128") as server:
            word = next((w for w in WORDS if found(server.url, ct, w)), None)
            assert word, f"none of {WORDS} was found in the drawing of an abdomen"
            one = {"extent": "slice", "slice": str(SLICE)}
            scenario = {
                "server": server.url,
                "chromium": chromium(),
                "folder": str(ARTIFACTS),
                "studies": [
                    {
                        "name": "ct",
                        "uid": ct.study,
                        "steps": [
                            {"name": "too soon", "press": "Update Model"},
                            {"name": "click", "click": place(ct, ct.click), "model": "points", "label": "segment_02"},
                            {"name": "save", "save": "round mass"},
                            {"name": "next", "press": "Next Sample", "strategy": "first"},
                            {"name": "absent", "run": "text", "options": {"text": word, "certainty": "1000000", **one}},
                            {
                                "name": "text",
                                "run": "text",
                                "options": {"text": word, "certainty": str(CERTAINTY), **one},
                            },
                            {"name": "segments", "run": "segments"},
                        ],
                    },
                    {
                        "name": "mr",
                        "uid": mr.study,
                        "steps": [
                            {"name": "stopped", "run": "segments", "stop": True},
                            {
                                "name": "ventricle",
                                "click": place(mr, VENTRICLE),
                                "model": "points",
                                "label": "segment_01",
                            },
                            {"name": "putamen", "click": place(mr, PUTAMEN), "model": "points", "label": "segment_02"},
                            {"name": "slice", "run": "segments", "options": {"extent": "slice", "select": "auto"}},
                        ],
                    },
                    {"name": "organs", "uid": organs.study, "steps": corrected(server.url, organs, folder)},
                ],
            }
            report = drive(scenario, folder)
            yield Visit(server.url, ct, mr, organs, word, report, store.instances(Modality="SEG"))


def found(server: str, series: Series, word: str) -> bool:
    options = {"text": word, "extent": "slice", "slice": SLICE, "certainty": CERTAINTY, "absent": "empty mask"}
    answer = requests.post(
        f"{server}/infer/text?image={series.uid}&output=json", data={"params": json.dumps(options)}, timeout=120
    )
    answer.raise_for_status()
    return not answer.json()["absent"]


def corrected(server: str, series: Series, folder: Path) -> list[dict]:
    """Of each organ a click, then a correction in another slice: where a person would make it on seeing the first answer."""
    _, truths, first = make_organs()
    steps = []
    for label, name in zip(("segment_01", "segment_02"), ORGANS, strict=True):
        params = {"foreground": [first[name]], "result_extension": ".nrrd"}
        answer = requests.post(
            f"{server}/infer/points?image={series.uid}&output=image", data={"params": json.dumps(params)}, timeout=120
        )
        answer.raise_for_status()
        file = folder / f"{name}.nrrd"
        file.write_bytes(answer.content)
        voxel, kind = correction(nrrd.read(str(file))[0] > 0, truths[name], first[name][2])
        click = {"model": "points", "label": label}
        steps += [
            {"name": name, "click": place(series, first[name]), **click},
            {"name": f"{name} corrected", "click": place(series, voxel), "background": not kind, **click},
        ]
    return steps


def place(series: Series, voxel: list[int]) -> list[float]:
    """LPS mm of a voxel."""
    return (TO_LPS @ series.affine @ [*voxel, 1])[:3].tolist()


def drive(scenario: dict, folder: Path) -> dict:
    """Run the browser; its screenshots go to ``ARTIFACTS``."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    file = folder / "scenario.json"
    file.write_text(json.dumps(scenario))
    done = subprocess.run(
        ["node", str(BROWSER / "ohif.mjs"), str(file)], capture_output=True, text=True, timeout=600, cwd=folder
    )
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n(screenshot: {ARTIFACTS / 'failure.png'})"
    return json.loads(done.stdout)


def labels_of(step: dict) -> tuple[np.ndarray, np.ndarray]:
    """The segmentation the page holds: (X, Y, Z) uint8, and voxel index -> RAS mm."""
    held = step["labels"]
    values = np.frombuffer(base64.b64decode(held["data"]), np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(held["direction"], (3, 3)).T * held["spacing"]
    affine[:3, 3] = held["origin"]
    return values.reshape(held["dimensions"], order="F"), TO_LPS @ affine


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def test_the_page_opens_the_studies_without_errors_and_stays_on_this_machine(visit):
    for study in visit.report["studies"]:
        assert study["viewports"] == ["mpr-axial", "mpr-sagittal", "mpr-coronal"]
    assert visit.report["errors"] == []
    assert all("fonts.g" in address for address in visit.report["left"]), visit.report["left"]  # OHIF's own, refused


def test_the_panel_tells_segments_apart_by_their_colours(visit):
    colours = {k: np.array(v) for k, v in visit.report["studies"][0]["colours"].items() if k.startswith("segment_")}
    assert len(colours) == 16
    distances = [np.abs(colours[a] - colours[b]).max() for a in colours for b in colours if a < b]
    assert min(distances) >= 40, colours


def test_a_click_on_the_picture_draws_the_object_under_it(visit):
    step = visit.step("ct", "click")
    labels, affine = labels_of(step)
    assert step["status"] == 200 and labels.shape == visit.ct.volume.shape
    np.testing.assert_allclose(affine, visit.ct.affine, atol=1e-3)  # so that voxels can be compared
    assert np.abs(np.subtract(step["params"]["foreground"], visit.ct.click)).max() <= 1
    assert set(np.unique(labels)) == {0, SECOND}  # the label that was picked
    assert dice(labels == SECOND, visit.ct.object) > 0.7
    assert all(step["coloured"][name] > 100 for name in ("mpr-axial", "mpr-sagittal", "mpr-coronal")), step["coloured"]


def test_what_is_on_screen_is_saved_as_dicom_seg_under_the_users_name(visit):
    step = visit.step("ct", "save")
    assert step["status"] == 200 and "round mass" in step["notice"]
    [seg] = visit.stored
    assert [one.SegmentLabel for one in seg.SegmentSequence] == ["round mass"]
    labels, _ = labels_of(step)
    shown = {
        visit.ct.instances[k]: np.count_nonzero(labels[..., k]) for k in range(labels.shape[2]) if labels[..., k].any()
    }
    for frame, mask in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        uid = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert np.count_nonzero(mask) == shown.pop(uid)
    assert not shown


def test_the_buttons_of_active_learning_do_what_they_say(visit):
    refused, following = visit.step("ct", "too soon"), visit.step("ct", "next")
    assert refused["status"] == 422 and "no label was submitted" in refused["notice"]
    # The panel asks for random whatever is picked; and the CT has its label now.
    assert following["url"].endswith("/activelearning/first")
    assert following["answer"]["id"] == min(visit.mr.uid, visit.organs.uid)
    assert "Class Prompts" not in visit.report["studies"][0]["tabs"] and len(visit.report["studies"][0]["tabs"]) == 3


def test_a_text_typed_into_the_options_draws_what_it_names(visit):
    step = visit.step("ct", "text")
    labels, _ = labels_of(step)
    assert step["status"] == 200 and step["params"]["text"] == visit.word
    assert set(np.flatnonzero(labels.any((0, 1)))) == {SLICE} and len(np.unique(labels)) == 2
    options = {**step["params"], "result_extension": ".nrrd"}
    again = requests.post(
        f"{visit.server}/infer/text?image={visit.ct.uid}&output=json", data={"params": json.dumps(options)}, timeout=120
    ).json()
    assert again["label_names"] == {visit.word: 1}


def test_an_absent_text_is_said_to_be_absent_and_draws_nothing(visit):
    click, absent = visit.step("ct", "click"), visit.step("ct", "absent")
    assert absent["status"] == 422 and absent["params"]["certainty"] == 1e6
    assert "absent" in absent["notice"] and visit.word in absent["notice"]
    assert absent["labels"] == click["labels"]


def test_run_draws_all_segments(visit):
    step = visit.step("ct", "segments")
    labels, _ = labels_of(step)
    assert step["status"] == 200 and len(np.unique(labels)) > 4
    values = np.bincount(labels[visit.ct.object])
    assert values.max() > 0.5 * visit.ct.object.sum()  # the mass is mostly one of them
    assert step["coloured"]["mpr-axial"] > visit.step("ct", "click")["coloured"]["mpr-axial"]


def test_clicks_for_two_labels_stay_side_by_side_on_an_mr(visit):
    first, affine = labels_of(visit.step("mr", "ventricle"))
    both, _ = labels_of(visit.step("mr", "putamen"))
    np.testing.assert_allclose(affine, visit.mr.affine, atol=1e-3)
    assert first[tuple(VENTRICLE)] == FIRST and both[tuple(PUTAMEN)] == SECOND
    assert np.array_equal(both == FIRST, (first == FIRST) & (both != SECOND))
    k = VENTRICLE[2]
    brain, ventricle, putamen = (visit.mr.volume[..., k][both[..., k] == label].mean() for label in (0, FIRST, SECOND))
    assert ventricle < min(putamen, brain)  # dark fluid, beside gray and white matter


def test_a_long_answer_says_how_far_it_is_and_can_be_stopped(visit):
    step = visit.step("mr", "stopped")
    assert re.search(rf"step \d+ of {visit.mr.volume.shape[2]}, \d+ s", step["notice"]), step["notice"]
    assert not labels_of(step)[0].any()
    # The server is free again for what came next.
    assert visit.step("mr", "ventricle")["status"] == 200


@pytest.mark.parametrize(("name", "label"), zip(ORGANS, (FIRST, SECOND), strict=True))
def test_a_correction_in_another_slice_improves_the_volume(visit, name, label):
    steps = [visit.step("organs", step) for step in (name, f"{name} corrected")]
    (before, affine), (after, _) = (labels_of(step) for step in steps)
    np.testing.assert_allclose(affine, visit.organs.affine, atol=1e-3)
    truth = make_organs()[1][name]
    assert dice(after == label, truth) > dice(before == label, truth) > 0.2
    first, both = ([*step["params"]["foreground"], *step["params"]["background"]] for step in steps)
    assert len(first) == 1 and len(both) == 2 and first[0] in both
    [further] = [voxel for voxel in both if voxel != first[0]]
    assert further[2] != first[0][2]
    assert (after[tuple(further)] == label) == (further in steps[1]["params"]["foreground"])
    # What the other organ was given stays.
    others = (before > 0) & (before != label)
    assert np.array_equal(after[others], before[others])


def test_options_reach_the_task(visit):
    step = visit.step("mr", "slice")
    labels, _ = labels_of(step)
    assert step["params"].items() >= {"extent": "slice", "select": "auto"}.items()
    assert set(np.flatnonzero(labels.any((0, 1)))) == {visit.mr.volume.shape[2] // 2}


@pytest.mark.skipif(not (MODELS / "tumor").is_dir(), reason="the bundle holds no tumour model")
def test_a_tumour_asked_for_by_words_is_drawn_or_said_to_be_absent(tmp_path):
    limb = dicom_series.limb(tmp_path / "limb")
    sarcoma, nonsense = {"organ": "limb", "text": "soft tissue sarcoma"}, {"organ": "limb", "text": "zqxv plomf"}
    with orthanc(tmp_path / "orthanc") as store:
        store.push(limb.folder)
        with serving(store.dicom_web, tmp_path / "server") as server:
            steps = [
                {"name": "nonsense", "run": "tumor", "options": nonsense},
                {"name": "sarcoma", "run": "tumor", "options": sarcoma},
            ]
            scenario = {
                "server": server.url,
                "chromium": chromium(),
                "folder": str(ARTIFACTS),
                "studies": [{"name": "limb", "uid": limb.study, "steps": steps}],
            }
            report = drive(scenario, tmp_path)
    absent, found = report["studies"][0]["steps"]
    assert absent["status"] == 422 and not labels_of(absent)[0].any()
    assert nonsense["text"] in absent["notice"] and "knows none of the words" in absent["notice"]
    labels, affine = labels_of(found)
    assert found["status"] == 200 and found["params"].items() >= sarcoma.items()
    np.testing.assert_allclose(affine, limb.affine, atol=1e-3)
    assert len(np.unique(labels)) == 2 and dice(labels > 0, limb.object) > 0.4
    assert all(found["coloured"][name] > 100 for name in ("mpr-axial", "mpr-sagittal", "mpr-coronal"))
    assert report["errors"] == []


@pytest.mark.parametrize(
    ("shot", "name"),
    [("mr-putamen", "ohif"), ("organs-touching corrected", "ohif_corrected"), ("ct-too soon", "ohif_refused")],
)
def test_the_screenshots_for_the_readmes(visit, shot, name):
    """Kept with the other artefacts; ZEROSEG_UPDATE_DOCS=1 puts them into docs/ as well."""
    picture = ARTIFACTS / f"{name}.jpg"
    with Image.open(ARTIFACTS / f"{shot}.png") as taken:
        taken.convert("RGB").resize((1200, round(1200 * taken.height / taken.width)), Image.LANCZOS).save(
            picture, quality=82, optimize=True
        )
    assert 20_000 < picture.stat().st_size < 200_000
    if os.environ.get("ZEROSEG_UPDATE_DOCS"):
        shutil.copy(picture, ROOT / "docs" / picture.name)
