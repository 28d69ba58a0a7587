"""Fixtures shared by all tests: a tiny Stable-Diffusion-shaped pipeline built on the spot, and the embedded backbone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before torch is imported: as `zeroseg` itself does, because several tests and servers share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

# No test may reach a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "OMP_NUM_THREADS" not in os.environ:
    # More threads than free cores make torch wait at every operation.
    torch.set_num_threads(min(2, os.cpu_count() or 1))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """What tests and their servers leave among the temporary files goes with pytest's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


def save_tiny_pipeline(folder: Path, sample_size: int = 16) -> Path:
    """Save a random pipeline of the Stable Diffusion 1.x layout: 4 UNet levels, factor-8 autoencoder, CLIP text encoder."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from train_backbone import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["chest x-ray with lungs", "blood smear with white blood cell"], folder / "words")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=sample_size * 8,
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """Folder of a tiny random pipeline as ``save_pretrained`` writes it."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_backbone(tiny_pipeline):
    """The tiny pipeline, loaded; shared, because nothing in it ever changes."""
    from zeroseg.backbones import StableDiffusionBackbone

    return StableDiffusionBackbone(tiny_pipeline, device="cpu").load()


@pytest.fixture(scope="session")
def embedded_backbone():
    """The weights that ship with the bundle."""
    from zeroseg.backbones import StableDiffusionBackbone

    return StableDiffusionBackbone(device="cpu").load()


@pytest.fixture(scope="session")
def tiny_tumor_model(tmp_path_factory) -> Path:
    """Folder of a tiny random model in the layout of ``bundle/models/tumor``."""
    from tumor_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tumor") / "model")


@pytest.fixture(scope="session")
def tiny_maisi(tiny_tumor_model):
    """Its backbone, loaded; shared, because nothing in it ever changes."""
    from zeroseg.backbones.maisi import MaisiBackbone

    return MaisiBackbone(tiny_tumor_model, device="cpu").load()


@pytest.fixture
def disc():
    """A bright disc on a dark, slightly noisy ground: (3, 96, 96) float32 in [0, 1] and its (96, 96) bool mask."""
    y, x = np.mgrid[:96, :96]
    mask = (x - 40) ** 2 + (y - 52) ** 2 < 20**2
    rng = np.random.default_rng(0)
    image = np.where(mask, 0.8, 0.2)[None] + 0.02 * rng.standard_normal((3, 96, 96))
    return np.clip(image, 0, 1).astype(np.float32), mask
