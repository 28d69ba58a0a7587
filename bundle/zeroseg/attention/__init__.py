"""ADZUS: self-attention of a frozen diffusion model, aggregated, merged, selected, refined."""

from zeroseg.attention.aggregate import aggregate_self_attention
from zeroseg.attention.inferer import AttentionSegmentationInferer, EncodedImage
from zeroseg.attention.merge import label_map, merge_attention, symmetric_kl
from zeroseg.attention.segmentation import Segmentation

__all__ = [
    "AttentionSegmentationInferer",
    "EncodedImage",
    "Segmentation",
    "aggregate_self_attention",
    "label_map",
    "merge_attention",
    "symmetric_kl",
]
