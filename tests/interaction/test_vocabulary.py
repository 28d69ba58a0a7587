"""What a prompt is taken for, and files of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zeroseg.errors import ZeroSegError
from zeroseg.interaction.settings import Settings
from zeroseg.interaction.vocabulary import Meaning, normalise, read_vocabulary


@pytest.fixture(scope="module")
def shipped():
    return read_vocabulary()


def test_every_concept_is_of_the_training(shipped):
    """What was trained are phrases that stand as they are in the scripts that train."""
    training = Path(__file__).parents[2] / "scripts" / "training"
    told = " ".join((training / name).read_text() for name in ("phantoms.py", "train_backbone.py", "concepts.py"))
    assert all(re.search(rf"[\" ]{concept}[\", ]", told) for concept in shipped.concepts)


def test_the_table_is_large_and_says_nothing_twice(shipped):
    assert len(shipped.targets) - len(shipped.concepts) >= 150
    assert len({normalise(term) for term in shipped.targets}) == len(shipped.targets)
    assert all(
        shipped.look_up(term) == Meaning(target, True) for term, target in shipped.targets.items() if term != target
    )


def test_what_the_model_knows_stays_as_it_is(shipped):
    for text in (
        *shipped.concepts,
        "chest x-ray with heart, lungs",
        "blood smear with white blood cell",
        "blood",
        "Skin lesion",
    ):
        assert shipped.look_up(text) == Meaning(text)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("lungs", (("lungs",),)),
        ("Chest X-ray with lungs, no heart", (("chest x-ray",), ("lungs",))),
        ("skin lesion in dermoscopy", (("skin lesion",), ("dermoscopy",))),
        ("blood", (("blood smear", "white blood cell", "red blood cells"),)),
    ],
)
def test_what_is_asked_for(shipped, text, asked):
    assert shipped.things(text) == asked


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Melanoma", "skin lesion"),
        ("a mole", "skin lesion"),
        ("  skin   LESIONS ", "skin lesion"),
        ("brain-tumors", "brain tumour"),
        ("leukocytes", "white blood cell"),
        ("lung", "lungs"),
        ("opacities", "opacity"),
        ("dermoscopy with melanoma, no hairs", "dermoscopy with skin lesion, no hair"),
    ],
)
def test_other_words_for_it(shipped, text, meant):
    assert shipped.look_up(text) == Meaning(meant, True, 1.0)


@pytest.mark.parametrize("text", ["zqxv plomf wug", "melanomma", "giraffe in dermoscopy", "...", "骨", "white giraffe"])
def test_unknown_words_have_three_known_neighbours(shipped, text):
    meaning = shipped.look_up(text)
    assert meaning.text is None and meaning.similarity == 0 and len(meaning.nearest) == 3
    if text == "melanomma":
        assert meaning.nearest[0] == "melanoma (skin lesion)"


def test_an_own_file_comes_first(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("\ufeff# ours\nspot: Fleck\nskin lesion: spot, Muttermal\nlung opacity: mole\n", encoding="utf-8")
    own = read_vocabulary(file)
    assert own.look_up("fleck").text == own.look_up("Muttermal").text == "skin lesion", "through another own term"
    assert own.look_up("mole").text == "lung opacity" and own.look_up("melanoma").text == "skin lesion"
    assert read_vocabulary().look_up("mole").text == "skin lesion", "the shipped one is as it was"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"skin lesion: M\xe4l", "not UTF-8"),
        (b"skin lesion mole", "line 1: write concept: term, term"),
        (b"\n: mole", "line 2: write concept"),
        (b"skin lesion: a b,,c", "line 1: write concept"),
        (b"giraffe: tall", "line 1: 'giraffe' is no known concept; nearest: "),
        (b"mole: naevus\nnaevus: mole", "in a circle: "),
        (b"mole: mole", "in a circle: mole -> mole"),
        (b"skin lesion: liver", "'liver' is a concept itself"),
        (b"skin lesion: dot\nlesion: Dots", "'Dots' stands there twice, first in line 1"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, content, message):
    file = tmp_path / "own.txt"
    file.write_bytes(content)
    with pytest.raises(ZeroSegError, match=message) as caught:
        read_vocabulary(file)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ZeroSegError, match="cannot read the vocabulary"):
        read_vocabulary(f"{tmp_path}/{name}")


def test_a_file_is_read_once_until_it_changes(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("skin lesion: beauty mark")
    assert read_vocabulary(file) is read_vocabulary(file)
    recorded = Settings(vocabulary=str(file)).record()["vocabulary"]
    assert recorded["file"] == "own.txt"
    file.write_text("cell nuclei: beauty mark, dot")
    assert read_vocabulary(file).look_up("beauty mark").text == "cell nuclei"
    assert Settings(vocabulary=str(file)).record()["vocabulary"]["sha256"] != recorded["sha256"]
