"""What the promptable head reads of an encoded image: a few maps over its tokens that any diffusion backbone gives.

All are relative to the image itself (ranks, shares of a mean), so that a head trained over one backbone reads another's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.attention.geodesic import TokenPaths, neighbours, step_graph
from zeroseg.attention.merge import KLDistance

COORDINATES = 12
"""Leading coordinates kept of every token's attention map."""
REACH = 2.0
"""Geodesic distance at which a prompt's relevance has fallen to 1/e, in mean distances of the image."""
LEAST_STEP = 1e-2
"""Cost of a step where nothing changes, as a share of the mean step: paths stay short in flat regions."""

KEPT = 64
"""Prompted tokens whose relevance is kept."""


@dataclass
class Readout:
    """Maps over the (side, side) tokens of one image.

    Attributes:
        side: tokens along a side.
        steps: (S,) float32, cost of every step between neighbours (root of the symmetric KL divergence of their attention maps)
            in mean steps of the image.
        coordinates: (COORDINATES, side * side) float32; the distance between two tokens' coordinates, in units of the image's
            mean, says how unlike their attention is wherever they lie.
        salience: (side * side,) float32 in [0, 1], how every token stands out from the frame.
    """

    side: int
    steps: np.ndarray
    coordinates: np.ndarray
    salience: np.ndarray
    _graph: csr_matrix | None = field(default=None, repr=False)
    _kept: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def edges(self) -> np.ndarray:
        """(side * side,) float32 in [0, 1): mean cost of the steps that leave a token, squashed."""
        start, end = neighbours(self.side)
        tokens = self.side**2
        total = np.bincount(start, self.steps, tokens) + np.bincount(end, self.steps, tokens)
        count = np.bincount(start, minlength=tokens) + np.bincount(end, minlength=tokens)
        mean = total / np.maximum(count, 1)
        return (mean / (1 + mean)).astype(np.float32)

    def relevance(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one prompted token: how easily every token is reached from it, and how alike it is; both (N,) in (0, 1]."""
        if token not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            if self._graph is None:
                self._graph = step_graph(self.side, self.steps, LEAST_STEP)
            away = dijkstra(self._graph, directed=False, indices=token)
            near = np.exp(-away / max(REACH * away.mean(), 1e-12)).astype(np.float32)
            apart = np.linalg.norm(self.coordinates - self.coordinates[:, token : token + 1], axis=0)
            answer = near, np.exp(-2 * apart).astype(np.float32)
            self._kept[token] = answer
            return answer
        return self._kept[token]


def read_out(distance: KLDistance, paths: TokenPaths, salience: Tensor) -> Readout:
    """What the head reads of an image's attention.

    Args:
        distance: to the (N, N) aggregated attention.
        paths: through it.
        salience: (N,) in [0, 1], how every token stands out from the frame.
    """
    mean = float(paths.steps.mean()) if len(paths.steps) else 1.0
    return Readout(
        grid_side(len(distance.maps)),
        (paths.steps / max(mean, 1e-12)).astype(np.float32),
        _coordinates(distance.maps).cpu().numpy(),
        salience.float().cpu().numpy(),
    )


def _coordinates(attention: Tensor) -> Tensor:
    """(COORDINATES, N) leading principal coordinates of the root attention maps, scaled to a mean distance of about 1.

    Found by subspace iteration from a fixed start. The Euclidean distance of two root maps is their Hellinger distance, which the
    root of a small KL divergence is proportional to.
    """
    # In blocks that stay in the cache: the roots of all maps would be one more large matrix, read five times.
    blocks, tokens = attention.split(64), len(attention)
    mean = torch.stack([_root(block).sum(0) for block in blocks]).sum(0, keepdim=True) / tokens
    count = min(COORDINATES, tokens)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(tokens, count + 4, generator=generator).to(attention.device)
    for _ in range(2):
        middle, product, total = mean @ basis, torch.zeros_like(basis), torch.zeros_like(basis[0])
        for block in blocks:
            root = _root(block)
            scores = root @ basis - middle
            product.addmm_(root.T, scores)
            total = total + scores.sum(0)
        basis = torch.linalg.qr(product - mean.T * total).Q
    scores = torch.cat([_root(block) @ basis for block in blocks]) - mean @ basis
    _, vectors = torch.linalg.eigh(scores.T @ scores)
    scores = scores @ vectors.flip(1)[:, :count]
    scale = scores.square().sum(1).mean().sqrt() * 2**0.5
    out = scores.new_zeros(COORDINATES, tokens)
    out[:count] = (scores / scale.clamp_min(1e-12)).T
    return out


def _root(maps: Tensor) -> Tensor:
    return maps.float().sqrt()
