"""A real server process, and the client 3D Slicer uses."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests

pytest.importorskip("monailabel")

from monailabel.client.client import MONAILabelClient, MONAILabelClientException

from phantom_studies import (
    CLICK,
    OBJECT,
    ORGANS,
    ORGANS_AFFINE,
    SHAPE,
    correction,
    oblique,
    organs,
    write_studies,
)
from serving import serving
from soak import soak
from zeroseg.io import find_cases, read_image

pytestmark = pytest.mark.slow

SMALL = ("--resolution", "128")  # a quarter of the embedded model's own side: quick, coarser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with serving(write_studies(folder / "studies"), folder, *SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> MONAILabelClient:
    return MONAILabelClient(server.url, str(tmp_path_factory.mktemp("client")))


def mask_of(path: str):
    """The mask a client received, as read by the bundle: labels and affine."""
    image = read_image(find_cases(path)[0])
    return image.array[0].astype(np.uint8), image.affine


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def the_object() -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[OBJECT] = True
    return mask


def test_info_holds_what_the_viewers_panels_need(client):
    info = client.info()
    models = info["models"]
    types = {name: m["type"] for name, m in models.items()}
    expected = {"segments": "segmentation", "points": "deepgrow", "scribbles": "scribbles", "text": "segmentation"}
    assert types.items() >= expected.items()
    for model in models.values():
        assert model["dimension"] == 3 and all(isinstance(v, int) for v in model["labels"].values())
        assert bool(model["labels"]) == (model["type"] == "segmentation")  # of the others the client names the label
        for value in model[
            "config"
        ].values():  # what OHIF and 3D Slicer can draw: combo boxes of strings, or single values
            assert isinstance(value, (bool, int, float, str)) or all(isinstance(entry, str) for entry in value)
    assert list(models["segments"]["labels"])[:2] == ["segment_01", "segment_02"]
    assert models["text"]["config"]["text"] == ""
    # 3D Slicer makes an empty segment of each on every image, and runs the task that declares one.
    assert info["labels"] == ["object"] and not any("object" in model["labels"] for model in models.values())


@pytest.mark.parametrize("image", ["flipped", "oblique", "scan", "series"])
def test_a_click_gives_the_object_under_it_on_the_viewers_grid(client, image):
    path, params = client.infer("points", image, {"foreground": [CLICK], "background": [], "result_extension": ".nrrd"})
    labels, affine = mask_of(path)
    assert labels.shape == SHAPE and labels[tuple(CLICK)] == 1 and set(np.unique(labels)) == {0, 1}
    assert dice(labels > 0, the_object()) > 0.7
    if image == "oblique":
        np.testing.assert_allclose(affine, oblique(), atol=1e-4)
    if image == "flipped":
        np.testing.assert_allclose(affine, np.diag([-1.5, 1.2, 3.0, 1.0]), atol=1e-5)
    assert not labels[:, :, 0].any()  # it ends where the object does
    assert params["label_names"] == {"object": 1} and params["absent"] is False and len(params["scores"]) == 1
    assert params["backbone"]["source"] == "embedded" and len(params["backbone"]["sha256"]) == 64
    assert params["seconds"]["total"] > 0


@pytest.fixture(scope="module")
def session_of_organs(client, tmp_path_factory):
    """A volume that 3D Slicer has and the server has not: it is sent once, and each click names the session."""
    file = tmp_path_factory.mktemp("organs") / "organs.nii.gz"
    nib.save(nib.Nifti1Image(organs()[0].astype(np.int16), ORGANS_AFFINE), file)
    session = client.create_session(str(file))["session_id"]
    yield session
    client.remove_session(session)


@pytest.mark.parametrize("name", ORGANS)
def test_a_correction_in_another_slice_improves_the_volume(client, session_of_organs, name):
    _, truths, first = organs()
    truth, clicks = truths[name], {"foreground": [first[name]], "background": []}

    def ask() -> np.ndarray:
        request = {**clicks, "result_extension": ".nrrd"}
        path, params = client.infer("points", "", request, session_id=session_of_organs)
        labels, affine = mask_of(path)
        np.testing.assert_allclose(affine, ORGANS_AFFINE, atol=1e-5)
        assert params["details"]["spacing_mm"] == [1.2, 1.2, 1.5]
        return labels > 0

    before = ask()
    voxel, kind = correction(before, truth, first[name][2])
    clicks["foreground" if kind else "background"].append(voxel)
    after = ask()
    assert after[tuple(voxel)] == kind and after[tuple(first[name])]
    assert dice(after, truth) > dice(before, truth) > 0.2
    changed = (after != before).any((0, 1))
    assert changed[voxel[2]] and changed.sum() >= 2, "its neighbours as well"


def test_a_second_click_is_answered_from_memory(client):
    _, first = client.infer("points", "picture", {"foreground": [[28, 56, 0]], "background": []})
    corrections = ({"foreground": [[28 + i, 56, 0]], "background": [[2, 2, 0]]} for i in range(1, 4))
    again = [client.infer("points", "picture", correction)[1]["seconds"] for correction in corrections]
    assert "encode" in first["seconds"] and not any("encode" in seconds for seconds in again)
    assert min(seconds["total"] for seconds in again) < first["seconds"]["encode"]


def test_a_region_bounds_the_answer(client):
    roi = [40, 10, 30, -5, 9, 3]  # unsorted, and it leaves the volume
    path, _ = client.infer("points", "oblique", {"foreground": [[12, 28, 3]], "roi": roi, "result_extension": ".nrrd"})
    where = np.argwhere(mask_of(path)[0])
    assert len(where) and (where >= (10, 0, 3)).all() and (where <= (40, 30, 5)).all()
    path, params = client.infer("points", "oblique", {"roi": [6, 22, 20, 36, 1, 5], "result_extension": ".nrrd"})
    assert dice(mask_of(path)[0] > 0, the_object()) > 0.5 and params["select"] == "box"


def test_scribbles_of_3d_slicer_are_followed(client, tmp_path):
    """As its module sends them: all segments in one label map, their values in ``label_info``."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:18, 28, 3], labels[4:44, 4, 3] = 3, 2
    file = tmp_path / "scribbles.nii.gz"
    nib.save(nib.Nifti1Image(labels, oblique()), file)
    names = ("lesion", "background_scribbles", "foreground_scribbles")
    params = {"roi": [], "label_info": [{"name": name, "id": k} for k, name in enumerate(names, 1)]}
    params |= {"selected_label_name": "lesion", "result_extension": ".nrrd"}
    path, answer = client.infer("scribbles", "oblique", params, label_in=str(file))
    mask, affine = mask_of(path)
    assert dice(mask > 0, the_object()) > 0.6 and answer["label_names"] == {"lesion": 1}
    assert mask[10:18, 28, 3].all() and not mask[4:44, 4, 3].any()
    np.testing.assert_allclose(affine, oblique(), atol=1e-4)


@pytest.mark.parametrize("image", ["oblique", "photo"])
def test_the_confidence_can_be_had_in_place_of_the_mask(server, tmp_path, image):
    click = CLICK if image == "oblique" else [14, 28, 0]
    asked = {"params": json.dumps({"foreground": [click], "result_extension": ".nrrd"})}
    answer = requests.post(f"{server.url}/infer/points?image={image}&output=confidence", data=asked)
    assert answer.status_code == 200, answer.text
    (tmp_path / "confidence.nrrd").write_bytes(answer.content)
    values = read_image(find_cases(tmp_path / "confidence.nrrd")[0]).array[0]
    assert values.dtype == np.float32 and 0 <= values.min() < values.max() <= 1
    mask = requests.post(f"{server.url}/infer/points?image={image}&output=image", data=asked)
    (tmp_path / "mask.nrrd").write_bytes(mask.content)
    assert set(np.unique(read_image(find_cases(tmp_path / "mask.nrrd")[0]).array)) == {0, 1}


def test_a_slice_sent_for_its_header_is_no_image(client, server):
    before = set(client.datastore()["objects"])
    one = next((server.log.parent / "studies" / "series").iterdir())
    client.upload_image(str(one), "IMG0001")
    assert set(client.datastore()["objects"]) == before


def test_one_slice_can_be_asked_for(client):
    path, _ = client.infer("points", "flipped", {"foreground": [CLICK], "extent": "slice", "result_extension": ".nrrd"})
    labels, _ = mask_of(path)
    assert set(np.flatnonzero(labels.any((0, 1)))) == {CLICK[2]}
    path, params = client.infer("segments", "flipped", {"extent": "slice", "slice": 1, "result_extension": ".nrrd"})
    labels, _ = mask_of(path)
    assert set(np.flatnonzero(labels.any((0, 1)))) == {1} and params["select"] == "segments"


def test_segments_of_a_volume_are_those_declared(client):
    path, params = client.infer("segments", "oblique", {"max_segments": 4})
    labels, affine = mask_of(path)
    values = set(np.unique(labels)) - {0}
    assert path.endswith(".nii.gz") and len(values) >= 2 and max(values) <= 16
    assert set(params["label_names"].values()) == values
    np.testing.assert_allclose(affine, oblique(), atol=1e-4)


def test_pictures_are_segmented_too(client):
    path, params = client.infer("segments", "photo", {"select": "auto"})
    labels, _ = mask_of(path)
    assert path.endswith(".png") and labels.shape == (40, 48) and params["select"] == "auto"
    path, _ = client.infer("points", "picture", {"foreground": [[28, 56, 0]], "background": []})
    labels, _ = mask_of(path)
    assert path.endswith(".png") and labels.shape == (80, 96) and labels[56, 28] == 1  # PNG: JPEG would blur labels
    path, _ = client.infer("points", "photo", {"foreground": [[14, 28, 0]], "result_extension": ".nrrd"})
    labels, _ = mask_of(path)
    assert labels.shape == (48, 40, 1) and labels[14, 28, 0] == 1  # as OHIF and 3D Slicer see a picture: (i, j, k)


def test_a_text_is_found_or_said_to_be_absent(client):
    """Which of the two a text gets is the model's affair; that the user is told is the app's."""
    sure, unsure = {"text": "bright square", "certainty": -1e6}, {"text": "bright square", "certainty": 1e6}
    outcomes = []
    for options in (sure, unsure):
        try:
            _, params = client.infer("text", "photo", options)
            outcomes.append(params["label_names"])
        except MONAILabelClientException as error:
            outcomes.append(error.msg)
    assert "Status: 422" in outcomes[1] and "absent" in outcomes[1] and "bright square" in outcomes[1]
    if isinstance(outcomes[0], str):
        assert "absent" in outcomes[0]  # no gain at all: absent whatever the certainty asked for
    else:
        assert outcomes[0] == {"bright square": 1}
    path, params = client.infer("text", "photo", {**unsure, "absent": "empty mask"})
    assert params["absent"] is True and params["label_names"] == {} and not mask_of(path)[0].any()


def test_a_session_and_an_uploaded_file_are_images_as_well(client, server):
    image = str(Path(server.log.parent) / "studies" / "oblique.nii.gz")
    session = client.create_session(image)["session_id"]
    path, _ = client.infer("points", "", {"foreground": [CLICK]}, session_id=session)
    assert mask_of(path)[0][tuple(CLICK)] == 1
    client.remove_session(session)
    path, _ = client.infer("points", "", {"foreground": [CLICK]}, file=image)
    assert mask_of(path)[0][tuple(CLICK)] == 1


def test_a_label_is_saved_and_comes_back(client):
    path, _ = client.infer("points", "scan", {"foreground": [CLICK], "result_extension": ".nrrd"})
    saved = client.save_label("scan", path, "final", {"label_info": [{"name": "lesion", "idx": 1}]})
    assert saved["label"] == "scan"
    back = client.download_label("scan", "final")
    np.testing.assert_array_equal(mask_of(back)[0], mask_of(path)[0])
    assert client.datastore()["objects"]["scan"]["labels"]["final"]["info"]["label_info"][0]["name"] == "lesion"
    assert client.next_sample("random", {})["id"] != "scan"


def test_a_batch_segments_all_images_and_survives_one_it_cannot_read(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    studies = write_studies(folder / "studies")
    for name in ("long.nii.gz", "oblique.nii.gz", "scan.nrrd"):
        (studies / name).unlink()
    (studies / "broken.nii.gz").write_bytes(b"no image")
    with serving(studies, folder, *SMALL) as running:
        options = {"max_segments": 3, "extent": "slice", "label_tag": "original"}
        answer = requests.post(f"{running.url}/batch/infer/segments?images=all", json=options)
        assert answer.status_code == 200, answer.text
        deadline = time.monotonic() + 560
        while (status := requests.get(f"{running.url}/batch/infer").json())["status"] in ("SUBMITTED", "RUNNING"):
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        assert status["status"] == "DONE", status
        deadline = time.monotonic() + 60  # the server sees the other process's labels by watching the folder
        while time.monotonic() < deadline:
            objects = requests.get(f"{running.url}/datastore/?output=all").json()["objects"]
            labelled = {name for name, entry in objects.items() if "original" in entry["labels"]}
            if len(labelled) == 4:
                break
            time.sleep(0.5)
        assert labelled == {"flipped", "series", "photo", "picture"}
        assert running.alive()


def test_the_server_answers_while_it_infers(server):
    answers = []

    def long() -> None:
        answers.append(requests.post(f"{server.url}/infer/segments?image=long&output=json", data={"params": "{}"}))
        answers.append(time.perf_counter())

    job = threading.Thread(target=long)
    begin = time.perf_counter()
    job.start()
    time.sleep(0.3)
    waits, steps = {path: [] for path in ("/info/", "/ohif/", "/datastore/")}, []
    # Until the job has got further: on a busy machine its first slice can take longer than fifty answers.
    while job.is_alive() and (len(waits["/info/"]) < 50 or steps[-1][0] == steps[0][0]):
        for path, seconds in waits.items():
            start = time.perf_counter()
            told = requests.get(server.url + path)
            assert told.status_code == 200
            seconds.append(time.perf_counter() - start)
            steps += [(job["done"], job["total"]) for job in told.json()["queue"]] if path == "/info/" else []
    assert len(waits["/info/"]) >= 10, "the job was over too soon to say anything"
    job.join()
    assert answers[0].status_code == 200
    assert (steps == sorted(steps)) and steps[-1][0] > steps[0][0] and steps[-1][1] == 8 * SHAPE[2], steps
    assert requests.get(f"{server.url}/info/").json()["queue"] == []
    whole = answers[1] - begin
    assert all(np.quantile(seconds, 0.95) < whole / 4 for seconds in waits.values()), (whole, waits)


def test_a_client_that_leaves_frees_the_server(server):
    """The long job of a client that has gone stops at the next slice; else the click behind it would wait for all of them."""

    def segment(max_segments: int, **options) -> float:
        params = {"params": json.dumps({"max_segments": max_segments})}
        start = time.perf_counter()
        answer = requests.post(f"{server.url}/infer/segments?image=long&output=json", data=params, **options)
        assert answer.status_code == 200
        return time.perf_counter() - start

    whole = segment(14)
    with pytest.raises(requests.exceptions.ReadTimeout):
        segment(15, timeout=whole / 10)
    start = time.perf_counter()
    answer = requests.post(
        f"{server.url}/infer/points?image=photo&output=json", data={"params": '{"foreground": [[14, 28, 0]]}'}
    )
    assert answer.status_code == 200 and time.perf_counter() - start < whole / 2


def test_a_short_soak_fails_no_request(server):
    report = soak(server.url, clients=8, seconds=15, pid=server.process.pid)
    assert report["failed"] == 0 and report["requests"] > 2 * report["clients"], report
    assert report["info_p95_seconds"] < report["infer_p50_seconds"], report
    assert report["memory_growth_mb"] < 200, report


CLICKS = json.dumps({"foreground": [CLICK]})
BAD = {
    "unknown model": ("POST", "/infer/nothing?image=photo", {"data": {"params": "{}"}}),
    "unknown image": ("POST", "/infer/points?image=nothing", {"data": {"params": CLICKS}}),
    "no image": ("POST", "/infer/points", {"data": {"params": CLICKS}}),
    "path as image": ("POST", "/infer/points?image=/etc/passwd", {"data": {"params": CLICKS}}),
    "path upwards": ("POST", "/infer/points?image=../../etc/passwd", {"data": {"params": CLICKS}}),
    "encoded path upwards": ("POST", "/infer/points?image=..%2f..%2fetc%2fpasswd", {"data": {"params": CLICKS}}),
    "path in params": ("POST", "/infer/points?image=photo", {"data": {"params": '{"image": "/etc/passwd"}'}}),
    "params not JSON": ("POST", "/infer/points?image=photo", {"data": {"params": "{"}}),
    "params a list": ("POST", "/infer/points?image=photo", {"data": {"params": "[1]"}}),
    "params a number": ("POST", "/infer/points?image=photo", {"data": {"params": "7"}}),
    "no click": ("POST", "/infer/points?image=photo", {"data": {"params": "{}"}}),
    "click outside": ("POST", "/infer/points?image=oblique", {"data": {"params": '{"foreground": [[99, 1, 1]]}'}}),
    "click below zero": ("POST", "/infer/points?image=oblique", {"data": {"params": '{"foreground": [[-1, 1, 1]]}'}}),
    "click on slice 3 of a picture": ("POST", "/infer/points?image=photo", {"data": {"params": CLICKS}}),
    "click of words": ("POST", "/infer/points?image=photo", {"data": {"params": '{"foreground": [["a", "b"]]}'}}),
    "click of one number": ("POST", "/infer/points?image=photo", {"data": {"params": '{"foreground": [[1]]}'}}),
    "clicks no list": ("POST", "/infer/points?image=photo", {"data": {"params": '{"foreground": "here"}'}}),
    "background only": ("POST", "/infer/points?image=photo", {"data": {"params": '{"background": [[1, 1, 0]]}'}}),
    "box inside out": ("POST", "/infer/points?image=photo", {"data": {"params": '{"box": [9, 9, 1, 1]}'}}),
    "box of words": ("POST", "/infer/points?image=photo", {"data": {"params": '{"box": "all"}'}}),
    "roi of five numbers": ("POST", "/infer/points?image=oblique", {"data": {"params": '{"roi": [1, 2, 3, 4, 5]}'}}),
    "roi beside the volume": (
        "POST",
        "/infer/points?image=oblique",
        {"data": {"params": '{"roi": [90, 99, 1, 9, 1, 3]}'}},
    ),
    "candidate four": (
        "POST",
        "/infer/points?image=photo",
        {"data": {"params": '{"foreground": [[14, 28, 0]], "candidate": "4"}'}},
    ),
    "scribbles without strokes": ("POST", "/infer/scribbles?image=photo", {"data": {"params": "{}"}}),
    "scribbles on a server's file": (
        "POST",
        "/infer/scribbles?image=photo",
        {"data": {"params": '{"label": "/etc/passwd"}'}},
    ),
    "scribbles of no image": ("POST", "/infer/scribbles?image=photo", {"files": {"label": ("a.nrrd", b"no image")}}),
    "confidence as PNG": (
        "POST",
        "/infer/points?image=photo&output=confidence",
        {"data": {"params": '{"foreground": [[14, 28, 0]], "result_extension": ".png"}'}},
    ),
    "weights from outside": ("PUT", "/model/points", {"files": {"file": ("a.pt", b"x")}}),
    "weights removed": ("DELETE", "/model/points", {}),
    "no text": ("POST", "/infer/text?image=photo", {"data": {"params": "{}"}}),
    "text a number": ("POST", "/infer/text?image=photo", {"data": {"params": '{"text": 5}'}}),
    "certainty no number": ("POST", "/infer/text?image=photo", {"data": {"params": '{"text": "x", "certainty": "?"}'}}),
    "unknown select": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"select": "magic"}'}}),
    "unknown refine": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"refine": "magic"}'}}),
    "threshold of words": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"threshold": "high"}'}}),
    "threshold below zero": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"threshold": "-1"}'}}),
    "slice outside": (
        "POST",
        "/infer/segments?image=oblique",
        {"data": {"params": '{"extent": "slice", "slice": 99}'}},
    ),
    "too many segments": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"max_segments": 1000}'}}),
    "unknown extension": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"result_extension": ".exe"}'}}),
    "path as extension": ("POST", "/infer/segments?image=photo", {"data": {"params": '{"result_extension": "/../x"}'}}),
    "volume as PNG": (
        "POST",
        "/infer/points?image=oblique",
        {"data": {"params": json.dumps({"foreground": [CLICK], "result_extension": ".png"})}},
    ),
    "path as tag": (
        "POST",
        "/infer/segments?image=photo",
        {"data": {"params": '{"save_label": true, "label_tag": "../x"}'}},
    ),
    "unknown output": ("POST", "/infer/points?image=photo&output=magic", {"data": {"params": CLICKS}}),
    "DICOM SEG of a folder": ("POST", "/infer/segments?image=photo&output=dicom_seg", {"data": {"params": "{}"}}),
    "broken file": ("POST", "/infer/segments", {"files": {"file": ("a.nii.gz", b"no image")}}),
    "empty file": ("POST", "/infer/segments", {"files": {"file": ("a.png", b"")}}),
    "file of no image": ("POST", "/infer/segments", {"files": {"file": ("a.exe", b"MZ")}}),
    "unknown session": ("POST", "/infer/segments?session_id=nothing", {"data": {"params": "{}"}}),
    "path as session": ("GET", "/session/..%2f..%2fetc", {}),
    "session not there": ("DELETE", "/session/nothing", {}),
    "session of a broken archive": ("PUT", "/session/?uncompress=true", {"files": {"files": ("a.zip", b"no archive")}}),
    "session of nothing": ("PUT", "/session/", {}),
    "image not there": ("GET", "/datastore/image?image=nothing", {}),
    "path of an upload": ("PUT", "/datastore/image?image=../../x", {"files": {"file": ("a.png", b"x")}}),
    "label of no image": ("PUT", "/datastore/label?image=nothing", {"files": {"label": ("a.nrrd", b"x")}}),
    "path as label's tag": ("PUT", "/datastore/label?image=photo&tag=../x", {"files": {"label": ("a.nrrd", b"x")}}),
    "label not there": ("GET", "/datastore/label?label=nothing&tag=final", {}),
    "removing what is not there": ("DELETE", "/datastore/image?id=nothing", {}),
    "info not JSON": ("PUT", "/datastore/image/info?image=photo", {"data": {"info": "{"}}),
    "batch of an unknown model": ("POST", "/batch/infer/nothing", {"json": {}}),
    "batch of unknown images": ("POST", "/batch/infer/segments?images=some", {"json": {}}),
    "unknown strategy": ("POST", "/activelearning/nothing", {"json": {}}),
    "training of a frozen model": ("POST", "/train/segments", {"json": {}}),
    "unknown scoring": ("POST", "/scoring/nothing", {"json": {}}),
    "proxy without a DICOM server": ("GET", "/proxy/dicom/qido/studies", {}),
    "nowhere": ("GET", "/nowhere", {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_with_a_reason(server, case):
    method, path, rest = BAD[case]
    answer = requests.request(method, server.url + path, timeout=60, **rest)
    assert 400 <= answer.status_code < 500 or answer.status_code == 503, (case, answer.status_code, answer.text)
    detail = answer.json()["detail"]
    assert detail and "Traceback" not in str(detail) and str(server.log.parent) not in str(detail), detail


def test_ohif_is_served_with_its_files_and_shows_the_servers_reasons(server):
    for path in ("/ohif/", "/ohif/monai-label?StudyInstanceUIDs=1.2"):
        page = requests.get(server.url + path)
        assert page.status_code == 200 and "zeroseg-message" in page.text and "app.bundle" in page.text
    script = requests.get(f"{server.url}/ohif/app-config.js")
    assert script.status_code == 200 and "window.config" in script.text
    assert "<html" not in requests.get(f"{server.url}/ohif/assets/android-chrome-192x192.png").text[:300]


def test_the_server_is_alive_after_all_that(server):
    assert server.alive()
    assert not (server.log.parent.parent / "x").exists()
    assert "Traceback" not in server.log.read_text() or "Internal Server Error" not in server.log.read_text()


def test_missing_weights_are_a_503_with_the_reason(tmp_path):
    studies = write_studies(tmp_path / "studies")
    with serving(studies, tmp_path, "--backbone", str(tmp_path / "nowhere")) as running:
        answer = requests.post(f"{running.url}/infer/segments?image=photo", data={"params": "{}"})
        assert answer.status_code == 503 and "nowhere" in answer.json()["detail"]
        assert running.alive()
        assert not list(Path(running.log.parent).glob("**/.env"))
