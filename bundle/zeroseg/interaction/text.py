"""Text prompts: is the named thing in the image, and where?

Both questions are answered by contrast with the null prompt, so that what every prompt lights up cancels:

- presence: how much better the frozen model predicts known noise when it is told the prompt than when it is told
  nothing (Diffusion Classifier, Li et al. 2023; pixel-wise as in Kong et al. 2024). A wrong or meaningless prompt does not help
  the prediction, so its answer is "absent".
- place: the pixel-wise gain, plus the cross-attention that the prompt's words receive beyond what the null prompt's
  tokens receive, spread over tokens that attend alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.interaction.prompts import check_text


@dataclass
class TextEvidence:
    """What the model says about one prompt.

    Attributes:
        relevance: (N,) on the attention's grid, standardised: mean 0, spread 1; higher where the prompt fits.
        gain: relative reduction of the noise-prediction error by the prompt against the null prompt, mean over the
            draws; positive where the prompt explains the image.
        certainty: gain divided by its standard error over the draws (a t-value).
    """

    relevance: Tensor
    gain: float
    certainty: float

    absent_because: ClassVar[str] = "the words explain the image no better than no words do"

    def record(self) -> dict[str, float]:
        """What a manifest records."""
        return {"gain": round(self.gain, 6), "certainty": round(self.certainty, 3)}

    def doubt(self, least: float) -> float:
        """How sure it is, in [0, 1], that the thing is not there, where the certainty is below ``least``: as a normal deviate."""
        return math.erf((least - self.certainty) / math.sqrt(2))


class TextProbe:
    """An image made ready for any number of prompts: what the null prompt says about it is worked out once.

    Args:
        backbone: the frozen model.
        latents: (1, C, h, w) clean latents of the image; their grid may be coarser than that of ``attention``.
        attention: (N, N) aggregated self-attention, along which evidence spreads.
        timestep: at which cross-attention is read.
        noise_timesteps: noise levels at which the prediction is tested.
        draws: noise draws per level; the same noise is used with and without a prompt.
        seed: of the noise.
    """

    @torch.inference_mode()
    def __init__(
        self,
        backbone: StableDiffusionBackbone,
        latents: Tensor,
        attention: Tensor,
        *,
        timestep: int = 300,
        noise_timesteps: tuple[int, ...] = (150, 350, 550, 750),
        draws: int = 2,
        seed: int = 0,
    ):
        self.backbone, self.latents, self.attention, self.timestep = backbone, latents, attention, timestep
        generator = torch.Generator().manual_seed(seed)
        self._draws = []
        for level in noise_timesteps:
            noise = torch.randn(draws, *latents.shape[1:], generator=generator).to(latents.device)
            noisy = backbone.add_noise(latents.expand(draws, -1, -1, -1), level, noise)
            self._draws.append((level, noise, noisy))
        null = backbone.embed_text([""])
        self._null_errors = [self._errors(draw, null) for draw in self._draws]
        self._null_cross = self._cross_attention(null)

    @torch.inference_mode()
    def __call__(self, prompt: str) -> TextEvidence:
        """Evidence for a prompt.

        Raises:
            ZeroSegError: the prompt is blank or no string.
        """
        prompt = check_text(prompt)
        context = self.backbone.embed_text([prompt])
        gains = torch.cat(
            [
                (null - self._errors(draw, context)) / null.mean((1, 2), keepdim=True).clamp_min(1e-8)
                for draw, null in zip(self._draws, self._null_errors, strict=True)
            ]
        )
        each = gains.mean((1, 2))
        spread = each.std() / len(each) ** 0.5 if len(each) > 1 else each.new_tensor(torch.inf)
        certainty = each.mean() / spread.clamp_min(1e-8)

        side = grid_side(self.attention.shape[0])
        words = _words(self.backbone, prompt)
        cross = torch.zeros(side * side, device=self.latents.device)
        for tokens, with_prompt in self._cross_attention(context).items():
            contrast = with_prompt[0][:, words].mean(-1) - self._null_cross[tokens][0][:, words].mean(-1)
            grid = grid_side(tokens)
            cross += standardise(_to_grid(contrast.view(grid, grid), side))
        evidence = standardise(_to_grid(gains.mean(0), side)), standardise(cross)
        relevance = sum(standardise(self.attention @ e) for e in evidence)
        return TextEvidence(standardise(relevance), float(each.mean()), float(certainty))

    def _errors(self, draw: tuple[int, Tensor, Tensor], context: Tensor) -> Tensor:
        """(draws, h, w) squared errors of the predicted noise at one level."""
        level, noise, noisy = draw
        predicted = self.backbone.predict_noise(noisy, level, context.expand(len(noisy), -1, -1))
        return (predicted - noise).square().mean(1)

    def _cross_attention(self, context: Tensor) -> dict[int, Tensor]:
        record = self.backbone.read(self.latents, self.timestep, context, self_attention=False, cross_attention=True)
        return record.cross_attention


def _words(backbone: StableDiffusionBackbone, prompt: str) -> slice:
    """The prompt's own tokens, without the start token, the end token and the padding."""
    return slice(1, max(2, backbone.count_tokens(prompt) - 1))


def _to_grid(values: Tensor, side: int) -> Tensor:
    """(h, w) -> (side * side,)"""
    if values.shape[-1] > side:
        return F.adaptive_avg_pool2d(values[None, None].float(), side).flatten()
    return F.interpolate(values[None, None].float(), (side, side), mode="bilinear", align_corners=False).flatten()


def standardise(values: Tensor) -> Tensor:
    """The same values with mean 0 and spread 1."""
    return (values - values.mean()) / values.std().clamp_min(1e-8)
