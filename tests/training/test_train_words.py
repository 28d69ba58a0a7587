"""What the word head is told, and its training from images to a folder that loads."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from concepts import CONCEPTS, FOLDERS, IMPLIES, KINDS, of_file, shows
from phantoms import FURTHER, make_phantom
from train_words import CLOSE_UP, Drawn, changed, labels, main, near_one, of_file_drawn, of_phantom, of_volume, stained
from zeroseg.interaction.word_head import SIDE, load_word_head


def test_what_is_told_implies_the_general():
    what = shows(("breast ultrasound", "breast tumour"))
    assert {"ultrasound", "tumour", "lesion"} <= what.shows and not what.shows & what.may
    assert all(set(general) <= set(CONCEPTS) for general in IMPLIES.values())
    with pytest.raises(ValueError, match="no concepts: giraffe"):
        shows(["giraffe"])


def test_files_of_mixed_folders_are_told_by_their_names():
    assert "cell nuclei" in of_file("micro_neubias", "xy_8bit__nuclei_3.jpg").shows
    assert "electron microscopy" in of_file("micro_neubias", "xy_8bit__em_mitochondria_er_1.jpg").shows
    assert of_file("blood_bccd", "any.jpg") is FOLDERS["blood_bccd"]


@pytest.mark.parametrize("kind", FURTHER)
def test_phantoms_show_what_they_say(kind):
    phantom = make_phantom(5, 96, kind)
    assert phantom.image.shape == (96, 96, 3) and np.array_equal(phantom.image, make_phantom(5, 96, kind).image)
    drawn = of_phantom(5, kind)
    assert drawn.what.shows & set(KINDS) and drawn.masks and set(drawn.masks) <= set(CONCEPTS)


def test_a_slice_of_a_volume_has_its_organs():
    drawn = [of_volume(seed) for seed in range(8)]
    assert all(d.image.shape[:2] == next(iter(d.masks.values())).shape for d in drawn)
    assert any(d.masks.get("liver", np.zeros(1)).any() for d in drawn)


def test_labels_follow_the_changes():
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    drawn = Drawn(np.full((64, 64, 3), 90, np.uint8), shows(["brain ct"]), {"brain": mask, "stroke": ~mask & False})
    for seed in range(12):
        image, cells = changed(drawn, np.random.default_rng(seed))
        assert image.shape == (128, 128, 3) and image.min() >= 0 and image.max() <= 1
        said, place = labels(drawn, cells)
        there = place[CONCEPTS.index("brain")].mean() / 255
        assert place.shape == (len(CONCEPTS), SIDE, SIDE) and there > 0.1
        assert said[CONCEPTS.index("brain")] == said[CONCEPTS.index("ct")] == 1
        assert said[CONCEPTS.index("stroke")] == 0 and said[CONCEPTS.index("ventricles")] == -1


def test_a_look_from_near_holds_a_part():
    mask = np.zeros((96, 96), bool)
    mask[40:60, 20:32] = True
    y, x, h, w = near_one({"liver": mask}, np.random.default_rng(0))
    assert h == w and mask[y : y + h, x : x + w].any()
    assert near_one({"liver": np.ones((96, 96), bool)}, np.random.default_rng(0)) is None


def test_what_is_stained_as_a_nucleus_is_looked_at_from_near(tmp_path):
    image = np.full((96, 120, 3), (210, 200, 205), np.uint8)
    image[10:30, 10:30] = (205, 150, 140)  # a red cell
    image[50:70, 60:84] = (110, 50, 160)
    image[4:7, 100:103] = (110, 50, 160)  # a platelet
    assert stained(image)[60, 70] and not stained(image)[:40].any()
    path = tmp_path / "smear.png"
    Image.fromarray(image).save(path)
    assert of_file_drawn(path, FOLDERS["blood_bccd"], np.random.default_rng(0)).image.shape == image.shape
    for seed in range(6):
        near = of_file_drawn(path, CLOSE_UP, np.random.default_rng(seed)).image
        assert near.shape[0] == near.shape[1] < 90 and (near[..., 1] < 60).sum() > 100


@pytest.mark.slow
def test_from_images_to_a_head_that_loads(tmp_path):
    rng = np.random.default_rng(0)
    for folder in (
        "unlabelled/blood_bccd",
        "unlabelled/nuclei_dsb2018",
        "unlabelled/cxr_ieee8023",
        "training/us_carotid_artery/images",
    ):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / folder / "a.png")
    (tmp_path / "unlabelled" / "cxr_ieee8023_licences.csv").write_text("stem,licence\na,CC BY 4.0\n")
    (tmp_path / "volumes").mkdir()
    folders = [f"--{name}={tmp_path / name}" for name in ("unlabelled", "training", "volumes")]
    work = f"--work={tmp_path / 'work'}"
    assert main([work, "--encode", "64", *folders]) == 0
    shard = tmp_path / "work" / "shard_0000.npz"
    before = shard.stat().st_mtime_ns
    assert main([work, "--encode", "64", *folders]) == 0 and shard.stat().st_mtime_ns == before, (
        "it goes on where it ended"
    )
    assert main([work, "--steps", "2", "--batch", "4", "--members", "2", "--out", str(tmp_path / "head")]) == 0
    head, placeless = load_word_head(tmp_path / "head")
    assert head.concepts == CONCEPTS and placeless == set(KINDS)
    first, second = (dict(member.named_parameters())["place.bias"] for member in head.members)
    assert (first != second).any(), "each was trained alone"
