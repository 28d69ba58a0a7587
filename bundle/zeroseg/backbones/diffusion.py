"""A frozen Stable-Diffusion-shaped text-to-image model, loaded from one folder layout whatever its size."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from zeroseg.backbones.frozen import FrozenModel
from zeroseg.backbones.recording import Recording, record
from zeroseg.backbones.weights import EMBEDDED, fingerprint, resolve_folder, verify_sums
from zeroseg.errors import WeightsError, ZeroSegError


def _quiet() -> None:
    """Keep the libraries' loading bars and advice off the user's terminal; their errors still come through."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class StableDiffusionBackbone(FrozenModel):
    """A frozen latent diffusion model of the Stable Diffusion 1.x / 2.x shape.

    The weights load on first use, once, also when several threads ask at the same time; until then building one costs
    nothing. Gradients are never kept.

    Args:
        source: ``"embedded"``, the folder of a saved diffusers pipeline, or a hub id (then ``revision`` is required).
        revision: revision of a hub id.
        device: auto, cpu, cuda[:i] or mps.
        dtype: fp32, bf16 or fp16; fp16 needs a GPU.
        untrained: give the UNet and the text encoder random weights (seed 0) in place of the stored ones. The control
            of every evaluation: what the architecture, the autoencoder and the pipeline do without learning.
    """

    def __init__(
        self,
        source: str | Path = EMBEDDED,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "fp32",
        untrained: bool = False,
    ):
        super().__init__(device, dtype)
        self.source, self.revision, self.untrained = str(source), revision, bool(untrained)

    def _load(self) -> None:
        self._place()
        folder = resolve_folder(self.source, revision=self.revision)
        self._check_shape(folder)
        self.weights = verify_sums(folder)
        self.fingerprint = fingerprint(self.weights) + ("-untrained" if self.untrained else "")

        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        _quiet()

        def network(kind, subfolder):
            options = {
                "subfolder": subfolder,
                "local_files_only": True,
                "use_safetensors": True,
                "torch_dtype": self.dtype,
            }
            if kind is not CLIPTextModel:
                options["low_cpu_mem_usage"] = False  # its saving needs accelerate, which nothing else here does
            names = [p.name for p in (folder / subfolder).glob("*.safetensors")]
            if names and all(".fp16." in n for n in names):
                options["variant"] = "fp16"
            return kind.from_pretrained(folder, **options).to(self.device).eval().requires_grad_(False)

        try:
            self.vae = network(AutoencoderKL, "vae")
            self.unet = network(UNet2DConditionModel, "unet")
            self.text_encoder = network(CLIPTextModel, "text_encoder")
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
            # Only the noise schedule is used, so any saved scheduler serves: its config names the betas.
            self.schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            msg = f"cannot load the backbone in {folder.name}: {first}"
            raise WeightsError(msg) from error
        if self.untrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.unet = UNet2DConditionModel.from_config(self.unet.config)
                self.text_encoder = CLIPTextModel(self.text_encoder.config)
            for net in (self.unet, self.text_encoder):
                net.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            msg = f"{folder.name} predicts {self.schedule.config.prediction_type!r}; only epsilon and v_prediction are supported"
            raise WeightsError(msg)
        self.alphas = self.schedule.alphas_cumprod.to(self.device, torch.float32)
        self.name = self.source if self.source == EMBEDDED else folder.name

    @staticmethod
    def _check_shape(folder: Path) -> None:
        """Refuse a folder of another layout with a line that says what is missing."""
        try:
            index = json.loads((folder / "model_index.json").read_text())
            if not isinstance(index, dict):
                raise ValueError("not an object")
        except (OSError, ValueError):
            msg = f"{folder.name} holds no readable model_index.json: give the folder that save_pretrained wrote"
            raise WeightsError(msg) from None
        if index.get("_class_name", "") == "StableDiffusionXLPipeline" or "text_encoder_2" in index:
            msg = f"{folder.name} is a Stable Diffusion XL pipeline; only the 1.x and 2.x shape is supported"
            raise WeightsError(msg)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (folder / part).is_dir():
                msg = f"{folder.name} lacks the folder {part}/: copy the whole diffusers pipeline"
                raise WeightsError(msg)
            if part in ("unet", "vae", "text_encoder") and not any((folder / part).glob("*.safetensors")):
                msg = f"{folder.name}/{part} holds no .safetensors file: pickle weights are refused; save it with safe_serialization=True"
                raise WeightsError(msg)

    @property
    def image_size(self) -> int:
        """Side in pixels the model was made for (its latent grid times the autoencoder's factor)."""
        self.load()
        return int(self.unet.config.sample_size) * self.vae_factor

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

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latent (B, C, H/f, W/f): the posterior mean times the scaling factor, no sampling."""
        self.load()
        images = images.to(self.device, self.dtype) * 2 - 1
        return self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.inference_mode()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> (P, L, D) context for the UNet's cross-attention."""
        self.load()
        length = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

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
            msg = f"timestep {timestep} is outside 0..{len(self.alphas) - 1}"
            raise ZeroSegError(msg)

    @torch.inference_mode()
    def denoise(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """One plain UNet forward, (B, C, h, w) -> (B, C, h, w), no recording."""
        self.load()
        self.check_timestep(timestep)
        with self._lock:  # a recording may sit on the shared UNet; no other thread's pass may land in it
            return self.unet(latents.to(self.dtype), timestep, context.to(self.dtype)).sample

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
        """Run the UNet and record what its layers attend to.

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
        with self._lock, record(self.unet, self_attention, cross_attention, features) as recording:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(max(1, noise_draws)):
                noisy = latents
                if noise_draws:
                    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                    noisy = self.add_noise(latents, timestep, noise)
                self.denoise(noisy, timestep, context)
        return recording

    def describe(self) -> dict:
        """What a manifest records of the backbone: source, revision, SHA-256 of its weights, device and dtype."""
        self.load()
        return {
            "source": self.name,
            "revision": self.revision,
            "sha256": self.fingerprint,
            "files": self.weights,
            "untrained": self.untrained,
            "device": str(self.device),
            "dtype": self._dtype_name,
        }
