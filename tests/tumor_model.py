"""A tiny random model in the layout of ``bundle/models/tumor``, for tests of everything that needs one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from zeroseg.backbones.maisi import COMPACT, build_autoencoder, build_unet, record_stages
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.tumor import AovaAdapters
from zeroseg.tumor.prompts import MODALITIES, TEMPLATES, grammar, prompt_set

TEXT_DIM = 16


def tiny_config() -> dict:
    """COMPACT with a few channels, one residual block a level and windows of 32 voxels."""
    config = copy.deepcopy(COMPACT)
    config["autoencoder"].update(num_channels=[4, 8, 8], num_res_blocks=[1, 1, 1], norm_num_groups=2)
    config["unet"].update(num_channels=[8, 16], attention_levels=[False, True], num_head_channels=[0, 8])
    config["unet"].update(norm_num_groups=4, num_res_blocks=1)
    config["window"] = [32, 32, 32]
    return config


def fill_zeros(unet: torch.nn.Module) -> None:
    """Give the layers that MONAI initialises with zeros random weights, so that the answer depends on every input."""
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def save_text_encoder(folder: Path) -> Path:
    """A one-layer BERT with random weights whose vocabulary is the prompt grammar's words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = {w for organ, tumor, _, _ in grammar() for w in f"{organ} {tumor}".split()}
    words |= {w for t in TEMPLATES.values() for s in t for w in s.format(organ="", tumor="", modality="").split()}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*special, *sorted(words | {m.lower() for m in MODALITIES.values()})]
    BertTokenizer(vocab={w: i for i, w in enumerate(names)}, do_lower_case=True).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=TEXT_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write the whole folder: networks, adapters and text encoder, all random."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config()
    unet = build_unet(config)
    fill_zeros(unet)
    save_text_encoder(folder / "text")
    autoencoder = build_autoencoder(config)
    adapters = AovaAdapters(config["autoencoder"]["num_channels"], TEXT_DIM, hidden=2, context=((), (3,), (7,)))
    spread_margin(adapters, autoencoder, TextEncoder(folder / "text", device="cpu"))
    save_file(autoencoder.state_dict(), folder / "autoencoder.safetensors")
    save_file(unet.state_dict(), folder / "unet.safetensors")
    save_file(adapters.state_dict(), folder / "adapters.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "adapters": adapters.options}))
    return folder


@torch.no_grad()
def spread_margin(adapters: AovaAdapters, autoencoder: torch.nn.Module, encoder: TextEncoder) -> None:
    """Scale and shift a random margin, so that a fifth of a noise volume lies above 0 and some of it far above."""
    with record_stages(autoencoder.encoder) as features:
        autoencoder.encode(torch.rand(1, 1, 16, 16, 16))
    adapters.calibrate(features)
    asked = prompt_set("liver", None, "ct")
    adapters.bias.zero_()
    prompts, roles = encoder.embed([text for _, text in asked]), [role for role, _ in asked]
    for stage in adapters.stages:  # a random encoder's sentences differ by little
        stage.text[0].bias.copy_(-stage.text[0].weight @ prompts.mean(0))
        stage.text[0].weight *= 30
        stage.text[0].bias *= 30
    margin = adapters(features, prompts, roles).margin
    adapters.log_temperature += float(torch.log(2 / margin.std()))
    adapters.bias -= float(adapters(features, prompts, roles).margin.quantile(0.8))
