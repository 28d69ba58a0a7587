"""DiffSeg by one word, words while reading, and text at no less than the size a model was trained at."""

from __future__ import annotations

import pytest
import torch

from zeroseg.attention import AttentionSegmentationInferer, aggregate_self_attention, label_map, merge_attention
from zeroseg.attention.prepare import prepare
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.settings import PRESETS, Settings, with_preset


@pytest.fixture(scope="module")
def image():
    return torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_diffseg_by_one_word_is_diffseg(tiny_backbone, image):
    latents = tiny_backbone.encode_image(prepare(image)[None])
    maps = tiny_backbone.read(latents, 300, tiny_backbone.embed_text([""])).self_attention.values()
    attention = aggregate_self_attention([m[0] for m in maps])
    # Random attention hardly differs: the largest thresholds, of some, that tell anything apart.
    tried = ([10.0**-k] * 3 for k in range(1, 12))
    thresholds = next(t for t in tried if len(merge_attention(attention, t, 16)) > 1)
    inferer = AttentionSegmentationInferer(tiny_backbone, preset="diffseg", thresholds=thresholds)
    found = torch.from_numpy(inferer.segment(image).labels)
    proposals = merge_attention(attention, thresholds, 16)
    expected = torch.as_tensor(label_map(proposals, 128)).long()
    assert len(proposals) > 1
    pairs = {(int(a), int(b)) for a, b in zip(found.flatten(), expected.flatten(), strict=True)}
    common = sum(
        max(((found == a) & (expected == b)).sum() for a, b in pairs if a == label) for label in found.unique().tolist()
    )
    assert common / found.numel() >= 0.999, "the same parts, whatever their numbers"


def test_a_preset_gives_way_to_what_is_said(tiny_backbone):
    inferer = AttentionSegmentationInferer(tiny_backbone, preset="diffseg", thresholds=[0.9, 0.9], seed=3)
    settings = inferer.settings()
    assert {k: settings[k] for k in ("assign", "refine", "timestep")} == {
        "assign": "argmax",
        "refine": "none",
        "timestep": 300,
    }
    assert settings["thresholds"] == [0.9, 0.9] and settings["seed"] == 3
    plain = AttentionSegmentationInferer(tiny_backbone, preset="diffseg").settings()
    assert plain["thresholds"] == [1.1, 1.1, 1.1] and plain["select"] == "segments"
    assert inferer.replace(refine="guided").refine == "guided"
    defaults = {name: getattr(Settings(), name) for name in PRESETS["diffseg"]}
    assert with_preset("diffseg", defaults) == PRESETS["diffseg"], "a config gives every setting, mostly at its default"
    with pytest.raises(ZeroSegError, match="unknown preset 'sam': use one of diffseg"):
        AttentionSegmentationInferer(tiny_backbone, preset="sam")


def test_words_while_reading(tiny_backbone, image):
    inferer = AttentionSegmentationInferer(tiny_backbone)
    silent, told = inferer.encode(image), inferer.encode(image, text="lungs")
    assert not torch.allclose(silent.attention, told.attention, rtol=1e-6, atol=1e-9)
    setting = inferer.replace(condition="lungs")
    torch.testing.assert_close(setting.encode(image).attention, told.attention, rtol=0, atol=0)
    assert setting.encoding_key != inferer.encoding_key, "a cache must not mix them"
    assert inferer.predict(told, select="auto").labels.shape == (128, 128)
    for wrong in ("  ", 5):
        with pytest.raises(ZeroSegError, match="words"):
            inferer.encode(image, text=wrong)
        with pytest.raises(ZeroSegError, match="condition must be words, or null"):
            inferer.replace(condition=wrong).check()


def test_text_is_tested_at_no_less_than_the_training_size(tiny_backbone, image):
    assert tiny_backbone.text_size == tiny_backbone.image_size
    inferer = AttentionSegmentationInferer(tiny_backbone)
    assert inferer._text_latents(inferer.encode(image)).shape[-1] * 8 == 128
    smaller = inferer.replace(text_resolution=64)
    assert smaller._text_latents(smaller.encode(image)).shape[-1] * 8 == 64, "unless it is said"


def test_the_embedded_model_was_trained_at_half_its_size(embedded_backbone):
    assert (embedded_backbone.image_size, embedded_backbone.text_size) == (256, 128)
