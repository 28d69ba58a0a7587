"""Prompt pairs per organ and modality, and what is made of free text."""

from __future__ import annotations

import pytest

from zeroseg.errors import ZeroSegError
from zeroseg.tumor.prompts import (
    MODALITIES,
    ORGANS,
    PLACES,
    REGIONS,
    check_modality,
    default_tumor,
    grammar,
    normalise,
    organ_note,
    place_of,
    prompt_set,
    without_place,
)


def test_every_role_has_all_its_wordings_in_order():
    asked = prompt_set("liver", "liver tumour", "ct")
    assert [role for role, _ in asked] == ["normal"] * 2 + ["abnormal"] * 2 + ["null"] * 2
    assert asked[0][1] == "normal CT of liver"
    assert all("liver tumour" in text for role, text in asked if role == "abnormal")
    assert not any("tumour" in text for role, text in asked if role != "abnormal")
    assert "" in [text for role, text in asked if role == "null"]


@pytest.mark.parametrize("organ", ORGANS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_every_organ_has_prompts(organ, modality):
    texts = [text for _, text in prompt_set(organ, None, modality)]
    assert any(default_tumor(organ) in text for text in texts)
    assert sum(MODALITIES[modality] in text for text in texts) == 5
    assert organ_note(organ) is None


def test_free_text_is_taken_in_one_spelling():
    assert prompt_set(" Liver ", "Liver  TUMOR!", "MRI") == prompt_set("liver", "liver tumour", "mr")
    assert normalise("soft_tissue (left)", "organ") == "soft tissue left"
    assert any("gallstone" in text for _, text in prompt_set("gallbladder", "gallstone", "ct"))
    assert any("gallbladder tumour" in text for _, text in prompt_set("gallbladder", None, "ct"))


def test_an_unknown_organ_is_said_with_the_nearest_known():
    assert "did you mean 'kidney'" in organ_note("kidny")
    assert "known: liver" in organ_note("xyzzy")


@pytest.mark.parametrize("bad", ["", "  ", "!?", None, 3, ["liver"]])
def test_what_is_no_words_is_refused(bad):
    with pytest.raises(ZeroSegError, match="organ must be words"):
        prompt_set(bad, "tumour", "ct")
    with pytest.raises(ZeroSegError, match="tumor must be words"):
        normalise(bad, "tumor")


def test_modalities():
    assert [check_modality(m) for m in ("CT", "mri", "MR", "PT", "pet")] == ["ct", "mr", "mr", "pet", "pet"]
    for bad in ("ultrasound", None, "", 3):
        with pytest.raises(ZeroSegError, match="modality must be ct, mr or pet"):
            check_modality(bad)


def test_the_grammar_covers_every_organ_modality_and_role():
    rows = set(grammar())
    assert {(o, m, r) for o, _, m, r in rows} == {
        (o, m, r) for o in ORGANS for m in MODALITIES for r in ("normal", "abnormal", "null")
    }
    assert set(REGIONS) <= set(ORGANS) and all(0 <= a <= b <= 3 for a, b in REGIONS.values())


@pytest.mark.parametrize(
    ("organ", "tumor", "place"),
    [
        ("liver", "glioma", "liver"),
        ("breast", "breast cancer", "soft tissue"),
        ("left breast", "tumour", "soft tissue"),
        ("right lung", "lung tumour", "lung"),
        ("head and neck", "tumour", "head"),
        ("xyzzy", "liver tumour", "xyzzy"),
        ("left xyzzy", "tumour", "left xyzzy"),
        ("left", "tumour", "left"),
        ("body", "glioma", "brain"),
        ("body", "soft tissue sarcoma", "limb"),
        ("body", "breast cancer", "soft tissue"),
        ("body", "pulmonary nodule", "lung"),
        ("body", "spleen lesion", "spleen"),
        ("body", "tumour", "body"),
        ("body", "purple bicycle", "body"),
    ],
)
def test_the_place_is_the_organs_or_what_the_words_name(organ, tumor, place):
    assert place_of(organ, tumor) == place


def test_other_names_lead_to_organs_with_prompts_and_to_one_only():
    names = [name for others in PLACES.values() for name in others]
    assert set(PLACES) <= set(ORGANS) and not set(names) & set(ORGANS)
    assert len(names) == len(set(names)) and all(normalise(name, "organ") == name for name in names)


def test_words_for_the_place_are_left_out_of_that_places_tumour_only():
    assert without_place("breast cancer", "soft tissue") == "cancer"
    assert without_place("breast cancer", "liver") == "breast cancer"
    assert without_place("soft tissue", "soft tissue") == "soft tissue"
    assert without_place("xyzzy tumour", "body") == "xyzzy tumour"
