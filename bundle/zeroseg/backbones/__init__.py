"""Frozen models, where their weights come from, and how attention and features are read out of them."""

from zeroseg.backbones.diffusion import StableDiffusionBackbone
from zeroseg.backbones.frozen import pick_device
from zeroseg.backbones.recording import Recording, record
from zeroseg.backbones.weights import EMBEDDED, file_sha256, fingerprint, resolve_folder, verify_sums

__all__ = [
    "EMBEDDED",
    "Recording",
    "StableDiffusionBackbone",
    "file_sha256",
    "fingerprint",
    "pick_device",
    "record",
    "resolve_folder",
    "verify_sums",
]
