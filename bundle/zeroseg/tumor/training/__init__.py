"""Training of the adapters, the only part of DiffuGTS that learns from masks (paper section 2.1; ``configs/train_tumor.yaml``).

Everything else is frozen. Each step takes a case at random, changes its scale, orientation and values, perhaps grows a lesion into
it, cuts a part out, and asks two questions about it. The paper's losses are known from a third-party account: an
image-level anomaly term, an alignment of pooled features with the text, and Dice. ZeroSeg adds cross-entropy per voxel, which
is what calibrates the 0.5 of ``AovaOutput.probability``, and trains on absence: healthy volumes, other organs' words and
nonsense words must find nothing.

``cases`` says what is trained on, ``questions`` what is asked, ``lesions`` and ``samples`` what a step sees, ``terms`` what it costs, ``fusion``
what is fitted afterwards; ``trainer`` ties them.
"""

from zeroseg.tumor.training.cases import CaseSets, TrainingCase, gather_cases, read_cases, refuse_held_out
from zeroseg.tumor.training.fusion import FusionFitter
from zeroseg.tumor.training.lesions import grow_lesion
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import CaseReader, Sampling, cropped
from zeroseg.tumor.training.terms import volume_terms
from zeroseg.tumor.training.trainer import AdapterTrainer, Schedule

__all__ = [
    "AdapterTrainer",
    "CaseReader",
    "CaseSets",
    "FusionFitter",
    "Questions",
    "Sampling",
    "Schedule",
    "TrainingCase",
    "cropped",
    "gather_cases",
    "grow_lesion",
    "read_cases",
    "refuse_held_out",
    "volume_terms",
]
