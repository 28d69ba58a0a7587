"""A frozen Stable-Diffusion-shaped text-to-image model, loaded from one folder layout whatever its size."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroseg.backbones.frozen import FrozenModel
from zeroseg.backbones.recording import PassEnded, Recording, record
from zeroseg.backbones.weights import (
    EMBEDDED,
    choose_pipeline,
    fill,
    fingerprint,
    pipeline_parts,
    read_tensors,
    relative_files,
    resolve_folder,
    verify_sums,
    weight_files,
)
from zeroseg.errors import WeightsError, ZeroSegError, first_line, is_out_of_memory

HARMLESS = ("*.position_ids", "text_projection.weight", "logit_scale")
"""Keys that a text encoder's file may hold in excess: the numbers 0, 1, 2 ..., which old versions of transformers saved, and
the heads of the whole CLIP, which a pipeline never runs. (For the second encoder of XL the projection is no excess: it is
needed, and must be there.)"""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of an autoencoder's attention layers in files from before diffusers 0.13, Stable Diffusion 1.5's among them."""
KEPT_TEXTS = 16
"""Embeddings that a backbone keeps, at most 0.6 MB each: an image is read by the same words as the one before, mostly none."""


def _quiet() -> None:
    """Keep the libraries' loading bars and advice off the user's terminal; their errors still come through."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class StableDiffusionBackbone(FrozenModel):
    """A frozen latent diffusion model of the Stable Diffusion 1.x, 2.x or XL (base) shape.

    The weights load on first use, once, also when several threads ask at the same time; until then building one costs
    nothing. Gradients are never kept. A file that lacks a weight, or holds one that has no place, is refused by name: no
    weight is ever filled in.

    Args:
        source: ``"embedded"``, the folder of a saved diffusers pipeline, or a hub id (then ``revision`` is required).
        revision: revision of a hub id.
        device: auto, cpu, cuda[:i] or mps.
        dtype: fp32, bf16 or fp16; fp16 needs a GPU.
        untrained: give the UNet and the text encoder random weights (seed 0) in place of the stored ones. The control
            of every evaluation: what the architecture, the autoencoder and the pipeline do without learning.
        variant: which copy of the weights is read where a folder holds several, e.g. fp16 or non_ema. None: the plain
            one, or the only one. ``dtype``, not the copy, says the precision of the computation.
    """

    def __init__(
        self,
        source: str | Path = EMBEDDED,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "fp32",
        untrained: bool = False,
        variant: str | None = None,
    ):
        super().__init__(device, dtype)
        self.source, self.revision, self.untrained = str(source), revision, bool(untrained)
        self.variant = variant
        self._contexts: dict[tuple[str, ...], Tensor] = {}

    def _load(self) -> None:
        self._place()
        choose = choose_pipeline(self.variant, self.source)
        folder = resolve_folder(self.source, revision=self.revision, choose=choose)
        given_a_folder = self.source != EMBEDDED and Path(self.source).expanduser().is_dir()
        self.name = folder.name if given_a_folder else self.source
        files = self._files(folder)
        self.weights = verify_sums(folder, [name for names in files.values() for name in names])
        self.fingerprint = fingerprint(self.weights) + ("-untrained" if self.untrained else "")
        _quiet()
        try:
            self._read(folder, files)
        except Exception as error:  # diffusers and transformers raise many kinds, few of them documented
            if isinstance(error, ZeroSegError) or is_out_of_memory(error):
                raise
            raise WeightsError(f"cannot load the backbone in {self.name}: {first_line(error)}") from error
        self._check()
        if self.untrained:
            self._forget()
        self.alphas = self.schedule.alphas_cumprod.to(self.device, torch.float32)

    def _files(self, folder: Path) -> dict[str, list[str]]:
        """Part of the pipeline -> its weights' files, of a folder that holds every part its index names."""
        try:
            index = json.loads((folder / "model_index.json").read_text())
            if not isinstance(index, dict):
                raise ValueError("not an object")
        except (OSError, ValueError):
            raise WeightsError(
                f"{self.name} holds no readable model_index.json: give the folder that save_pretrained wrote"
            ) from None
        parts = pipeline_parts(index, self.name)
        for part in parts:
            if not (folder / part).is_dir():
                raise WeightsError(f"{self.name} lacks the folder {part}/: copy the whole diffusers pipeline")
        self._empty_is_zero = bool(index.get("force_zeros_for_empty_prompt", False)) and "text_encoder_2" in parts
        names = relative_files(folder)
        networks = [p for p in parts if not p.startswith(("tokenizer", "scheduler"))]
        return {part: weight_files(names, part, self.variant, self.name) for part in networks}

    def _read(self, folder: Path, files: dict[str, list[str]]) -> None:
        """Build the networks from their configs without weights, and fill in exactly what the files hold."""
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        def filled(part: str, network: nn.Module, harmless=(), rename=lambda key: key, dtype=self.dtype) -> nn.Module:
            state = {rename(key): value for key, value in read_tensors(folder, files[part]).items()}
            return fill(network, state, f"the {part} of {self.name}", harmless, self.device, dtype)

        def config(part: str, kind: Any) -> dict:
            found = kind.load_config(folder, subfolder=part, local_files_only=True)
            # What is no object from_config takes for the name of a repository of the hub.
            if not isinstance(found, dict):
                raise WeightsError(f"the config of the {part} of {self.name} is no JSON object: copy the folder again")
            return found

        def text_encoder(part: str, kind: type) -> nn.Module:
            with torch.device("meta"):
                network = kind(CLIPTextConfig.from_pretrained(folder / part, local_files_only=True))
            for module in network.modules():
                if "position_ids" in module._buffers:
                    module.position_ids = torch.arange(network.config.max_position_embeddings)[None]
            # transformers 4 keeps the layers of CLIPTextModel under text_model, transformers 5 does not; files of both exist.
            own = {key.removeprefix("text_model."): key for key in network.state_dict()}
            return filled(part, network, HARMLESS, lambda key: own.get(key.removeprefix("text_model."), key))

        with torch.device("meta"):
            unet, vae = (
                kind.from_config(config(part, kind))
                for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
            )
        half = torch.float32 if self.dtype == torch.float16 and "text_encoder_2" in files else self.dtype
        # The autoencoder of XL overflows in fp16, so there it stays in float32, as in diffusers' own pipeline.
        self.vae = filled("vae", vae, rename=_new_attention_name, dtype=half)
        self.unet = filled("unet", unet)
        self.text_encoders = [text_encoder("text_encoder", CLIPTextModel)]
        if "text_encoder_2" in files:
            self.text_encoders.append(text_encoder("text_encoder_2", CLIPTextModelWithProjection))
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(folder, subfolder=part, local_files_only=True)
            for part in ("tokenizer", "tokenizer_2")[: len(self.text_encoders)]
        ]
        # Only the noise schedule is used, so any saved scheduler serves: its config names the betas.
        self.schedule = DDPMScheduler.from_config(config("scheduler", DDPMScheduler))

    def _check(self) -> None:
        """Refuse what loads, but is asked for something else than a latent, a timestep and a prompt."""
        config = self.unet.config
        for part, name, value in (
            ("unet", "sample_size", config.sample_size),
            ("vae", "scaling_factor", self.vae.config.scaling_factor),
        ):
            if not isinstance(value, (int, float)) or not value > 0:
                raise WeightsError(f"the {name} of the {part} of {self.name} must be a positive number, not {value!r}")
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"{self.name} predicts {self.schedule.config.prediction_type!r}; "
                "only epsilon and v_prediction are supported"
            )
        if config.in_channels != self.vae.config.latent_channels:
            raise WeightsError(
                f"the unet of {self.name} reads {config.in_channels} channels, its vae gives "
                f"{self.vae.config.latent_channels}: a model for inpainting or editing does not fit"
            )
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        if config.cross_attention_dim != width:
            raise WeightsError(
                f"the unet of {self.name} reads text of {config.cross_attention_dim} numbers, its text encoders give {width}"
            )
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            # Without its file transformers 5 makes a tokenizer that knows no words, and all prompts then mean the same.
            if len(tokenizer) != encoder.config.vocab_size:
                raise WeightsError(
                    f"a tokenizer of {self.name} knows {len(tokenizer)} tokens, its text encoder "
                    f"{encoder.config.vocab_size}: copy the folders tokenizer* again"
                )
        wanted = "text_time" if len(self.text_encoders) == 2 else None
        if config.addition_embed_type != wanted or config.class_embed_type or config.encoder_hid_dim_type:
            raise WeightsError(f"the unet of {self.name} asks for conditions that a plain text-to-image model has not")

    def _forget(self) -> None:
        """Random weights in place of the stored ones, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet = type(self.unet).from_config(self.unet.config)
            self.text_encoders = [type(encoder)(encoder.config) for encoder in self.text_encoders]
        for network in (self.unet, *self.text_encoders):
            network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    @property
    def tokenizer(self):
        """The tokenizer of the (first) text encoder."""
        self.load()
        return self.tokenizers[0]

    @property
    def image_size(self) -> int:
        """Side in pixels the model was made for (its latent grid times the autoencoder's factor)."""
        self.load()
        return int(self.unet.config.sample_size) * self.vae_factor

    @property
    def text_size(self) -> int:
        """Side in pixels below which words should not be tested: a published model knows its own size only; the embedded one
        was trained at 96 and 192 pixels, and reads half of its 256 as well."""
        return self.image_size // 2 if self.source == EMBEDDED else self.image_size

    @property
    def vae_factor(self) -> int:
        """Pixels per latent position along a side."""
        self.load()
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """An image side must be a multiple of this many pixels."""
        self.load()
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def attention_factor(self) -> int:
        """Latent positions per token, along a side, of the finest attention: 1 for Stable Diffusion 1.x and 2.x, 2 for XL."""
        self.load()
        kinds = self.unet.config.down_block_types
        return 2 ** next(level for level, kind in enumerate(kinds) if kind.startswith("CrossAttn"))

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latent (B, C, H/f, W/f): the posterior mean times the scaling factor, no sampling."""
        self.load()
        images = images.to(self.device, self.vae.dtype) * 2 - 1
        return (self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor).to(self.dtype)

    @torch.inference_mode()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> (P, L, D) context for the UNet, one row per token.

        For XL the last row is no token: it carries the pooled embedding, filled up with zeros, and ``denoise`` takes it
        apart. An empty prompt is zeros there where the pipeline was trained so (``force_zeros_for_empty_prompt``).
        The last ``KEPT_TEXTS`` are kept.
        """
        self.load()
        with self._lock:
            context = self._contexts.pop(tuple(prompts), None)
            if context is None:
                context = self._embed(prompts)
            # The one asked for last stands last, and the first one goes.
            self._contexts[tuple(prompts)] = context
            if len(self._contexts) > KEPT_TEXTS:
                del self._contexts[next(iter(self._contexts))]
        return context.clone()

    def _embed(self, prompts: list[str]) -> Tensor:
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            length = encoder.config.max_position_embeddings
            tokens = tokenizer(
                prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            if len(self.text_encoders) == 1:
                return encoder(tokens.to(self.device)).last_hidden_state
            output = encoder(tokens.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        # The last encoder's, as the pipeline has it.
        pooled = output[0]
        context = torch.cat(hidden, -1)
        context = torch.cat([context, F.pad(pooled, (0, context.shape[-1] - pooled.shape[-1]))[:, None]], 1)
        if self._empty_is_zero:
            context[[not prompt for prompt in prompts]] = 0
        return context

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt by the first tokenizer, its start and its end among them, as many as it keeps."""
        tokenizer = self.tokenizer
        # A fast tokenizer keeps how it pads and cuts: no other thread's call may come in between.
        with self._lock:
            return len(tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids)

    @torch.inference_mode()
    def add_noise(self, latents: Tensor, timestep: int, noise: Tensor) -> Tensor:
        """The forward process q(z_t | z_0) at one timestep in [0, number of training timesteps)."""
        self.check_timestep(timestep)
        alpha = self.alphas[timestep]
        return (alpha.sqrt() * latents.float() + (1 - alpha).sqrt() * noise).to(latents.dtype)

    @torch.inference_mode()
    def predict_noise(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """The UNet's estimate of the noise in z_t, float32, whatever the model was trained to predict.

        Args:
            latents: (B, C, h, w) noisy latents z_t.
            timestep: int in [0, number of training timesteps).
            context: (B, L, D) from ``embed_text``.
        """
        output = self.denoise(latents, timestep, context).float()
        if self.schedule.config.prediction_type == "v_prediction":
            alpha = self.alphas[timestep]
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * latents.float()
        return output

    def check_timestep(self, timestep: int) -> None:
        """Refuse a timestep outside the model's schedule.

        Raises:
            ZeroSegError: it is no integer in [0, number of training timesteps).
        """
        self.load()
        if not isinstance(timestep, int) or not 0 <= timestep < len(self.alphas):
            raise ZeroSegError(f"timestep {timestep} is outside 0..{len(self.alphas) - 1}")

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """One plain UNet forward, (B, C, h, w) -> (B, C, h, w), no recording."""
        self.load()
        self.check_timestep(timestep)
        with self._lock:  # a recording may sit on the shared UNet; no other thread's pass may land in it
            return self.unet(latents.to(self.dtype), timestep, **self._conditions(latents, context)).sample

    def _conditions(self, latents: Tensor, context: Tensor) -> dict:
        """What the UNet is told beside the timestep."""
        context = context.to(self.dtype)
        if len(self.text_encoders) == 1:
            return {"encoder_hidden_states": context}
        # XL also hears how large its training picture was before resizing, what was cropped, and the size aimed at: here
        # the whole image at the size it is given.
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        times = context.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)
        pooled = context[:, -1, : self.text_encoders[1].config.projection_dim]
        return {
            "encoder_hidden_states": context[:, :-1],
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times},
        }

    @torch.inference_mode()
    def read(
        self,
        latents: Tensor,
        timestep: int,
        context: Tensor,
        *,
        self_attention: bool = True,
        cross_attention: bool = False,
        features: bool = False,
        noise_draws: int = 0,
        seed: int = 0,
    ) -> Recording:
        """Run the UNet and record what its layers attend to, as far as the last of them.

        Args:
            latents: (B, C, h, w) clean latents z_0.
            timestep: the noise level the UNet is told, in [0, number of training timesteps).
            context: (B, L, D) text context.
            self_attention, cross_attention, features: what to record, see ``record``.
            noise_draws: 0 passes the clean latent in once, as DiffSeg's released code does; n > 0 averages n passes
                on latents noised to the timestep.
            seed: of the noise.

        Raises:
            ZeroSegError: the timestep lies outside the schedule, or a draw count is negative.
        """
        self.load()
        if noise_draws < 0:
            raise ZeroSegError("noise_draws must be 0 (clean latent) or a positive number of draws")
        with self._lock, record(self.unet, self_attention, cross_attention, features, end_early=True) as recording:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(max(1, noise_draws)):
                noisy = latents
                if noise_draws:
                    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                    noisy = self.add_noise(latents, timestep, noise)
                with suppress(PassEnded):
                    self.denoise(noisy, timestep, context)
        return recording

    def describe(self) -> dict:
        """What a manifest records of the backbone: source, revision, SHA-256 of its weights, device and dtype."""
        self.load()
        return {
            "source": self.name,
            "revision": self.revision,
            "variant": self.variant,
            "sha256": self.fingerprint,
            "files": self.weights,
            "untrained": self.untrained,
            "device": str(self.device),
            "dtype": self._dtype_name,
        }


def _new_attention_name(key: str) -> str:
    """The present name of an autoencoder's key."""
    return re.sub(
        r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)",
        lambda found: _OLD_ATTENTION[found[0]],
        key,
    )
