"""The order in which images are labelled, and labels read back for learning; a real datastore, a tiny model, no server."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monailabel")

from lib.datastore import FolderDatastore
from lib.engine import Engine
from lib.heads import Heads
from lib.strategies.measured import Diverse, Uncertain
from lib.strategies.plain import First, Random
from lib.submissions import read, read_all, submitted, values_of_all
from lib.trainers.learned import LearnedTrainer
from zeroseg.learning import volumes

NAMES = ("a", "b", "c", "d")
NO_HURRY = {"seconds": 3600}
"""On a busy machine even four tiny images can take longer than a button may."""


@pytest.fixture(scope="module")
def engine(tiny_backbone) -> Engine:
    return Engine(tiny_backbone)


@pytest.fixture
def store(tmp_path) -> FolderDatastore:
    """Four ramps, of which d is unlike the others."""
    for k, name in enumerate(NAMES):
        x, y, z = np.indices((48, 48, 1))
        image = (x + z) % 9 * 30.0 if name == "d" else x + y + z + np.random.default_rng(k).normal(0, 0.3, x.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    return FolderDatastore(str(tmp_path), auto_reload=False)


def submit(store: FolderDatastore, image: str, labels: np.ndarray, names=None) -> None:
    file = Path(store._datastore_path) / "submitted.nii.gz"
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), file)
    store.save_label(image, str(file), "final", {"label_info": names} if names else {})
    file.unlink()
    store.refresh()


def hand_out(store: FolderDatastore, image: str, seconds_ago: float = 0) -> None:
    """As MONAI Label notes it."""
    store.update_image_info(image, {"strategy": {"first": {"ts": int(time.time() - seconds_ago)}}})


def test_first_goes_by_name_and_leaves_out_what_is_labelled_or_just_handed_out(store):
    ask = First()
    assert ask({}, store) == {"id": "a"}
    hand_out(store, "a", 10)
    assert ask({}, store) == {"id": "b"}
    submit(store, "b", np.ones((48, 48, 1)))
    assert ask({}, store) == {"id": "c"}
    hand_out(store, "c", 5)
    hand_out(store, "d", 1)
    assert ask({}, store) == {"id": "a"}, "all were handed out: a was so longest ago"
    for name in "acd":
        submit(store, name, np.ones((48, 48, 1)))
    assert ask({}, store) is None


def test_random_with_a_seed_is_the_same_every_time(store):
    found = {seed: Random()({"seed": seed}, store)["id"] for seed in range(9)}
    assert found == {seed: Random()({"seed": seed}, store)["id"] for seed in range(9)} and len(set(found.values())) > 1


def test_diverse_goes_to_what_is_unlike_the_images_before(store, engine):
    ask = Diverse(engine)
    first = ask(NO_HURRY, store)
    assert first["id"] != "d" and first["of"] == 4, "the most usual one comes first"
    hand_out(store, first["id"])
    second = ask(NO_HURRY, store)
    assert second["id"] == "d" and second["distance"] > 0


def test_uncertain_goes_to_the_least_sure_and_measures_an_image_once(store, engine, tmp_path, monkeypatch):
    ask = Uncertain(engine, Heads(tmp_path / ".learned", engine))
    measured = []
    monkeypatch.setattr(
        Uncertain,
        "_click",
        lambda self, part: measured.append(1) or {0: 0.9, 1: 0.2, 2: 0.8, 3: 0.7}[len(measured) - 1],
    )
    asked = ask(NO_HURRY, store)
    assert asked["confidence"] == 0.2 and asked["of"] == 4 and len(measured) == 4
    assert ask(NO_HURRY, store) == asked and len(measured) == 4
    assert ask({"seconds": 0}, store) == asked, "what is known needs no time"


def test_uncertain_measures_at_least_one_image_whatever_its_time(store, engine, tmp_path):
    ask = Uncertain(engine, Heads(tmp_path / ".learned", engine))
    one = ask({"seconds": 0}, store)
    assert one["of"] == 1 and 0 <= one["confidence"] <= 1


def test_submissions_are_read_under_common_values(store, engine):
    labels = np.zeros((48, 48, 1))
    labels[4:9], labels[20:30] = 1, 2
    submit(store, "c", labels, [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}])
    submit(store, "a", labels, [{"name": "spleen", "idx": 1}, {"name": "background_scribbles", "idx": 2}])
    submit(store, "b", labels)
    assert set(submitted(store)) == {"a", "b", "c"}
    every = {one.image: one for one in read_all(store, engine)}
    assert every["a"].names == {"spleen": 1} and every["b"].names == {"label 1": 1, "label 2": 2}
    values = values_of_all([every["c"], every["a"]])
    assert values == {"liver": 1, "spleen": 2}
    np.testing.assert_array_equal(np.unique(every["a"].in_values(values)), [0, 2])
    assert (every["a"].in_values(values) == 2).sum() == (every["a"].labels == 1).sum()
    (Path(store._datastore_path) / "labels" / "final" / "b.nii.gz").write_bytes(b"broken")
    assert {one.image for one in read_all(store, engine)} == {"a", "c"}
    assert read(store, engine, "a").time > 0


def test_segments_of_one_name_are_one_label_and_values_last(store, engine):
    labels = np.zeros((48, 48, 1))
    labels[4:9], labels[20:30], labels[40:44] = 1, 2, 3
    two_lesions = [{"name": "lesion", "idx": 1}, {"name": " lesion ", "idx": 2}, {"name": "  ", "idx": 3}]
    submit(store, "a", labels, two_lesions)
    submit(store, "b", labels, [{"name": "cyst", "idx": 1}, {"name": "lesion", "idx": 2}])
    every = {one.image: one for one in read_all(store, engine)}
    assert every["a"].names == {"lesion": 1, "label 3": 3}
    learned = every["a"].in_values({"lesion": 1, "label 3": 2})
    np.testing.assert_array_equal(learned == 1, (labels == 1) | (labels == 2))
    # Submitted anew, "b" is later than "a" or before it: the names that are known keep their values.
    known = {"lesion": 1, "label 3": 2, "cyst": 3}
    assert values_of_all([every["b"], every["a"]], known) == known
    assert values_of_all([every["b"], every["a"]]) == {"cyst": 1, "lesion": 2, "label 3": 3}
    assert values_of_all([every["b"]], {"gone": 1, "lesion": 2, "went": 3}) == {"lesion": 2, "cyst": 4, "label 3": 5}
    assert values_of_all([every["b"]], {"lesion": 255}) == {"cyst": 1, "label 3": 2, "lesion": 255}


@pytest.fixture
def scans(tmp_path) -> FolderDatastore:
    """Two scans, deep enough to be learned from as a whole."""
    for k, name in enumerate("ab"):
        image = np.random.default_rng(k).normal(50, 5, (24, 10, 9))
        image[6:18, 3:7, 2:7] += 100
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    return FolderDatastore(str(tmp_path), auto_reload=False)


def test_scans_are_learned_as_a_whole_and_served_so(scans, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "VOXELS", 32 * 32 * 64)
    engine = Engine(tiny_backbone)
    heads = Heads(tmp_path / ".learned", engine)
    trainer = LearnedTrainer(engine, heads)
    labels = np.zeros((24, 10, 9))
    labels[6:18, 3:7, 2:7] = 1
    submit(scans, "a", labels, [{"name": "block", "idx": 1}])
    record = trainer({"steps": 2, "seconds": 600}, scans)
    assert record["labels"] == {"block": 1} and heads.head().of_volumes
    again = trainer({"steps": 1, "seconds": 600}, scans)
    assert again["total_epochs"] == 1 and heads.head().facts["train_dice"] > 0

    entry = engine.open(scans.get_image_uri("b"))
    whole, one = engine.learned(entry, heads.head()), engine.learned(entry, heads.head(), only_slice=4)
    assert whole.labels.shape == (24, 10, 9)
    assert np.array_equal(one.labels[..., 4], whole.labels[..., 4]) and not one.labels[..., :4].any()
    assert (one.confidence[..., :4] == 1).all() and np.array_equal(one.confidence[..., 4], whole.confidence[..., 4])
    asked = Uncertain(engine, heads)(NO_HURRY, scans)
    assert asked["id"] == "b" and asked["confidence"] == pytest.approx(whole.details["expected_dice"], abs=1e-3)
