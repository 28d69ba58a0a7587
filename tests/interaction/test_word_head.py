"""Words by the trained head: what is in an image, about where, and what is done where it does not know."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.errors import WeightsError
from zeroseg.interaction.vocabulary import read_vocabulary
from zeroseg.interaction.word_head import SIDE, WORD_HEAD, WordHead, WordProbe, load_word_head, word_features
from zeroseg.samples import sample_files


def test_the_head_reads_any_blocks_and_says_both():
    image = torch.rand(2, 3, 64, 64)
    x = word_features([torch.rand(2, 5, 8, 8), torch.rand(2, 4, 32, 32)], image)
    assert x.shape == (2, 5 + 4 + 6, SIDE, SIDE)
    assert torch.allclose(x[:, 9:12].mean((2, 3)), image.mean((2, 3)), atol=1e-5)
    present, place = WordHead(("a", "b", "c"), ("a", "b"), 15, width=16, blocks=1).eval()(x)
    assert present.shape == (2, 3) and place.shape == (2, 3, SIDE, SIDE)


def test_what_is_not_seen_in_an_image_of_its_kind_is_not_there():
    head = WordHead(("ct", "fundus", "liver"), ("ct", "fundus"), 6, width=16, blocks=1)
    head.seen_in[2] = torch.tensor([True, False])
    certainty = head.certainty(torch.tensor([[4.0, -4.0, 2.0], [-4.0, 4.0, 2.0]]))
    assert certainty[0, 2] == 2 and certainty[1, 2] == pytest.approx(-8, abs=1e-3)
    assert torch.equal(certainty[:, :2], torch.tensor([[4.0, -4.0], [-4.0, 4.0]]))


def test_it_knows_what_the_vocabulary_says_it_knows():
    head, placeless = load_word_head()
    assert set(head.concepts) <= set(read_vocabulary().concepts) and set(head.kinds) < placeless < set(head.concepts)


@pytest.mark.parametrize("spoilt", ["head.safetensors", "config.json", None])
def test_a_head_that_is_not_whole_is_refused(tmp_path, spoilt):
    folder = tmp_path / "words"
    if spoilt is not None:
        shutil.copytree(WORD_HEAD, folder)
        (folder / spoilt).write_bytes((folder / spoilt).read_bytes()[:-9] + b"\n")
    with pytest.raises(WeightsError, match=r"cannot load the word head in words: .*; or use words backbone"):
        load_word_head(folder)


@pytest.fixture(scope="module")
def inferer() -> AttentionSegmentationInferer:
    return AttentionSegmentationInferer(resolution=128)


@pytest.fixture(scope="module")
def encoded(inferer):
    file = next(file for file in sample_files() if file.name == "retina.jpg")
    return inferer.encode(np.asarray(Image.open(file).resize((256, 256))).transpose(2, 0, 1).copy())


def test_real_images_show_what_they_show_and_nothing_else(inferer, encoded):
    answer = inferer.predict(encoded, text="optic disc")
    assert not answer.absent and answer.labels.any() and answer.details["probability"] > 0.4
    for word in ("liver", "white blood cell", "brain tumour"):
        absent = inferer.predict(encoded, text=word)
        assert absent.absent and "does not look like" in absent.reason and absent.confidence.min() > 0.5


def test_an_image_is_read_once_for_any_number_of_words(inferer, encoded, monkeypatch):
    image = encoded.fresh()
    image.forget()
    read, count = StableDiffusionBackbone.read, []
    monkeypatch.setattr(StableDiffusionBackbone, "read", lambda *a, **k: count.append(1) or read(*a, **k))
    probe = WordProbe(inferer.backbone, image.image, image.side)
    assert len(count) == 1
    both = probe((("optic disc",), ("retinal fundus",)))
    each = [probe(((name,),)) for name in ("optic disc", "retinal fundus")]
    assert both.certainty == min(e.certainty for e in each), "all of it has to be there"
    either = probe((("optic disc", "liver"),))
    assert either.certainty >= each[0].certainty, "a word that may be several things is any of them"
    assert (each[1].relevance == -0.5).all(), "a kind of image has no place"
    assert not probe.knows((("giraffe",),)) and not probe.knows(()) and len(count) == 1


def test_the_backbones_own_words_can_be_asked(inferer, encoded):
    by_backbone = inferer.replace(words="backbone").predict(encoded, text="optic disc")
    assert "gain" in by_backbone.details and "probability" not in by_backbone.details
    # "shapes" was in captions of the backbone's training and is no concept of the head.
    assert "gain" in inferer.predict(encoded, text="shapes").details
