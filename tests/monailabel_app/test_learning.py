"""The whole loop with a real server: submit, train, use what was learned; choose the next image; score."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests

pytest.importorskip("monailabel")

from monailabel.client.client import MONAILabelClient, MONAILabelClientException

from serving import Server, serving
from zeroseg.io import find_cases, read_image

pytestmark = pytest.mark.slow

SMALL = ("--resolution", "128")
SIDE = 96
NAMES = [{"name": "disc", "idx": 1}, {"name": "bar", "idx": 2}]
TRAINING = {"seconds": 3600, "steps": 100}
"""Ended by its steps, so that it learns the same on every machine."""
PATIENCE = 560


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(SIDE, SIDE, 1) values and labels: a bright disc and a dark bar somewhere on a gray, noisy ground."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[:SIDE, :SIDE]
    image = 100 + 4 * rng.standard_normal((SIDE, SIDE))
    labels = np.zeros((SIDE, SIDE), np.uint8)
    cx, cy = rng.integers(24, 40, 2)
    labels[(x - cx) ** 2 + (y - cy) ** 2 < 15**2] = 1
    bx, by = rng.integers(52, 64, 2)
    labels[bx : bx + 24, by : by + 12] = 2
    image[labels == 1] += 60
    image[labels == 2] -= 60
    return image[..., None].astype(np.float32), labels[..., None]


def write_scenes(folder: Path, count: int) -> list[np.ndarray]:
    """Write scene0.nii.gz, scene1.nii.gz ...; returns their labels."""
    folder.mkdir(parents=True)
    truths = []
    for k in range(count):
        image, labels = scene(k)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"scene{k}.nii.gz")
        truths.append(labels)
    return truths


def submit(client: MONAILabelClient, folder: Path, image: str, labels: np.ndarray) -> None:
    """As 3D Slicer submits a label."""
    file = folder / f"{image}.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.eye(4)), file)
    client.save_label(image, str(file), "final", {"label_info": NAMES})


def ended(server: Server, kind: str) -> dict:
    """The background task, once it has ended."""
    deadline = time.monotonic() + PATIENCE
    while (task := requests.get(f"{server.url}/{kind}/").json()).get("status") in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < deadline, task
        time.sleep(0.5)
    return task


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A server with five images, of which three have labels from which it has learned."""
    folder = tmp_path_factory.mktemp("loop")
    truths = write_scenes(folder / "studies", 5)
    (folder / "labels").mkdir()
    with serving(folder / "studies", folder, *SMALL, "--strategy", "first") as server:
        client = MONAILabelClient(server.url, str(tmp_path_factory.mktemp("client")))
        assert "learned" not in client.info()["models"] and client.info()["train_stats"]["learned"] == {}
        refused = requests.post(f"{server.url}/train/")
        assert refused.status_code == 422 and "no label was submitted" in refused.json()["detail"]
        for k in range(3):
            submit(client, folder / "labels", f"scene{k}", truths[k])
        client.train_start("learned", TRAINING)
        epochs = []
        while client.train_status(check_if_running=True) or not epochs:
            epochs.append(client.info()["train_stats"]["learned"].get("epoch", 0))
            time.sleep(0.2)
        task = ended(server, "train")
        assert task["status"] == "DONE", "\n".join(task["details"])
        yield server, client, truths, epochs


def test_the_progress_of_a_training_is_shown(loop):
    _, client, _, epochs = loop
    assert epochs == sorted(epochs) and epochs[-1] > 0
    stats = client.info()["train_stats"]["learned"]
    assert stats["epoch"] <= stats["total_epochs"] and 0 <= stats["best_metric"] <= 1 and stats["total_time"]


def test_what_was_learned_is_found_in_the_next_image(loop):
    _, client, truths, _ = loop
    info = client.info()
    assert info["models"]["learned"]["labels"] == {"disc": 1, "bar": 2} and info["labels"] == ["disc", "bar"]
    assert next(iter(info["models"])) == "learned"
    path, answer = client.infer("learned", "scene3", {"result_extension": ".nrrd"})
    found = read_image(find_cases(Path(path))[0]).array[0]
    assert found.shape == (SIDE, SIDE, 1) and answer["label_names"] == {"disc": 1, "bar": 2}
    dices = [dice(found == value, truths[3] == value) for value in (1, 2)]
    print(f"Dice on the fourth image, after three: {dices}")
    assert min(dices) > 0.6


def test_the_head_is_scored_label_by_label(loop):
    server, client, _, _ = loop
    # After a training the server scores by itself.
    deadline = time.monotonic() + PATIENCE
    while not (scores := client.info()["scoring"]["learned"]).get("seen"):
        assert time.monotonic() < deadline, requests.get(f"{server.url}/scoring/").text
        time.sleep(1)
    assert set(scores["seen"]) == {"disc", "bar"} and scores["seen"]["disc"]["images"] == 3
    assert all(0 <= scores["seen"][name][key] <= 1 for name in ("disc", "bar") for key in ("dice", "nsd"))
    assert scores["unseen"] == {}


def test_the_next_image_comes_as_the_server_was_told(loop):
    _, client, _, _ = loop
    assert set(client.info()["strategies"]) == {"uncertain", "diverse", "first", "random"}
    # OHIF asks for random: this server was started with "first".
    assert [client.next_sample("random", {})["id"] for _ in range(3)] == ["scene3", "scene4", "scene3"]
    with pytest.raises(MONAILabelClientException, match="no strategy"):
        client.next_sample("nothing", {})


def test_a_training_that_is_killed_leaves_the_head_before(loop, tmp_path):
    server, client, truths, _ = loop
    studies = server.log.parent / "studies"
    before = json.loads((studies / ".learned" / "current.json").read_text())
    submit(client, tmp_path, "scene3", truths[3])
    client.train_start("learned", {"seconds": 3600})
    deadline = time.monotonic() + PATIENCE
    # No total time: it runs.
    while "total_time" in client.info()["train_stats"]["learned"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    training = json.loads((studies / ".learned" / "training.json").read_text())
    os.kill(training["pid"], signal.SIGKILL)
    assert ended(server, "train")["status"] == "ERROR"
    assert json.loads((studies / ".learned" / "current.json").read_text()) == before
    assert client.info()["train_stats"]["learned"]["total_time"] == before["total_time"]
    client.infer("learned", "scene4", {"result_extension": ".nrrd"})
    # And the button that stops one does the same.
    client.train_start("learned", {"seconds": 3600})
    while not client.train_status(check_if_running=True):
        time.sleep(0.2)
    client.train_stop()
    assert not client.train_status(check_if_running=True)
    assert json.loads((studies / ".learned" / "current.json").read_text())["name"] == before["name"]


BAD = {
    "seconds of words": ("/train/learned", {"seconds": "long"}),
    "seconds below zero": ("/train/learned", {"seconds": -1}),
    "no steps": ("/train/learned", {"steps": 0}),
    "a model that is frozen": ("/train/points", {}),
    "seconds of a strategy": ("/activelearning/uncertain", {"seconds": "long"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_a_reason(loop, case):
    server, _, _, _ = loop
    path, params = BAD[case]
    answer = requests.post(server.url + path, json=params)
    assert answer.status_code in (404, 422) and answer.json()["detail"], answer.text
    assert server.alive()
