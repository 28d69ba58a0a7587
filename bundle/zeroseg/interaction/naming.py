"""Names for segments: an open-vocabulary label map from a list of nouns.

A segment's score for a noun is the noun's evidence (``TextProbe``: contrast with the null prompt) averaged over the segment. The nouns of
one list and "none", whose score is 0, the mean of every noun's evidence, compete by a softmax. A noun that fails the test of presence
names nothing, whatever its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zeroseg.interaction.text import TextEvidence
from zeroseg.interaction.vocabulary import Meaning

BACKGROUND = "background"
"""The noun that stands for "none": it names what no other noun fits."""


@dataclass
class Naming:
    """Which noun names which segment.

    Attributes:
        nouns: as given; the k-th is label k, from 1.
        group: (K,) per segment the index of its noun, or an index of its own from ``named`` where no noun fits.
        groups: one more than the highest index.
        entries: per noun what a manifest records.
        notes: doubts a reader should know of.
    """

    nouns: tuple[str, ...]
    group: Tensor
    groups: int
    entries: list[dict]
    notes: list[str]

    @property
    def named(self) -> int:
        """Number of labels that belong to nouns."""
        return len(self.nouns)

    def describe(self, labels: np.ndarray) -> dict:
        """What a manifest records: ``labels``, name -> value of those in the label map, and ``nouns``."""
        found = {noun: k for k, noun in enumerate(self.nouns, 1) if (labels == k).any()}
        return {"labels": found, "nouns": self.entries}


def name_segments(
    nouns: tuple[str, ...],
    meanings: Sequence[Meaning],
    evidence: Sequence[TextEvidence | None],
    owner: Tensor,
    count: int,
    least_certainty: float,
) -> Naming:
    """Give each segment the noun that fits it best, if one fits.

    Args:
        nouns: as given.
        meanings: what each is taken for.
        evidence: for each, on the grid of ``owner``; None for ``background`` and for words that are not known.
        owner: (N,) the segment of each token, 0..count-1.
        count: number of segments.
        least_certainty: t-value of the evidence below which a noun is absent.
    """
    tokens = torch.bincount(owner, minlength=count).clamp_min(1)
    scores = torch.full((count, len(nouns) + 1), -torch.inf, device=owner.device)
    scores[:, -1] = 0
    present = [e is not None and e.certainty >= least_certainty for e in evidence]
    for k, found in enumerate(evidence):
        if found is not None and present[k]:
            relevance = found.relevance.to(scores.device, scores.dtype)
            scores[:, k] = scores.new_zeros(count).index_add(0, owner, relevance) / tokens
    shares = scores.softmax(1)
    best = shares.argmax(1)
    nameless = (best == len(nouns)).nonzero()[:, 0]
    background = next((k for k, noun in enumerate(nouns) if noun.casefold() == BACKGROUND), None)
    group = best.clone()
    if background is None:
        group[nameless] = len(nouns) + torch.arange(len(nameless), device=group.device)
    else:
        group[nameless] = background
    entries, notes = [], []
    for k, (noun, meaning, found) in enumerate(zip(nouns, meanings, evidence, strict=True)):
        entry = {"noun": noun, "label": k + 1, **meaning.describe()}
        if k != background:
            entry["absent"] = not present[k]
        if found is not None:
            entry |= found.record()
        if (best == k).any():
            entry["share"] = round(float(shares[best == k, k].mean()), 4)
        entries.append(entry)
        notes += meaning.notes(noun)
        if meaning.text is None:
            notes.append(f"{noun!r} names nothing: {meaning.reason}")
        elif not present[k] and k != background:
            notes.append(f"{noun!r} is absent and names nothing")
    groups = len(nouns) + (len(nameless) if background is None else 0)
    return Naming(nouns, group, groups, entries, notes)
