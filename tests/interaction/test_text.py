"""Evidence for a prompt: contrast with the null prompt."""

from __future__ import annotations

import pytest
import torch

from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import check_text
from zeroseg.interaction.text import TextEvidence, TextProbe


@pytest.fixture(scope="module")
def encoded(tiny_backbone):
    """Latents of a small image and its attention on an 8 x 8 grid."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return latents, tiny_backbone.read(latents, 300, tiny_backbone.embed_text([""])).self_attention[64][0]


def text_evidence(backbone, latents, attention, prompt, **settings) -> TextEvidence:
    return TextProbe(backbone, latents, attention, **settings)(prompt)


@pytest.mark.parametrize("text", ["", "  \n", None, 7, ["cells"]])
def test_what_is_no_prompt(text):
    with pytest.raises(ZeroSegError, match="must be words"):
        check_text(text)


def test_blanks_around_a_prompt_mean_nothing(tiny_backbone, encoded):
    assert check_text("  white blood cell\n") == "white blood cell"
    plain, padded = (text_evidence(tiny_backbone, *encoded, t, draws=1) for t in ("cell", " cell "))
    assert (plain.gain, plain.certainty) == (padded.gain, padded.certainty)


def test_types_and_normalisation(tiny_backbone, encoded):
    evidence = text_evidence(tiny_backbone, *encoded, "white blood cell")
    assert evidence.relevance.shape == (64,)
    assert abs(evidence.relevance.mean()) < 1e-5
    assert evidence.relevance.std() == pytest.approx(1, abs=1e-4)
    assert type(evidence.gain) is float and type(evidence.certainty) is float


def test_the_same_seed_gives_the_same_evidence(tiny_backbone, encoded):
    first, again, other = (text_evidence(tiny_backbone, *encoded, "cell", draws=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.relevance, again.relevance)
    assert (first.gain, first.certainty) == (again.gain, again.certainty)
    assert first.gain != other.gain


def test_one_probe_serves_any_number_of_prompts(tiny_backbone, encoded):
    probe = TextProbe(tiny_backbone, *encoded, draws=1)
    for prompt in ("cell", "lungs", "cell"):
        kept, fresh = probe(prompt), text_evidence(tiny_backbone, *encoded, prompt, draws=1)
        assert torch.equal(kept.relevance, fresh.relevance)
        assert kept.gain == fresh.gain


def test_latents_may_be_coarser_than_the_attention(tiny_backbone, encoded):
    small = torch.nn.functional.avg_pool2d(encoded[0], 2)
    assert text_evidence(tiny_backbone, small, encoded[1], "cell", draws=1).relevance.shape == (64,)


def test_a_prompt_that_says_nothing_gains_nothing(tiny_backbone, encoded):
    nothing = "<|endoftext|>"  # the padding token: the same tokens as the null prompt
    assert torch.equal(*(tiny_backbone.embed_text([text]) for text in (nothing, "")))
    evidence = text_evidence(tiny_backbone, *encoded, nothing)
    assert (evidence.gain, evidence.certainty) == (0, 0)
    assert not evidence.relevance.any()


def test_a_single_draw_is_no_certainty(tiny_backbone, encoded):
    evidence = text_evidence(tiny_backbone, *encoded, "cell", noise_timesteps=(300,), draws=1)
    assert evidence.gain != 0 and evidence.certainty == 0


def test_a_prompt_longer_than_the_context(tiny_backbone, encoded):
    evidence = text_evidence(tiny_backbone, *encoded, "white blood cell " * 50, draws=1)
    assert torch.isfinite(evidence.relevance).all()


class Knowing(StableDiffusionBackbone):
    """Predicts the true noise in the left half of the image when told ``helpful`` words, and nothing otherwise."""

    latents: torch.Tensor
    helpful = "lungs"

    def predict_noise(self, latents, timestep, context):
        alpha = self.alphas[timestep]
        noise = (latents - alpha.sqrt() * self.latents) / (1 - alpha).sqrt()
        noise[..., 4:] = 0
        knows = (context == self.embed_text([self.helpful])).all((1, 2))
        return noise * knows[:, None, None, None]


@pytest.fixture(scope="module")
def knowing(tiny_pipeline, encoded):
    backbone = Knowing(tiny_pipeline, device="cpu")
    backbone.latents = encoded[0]
    return backbone


def test_a_prompt_that_explains_the_image_is_present_and_placed(knowing, encoded):
    evidence = text_evidence(knowing, encoded[0], torch.eye(64), "lungs")
    assert evidence.gain == pytest.approx(0.5, abs=0.1), "half of the error is gone"
    assert evidence.certainty > 10
    halves = evidence.relevance.view(8, 8).split(4, dim=1)
    assert halves[0].mean() > halves[1].mean() + 0.5
    other = text_evidence(knowing, encoded[0], torch.eye(64), "heart")
    assert other.gain == 0


def test_a_prompt_that_makes_it_worse_has_negative_gain(knowing, encoded, monkeypatch):
    monkeypatch.setattr(knowing, "helpful", "")  # now the null prompt knows
    evidence = text_evidence(knowing, encoded[0], torch.eye(64), "lungs")
    assert evidence.gain < -0.5 and evidence.certainty < -10
