"""Geodesic distance over the token grid: how much the attention changes on the way from one token to another."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.attention.merge import KLDistance

LEAST_STEP = 1e-3
"""Cost of a step where nothing changes, as a share of the mean step: paths stay short in flat regions."""


class TokenPaths:
    """Shortest paths between the tokens of an image, through their 8-neighbourhoods.

    A step costs the root of the symmetric KL divergence between both tokens' attention maps. Plain divergence between two
    distant tokens says whether they look alike, wherever they are; the geodesic distance (Criminisi et al. 2008, for
    colours) says whether one is reached from the other without crossing an edge. Two livers alike but apart are far
    away, a shaded object is near all through.

    Args:
        distance: of the (N, N) aggregated attention of a square grid.
    """

    def __init__(self, distance: KLDistance):
        tokens = len(distance.maps)
        side = grid_side(tokens)
        index = torch.arange(tokens, device=distance.maps.device)
        column = index % side
        starts, ends, costs = [], [], []
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            offset = down * side + right
            if offset <= 0 or offset >= tokens:
                continue
            stays = ((column + right >= 0) & (column + right < side))[: tokens - offset]
            cost = distance.apart(offset).sqrt()[stays]
            start = index[: tokens - offset][stays]
            starts.append(start)
            ends.append(start + offset)
            costs.append(cost)
        if not starts:  # a single token
            self._graph = csr_matrix((tokens, tokens))
            return
        cost = torch.cat(costs).double().cpu().numpy()
        cost += max(LEAST_STEP * float(cost.mean()), np.finfo(np.float64).tiny)  # zero would mean "no edge"
        start, end = torch.cat(starts).cpu().numpy(), torch.cat(ends).cpu().numpy()
        self._graph = csr_matrix((cost, (start, end)), shape=(tokens, tokens))

    def __call__(self, tokens: list[int]) -> Tensor:
        """(A, N) float32 distances from each of A tokens to every token."""
        return torch.from_numpy(dijkstra(self._graph, directed=False, indices=list(tokens)).astype(np.float32))
