"""The losses: of whole volumes, and of voxels drawn from many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.tumor.adapters import AovaAdapters, AovaOutput, role_margin
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import VoxelSamples

MOST_VOXELS = 256
"""Of every case that a step on voxels looks at."""
MOST_WEIGHT = 30
"""Of a lesion's voxel against another one."""


def volume_terms(output: AovaOutput, prompts: Tensor, roles: Sequence[str], target: Tensor) -> dict[str, Tensor]:
    """The training terms of one volume and one question.

    Args:
        output: of the adapters.
        prompts: (N, d) embeddings, unit length.
        roles: one per prompt.
        target: (X, Y, Z) bool; empty where the answer is "absent".

    Returns:
        ``dice`` (zero for an empty target), ``voxel`` cross-entropy, a lesion's voxels counting more the rarer they are, as in
        :func:`voxel_terms`, ``image`` cross-entropy, and ``align``: symmetric cross-entropy between pooled features and texts, one
        per role, at temperature 0.07.
    """
    present, wanted = bool(target.any()), target.float()
    probability = output.margin.sigmoid()
    overlap = 2 * (probability * wanted).sum() + 1
    dice = 1 - overlap / (probability.sum() + wanted.sum() + 1)
    share = wanted.mean().clamp_min(1 / MOST_WEIGHT**2)
    voxel = F.binary_cross_entropy_with_logits(output.margin, wanted, pos_weight=((1 - share) / share).sqrt())
    image = F.binary_cross_entropy_with_logits(output.image_logit, wanted.new_tensor(float(present)))
    names = list(dict.fromkeys(roles))
    members = [[i for i, role in enumerate(roles) if role == name] for name in names]
    pooled = F.normalize(torch.stack([output.pooled[m].mean(0) for m in members]), dim=-1)
    texts = F.normalize(torch.stack([prompts[m].mean(0) for m in members]), dim=-1)
    likeness, own = pooled @ texts.T / 0.07, torch.arange(len(names), device=target.device)
    align = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    return {"dice": dice if present else dice * 0, "voxel": voxel, "image": image, "align": align}


def voxel_terms(
    adapters: AovaAdapters, questions: Questions, samples: VoxelSamples, rows: Sequence[int], rng: np.random.Generator
) -> dict[str, Tensor]:
    """The training terms of random voxels of some cases, each with a question of its own.

    Args:
        adapters: in training.
        questions: asked.
        samples: of all cases.
        rows: which of them.
        rng: draws questions and voxels.

    Returns:
        ``dice`` per volume (zero where every answer is "absent") and ``voxel`` cross-entropy.
    """
    device, voxels = adapters.bias.device, samples.target.shape[1]
    fits, prompts = [], []
    roles: list[str] = []
    for case in (samples.cases[row] for row in rows):
        organ, tumor, fit = questions.draw(rng, case)
        embedded, roles = questions.embed(organ, tumor, case.modality)
        fits.append(fit)
        prompts.append(embedded)
    fits = torch.tensor(fits, device=device)[:, None]
    drawn = rng.permuted(np.tile(np.arange(voxels), (len(rows), 1)), axis=1)[:, :MOST_VOXELS]
    place = torch.tensor(rows)[:, None], torch.from_numpy(drawn)
    target, weight = samples.target[place].to(device) & fits, samples.weight[place].to(device)
    prompts = torch.stack(prompts).to(device)
    logits = torch.zeros((), device=device)
    temperatures = adapters.log_temperature.exp()
    for level, (stage, temperature) in enumerate(zip(adapters.stages, temperatures, strict=True)):
        seen = samples.inputs[level][place].to(device).float()
        adapted = stage.alpha * stage.adapt(seen) + (1 - stage.alpha) * seen[..., : stage.channels]
        keys = stage.key(stage.text(prompts))
        likeness = torch.einsum("bvc,bnc->nbv", stage.query(adapted), keys)
        logits = logits + temperature * likeness / stage.channels**0.5
    margin = role_margin(logits.float(), roles) + adapters.bias
    wanted = target.float()
    # Between true frequencies, which drown lesions, and equal ones.
    share = (weight / weight.mean()).sqrt()
    voxel = F.binary_cross_entropy_with_logits(margin, wanted, share)
    present = target.any(1)
    found, weight = margin[present].sigmoid(), weight[present]
    overlap = 2 * (weight * found * wanted[present]).sum(1) + 1e-3
    dice = 1 - overlap / ((weight * (found + wanted[present])).sum(1) + 1e-3)
    return {"dice": dice.mean() if present.any() else voxel * 0, "voxel": voxel}
