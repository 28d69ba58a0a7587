"""What a person shows beside clicks: regions, strokes, masks to start from, candidates; on a tiny model, without a server."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("monailabel")

from lib import prompts
from lib.configs import tasks
from lib.engine import Engine, _shifted
from lib.mends import files
from phantom_studies import CLICK, OBJECT, SHAPE, phantom, picture
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases, read_image


@pytest.fixture
def volume(tmp_path) -> Path:
    path = tmp_path / "volume.nii.gz"
    nib.save(nib.Nifti1Image(phantom().astype(np.int16), np.diag([1.5, 1.2, 3.0, 1.0])), path)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture()).save(path)
    return path


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Writes a label map as one that came with the request that runs."""
    made: list[str] = []
    token = files._made.set(made)

    def write(labels: np.ndarray, of: Path) -> str:
        affine = nib.load(of).affine if of.suffix == ".gz" else np.diag([-1.0, -1.0, 1.0, 1.0])
        path = tmp_path / f"label{len(made)}.nii.gz"
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), path)
        made.append(str(path))
        return str(path)

    yield write
    files._made.reset(token)


@pytest.fixture(scope="module")
def engine(tiny_backbone) -> Engine:
    return Engine(tiny_backbone)


def labels_of(answer: tuple[str, dict]) -> np.ndarray:
    return read_image(find_cases(Path(answer[0]))[0]).array[0]


def image_of(path: Path):
    return read_image(find_cases(path)[0])


@pytest.mark.parametrize(
    ("roi", "box"),
    [
        (None, None),
        ([], None),
        ([8, 19, 22, 33, 2, 4], [8, 22, 2, 19, 33, 4]),
        ([19, 8, 33, 22, 4, 2], [8, 22, 2, 19, 33, 4]),
        ([-9, 19, 22, 400, 2, 99], [0, 22, 2, 19, 39, 5]),
        ([7.6, 19.2, 22, 33, 2, 4], [8, 22, 2, 19, 33, 4]),
    ],
)
def test_a_region_is_a_box_within_the_image(volume, roi, box):
    assert prompts.region_of(roi, image_of(volume)) == box


def test_a_region_of_a_picture_needs_no_depth(photo):
    image = image_of(photo)
    assert prompts.region_of([3, 9, 50, 20], image) == prompts.region_of([3, 9, 50, 20, 0, 0], image) == [3, 20, 9, 39]
    assert prompts.window_of([3, 20, 9, 39], False) == (slice(20, 40), slice(3, 10))


@pytest.mark.parametrize(
    "roi", [[1, 2, 3], "all", [1, 2, 3, 4, 5, "x"], [1, 2, 3, 4, 5, float("nan")], [60, 70, 1, 2, 1, 2], {}]
)
def test_a_region_of_another_form_or_beside_the_image_is_refused(volume, roi):
    with pytest.raises(ZeroSegError, match="roi"):
        prompts.region_of(roi, image_of(volume))


def test_a_region_alone_is_a_box_and_with_clicks_bounds_the_answer(engine, volume):
    task = tasks.points(engine)
    roi = [10, 25, 24, 36, 3, 4]
    for asked in ({}, {"foreground": [CLICK]}):
        labels = labels_of(task({"image": str(volume), "roi": roi, **asked}))
        assert labels.any()
        where = np.argwhere(labels)
        assert (where >= (10, 24, 3)).all() and (where <= (25, 36, 4)).all()
    flat = labels_of(task({"image": str(volume), "roi": roi, "extent": "slice"}))
    assert len(np.flatnonzero(flat.any((0, 1)))) == 1
    with pytest.raises(ZeroSegError, match="outside the roi"):
        task({"image": str(volume), "roi": roi, "foreground": [[1, 1, 1]]})


def test_strokes_and_a_mask_to_start_from_come_as_one_label_map(volume, upload):
    labels = np.zeros(SHAPE, np.uint8)
    labels[OBJECT], labels[12, 28, 3], labels[40, 4, 3] = 1, 3, 2
    names = [
        {"name": "lesion", "id": 1},
        {"name": "background_scribbles", "id": 2},
        {"name": "foreground_scribbles", "id": 3},
    ]
    asked = {"label": upload(labels, volume), "label_info": names, "selected_label_name": "lesion"}
    drawn = prompts.drawn(asked, image_of(volume))
    assert np.argwhere(drawn["scribbles"] == 1).tolist() == [[12, 28, 3]]
    assert np.argwhere(drawn["scribbles"] == 2).tolist() == [[40, 4, 3]]
    np.testing.assert_array_equal(drawn["mask"], labels == 1)
    alone = prompts.drawn({"label": upload(labels == 1, volume)}, image_of(volume))
    assert list(alone) == ["mask"]


def test_a_label_map_is_uploaded_and_never_named(volume, upload):
    path = upload(np.ones(SHAPE), volume)
    files._made.get().clear()
    assert prompts.drawn({"label": path}, image_of(volume)) == {}
    assert prompts.drawn({"label": "spleen"}, image_of(volume)) == {}


@pytest.mark.parametrize(
    ("label_info", "message"),
    [
        ("all", "label_info must list"),
        ([{"name": "a"}], "label_info must list"),
        ([{"name": "a", "id": "1"}], "label_info must list"),
        ([{"name": "foreground_scribbles", "id": 9}], "neither strokes nor a mask"),
    ],
)
def test_a_label_map_that_says_nothing_is_refused(volume, upload, label_info, message):
    asked = {"label": upload(np.ones(SHAPE), volume), "label_info": label_info}
    with pytest.raises(ZeroSegError, match=message):
        prompts.drawn(asked, image_of(volume))


def test_scribbles_follow_the_strokes(engine, photo, upload):
    task = tasks.scribbles(engine)
    labels = np.zeros((48, 40, 1), np.uint8)
    labels[10:18, 28, 0], labels[2:46, 3, 0] = 2, 1
    names = [{"name": "background_scribbles", "id": 1}, {"name": "foreground_scribbles", "id": 2}]
    path, answer = task({"image": str(photo), "label": upload(labels, photo), "label_info": names, "roi": []})
    mask = labels_of((path, answer)).T > 0
    assert mask[10:18, 28].all() and not mask[2:46, 3].any() and answer["label_names"] == {"object": 1}
    with pytest.raises(ZeroSegError, match="no label map was sent"):
        task({"image": str(photo)})


def test_the_segment_picked_names_the_answer(engine, photo):
    asked = {"image": str(photo), "foreground": [[14, 28, 0]], "label": "lesion"}
    assert tasks.points(engine)(asked)[1]["label_names"] == {"lesion": 1}


def test_candidates_are_chosen_by_number(engine, photo):
    task = tasks.points(engine)
    asked = {"image": str(photo), "foreground": [[14, 28, 0]]}
    sizes = [np.count_nonzero(labels_of(task({**asked, "candidate": k}))) for k in ("1", "2", "3")]
    assert sizes == sorted(sizes)
    with pytest.raises(ZeroSegError, match="candidate must be one of"):
        task({**asked, "candidate": "4"})


def test_what_is_drawn_moves_with_its_slice():
    strokes = np.zeros((4, 5, 6), np.uint8)
    strokes[1, 2, 3], strokes[1, 2, 4] = 1, 2
    prompt = {"points": [[1, 2, 3], [1, 2, 4]], "labels": [1, 0], "box": [0, 0, 1, 3, 4, 5]}
    moved = _shifted({**prompt, "scribbles": strokes, "mask": strokes == 1}, 2, 3)
    assert moved["points"] == [[1, 2, 0]] and moved["labels"] == [1] and moved["box"] == [0, 0, 0, 3, 4, 0]
    assert moved["scribbles"].shape == (4, 5, 1) and moved["scribbles"].sum() == 1 and moved["mask"].sum() == 1
    assert "mask" not in _shifted({"mask": strokes == 1}, 2, 0)
    with pytest.raises(ZeroSegError, match="does not reach slice 0"):
        _shifted(prompt, 2, 0)
