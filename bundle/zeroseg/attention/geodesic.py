"""Geodesic distance over the token grid: how much the attention changes on the way from one token to another."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.attention.merge import KLDistance

LEAST_STEP = 1e-3
"""Cost of a step where nothing changes, as a share of the mean step: paths stay short in flat regions."""

_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""(down, right) of the steps to half of a token's neighbours; the other half are the same steps the other way round."""


@cache
def neighbours(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end token of every step of the 8-neighbourhoods of a (side, side) grid, each step once."""
    index = np.arange(side * side)
    column, starts, ends = index % side, [], []
    for down, right in _DIRECTIONS:
        offset = down * side + right
        inside = (offset > 0) & (column + right >= 0) & (column + right < side) & (index + offset < side * side)
        starts.append(index[inside])
        ends.append(index[inside] + offset)
    return np.concatenate(starts), np.concatenate(ends)


def step_graph(side: int, steps: np.ndarray, least: float) -> csr_matrix:
    """Graph over the tokens of a grid.

    Args:
        side: tokens along a side.
        steps: (S,) costs in the order of ``neighbours``.
        least: what a step costs at least, as a share of the mean step.
    """
    cost = steps.astype(np.float64)
    if len(cost):
        # Zero would mean "no edge".
        cost += max(least * float(cost.mean()), float(np.finfo(np.float64).tiny))
    return csr_matrix((cost, neighbours(side)), shape=(side * side,) * 2)


class TokenPaths:
    """Shortest paths between the tokens of an image, through their 8-neighbourhoods.

    A step costs the root of the symmetric KL divergence between both tokens' attention maps. Plain divergence between two
    distant tokens says whether they look alike, wherever they are; the geodesic distance (Criminisi et al. 2008, for
    colours) says whether one is reached from the other without crossing an edge. Two livers alike but apart are far
    away, a shaded object is near all through.

    Args:
        distance: of the (N, N) aggregated attention of a square grid.

    Attributes:
        steps: (S,) float32, the root of the divergence of every step, in the order of ``neighbours``.
    """

    def __init__(self, distance: KLDistance):
        tokens = len(distance.maps)
        side = grid_side(tokens)
        column = torch.arange(tokens, device=distance.maps.device) % side
        costs = []
        for down, right in _DIRECTIONS:
            offset = down * side + right
            if 0 < offset < tokens:
                stays = ((column + right >= 0) & (column + right < side))[: tokens - offset]
                costs.append(distance.apart(offset).sqrt()[stays])
        self.steps = torch.cat(costs).cpu().numpy() if costs else np.zeros(0, np.float32)
        self._graph = step_graph(side, self.steps, LEAST_STEP)

    def __call__(self, tokens: list[int]) -> Tensor:
        """(A, N) float32 distances from each of A tokens to every token."""
        return torch.from_numpy(dijkstra(self._graph, directed=False, indices=list(tokens)).astype(np.float32))
