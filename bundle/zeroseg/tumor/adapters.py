"""AOVA: adapters on frozen encoder features, and the attention of every voxel over the prompts (paper section 2.1).

Anomaly-aware open-vocabulary attention. Per encoder stage l:

    F'_l = alpha T_l(F_l) + (1 - alpha) F_l          T_l: two linear layers            (the paper)
    Q_l = F'_l W_q,  K_l = MLP_l(e) W_k               e: text embeddings of N prompts   (after a third-party account)
    A_l = softmax over the N prompts of Q_l K_l^T / sqrt(C_l)

These few layers are all of DiffuGTS that is trained with masks; the autoencoder, the diffusion model and the text
encoder are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROLES = ("normal", "abnormal", "null")
VOXEL_ML = 0.027
"""Millilitres of a voxel of 3 mm, the embedded model's."""
WHOLE_VOXELS = 96**3
"""Most voxels of a scan that is read as a whole; larger ones are read more coarsely."""


@dataclass
class AovaOutput:
    """What the adapters say about one volume and one set of prompts.

    Attributes:
        levels: per stage the (N, X_l, Y_l, Z_l) attention over the prompts; sums to 1 over N.
        margin: (X, Y, Z) fused log-odds of the abnormal prompts against the normal and null ones.
        image_logit: scalar log-odds that the volume holds what the abnormal prompts name.
        pooled: (N, text_dim) per prompt, the features it attends to, pooled and brought into the text's space.
        null_contrast: scalar log-odds of the abnormal prompts against the null ones alone, over the voxels where they
            are highest; None without a null prompt. What a prompt explains no better than no prompt is no evidence.
    """

    levels: tuple[Tensor, ...]
    margin: Tensor
    image_logit: Tensor
    pooled: Tensor
    null_contrast: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """(X, Y, Z) in [0, 1]; above 0.5 a voxel is better explained by the abnormal prompts than by all others
        together.

        It is a probability as far as the adapters' training made it one: temperature and bias of the fusion are learned
        by cross-entropy and Dice against masks, so 0.5 is the decision the training optimised.
        """
        return self.margin.sigmoid()


def check_roles(roles: Sequence[str], count: int) -> None:
    """Refuse roles that do not fit the prompts.

    Raises:
        ValueError: wrong number, an unknown role, or no abnormal or no opposing prompt.
    """
    if len(roles) != count:
        raise ValueError(f"{count} prompts need {count} roles, not {len(roles)}")
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ValueError(f"unknown role {sorted(unknown)[0]!r}: use {', '.join(ROLES)}")
    if "abnormal" not in roles or set(roles) == {"abnormal"}:
        raise ValueError("the prompts need at least one abnormal and one normal or null role")


class StageAdapter(nn.Module):
    """One stage's adapter and its attention over prompts.

    Choices of ZeroSeg, where the paper is silent:
      * ``T`` sees a voxel's features beside their mean and standard deviation in cubes around it (``context``), because
        what makes a tumour one is how it differs from its surroundings, and a frozen encoder's early stages hardly look
        there. ``context=()`` is the paper's plain form.
      * Features are standardised by fixed statistics (``center``, ``spread``) before anything else, because raw
        autoencoder features differ in scale by orders of magnitude; they are measured once on training material
        (``calibrate``).
      * GELU between the two layers of T; the hidden width is free.

    Args:
        channels: C_l of the stage.
        text_dim: of the prompt embeddings.
        alpha: residual ratio; at 0 the adapted features are the (standardised) input.
        hidden: width between the two linear layers of T.
        context: odd sides, in this stage's voxels, of the cubes whose mean and standard deviation T sees.
    """

    def __init__(self, channels: int, text_dim: int, alpha: float, hidden: int, context: Sequence[int]):
        super().__init__()
        self.channels, self.alpha, self.context = channels, alpha, tuple(context)
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))
        if alpha:
            self.adapt = nn.Sequential(
                nn.Linear(channels * (1 + 2 * len(self.context)), hidden), nn.GELU(), nn.Linear(hidden, channels)
            )
        middle = max(channels, text_dim // 2)
        self.text = nn.Sequential(
            nn.Linear(text_dim, middle), nn.GELU(), nn.LayerNorm(middle), nn.Linear(middle, channels)
        )
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)

    def calibrate(self, features: Tensor) -> None:
        """Set ``center`` and ``spread`` to the channel statistics of (1, C, X, Y, Z) or (C, n) features."""
        flat = features.detach().float().reshape(-1, self.channels, math.prod(features.shape[2:]) or 1)
        if features.ndim == 2:
            flat = features.detach().float()[None]
        self.center.copy_(flat.mean((0, 2)))
        self.spread.copy_(flat.transpose(0, 1).flatten(1).std(1).clamp_min(1e-6))

    def standardise(self, features: Tensor) -> Tensor:
        """(1, C, X, Y, Z) -> (1, C, X, Y, Z), centred and scaled per channel."""
        shape = (1, -1, 1, 1, 1)
        return (features - self.center.view(shape)) / self.spread.view(shape)

    def surroundings(self, features: Tensor) -> Tensor:
        """(1, C, X, Y, Z) standardised features -> (1, C (1 + 2 cubes), X, Y, Z) with mean and spread of the cubes."""
        parts = [features]
        with torch.autocast(features.device.type, enabled=False):  # a difference of squares does not survive bf16
            for side in self.context:
                mean = local_mean(features, side)
                parts += [mean, (local_mean(features.square(), side) - mean.square()).clamp_min(0).add(1e-4).sqrt()]
        return torch.cat(parts, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(1, C, X, Y, Z) raw stage features -> (X, Y, Z, C) adapted ones, F'."""
        plain = self.standardise(features)
        if self.alpha == 0:
            return plain[0].movedim(0, -1)
        adapted = self.adapt(self.surroundings(plain)[0].movedim(0, -1))
        return self.alpha * adapted + (1 - self.alpha) * plain[0].movedim(0, -1)

    def logits(self, adapted: Tensor, prompts: Tensor) -> Tensor:
        """(X, Y, Z, C) F' and (N, d) prompts -> (N, X, Y, Z), Q K^T / sqrt(C)."""
        keys = self.key(self.text(prompts))
        return (self.query(adapted) @ keys.T / math.sqrt(self.channels)).movedim(-1, 0)


def local_mean(features: Tensor, side: int) -> Tensor:
    """(1, C, X, Y, Z) mean over a cube of odd ``side`` around every voxel, the cube cut off at the borders."""
    for axis in (2, 3, 4):  # a cube's mean is the mean of lines' means, and those are one matrix product
        place = torch.arange(features.shape[axis], device=features.device)
        band = ((place[:, None] - place).abs() <= side // 2).to(features.dtype)
        band = band / band.sum(1, keepdim=True)
        features = (features.movedim(axis, -1) @ band.T).movedim(-1, axis)
    return features


class Norm(nn.Module):
    """Features of every voxel brought to unit root mean square: unlike a group norm it knows no window, so a crop and the
    whole volume are seen alike."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain


class ScanNorm(nn.Module):
    """Features brought to the mean and deviation that their channel has in the scan; torch's instance norm takes no map of one voxel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread, middle = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
        return (x - middle) * (spread + 1e-5).rsqrt() * self.gain + self.shift


class Block(nn.Module):
    """Two convolutions of 3 voxels and a residual, after the norm that ``norm`` makes."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.body = nn.Sequential(
            norm(channels),
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv3d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Surroundings(nn.Module):
    """T of all stages at once: a small U-Net over their standardised features.

    The paper's T sees a voxel alone. A tumour is one by what is around it, and the same grey is a lesion here and an organ there:
    coarser levels below the encoder's own look far, finer ones say where the border is.

    Args:
        channels: of the encoder's stages, finest first.
        deeper: channels of the levels below the coarsest stage, each half as fine.
        whole: it is always shown a whole scan. Features are then brought to the scan's own mean and deviation, so that what stands out
            is told from what is usual there, whatever the modality.
    """

    def __init__(self, channels: Sequence[int], deeper: Sequence[int], whole: bool = False):
        super().__init__()
        widths = [*channels, *deeper]
        norm = ScanNorm if whole else Norm
        self.enter = nn.ModuleList(nn.Conv3d(c, c, 1) for c in channels)
        self.down = nn.ModuleList(
            nn.Sequential(Block(a, norm), norm(a), nn.Conv3d(a, b, 2, stride=2))
            for a, b in zip(widths[len(channels) - 1 :], widths[len(channels) :], strict=False)
        )
        self.bottom = Block(widths[-1], norm)
        self.up = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairwise(widths))
        # At full size, where a convolution costs as much as all else together, the sum is enough.
        self.merge = nn.ModuleList([nn.Identity(), *(Block(a, norm) for a in widths[1:-1])])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per stage (1, C_l, X_l, Y_l, Z_l) standardised features -> the same shapes. Sides that do not halve evenly are
        padded for the deeper levels."""
        levels = [enter(f) for enter, f in zip(self.enter, features, strict=True)]
        for down in self.down:
            short = [v for n in reversed(levels[-1].shape[2:]) for v in (0, n % 2)]
            levels.append(down(F.pad(levels[-1], short, mode="replicate")))
        x = self.bottom(levels[-1])
        out = []
        for level in reversed(range(len(self.up))):
            x = F.interpolate(self.up[level](x), levels[level].shape[2:], mode="trilinear", align_corners=False)
            x = self.merge[level](x + levels[level])
            out.append(x)
        return out[::-1][: len(features)]


class AovaAdapters(nn.Module):
    """The trainable part of DiffuGTS: three stage adapters, the fusion of their attention, and an image-level head.

    Fusion is ZeroSeg's choice. The paper's account sums the three softmax maps; the sum lies in [0, 3], a sigmoid of it
    above 0.5 everywhere, and no threshold on it means anything. Here the stages are a product of experts: their logits
    are resized to full resolution (trilinear), weighted by learned temperatures and added, and one softmax over the
    prompts is taken of the sum. That keeps a probability over prompts, lets a sure stage outweigh an unsure one, and
    has its decision at 0.5. A role with several prompts counts as the mean of its members' likelihoods, so adding
    synonyms does not raise its odds.

    The image-level logit (for the paper's image-level anomaly term) is the mean margin over the ``top_ml`` highest
    plus a correction by an MLP of the features that the abnormal prompts attend to. ``pooled`` serves the text
    alignment term.

    Args:
        channels: of the encoder's stages.
        text_dim: of the prompt embeddings.
        alpha: residual ratio of the adapters; unknown in the paper, 0.1 in a third-party account.
        hidden: width of T per stage as a multiple of its channels.
        context: per stage, sides of the cubes T also sees; none at full resolution, where they cost most and the
            coarser stages see further anyway.
        deeper: channels of the levels that a ``Surroundings`` adds below the coarsest stage: T of all stages is then that U-Net, and
            ``hidden`` and ``context`` are of no use. (): T is the paper's, two linear layers a stage.
        whole_mm: side of the voxels on which a scan is read as a whole, by a U-Net (``deeper``) that takes it so; None: scans are read
            on the model's own grid, window by window.
        top_ml: millilitres that decide about the image: about the smallest lesion worth showing. A share of the volume would
            let the field of view decide, a number of voxels their size.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        text_dim: int = 64,
        alpha: float = 0.1,
        hidden: int = 4,
        context: Sequence[Sequence[int]] = ((), (3, 7), (3, 7)),
        top_ml: float = 20 * VOXEL_ML,
        deeper: Sequence[int] = (),
        whole_mm: float | None = None,
    ):
        super().__init__()
        if whole_mm is not None and (whole_mm <= 0 or not deeper):
            raise ValueError("whole_mm must be positive and needs the levels of deeper")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        if len(context) != len(channels):
            raise ValueError("context needs one list of cube sides per stage")
        self.options: dict[str, Any] = {
            "channels": list(channels),
            "text_dim": text_dim,
            "alpha": alpha,
            "hidden": hidden,
            "context": [list(c) for c in context],
            "top_ml": top_ml,
            "deeper": list(deeper),
            "whole_mm": whole_mm,
        }
        self.top_ml, self.whole_mm = top_ml, whole_mm
        # All per modality, see ``aova.load_adapters``.
        self.fusion: dict[str, dict[str, dict[str, float]]] | None = None
        self.presence: dict[str, float] | None = None
        self.presence_of: dict[str, str] | None = None
        self.beside: dict[str, float] | None = None
        self.head: dict[str, float] | None = None
        self.cut: dict[str, float] | None = None
        self.sha256: str | None = None  # of the file they were loaded from
        self.alpha = alpha
        self.surroundings = Surroundings(channels, deeper, whole_mm is not None) if deeper else None
        own = 0.0 if deeper else alpha
        self.stages = nn.ModuleList(
            StageAdapter(c, text_dim, own, hidden * c, around) for c, around in zip(channels, context, strict=True)
        )
        self.pool = nn.ModuleList(nn.Linear(c, text_dim) for c in channels)
        self.log_temperature = nn.Parameter(torch.zeros(len(channels)))
        self.bias = nn.Parameter(torch.tensor(-2.0))  # tumours are rare: an untrained margin says no
        self.image_head = nn.Sequential(nn.Linear(text_dim, text_dim), nn.GELU(), nn.Linear(text_dim, 1))
        nn.init.zeros_(self.image_head[-1].weight)
        nn.init.zeros_(self.image_head[-1].bias)

    def calibrate(self, features: Sequence[Tensor]) -> None:
        """Measure the features' fixed statistics, before training, on one or several volumes' stage features.

        Args:
            features: per stage (1, C_l, ...) features, or (C_l, n) samples of many volumes.
        """
        for stage, values in zip(self.stages, features, strict=True):
            stage.calibrate(values)

    def forward(
        self, features: Sequence[Tensor], prompts: Tensor, roles: Sequence[str] = ROLES, voxel_ml: float = VOXEL_ML
    ) -> AovaOutput:
        """Attention of one volume's voxels over the prompts: ``attend`` of ``adapt``.

        Args:
            features: per stage (1, C_l, X/2^l, Y/2^l, Z/2^l), from the backbone.
            prompts: (N, d) unit-length text embeddings.
            roles: per prompt ``normal``, ``abnormal`` or ``null``.
            voxel_ml: millilitres of a voxel, by which ``top_ml`` becomes a number of them.

        Raises:
            ValueError: roles and prompts do not fit.
        """
        return self.attend(self.adapt(features), prompts, roles, voxel_ml)

    def whole_size(self, shape: Sequence[int], voxel_ml: float, multiple: int) -> tuple[int, ...]:
        """Sides, multiples of ``multiple``, at which a volume of (X, Y, Z) voxels of so many millilitres is read as a whole."""
        voxel_mm = (1000 * voxel_ml) ** (1 / 3)
        coarsen = max(float(self.whole_mm or voxel_mm) / voxel_mm, (math.prod(shape) / WHOLE_VOXELS) ** (1 / 3))
        return tuple(max(1, round(n / coarsen / multiple)) * multiple for n in shape)

    def adapt(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Raw stage features -> F' per stage as (X_l, Y_l, Z_l, C_l). It knows no prompt, so many can share it."""
        return self.adapt_many([features])[0]

    def adapt_many(self, volumes: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """``adapt`` of volumes of one shape. A U-Net takes them in one pass, which costs a CPU a third of one pass for each: oneDNN leaves
        small convolutions of a single volume to a slower kernel."""
        if self.surroundings is None:
            return [tuple(stage(v) for stage, v in zip(self.stages, features, strict=True)) for features in volumes]
        stacked = [torch.cat(level) for level in zip(*volumes, strict=True)]
        plain = [stage.standardise(values) for stage, values in zip(self.stages, stacked, strict=True)]
        mixed = [self.alpha * t + (1 - self.alpha) * f for t, f in zip(self.surroundings(plain), plain, strict=True)]
        return [tuple(f.movedim(0, -1) for f in levels) for levels in zip(*mixed, strict=True)]

    def attend(
        self, adapted: Sequence[Tensor], prompts: Tensor, roles: Sequence[str] = ROLES, voxel_ml: float = VOXEL_ML
    ) -> AovaOutput:
        """Adapted features and prompts -> attention, margin and image-level evidence; arguments as ``forward``."""
        check_roles(roles, len(prompts))
        per_stage = [stage.logits(values, prompts) for stage, values in zip(self.stages, adapted, strict=True)]
        levels, pooled = [], []
        for pool, values, stage_logits in zip(self.pool, adapted, per_stage, strict=True):
            attention = stage_logits.softmax(0)
            levels.append(attention)
            share = attention.flatten(1) / attention.flatten(1).sum(1, keepdim=True).clamp_min(1e-6)
            pooled.append(pool(share @ values.flatten(0, 2)))
        logits = self._fused(per_stage)
        margin = role_margin(logits, roles) + self.bias
        pooled = torch.stack(pooled).mean(0)
        abnormal = [i for i, role in enumerate(roles) if role == "abnormal"]
        top = max(1, round(self.top_ml / voxel_ml))
        image_logit = top_mean(margin, top) + self.image_head(pooled[abnormal]).amax()
        contrast = None
        if "null" in roles:
            pair = [i for i, role in enumerate(roles) if role != "normal"]
            contrast = top_mean(role_margin(logits[pair], [roles[i] for i in pair]), top)
        return AovaOutput(tuple(levels), margin, image_logit, pooled, contrast)

    def fused_logits(self, adapted: Sequence[Tensor], prompts: Tensor) -> Tensor:
        """(N, X, Y, Z): the stages' logits at full size, weighted by their temperatures and added."""
        return self._fused([stage.logits(values, prompts) for stage, values in zip(self.stages, adapted, strict=True)])

    def _fused(self, per_stage: Sequence[Tensor]) -> Tensor:
        size, fused = per_stage[0].shape[1:], 0
        for temperature, logits in zip(self.log_temperature.exp(), per_stage, strict=True):
            logits = temperature * logits
            if logits.shape[1:] != size:
                logits = F.interpolate(logits[None], size, mode="trilinear", align_corners=False)[0]
            fused = fused + logits
        return fused


def role_margin(logits: Tensor, roles: Sequence[str]) -> Tensor:
    """(N, ...) prompt logits -> (...) log-odds of the abnormal role against the normal and null ones together."""

    def role(name: str) -> Tensor:
        members = [i for i, r in enumerate(roles) if r == name]
        return logits[members].logsumexp(0) - math.log(len(members))

    others = [role(name) for name in ("normal", "null") if name in roles]
    return role("abnormal") - torch.stack(others).logsumexp(0)


def top_mean(values: Tensor, count: int) -> Tensor:
    """Mean of a tensor's ``count`` highest values, or of all where it has fewer."""
    return values.flatten().topk(min(count, values.numel())).values.mean()
