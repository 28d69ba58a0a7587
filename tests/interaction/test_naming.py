"""Names for segments by a list of nouns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.interaction.naming import name_segments
from zeroseg.interaction.prompts import check_nouns
from zeroseg.interaction.text import TextEvidence
from zeroseg.interaction.vocabulary import Meaning

OWNER = torch.tensor([0, 0, 1, 1, 2, 2])


def evidence(*relevance: float, certainty: float = 5.0) -> TextEvidence:
    return TextEvidence(torch.tensor(relevance, dtype=torch.float32), 0.1, certainty)


def name(nouns, found, least=0.0, meanings=None):
    meanings = meanings or [Meaning(n) for n in nouns]
    return name_segments(nouns, meanings, found, lambda e: e.relevance > 0, OWNER, 3, least)


def test_nouns_compete_for_each_segment():
    naming = name(("cell", "lung"), [evidence(2, 2, 1, 1, -3, -3), evidence(-1, 1, 2, 2, -3, -3)])
    assert naming.group.tolist() == [0, 1, 2], "the third fits neither: it keeps an index of its own"
    assert naming.groups == 3 and naming.named == 2 and naming.notes == []
    assert naming.entries[0]["share"] == 1


def test_of_two_that_stand_out_alike_the_surer_one_names():
    naming = name(
        ("liver", "brain"), [evidence(1, 1, -1, -1, -1, -1, certainty=1), evidence(1, 1, -1, -1, -1, -1, certainty=3)]
    )
    assert naming.group.tolist() == [1, 2, 3]


def test_a_segment_of_which_less_than_half_is_there_stays_nameless():
    naming = name(("cell",), [evidence(3, -1, 2, 2, -3, -3)])
    assert naming.group.tolist() == [1, 0, 2]


def test_a_kind_of_image_names_no_segment():
    nowhere = evidence(*[-0.5] * 6)
    everywhere = torch.ones(6, dtype=torch.bool)
    naming = name_segments(("chest x-ray",), [Meaning("chest x-ray")], [nowhere], lambda e: everywhere, OWNER, 3, 0.0)
    assert naming.group.tolist() == [1, 2, 3] and not naming.entries[0]["absent"]


def test_background_names_the_rest():
    naming = name(("cell", "Background"), [evidence(2, 2, -1, -1, -1, -1), None])
    assert naming.group.tolist() == [0, 1, 1] and naming.groups == 2
    assert "absent" not in naming.entries[1]


def test_an_absent_noun_names_nothing_however_well_it_fits():
    naming = name(("cell", "lung"), [evidence(9, 9, 9, 9, 9, 8, certainty=-1), evidence(1, 1, -0.5, -0.5, -1, -1)])
    assert naming.group.tolist() == [1, 2, 3] and naming.entries[0]["absent"]
    assert naming.notes == ["'cell' is absent and names nothing"]


def test_unknown_words_are_said():
    unknown = Meaning(None, similarity=0.0, nearest=("polyp",))
    naming = name(
        ("wug", "mole"), [None, evidence(1, 1, 1, 1, -2, -2)], meanings=[unknown, Meaning("skin lesion", True)]
    )
    assert naming.group.tolist() == [1, 1, 2]
    assert naming.entries[0] == {"noun": "wug", "label": 1, "nearest": ["polyp"], "absent": True}
    assert naming.entries[1]["taken_for"] == "skin lesion"
    assert "'wug' names nothing" in naming.notes[0] and "polyp" in naming.notes[0] and "taken for" in naming.notes[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "has an empty one"),
        ("a, b,", "has an empty one"),
        (",", "has an empty one"),
        ("", "must be words"),
        (["a", "b"], "must be words"),
        (", ".join(f"n{k}" for k in range(100)), "at most 32 nouns, not 100"),
        ("cell, lung, Cell", "'Cell' twice"),
    ],
)
def test_what_is_no_list_of_nouns(text, message):
    with pytest.raises(ZeroSegError, match=message):
        check_nouns(text)


@pytest.fixture(scope="module")
def inferer(tiny_backbone):
    return AttentionSegmentationInferer(tiny_backbone, resolution=64, text_certainty=-1e9)


def test_a_label_for_each_noun(inferer, disc):
    plain = inferer.segment(disc[0], "segments")
    result = inferer.segment(disc[0], "segments", text="cell, melanoma, background")
    assert set(np.unique(result.labels)) <= {1, 2, 3} and len(result.scores) == result.labels.max()
    assert set(result.details["labels"]) <= {"cell", "melanoma", "background"}
    assert [e["label"] for e in result.details["nouns"]] == [1, 2, 3]
    assert "taken_for" not in result.details["nouns"][1], (
        "another backbone than the embedded one gets the words as typed"
    )
    assert result.name is None and not result.absent
    json.dumps(result.details)
    assert np.array_equal(plain.labels, inferer.segment(disc[0], "segments").labels)


def test_without_any_noun_present_the_segments_stay(inferer, disc):
    result = inferer.replace(text_certainty=1e9).segment(disc[0], "segments", text="cell, lung")
    plain = inferer.segment(disc[0], "segments")
    assert np.array_equal(result.labels, plain.labels + 2) and result.details["labels"] == {}
    assert result.scores == [0.0, 0.0, *plain.scores] and len(result.notes) == 2


def test_names_mean_one_thing_in_all_slices(inferer, disc):
    volume = torch.as_tensor(np.asarray(disc[0]))[:, :, :, None].repeat(1, 1, 1, 3)
    flat = inferer.segment(volume[..., 0], "segments", text="cell, lung")
    result = inferer.segment(volume, "segments", text="cell, lung")
    assert result.labels.shape == volume.shape[1:] and (result.labels > 0).all()
    assert set(result.details["labels"]) <= {"cell", "lung"} and len(result.details["slices"]) == 3
    for k in (1, 2):
        share = ((flat.labels == k).mean(), (result.labels == k).mean())
        assert share[0] == pytest.approx(share[1], abs=0.02)


def test_a_vocabulary_goes_with_the_embedded_backbone(inferer, disc, tmp_path):
    (tmp_path / "own.txt").write_text("polyp: bump")
    with pytest.raises(ZeroSegError, match="embedded backbone only"):
        inferer.replace(vocabulary=str(tmp_path / "own.txt")).segment(disc[0], text="bump")


def test_the_embedded_model_says_what_words_are_taken_for():
    inferer = AttentionSegmentationInferer(resolution=128, text_certainty=-1e9, max_segments=6)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoded = inferer.encode(image)
    found, known = inferer.predict(encoded, text="Melanoma"), inferer.predict(encoded, text="skin lesion")
    assert np.array_equal(found.labels, known.labels) and found.details["taken_for"] == "skin lesion"
    assert found.notes == ["'Melanoma' is taken for: skin lesion (similarity 1.00)"] and known.notes == []
    unknown = inferer.predict(encoded, text="giraffe")
    assert unknown.absent and not unknown.labels.any() and len(unknown.details["nearest"]) == 3
    assert "nearest it knows" in unknown.reason
    with pytest.raises(ZeroSegError, match="'mole' and 'naevus' are both taken for 'skin lesion'"):
        inferer.predict(encoded, select="segments", text="mole, naevus")
    volume = inferer.segment(image[..., None].repeat(1, 1, 1, 2), text="giraffe")
    assert volume.absent and volume.labels.shape == (64, 64, 2) and volume.reason == unknown.reason
