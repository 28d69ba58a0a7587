"""Model files as their publishers write them, small and with random weights: no real one can be fetched where tests run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import monai.transforms as mt
import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.utils import first
from torch import nn

from tumor_model import fill_zeros
from zeroseg.backbones import maisi


@dataclass
class Release:
    """The two files of a MAISI release and what they hold."""

    autoencoder_file: Path
    unet_file: Path
    autoencoder: nn.Module
    unet: nn.Module
    scale_factor: float


def trainer_scale_factor(folder: Path) -> MetaTensor:
    """The scale factor as NVIDIA's ``diff_model_train.py`` works it out: of the first batch of latents, loaded by MONAI from
    NIfTI files, with spacings beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).normal(0, 0.8, (8, 8, 8, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 2, 1])), folder / "case_emb.nii.gz")
    (folder / "case.json").write_text(json.dumps({"spacing": [1.5, 1.5, 2.0]}))
    transforms = mt.Compose(
        [
            mt.LoadImaged(keys="image"),
            mt.EnsureChannelFirstd(keys="image"),
            mt.Lambdad(keys="spacing", func=lambda x: torch.FloatTensor(json.loads(Path(x).read_text())["spacing"])),
            mt.Lambdad(keys="spacing", func=lambda x: x * 1e2),
        ]
    )
    case = {"image": str(folder / "case_emb.nii.gz"), "spacing": str(folder / "case.json")}
    loader = DataLoader(CacheDataset([case], transforms, cache_rate=0, progress=False), batch_size=1)
    return 1 / torch.std(first(loader)["image"])


def save_release(folder: Path, kind: str, overrides: Mapping, seed: int = 1) -> Release:
    """Write ``autoencoder_v1.pt`` (``_v2`` for rflow-mr) and ``diff_unet_3d_<kind>.pt``.

    Args:
        kind: one of ``RELEASES``; the DDPM release gets the projections that were saved and never applied.
        overrides: of its config, to make it small.
    """
    config = maisi._merged(maisi.RELEASES[kind], overrides)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    autoencoder, unet = maisi.build_autoencoder(config), maisi.build_unet(config)
    fill_zeros(unet)
    state = unet.state_dict()
    if kind == "ddpm-ct":
        for key in [k for k in state if k.endswith(".attn.to_q.weight")]:
            layer = key.removesuffix("to_q.weight")
            width = len(state[key])
            state[f"{layer}out_proj.weight"] = torch.randn(width, width)
            state[f"{layer}out_proj.bias"] = torch.randn(width)
    factor = trainer_scale_factor(folder / "embeddings")
    version = 2 if kind == "rflow-mr" else 1
    name = {"rflow-mr-brain": "rflow-mr-brain_v1"}.get(kind, kind)
    paths = folder / f"autoencoder_v{version}.pt", folder / f"diff_unet_3d_{name}.pt"
    # One release's autoencoder is a bare state dict, another's lies under the key of the UNet.
    torch.save({"unet_state_dict": autoencoder.state_dict()} if version == 2 else autoencoder.state_dict(), paths[0])
    content = {"epoch": 3, "loss": torch.tensor(0.5), "num_train_timesteps": 1000, "scale_factor": factor}
    torch.save({**content, "unet_state_dict": state}, paths[1])
    return Release(*paths, autoencoder.eval(), unet.eval(), float(factor))


# Stable Diffusion ------------------------------------------------------------------------------------------------------

KINDS = ("1.5", "2.1", "xl")


def _text_config(tokenizer, width: int, **options):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def save_stable_diffusion(folder: Path, kind: str, tokenizer, **unet_options) -> Path:
    """A pipeline of one of ``KINDS``, as diffusers saves it, with few channels; its UNet differs by ``unet_options``."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    levels = 3 if kind == "xl" else 4
    options = {
        "sample_size": {"1.5": 16, "2.1": 24, "xl": 16}[kind],
        "block_out_channels": (16, 16, 32, 32)[-levels:],
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    }
    if kind == "2.1":
        options |= {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True}
    if kind == "xl":
        options |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 4),
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 16 + 24,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        }
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=options["sample_size"] * 8,
    )
    parts = {"vae": vae, "unet": diffusers.UNet2DConditionModel(**{**options, **unet_options}), "tokenizer": tokenizer}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    text_encoder = CLIPTextModel(_text_config(tokenizer, 16))
    if kind == "xl":
        second = CLIPTextModelWithProjection(_text_config(tokenizer, 24, projection_dim=24))
        pipeline = diffusers.StableDiffusionXLPipeline(
            text_encoder=text_encoder,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            scheduler=diffusers.EulerDiscreteScheduler(**betas),
            add_watermarker=False,
            **parts,
        )
    else:
        prediction = "v_prediction" if kind == "2.1" else "epsilon"
        scheduler = {"1.5": diffusers.PNDMScheduler, "2.1": diffusers.DDIMScheduler}[kind]
        pipeline = diffusers.StableDiffusionPipeline(
            text_encoder=text_encoder,
            scheduler=scheduler(**betas, prediction_type=prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def change_tensors(file: Path, change, to: Path | None = None) -> None:
    """Rewrite a safetensors file (or write another) with ``change`` made to its dict of tensors."""
    from safetensors.torch import load_file, save_file

    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, to or file, metadata={"format": "pt"})


def as_hub_repository(folder: Path) -> Path:
    """Everything that lies beside the needed files in a repository such as Stable Diffusion 1.5's."""
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        plain = folder / part / f"{stem}.safetensors"
        change_tensors(plain, lambda t: {k: v.half() for k, v in t.items()}, folder / part / f"{stem}.fp16.safetensors")
        torch.save({}, folder / part / f"{stem}.bin")
    change_tensors(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        lambda t: {k: v + 1 for k, v in t.items()},
        folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors",
    )
    for name in ("v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors", "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"gigabytes that nobody needs")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a pickle")
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
