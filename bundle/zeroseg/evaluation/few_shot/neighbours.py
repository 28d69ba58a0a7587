"""What labels are worth without a network: every pixel or voxel takes the label of those that look like it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

NEIGHBOURS, SAMPLED = 15, 4000
"""Neighbours that vote, and pixels or voxels of each case they are chosen from."""


class Neighbours:
    """Labels by majority of the nearest.

    Args:
        values: of each case (N, F), in units of which one is hardly seen.
        labels: of each case (N,) bool.
        seed: of the choice.
    """

    def __init__(self, values: Sequence[np.ndarray], labels: Sequence[np.ndarray], seed: int):
        rng = np.random.default_rng(seed)
        chosen = [rng.choice(len(one), min(SAMPLED, len(one)), replace=False) for one in values]
        known = np.concatenate([one[picked] for one, picked in zip(values, chosen, strict=True)])
        wanted = np.concatenate([one[picked] for one, picked in zip(labels, chosen, strict=True)])
        self._model = KNeighborsClassifier(min(NEIGHBOURS, len(wanted))).fit(known, wanted)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(N, F) -> (N,) bool; values are rounded to whole units, so that each is asked for once."""
        unique, where = np.unique(values.round(), axis=0, return_inverse=True)
        return self._model.predict(unique)[where.ravel()]
