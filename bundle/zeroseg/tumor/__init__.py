"""DiffuGTS: text-prompted tumour segmentation in volumes by a frozen latent diffusion model (arXiv 2505.02753).

No code of the paper is public. What is known of it, and each choice made where it is silent, is said where it is made;
the modules follow the paper's order: ``prompts``, ``adapters`` and ``aova`` (anomaly-aware open-vocabulary attention),
``inpainting`` (the pseudo-healthy counterpart), ``residuals`` (mask refinement), ``inferer`` (all of it together).
"""

from zeroseg.tumor.adapters import AovaAdapters, AovaOutput
from zeroseg.tumor.inferer import EncodedVolume, TumorSegmentation, TumorSegmentationInferer
from zeroseg.tumor.prompts import prompt_set

__all__ = [
    "AovaAdapters",
    "AovaOutput",
    "EncodedVolume",
    "TumorSegmentation",
    "TumorSegmentationInferer",
    "prompt_set",
]
