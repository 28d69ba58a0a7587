"""Words that mean the same as known ones, by the sentence encoder where it is installed."""

from __future__ import annotations

import shutil

import pytest
import torch

from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.errors import WeightsError
from zeroseg.interaction import synonyms
from zeroseg.interaction.synonyms import SentenceEncoder, installed, sentence_encoder
from zeroseg.interaction.vocabulary import Meaning, Vocabulary, read_vocabulary

with_encoder = pytest.mark.skipif(installed() is None, reason='pip install "zeroseg[words]"')


def letters(phrases):
    """A stand-in that finds alike what is spelled with the same letters."""
    rows = [[float(phrase.casefold().count(chr(97 + k))) for k in range(26)] for phrase in phrases]
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def test_the_most_alike_term_is_taken_and_its_concept_told():
    known = Vocabulary(
        {"liver": "liver", "lungs": "lungs", "pulmo": "lungs", "pet": "pet scan", "pet scan": "pet scan"}
    )
    assert known.look_up("Pulmon", letters) == Meaning("lungs", True, 0.91)
    assert known.look_up("Liver", letters) == Meaning("Liver"), "what is known is not compared"
    unknown = known.look_up("xyz", letters)
    assert unknown.text is None and len(unknown.nearest) == 3
    assert known.look_up("pte", letters).text is None, "an abbreviation has too few letters to be told by"


@with_encoder
@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cancerous mole", "skin lesion"),
        ("brain cancer tumor", "brain tumour"),
        ("lung infection", "lung opacity"),
        ("cerebral bleed", "haemorrhage"),
        ("giraffe", None),
        ("dog", None),
        ("pancreas", None),
        ("zqxv plomf wug", None),
    ],
)
def test_phrases_people_type(text, meant):
    meaning = read_vocabulary().look_up(text, sentence_encoder())
    assert meaning.text == meant and (meant is None or 0.7 <= meaning.similarity < 1)


@with_encoder
def test_the_inferer_says_what_it_took_the_words_for():
    inferer = AttentionSegmentationInferer()
    assert inferer.meaning("cancerous mole").notes("cancerous mole") == [
        "'cancerous mole' is taken for: skin lesion (similarity 0.81)"
    ]
    assert inferer.replace(alike=False).meaning("cancerous mole").text is None


@with_encoder
def test_other_weights_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(installed(), folder)
    (folder / "model.safetensors").write_bytes(b"not the publisher's")
    with pytest.raises(WeightsError, match="not the publisher's: uninstall"):
        SentenceEncoder(folder)


@with_encoder
def test_an_encoder_without_its_vocabulary_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(installed() / name, tmp_path)
    with pytest.raises(WeightsError, match=r"the sentence encoder in .* knows no words"):
        SentenceEncoder(tmp_path)


def test_without_the_extra_there_is_none(monkeypatch):
    monkeypatch.setattr(synonyms, "PACKAGE", "a_package_nobody_has")
    assert installed() is None
