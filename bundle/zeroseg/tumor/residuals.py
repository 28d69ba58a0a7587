"""What inpainting took away: pixel and feature residuals, their fusion, and the refined mask (paper section 2.3).

Both residuals compare the input with its pseudo-healthy counterpart H = Dec(z_healthy). Neither compares with the input
itself: an autoencoder blurs, and |I - H| is large at every edge of a healthy volume. The change that inpainting made,

    D = H - Dec(E(I)),

has no such error in it. The pixel residual is |D| in units of the reconstruction's standard deviation. The feature
residual asks the encoder and the adapters about I and I + D: how much log-odds for the abnormal prompts disappeared
with the region.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from zeroseg.tumor.adapters import AovaAdapters, role_margin

BETA = {"pixel": 0.5, "feature": 0.5}
"""Weights of the two residuals without learned ones, by the third-party account of the paper."""
LOGIT_LIMIT = 10.0


def pixel_residual(reconstruction: Tensor, healthy: Tensor, inside: Tensor | None = None) -> Tensor:
    """|reconstruction - healthy| in standard deviations of the reconstruction.

    The account of the paper z-scores both volumes by their own statistics. Here both share the reconstruction's: with
    statistics of their own, removing a bright tumour would change every voxel of the volume.

    Args:
        reconstruction: (1, 1, X, Y, Z) Dec(E(I)).
        healthy: (1, 1, X, Y, Z) Dec(z_healthy).
        inside: (X, Y, Z) bool, the voxels whose statistics count (without padding); None: all.

    Returns:
        (X, Y, Z), zero where both are equal.
    """
    values = reconstruction[0, 0] if inside is None else reconstruction[0, 0][inside]
    return (reconstruction - healthy)[0, 0].abs() / values.std().clamp_min(1e-6)


def feature_residual(
    adapters: AovaAdapters,
    adapted: Sequence[Tensor],
    adapted_healthy: Sequence[Tensor],
    prompts: Tensor,
    roles: Sequence[str],
) -> Tensor:
    """Log-odds for the abnormal prompts that the pseudo-healthy features have lost.

    The account of the paper projects the latent difference onto the text embeddings by a projection nobody trained. The
    adapters hold a trained one: per stage <Q(F') - Q(F'_H), K(e_i)> / sqrt(C), the change of prompt i's logit. Summed
    over the stages as in the AOVA map and contrasted between the roles, it is the change of the margin.

    Args:
        adapters: trained.
        adapted: of the input, from ``adapters.adapt``.
        adapted_healthy: of the pseudo-healthy volume.
        prompts: (N, d).
        roles: one per prompt.

    Returns:
        (X, Y, Z), signed: positive where the abnormal went away; zero where both are equal.
    """
    now = role_margin(adapters.fused_logits(adapted, prompts), roles)
    return now - role_margin(adapters.fused_logits(adapted_healthy, prompts), roles)


def dilate(mask: np.ndarray, voxels: int | Sequence[int]) -> np.ndarray:
    """Binary dilation by a box that reaches ``voxels`` far, along every axis or each (which is what "3 iterations" of a cube
    do)."""
    reach = [voxels] * mask.ndim if isinstance(voxels, int) else list(voxels)
    return ndimage.maximum_filter(mask, [2 * r + 1 for r in reach], mode="constant")


def reach(millimetres: float, spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """Whole voxels along each axis that are nearest to a length."""
    return tuple(round(millimetres / s) for s in spacing_mm)


def fuse(
    maps: Mapping[str, np.ndarray], region: np.ndarray, weights: Mapping[str, float] | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """Log-odds per voxel from the AOVA margin and the residuals, inside a region.

    What the paper's "residual learning" learns is unknown. With learned weights this is a logistic regression on the
    maps, a handful of numbers fitted on the adapters' training material: its 0 is the best cut there, its sigmoid a
    probability. Without, it is the account of the paper: standardised residuals added half and
    half, cut by Otsu's threshold within the region; AOVA then only says where to look.

    Args:
        maps: ``aova`` (margin) and any of ``pixel``, ``feature``; each (X, Y, Z).
        region: (X, Y, Z) bool, the dilated AOVA mask.
        weights: {"bias": b, map name: weight}; a map whose weight is 0 need not be there. None: Otsu.

    Returns:
        (X, Y, Z) float32 log-odds, ``-LOGIT_LIMIT`` outside the region, and what was used, for the record.
    """
    logits = np.full(region.shape, -LOGIT_LIMIT, np.float32)
    residuals = [name for name in ("pixel", "feature") if name in maps]
    if not region.any():
        return logits, {}
    if weights:
        used = dict(weights)
        values = used["bias"] + sum(w * maps[n][region] for n, w in used.items() if n != "bias" and w != 0)
    elif not residuals:
        used, values = {"bias": 0.0, "aova": 1.0}, maps["aova"][region]
    else:
        total = sum(BETA[name] for name in residuals)
        mixed = np.sum([BETA[name] / total * _standardised(maps[name][region]) for name in residuals], axis=0)
        cut = float(threshold_otsu(mixed)) if mixed.min() < mixed.max() else float(mixed.max())
        used, values = {"otsu": cut, **{name: BETA[name] / total for name in residuals}}, mixed - cut
    logits[region] = np.clip(values, -LOGIT_LIMIT, LOGIT_LIMIT)
    return logits, {name: float(value) for name, value in used.items()}


def fit_fusion(maps: Mapping[str, np.ndarray], target: np.ndarray, penalty: float = 1e-3) -> dict[str, float]:
    """The weights of ``fuse`` for one choice of maps, by logistic regression.

    A residual can speak for a tumour, never against one: one whose weight comes out negative follows something else, such as
    edges that the autoencoder blurs, and is left out (weight 0).

    The bias is then moved so that the cut at 0 gives the best Dice on these voxels: where tumour is rare, that cut lies
    below even odds, and Dice is what a mask is judged by.

    Args:
        maps: name -> (n,) values at voxels inside regions of the training volumes.
        target: (n,) bool, whether the voxel is tumour.
        penalty: of the weights' squares, on standardised maps.

    Returns:
        {"bias": b, map name: weight}.

    Raises:
        ValueError: only one class is there.
    """
    if target.all() or not target.any():
        raise ValueError("fitting the fusion needs voxels inside and outside tumours")
    names = sorted(maps)
    dropped: list[str] = []
    while True:
        used = [name for name in names if name not in dropped]
        weights = _regression({name: maps[name] for name in used}, target, penalty)
        negative = [name for name in used if name != "aova" and weights[name] < 0]
        if not negative:
            break
        dropped.append(min(negative, key=weights.__getitem__))
    logits = torch.from_numpy(sum(weights[name] * np.asarray(maps[name], np.float64) for name in used))
    y = torch.from_numpy(target.astype("float64"))
    order = logits.argsort(descending=True)
    hits = y[order].cumsum(0)
    dice = 2 * hits / (torch.arange(1, len(y) + 1, dtype=torch.float64) + y.sum())
    last = int(dice.argmax())  # the voxels up to here make the best mask; the cut lies below the last of them
    following = min(last + 1, len(y) - 1)
    cut = float(logits[order[last]] + logits[order[following]]) / 2
    return {"bias": -cut, **weights, **dict.fromkeys(dropped, 0.0)}


def _regression(maps: Mapping[str, np.ndarray], target: np.ndarray, penalty: float) -> dict[str, float]:
    """Weights of a logistic regression, without its bias."""
    names = sorted(maps)
    x = torch.from_numpy(np.stack([maps[n] for n in names], 1)).double()
    y = torch.from_numpy(target.astype("float64"))
    centre, spread = x.mean(0), x.std(0).clamp_min(1e-9)
    scaled = (x - centre) / spread
    weight = torch.zeros(len(names) + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = binary_cross_entropy_with_logits(scaled @ weight[:-1] + weight[-1], y)
        value = value + penalty * weight[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return dict(zip(names, (weight.detach()[:-1] / spread).tolist(), strict=True))


def fit_fusions(maps: Mapping[str, np.ndarray], target: np.ndarray) -> dict[str, dict[str, float]]:
    """``fit_fusion`` for every choice of stages, as the entry ``fusion`` of ``config.json`` holds them.

    Args:
        maps: ``aova``, ``pixel`` and ``feature`` -> (n,) values at voxels inside regions of the training volumes.
        target: (n,) bool.

    Returns:
        ``"+".join(sorted(names))`` -> weights, for ``aova`` with either, both or none of the residuals.
    """
    others = [name for name in ("pixel", "feature") if name in maps]
    chosen = [["aova", *names] for count in range(len(others) + 1) for names in combinations(others, count)]
    return {"+".join(sorted(c)): fit_fusion({name: maps[name] for name in c}, target) for c in chosen}


def keep_components(mask: np.ndarray, min_voxels: int, most: int | None = None) -> np.ndarray:
    """The connected parts (26-neighbourhood) of at least ``min_voxels`` voxels, the ``most`` largest of them."""
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(parts.ravel())[1:]
    order = [p for p in np.argsort(-sizes, kind="stable") if sizes[p] >= max(1, min_voxels)][:most]
    return np.isin(parts, [p + 1 for p in order]) if count else np.zeros_like(mask)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def voxels_of(millilitres: float, spacing_mm: Sequence[float]) -> int:
    """Whole voxels that make up a volume."""
    return math.ceil(millilitres * 1000 / math.prod(spacing_mm))
