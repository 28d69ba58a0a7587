"""Text prompts: is the named thing in the image, and where?

Both questions are answered by contrast with the null prompt, so that what every prompt lights up cancels:

- presence: how much better the frozen model predicts known noise when it is told the prompt than when it is told
  nothing (Diffusion Classifier, Li et al. 2023; pixel-wise as in Kong et al. 2024). A wrong or meaningless prompt does not help
  the prediction, so its answer is "absent".
- place: the pixel-wise gain, plus the cross-attention that the prompt's words receive beyond what the null prompt's
  tokens receive, spread over tokens that attend alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.errors import ZeroSegError


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


def check_prompt(text: object) -> str:
    """The prompt without surrounding blanks.

    Raises:
        ZeroSegError: it is not a string, or blank.
    """
    if not isinstance(text, str) or not text.strip():
        msg = f"the text prompt must be words, not {text!r}"
        raise ZeroSegError(msg)
    return text.strip()


@torch.inference_mode()
def text_evidence(
    backbone: StableDiffusionBackbone,
    latents: Tensor,
    attention: Tensor,
    prompt: str,
    *,
    timestep: int = 300,
    noise_timesteps: tuple[int, ...] = (150, 350, 550, 750),
    draws: int = 2,
    seed: int = 0,
) -> TextEvidence:
    """Evidence for a prompt on an encoded image.

    Args:
        backbone: the frozen model.
        latents: (1, C, h, w) clean latents of the image.
        attention: (N, N) aggregated self-attention, along which evidence spreads.
        prompt: the words.
        timestep: at which cross-attention is read.
        noise_timesteps: noise levels at which the prediction is tested.
        draws: noise draws per level; the same noise is used with and without the prompt.
        seed: of the noise.

    Returns:
        TextEvidence.
    """
    prompt = check_prompt(prompt)
    contexts = backbone.embed_text([prompt, ""])
    side = grid_side(attention.shape[0])
    generator = torch.Generator().manual_seed(seed)
    maps, gains = [], []
    for level in noise_timesteps:
        for _ in range(draws):
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            noisy = backbone.add_noise(latents, level, noise)
            predicted = backbone.predict_noise(noisy.expand(2, -1, -1, -1), level, contexts)
            errors = (predicted - noise).square().mean(1)
            gain = (errors[1] - errors[0]) / errors[1].mean().clamp_min(1e-8)
            maps.append(gain)
            gains.append(gain.mean())
    gains = torch.stack(gains)
    certainty = gains.mean() / (gains.std() / len(gains) ** 0.5).clamp_min(1e-8) if len(gains) > 1 else gains.mean() * 0
    gain_map = _to_grid(torch.stack(maps).mean(0), side)

    words = _words(backbone, prompt)
    prompted, null = (
        backbone.read(latents, timestep, context[None], self_attention=False, cross_attention=True).cross_attention
        for context in contexts
    )
    cross = torch.zeros(side * side, device=latents.device)
    for tokens, with_prompt in prompted.items():
        contrast = with_prompt[0][:, words].mean(-1) - null[tokens][0][:, words].mean(-1)
        grid = grid_side(tokens)
        cross += _standardise(_to_grid(contrast.view(grid, grid), side))
    relevance = _standardise(attention @ _standardise(gain_map)) + _standardise(attention @ _standardise(cross))
    return TextEvidence(_standardise(relevance), float(gains.mean()), float(certainty))


def _words(backbone: StableDiffusionBackbone, prompt: str) -> slice:
    """The prompt's own tokens, without the start token, the end token and the padding."""
    count = len(backbone.tokenizer(prompt, truncation=True, max_length=backbone.tokenizer.model_max_length).input_ids)
    return slice(1, max(2, count - 1))


def _to_grid(values: Tensor, side: int) -> Tensor:
    """(h, w) -> (side * side,)"""
    if values.shape[-1] > side:
        return F.adaptive_avg_pool2d(values[None, None].float(), side).flatten()
    return F.interpolate(values[None, None].float(), (side, side), mode="bilinear", align_corners=False).flatten()


def _standardise(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp_min(1e-8)
