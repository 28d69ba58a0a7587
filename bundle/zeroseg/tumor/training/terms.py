"""The losses of one volume and one question."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.tumor.adapters import AovaOutput


def volume_terms(output: AovaOutput, prompts: Tensor, roles: Sequence[str], target: Tensor) -> dict[str, Tensor]:
    """The training terms of one volume and one question.

    Args:
        output: of the adapters.
        prompts: (N, d) embeddings, unit length.
        roles: one per prompt.
        target: (X, Y, Z) bool; empty where the answer is "absent".

    Returns:
        ``dice`` (zero for an empty target), ``voxel`` cross-entropy, ``image`` cross-entropy, and ``align``: symmetric
        cross-entropy between pooled features and texts, one per role, at temperature 0.07.
    """
    present, wanted = bool(target.any()), target.float()
    probability = output.margin.sigmoid()
    overlap = 2 * (probability * wanted).sum() + 1
    dice = 1 - overlap / (probability.sum() + wanted.sum() + 1)
    voxel = F.binary_cross_entropy_with_logits(output.margin, wanted)
    image = F.binary_cross_entropy_with_logits(output.image_logit, wanted.new_tensor(float(present)))
    names = list(dict.fromkeys(roles))
    members = [[i for i, role in enumerate(roles) if role == name] for name in names]
    pooled = F.normalize(torch.stack([output.pooled[m].mean(0) for m in members]), dim=-1)
    texts = F.normalize(torch.stack([prompts[m].mean(0) for m in members]), dim=-1)
    likeness, own = pooled @ texts.T / 0.07, torch.arange(len(names), device=target.device)
    align = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    return {"dice": dice if present else dice * 0, "voxel": voxel, "image": image, "align": align}
