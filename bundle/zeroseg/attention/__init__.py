"""ADZUS: self-attention of a frozen diffusion model, aggregated, merged, selected, refined."""

from zeroseg.attention.aggregate import aggregate_self_attention
from zeroseg.attention.encoding import EncodedImage
from zeroseg.attention.merge import label_map, merge_attention, symmetric_kl
from zeroseg.segmentation import Segmentation

__all__ = [
    "AttentionSegmentationInferer",
    "EncodedImage",
    "Segmentation",
    "aggregate_self_attention",
    "label_map",
    "merge_attention",
    "symmetric_kl",
]


def __getattr__(name: str) -> object:
    """The inferer lives with the prompts, in a package that imports this one; it is looked up when it is asked for."""
    if name == "AttentionSegmentationInferer":
        from importlib import import_module

        return import_module("zeroseg.interaction.inferer").AttentionSegmentationInferer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
