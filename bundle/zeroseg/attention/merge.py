"""Steps 2 and 3 of ADZUS: merge attention maps that agree, and give every pixel to the map that claims it most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.attention.aggregate import grid_side

_TINY = torch.finfo(torch.float32).tiny  # log stays finite where a probability underflowed to zero


class KLDistance:
    """Symmetric KL divergence to a fixed set of distributions, whose logarithms are taken once.

    D(p, q) = 1/2 sum_i (p_i - q_i)(log p_i - log q_i), expanded so that all pairs cost two matrix products and two
    entropies instead of an (A, B, N) broadcast.

    Args:
        maps: (B, N) distributions q.
    """

    def __init__(self, maps: Tensor):
        self.maps = maps.float()
        self._log = self.maps.clamp_min(_TINY).log_()
        # Any common shift of all logarithms cancels in the formula as long as rows sum alike; taking out their mean makes
        # the terms small, so that float32 products keep the digits that a threshold is compared with.
        self._shift = self._log.mean(0, keepdim=True)
        self._log.sub_(self._shift)
        # In blocks that stay in the cache: a whole product would be a third large matrix, most of whose time is its allocation.
        self._own = torch.cat([(p * q).sum(-1) for p, q in zip(self.maps.split(64), self._log.split(64), strict=True)])

    def __call__(self, p: Tensor) -> Tensor:
        """(A, N) distributions -> (A, B) float32, non-negative, in nats."""
        p = p.float()
        log_p = p.clamp_min(_TINY).log_().sub_(self._shift)
        cross = torch.addmm(p @ self._log.T, log_p, self.maps.T)
        return (((p * log_p).sum(-1)[:, None] + self._own[None, :] - cross) / 2).clamp_min_(0)

    def apart(self, offset: int) -> Tensor:
        """(B - offset,) divergences between each map and the one ``offset`` rows below it, without all the other pairs."""
        count, block = len(self.maps) - offset, 64  # blocks stay in the cache; whole products would not
        cross = torch.empty(count, device=self.maps.device)
        for start in range(0, count, block):
            i, j = slice(start, min(start + block, count)), slice(start + offset, min(start + block, count) + offset)
            cross[i] = (self.maps[i] * self._log[j]).sum(1) + (self.maps[j] * self._log[i]).sum(1)
        return ((self._own[:count] + self._own[offset:] - cross) / 2).clamp_min_(0)


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of both Kullback-Leibler divergences, for all pairs of distributions; see ``KLDistance``.

    Args:
        p: (A, N) distributions.
        q: (B, N) distributions.

    Returns:
        (A, B) float32, non-negative, in nats.
    """
    return KLDistance(q)(p)


def anchor_indices(side: int, grid: int) -> Tensor:
    """Token indices of the ``grid`` x ``grid`` anchors spread over a ``side`` x ``side`` grid, row by row (DiffSeg).

    The spacing is (side - 1) // (grid - 1) tokens and the rest is split over both margins; a grid denser than the
    tokens takes every token.

    Raises:
        ValueError: the grid is below 1.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, not {grid}")
    grid = min(grid, side)
    spacing = (side - 1) // (grid - 1) if grid > 1 else 0
    start = (side - 1 - spacing * (grid - 1)) // 2
    line = start + spacing * torch.arange(grid)
    return (line[:, None] * side + line[None, :]).flatten()


def merge_attention(attention: Tensor, thresholds: Sequence[float], grid: int = 16) -> Tensor:
    """Merge attention maps into object proposals (DiffSeg, section 3.3; ADZUS step 2).

    First iteration: every anchor becomes the mean of ALL maps closer to it than the first threshold, so neighbours may
    share maps. Each later iteration walks the maps in order and greedily replaces a map, if nothing has absorbed it yet,
    by the mean of every map closer than that iteration's threshold, absorbed or not.

    Args:
        attention: (N, N), rows are distributions over a square grid (``aggregate_self_attention``).
        thresholds: largest symmetric KL divergence, in nats, at which two maps are the same object; one per iteration.
        grid: anchors along a side of the grid.

    Returns:
        (K, N) float32 proposals, rows are distributions, in the order of their anchors.

    Raises:
        ValueError: attention is not (N, N) over a square grid, or thresholds is empty or not positive.
    """
    if attention.ndim != 2 or attention.shape[0] != attention.shape[1]:
        raise ValueError(f"attention must be (N, N), not {tuple(attention.shape)}")
    if not len(thresholds) or min(thresholds) <= 0:
        raise ValueError(f"thresholds must be a non-empty sequence of positive numbers, not {thresholds!r}")
    attention = attention.float()
    anchors = anchor_indices(grid_side(attention.shape[0]), grid).to(attention.device)
    proposals = _merge_around(anchors, attention, symmetric_kl(attention[anchors], attention) < thresholds[0])
    for threshold in thresholds[1:]:
        proposals = _merge_greedily(proposals, symmetric_kl(proposals, proposals) < threshold)
    return proposals


def merge_to(distance: KLDistance, max_segments: int, grid: int = 16) -> tuple[Tensor, list[float]]:
    """``merge_attention`` with thresholds found for this image: the smallest that leave at most ``max_segments``.

    How far apart attention maps lie depends on the model, the image and the timestep, by orders of magnitude, which is
    what makes fixed thresholds fragile. Here the first threshold is a low quantile of the image's own distances and the
    second is found by bisection; there are two iterations. Both lie in the middle of a gap between two distances, so that
    processors that round differently merge alike.

    Args:
        distance: to the (N, N) aggregated attention of ``merge_attention``.
        max_segments: most proposals wanted, at least 1.
        grid: anchors along a side.

    Returns:
        (K, N) proposals, K <= max_segments, and the two thresholds in nats.

    Raises:
        ValueError: max_segments is below 1.
    """
    if max_segments < 1:
        raise ValueError(f"max_segments must be at least 1, not {max_segments}")
    attention = distance.maps
    anchors = anchor_indices(grid_side(attention.shape[0]), grid).to(attention.device)
    to_all = distance(attention[anchors])
    first = _widest_gap(to_all, float(to_all[:, anchors].quantile(FIRST_QUANTILE)))
    proposals = _merge_around(anchors, attention, to_all < first)
    apart = symmetric_kl(proposals, proposals)
    levels = _levels(apart)
    # The highest level merges everything, so the invariant holds: high is enough. The lowest may be, too.
    low, high = -1, len(levels) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if len(_greedy_groups(apart < levels[middle])) <= max_segments:
            high = middle
        else:
            low = middle
    return _merge_greedily(proposals, apart < levels[high]), [first, levels[high]]


FIRST_QUANTILE = 0.05
"""Share of the distances between anchors that counts as "the same" in the first iteration of ``merge_to``."""
NEARBY = 0.01
"""Relative distance from that quantile within which the widest gap is looked for."""
LEAST_GAP = 1e-4
"""Relative gap between two distances in which a threshold may lie: several times what processors round differently."""


def _widest_gap(distances: Tensor, level: float) -> float:
    """The middle of the widest gap between distances near a level: a threshold that rounding does not carry over one."""
    low, high = level * (1 - NEARBY), level * (1 + NEARBY)
    near = distances[(distances > low) & (distances < high)].double().sort().values
    near = torch.cat([near.new_tensor([low]), near, near.new_tensor([high])])
    at = int(near.diff().argmax())
    return max(_TINY, float(near[at] + near[at + 1]) / 2)


def _levels(apart: Tensor) -> list[float]:
    """Thresholds that differ in what they merge, rising: the middles of the gaps between (K, K) distances, and one above all.

    Both directions of a pair are one distance that rounding made two, so gaps below ``LEAST_GAP`` are none.
    """
    values = apart[~torch.eye(len(apart), dtype=torch.bool, device=apart.device)].double().sort().values
    if not len(values):
        return [_TINY]
    low, high = values[:-1], values[1:]
    middles = ((low + high) / 2)[high - low > LEAST_GAP * high]
    return [float(v) for v in (*middles.tolist(), max(_TINY, 2 * float(values[-1]))) if v >= _TINY]


def _merge_around(anchors: Tensor, attention: Tensor, near: Tensor) -> Tensor:
    near = near.float()
    near[torch.arange(len(anchors)), anchors] = 1  # a map agrees with itself, whatever the rounding
    return (near @ attention) / near.sum(1, keepdim=True)


def _greedy_groups(near: Tensor) -> list[int]:
    """Rows that survive the greedy walk over a (K, K) bool matrix of agreement."""
    absorbed = torch.zeros(len(near), dtype=torch.bool)
    kept = []
    for i, row in enumerate(near.cpu()):
        if not absorbed[i]:
            absorbed |= row
            absorbed[i] = True
            kept.append(i)
    return kept


def _merge_greedily(proposals: Tensor, near: Tensor) -> Tensor:
    near.fill_diagonal_(True)
    weights = near[_greedy_groups(near)].float()
    return (weights @ proposals) / weights.sum(1, keepdim=True)


def label_map(proposals: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Give every pixel to the proposal that is largest there (DiffSeg's non-maximum suppression; ADZUS step 3).

    Args:
        proposals: (K, N) over a square grid.
        size: (H, W) of the label map, or one side of a square.

    Returns:
        (H, W) int64 labels in 0..K-1; bilinear resizing with half-pixel centres, ties go to the lower label.

    Raises:
        ValueError: proposals is empty or does not lie on a square grid.
    """
    if proposals.ndim != 2 or not len(proposals):
        raise ValueError(f"proposals must be (K, N) with K >= 1, not {tuple(proposals.shape)}")
    side = grid_side(proposals.shape[1])
    height, width = (size, size) if isinstance(size, int) else size
    best = torch.full((height, width), -torch.inf, device=proposals.device)
    labels = torch.zeros((height, width), dtype=torch.int64, device=proposals.device)
    for start in range(0, len(proposals), 32):  # a few at a time: K full-size maps need not exist together
        part = proposals[start : start + 32].float().view(-1, 1, side, side)
        part = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        top, index = part.max(0)
        better = top > best
        best = torch.where(better, top, best)
        labels = torch.where(better, index + start, labels)
    return labels
