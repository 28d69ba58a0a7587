"""Training of the adapters, the only part of DiffuGTS that learns from masks (paper section 2.1; ``configs/train_tumor.yaml``).

Everything else is frozen. Training has two phases. First, voxels: every volume goes through the encoder once, what the adapters
see of some of its voxels is kept, and each step draws from dozens of volumes. Then, volumes: whole ones,
encoded anew, which fits what needs them: interpolation between the stages, calibration, the image-level answer. The paper's losses are known from a third-party account: an image-level anomaly term, an alignment of pooled
features with the text, and Dice. ZeroSeg adds cross-entropy per voxel, which is what calibrates the 0.5 of
``AovaOutput.probability``, and trains on absence: healthy volumes, other organs' words and nonsense words must find nothing.

``cases`` says what is trained on, ``questions`` what is asked, ``samples`` what a step sees, ``terms`` what it costs, ``fusion``
what is fitted afterwards; ``trainer`` ties them.
"""

from zeroseg.tumor.training.cases import CaseSets, TrainingCase, gather_cases, read_cases, refuse_held_out
from zeroseg.tumor.training.fusion import FusionFitter
from zeroseg.tumor.training.questions import Questions
from zeroseg.tumor.training.samples import CaseReader, Sampling, cropped
from zeroseg.tumor.training.terms import volume_terms, voxel_terms
from zeroseg.tumor.training.trainer import AdapterTrainer, Schedule, run

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
    "read_cases",
    "refuse_held_out",
    "run",
    "volume_terms",
    "voxel_terms",
]
