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
