"""What a training step asks about a volume: words that fit it, another region's, and none at all."""

from __future__ import annotations

import string

import numpy as np
from torch import Tensor

from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.tumor.prompts import ANY_TUMOUR, ORGANS, default_tumor, prompt_set
from zeroseg.tumor.training.cases import TrainingCase

ORGANS_OF_REGION = {
    "limb": ("limb", "thigh", "soft tissue"),
    "abdomen": ("abdomen", "liver", "kidney", "spleen", "pancreas", "colon", "hepatic vessel"),
    "chest": ("lung",),
    "head": ("brain", "head"),
    "neck": ("nasopharynx",),
}
"""Region -> its organs. Asked for another region's tumour, nothing is to be found; within one, organs are not told apart."""
WORDS_THAT_FIT = {
    "limb": ORGANS_OF_REGION["limb"],
    "thigh": ORGANS_OF_REGION["limb"],
    "soft tissue": ORGANS_OF_REGION["limb"],
    "body": ("abdomen", "liver", "kidney", "lung", "soft tissue"),
    "brain": ("brain", "brain", "head"),
    "nasopharynx": ("nasopharynx", "nasopharynx", "head"),
}
"""Organ -> organs whose words mean it as well; others also answer to the body as a whole."""


class Questions:
    """Random prompts for a case, with whether the case holds what they ask for. Embeddings are computed once per question."""

    def __init__(self, encoder: TextEncoder, fitting: float = 0.65, nonsense: float = 0.15):
        self.encoder, self.fitting, self.nonsense = encoder, fitting, nonsense
        self._known: dict[tuple[str, str, str], tuple[Tensor, list[str]]] = {}

    def draw(self, rng: np.random.Generator, case: TrainingCase) -> tuple[str, str, bool]:
        """(organ, tumor, whether the words fit the place) for one step."""
        chance = rng.random()
        if chance < self.fitting or (case.organ == "body" and chance >= self.fitting + self.nonsense):
            organ = str(rng.choice([*WORDS_THAT_FIT.get(case.organ, (case.organ,)) * 2, "body"]))
            names = ORGANS.get(organ, (default_tumor(organ),))
            return organ, str(rng.choice(names if rng.random() < 0.7 else ANY_TUMOUR)), True
        if chance < self.fitting + self.nonsense:
            letters = list(string.ascii_lowercase)
            words = ["".join(rng.choice(letters, rng.integers(4, 10))) for _ in range(rng.integers(1, 4))]
            return (case.organ if rng.random() < 0.6 else words[0]), " ".join(words), False
        others = [o for organs in ORGANS_OF_REGION.values() if case.organ not in organs for o in organs]
        organ = str(rng.choice(others))
        return organ, str(rng.choice(ORGANS[organ])), False

    def embed(self, organ: str, tumor: str, modality: str) -> tuple[Tensor, list[str]]:
        """(N, d) embeddings of the prompts the inferer would ask, and their roles."""
        key = (organ, tumor, modality)
        if key not in self._known:
            asked = prompt_set(organ, tumor, modality)
            self._known[key] = self.encoder.embed([t for _, t in asked]).clone(), [r for r, _ in asked]
        return self._known[key]
