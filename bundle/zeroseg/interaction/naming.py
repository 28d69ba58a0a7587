"""Names for segments: an open-vocabulary label map from a list of nouns.

Where a noun is, is what the rule ``text`` would answer: the merge proposes the objects, words name them. A segment of which more than half
lies there may bear its name; of several such nouns that one is taken whose own evidence stands out most in the segment and of which the image
is surest. A noun that fails the test of presence names nothing, whatever its evidence, and neither does a kind of image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zeroseg.interaction.text import TextEvidence, standardise
from zeroseg.interaction.vocabulary import Meaning

BACKGROUND = "background"
"""The noun that stands for "none": it names what no other noun fits."""
SURENESS, MOST_SURE = 0.25, 4.0
"""Weight of a noun's certainty, cut off at the second number, beside how its evidence stands out in a segment, in standard deviations.
Chosen on development images."""


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
    where: Callable[[TextEvidence], Tensor],
    owner: Tensor,
    count: int,
    least_certainty: float,
) -> Naming:
    """Give each segment the noun that fits it best, if one fits.

    Args:
        nouns: as given.
        meanings: what each is taken for.
        evidence: for each, on the grid of ``owner``; None for ``background`` and for words that are not known.
        where: evidence -> (N,) bool, where the thing would be; asked only for nouns that are present and somewhere.
        owner: (N,) the segment of each token, 0..count-1.
        count: number of segments.
        least_certainty: t-value of the evidence below which a noun is absent.
    """
    tokens = torch.bincount(owner, minlength=count).clamp_min(1)

    def mean(values: Tensor) -> Tensor:
        """(N,) -> (count,) over each segment."""
        values = values.to(owner.device, torch.float32)
        return values.new_zeros(count).index_add(0, owner, values) / tokens

    shares = torch.zeros(count, len(nouns), device=owner.device)
    scores = torch.full_like(shares, -torch.inf)
    present = [e is not None and e.certainty >= least_certainty for e in evidence]
    for k, found in enumerate(evidence):
        # A kind of image, such as "chest x-ray", is nowhere in particular.
        if found is not None and present[k] and found.relevance.min() < found.relevance.max():
            shares[:, k] = mean(where(found))
            fits = shares[:, k] > 0.5
            sure = min(max(found.certainty, -MOST_SURE), MOST_SURE)
            scores[fits, k] = mean(standardise(found.relevance))[fits] + SURENESS * sure
    best = scores.argmax(1)
    best[scores.isneginf().all(1)] = len(nouns)
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
