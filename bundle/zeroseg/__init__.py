"""ZeroSeg: zero-shot segmentation of biomedical images with frozen diffusion models (ADZUS, DiffuGTS)."""

__version__ = "0.1.0"
