"""A frozen 3-D latent diffusion model of the MAISI shape, and how features and latents are read out of it.

One interface serves the embedded compact model, a folder in the embedded layout, and NVIDIA's released MAISI files. All
are built from the same two MONAI classes, ``AutoencoderKlMaisi`` and ``DiffusionModelUNetMaisi``.

Embedded layout: ``config.json``, ``autoencoder.safetensors``, ``unet.safetensors``, ``SHA256SUMS``.
Released files: ``autoencoder_v1.pt`` and ``diff_unet_3d_rflow-ct.pt`` (or the DDPM release), read with
``weights_only=True``; the UNet's state is under ``unet_state_dict`` beside ``scale_factor``, the autoencoder's is bare
or under the same key.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiDownsample,
    MaisiGroupNorm3D,
    MaisiResBlock,
)
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.inferers import sliding_window_inference
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch import Tensor, nn

from zeroseg.backbones.frozen import DTYPES, FrozenModel
from zeroseg.backbones.weights import EMBEDDED, MODELS, fingerprint, verify_sums
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.hashing import file_sha256

_OVERLAP = 0.25
"""Share of a window its neighbour repeats; windows are blended with a Gaussian weight (MAISI's recipe takes 0.4)."""

_MAISI_AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [64, 128, 256],
    "num_res_blocks": [2, 2, 2],
    "attention_levels": [False, False, False],
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_convtranspose": False,
    "norm_float16": False,
    "num_splits": 1,
    "dim_split": 1,
}
_MAISI_UNET = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels": [64, 128, 256, 512],
    "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32],
    "num_res_blocks": 2,
    "include_spacing_input": True,
}

MAISI_RFLOW: dict[str, Any] = {
    "autoencoder": _MAISI_AUTOENCODER,
    "unet": {**_MAISI_UNET, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True},
    "scheduler": {
        "kind": "rflow",
        "num_train_timesteps": 1000,
        "use_discrete_timesteps": False,
        "use_timestep_transform": True,
        "sample_method": "uniform",
        "scale": 1.4,
    },
    "scale_factor": 1.0,
    "spacing": [1.5, 1.5, 2.0],
    "modalities": {"ct": 1, "mr": 8},
    "ct_window": [-1000.0, 1000.0],
    "window": [128, 128, 128],
}
"""The published rectified-flow release. Two published values are changed, neither of which changes a result:
``norm_float16`` is off (it fails on the CPU; ``dtype`` says the precision instead) and ``num_splits`` is 1 (windows
bound the memory instead, and splits fail on small volumes). ``scale_factor`` is a placeholder: the checkpoint carries
its own. ``spacing`` is ZeroSeg's choice: it lies inside what MAISI was trained on (0.5..3 mm in plane, 0.5..5 mm along
z). Class labels: MAISI's modality table, CT 1, MR 8."""

MAISI_DDPM: dict[str, Any] = {
    **MAISI_RFLOW,
    "unet": {**_MAISI_UNET, "include_top_region_index_input": True, "include_bottom_region_index_input": True},
    "scheduler": {
        "kind": "ddpm",
        "num_train_timesteps": 1000,
        "schedule": "scaled_linear_beta",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "clip_sample": False,
    },
    "modalities": {"ct": 1},
}
"""The published DDPM release, which the paper used by its date: body regions and spacing as conditions, no modality
class."""

COMPACT: dict[str, Any] = {
    "autoencoder": {**_MAISI_AUTOENCODER, "num_channels": [16, 32, 64], "norm_num_groups": 8, "save_mem": False},
    "unet": {
        **_MAISI_UNET,
        "num_channels": [32, 64, 96],
        "attention_levels": [False, False, True],
        "num_head_channels": [0, 0, 32],
        "norm_num_groups": 16,
        "num_class_embeds": 4,
    },
    "scheduler": {
        "kind": "rflow",
        "num_train_timesteps": 1000,
        "use_discrete_timesteps": False,
        "use_timestep_transform": False,
        "sample_method": "uniform",
    },
    "scale_factor": 1.0,
    "spacing": [3.0, 3.0, 3.0],
    "modalities": {"ct": 1, "mr": 2, "pet": 3},
    "ct_window": [-250.0, 250.0],
    "window": [128, 128, 128],
}
"""The embedded model's shape: MAISI's, with a quarter of the autoencoder's channels and three UNet levels for four.
``ct_window``, the HU that become 0 and 1, is soft tissue only: MAISI's [-1000, 1000] leaves 0.01 between tumour and
muscle, below what a small autoencoder keeps.
``scale_factor`` is 1 / std of the training latents, written by the trainer. No timestep transform: it exists to spend
more steps on noise for large latents, and these are smaller than its reference of 32^3."""

PUBLISHED = {"rflow": MAISI_RFLOW, "ddpm": MAISI_DDPM}
BODY_REGIONS = ("head", "chest", "abdomen", "pelvis")
"""The DDPM release's one-hot body regions, in order."""


def build_autoencoder(config: Mapping[str, Any]) -> AutoencoderKlMaisi:
    """The autoencoder a config describes, with random weights.

    Args:
        config: a whole config such as ``COMPACT``; its entry ``autoencoder`` holds the arguments of
            ``AutoencoderKlMaisi``.
    """
    return AutoencoderKlMaisi(**config["autoencoder"])


def build_unet(config: Mapping[str, Any]) -> DiffusionModelUNetMaisi:
    """The diffusion UNet a config describes, with random weights and a zero output layer (MONAI's initialisation).

    Args:
        config: a whole config such as ``COMPACT``; its entry ``unet`` holds the arguments of
            ``DiffusionModelUNetMaisi``.
    """
    return DiffusionModelUNetMaisi(**config["unet"])


def make_scheduler(config: Mapping[str, Any]) -> RFlowScheduler | DDPMScheduler:
    """The noise schedule a config describes.

    Rectified flow: x_t = (1 - t/T) x_0 + (t/T) noise, and the network predicts v = x_0 - noise. DDPM: x_t = sqrt(a_t)
    x_0 + sqrt(1 - a_t) noise, and the network predicts the noise unless ``prediction_type`` says otherwise.

    Args:
        config: a whole config such as ``COMPACT``; its entry ``scheduler`` holds ``kind`` and the scheduler's
            arguments.

    Raises:
        ZeroSegError: the kind is neither rflow nor ddpm.
    """
    options = dict(config["scheduler"])
    kind = options.pop("kind", None)
    if kind not in PUBLISHED:
        raise ZeroSegError(f"scheduler kind must be rflow or ddpm, not {kind!r}")
    return (RFlowScheduler if kind == "rflow" else DDPMScheduler)(**options)


def spacing_condition(spacing_mm: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    """(1, 3) float32: voxel spacing as MAISI's UNet wants it, millimetres times 100."""
    return torch.tensor([[float(s) * 100 for s in spacing_mm]], dtype=torch.float32, device=device)


def stage_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The encoder's last residual block of each resolution, found by type.

    Which tensors the paper taps is unknown. These are the three stages' outputs before their down-sampling: for MAISI
    blocks 2, 5 and 8, with 64, 128 and 256 channels at full, half and quarter resolution. Tapping after the
    down-sampling would lose the full resolution, at which small lesions live.
    """
    stages, last = [], None
    for block in encoder.blocks:
        if isinstance(block, MaisiResBlock):
            last = block
        elif isinstance(block, (MaisiDownsample, MaisiGroupNorm3D)) and last is not None:
            stages.append(last)
            last = None
    return stages


@contextmanager
def record_stages(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Record the stage outputs of every encoder pass inside the context; the hooks are gone after it, whatever
    happened."""
    features: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: features.append(out.detach())) for b in stage_blocks(encoder)]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class EncoderReading:
    """One encoder pass.

    Attributes:
        latent: (1, C, X/f, Y/f, Z/f) posterior mean times ``scale_factor``.
        features: one (1, C_l, X/2^l, Y/2^l, Z/2^l) float32 tensor per stage l = 0, 1, 2.
    """

    latent: Tensor
    features: tuple[Tensor, ...]


class MaisiBackbone(FrozenModel):
    """A frozen MAISI-shaped latent diffusion model; the weights load on first use, once, and gradients are never kept.

    Memory, float32 on the CPU, measured: about 20 C bytes per voxel to encode and 33 C to decode, for C first-stage
    channels. In one piece 256^3 voxels would take 5 and 9 GiB (compact, C = 16), 20 and 33 GiB (MAISI, C = 64). Volumes
    beyond ``window`` are therefore encoded and decoded in overlapping windows of 128^3: 0.6 and 1 GiB (compact), 2.5
    and 4 GiB (MAISI), whatever the volume's size. Features of 256^3, when all are kept: 1.3 GiB
    (compact), 5.3 GiB (MAISI).

    Args:
        source: ``"embedded"``, or a folder in the embedded layout. Ignored when files are given.
        autoencoder: path of a released autoencoder file (``autoencoder_v1.pt``).
        unet: path of a released UNet file (``diff_unet_3d_rflow-ct.pt``).
        kind: which release the files are, ``rflow`` or ``ddpm``.
        device: auto, or as torch spells it.
        dtype: fp32, bf16 or fp16 (GPU), the precision both networks compute in (autocast, as MAISI's own scripts do;
            its group norm keeps float32). What leaves them is float32.
        untrained: random weights from seed 0, the control of the evaluation.
        overrides: config entries that differ from the source's own, merged one level deep, e.g.
            ``{"window": [64, 64, 64]}`` or ``{"unet": {"num_class_embeds": 16}}``.
    """

    def __init__(
        self,
        source: str | Path = EMBEDDED,
        autoencoder: str | Path | None = None,
        unet: str | Path | None = None,
        kind: str = "rflow",
        device: str = "auto",
        dtype: str = "fp32",
        untrained: bool = False,
        overrides: Mapping[str, Any] | None = None,
    ):
        super().__init__(device, dtype)
        self.source = str(source)
        self.files = {"autoencoder": autoencoder, "unet": unet}
        self.kind = kind
        self.untrained = untrained
        self.overrides = dict(overrides or {})

    # Loading -----------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self._dtype_name not in DTYPES:
            raise ZeroSegError(f"dtype must be one of {', '.join(DTYPES)}, not {self._dtype_name!r}")
        if self.kind not in PUBLISHED:
            raise ZeroSegError(f"kind must be rflow or ddpm, not {self.kind!r}")
        self._place()
        given = [n for n, path in self.files.items() if path is not None]
        if len(given) == 1:
            missing = "unet" if given == ["autoencoder"] else "autoencoder"
            raise ZeroSegError(f"{given[0]} is given without {missing}: give both released files, or neither")
        states = self._from_files() if given else self._from_folder()
        self.scale_factor = float(self.config["scale_factor"])
        self.spacing = tuple(float(s) for s in self.config["spacing"])
        self.modalities = {str(k): int(v) for k, v in self.config["modalities"].items()}
        self.ct_window = tuple(float(v) for v in self.config.get("ct_window", MAISI_RFLOW["ct_window"]))
        try:
            make_scheduler(self.config)
        except (TypeError, ValueError, KeyError) as error:
            raise WeightsError(f"the scheduler of {self.name} cannot be built: {_first_line(error)}") from error
        with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's random state stays its own
            torch.manual_seed(0)
            self.autoencoder = self._network(build_autoencoder, states.get("autoencoder"))
            self.unet = self._network(build_unet, states.get("unet"))
        self.fingerprint = fingerprint(self.weights) + ("-untrained" if self.untrained else "")

    def _from_folder(self) -> dict[str, dict[str, Tensor]]:
        """Config and states of a folder in the embedded layout."""
        from safetensors.torch import load_file

        folder = MODELS / "tumor" if self.source == EMBEDDED else Path(self.source).expanduser()
        where = f"models/{folder.name}" if self.source == EMBEDDED else str(self.source)
        self.name = self.source if self.source == EMBEDDED else folder.name
        try:
            self.config = _merged(json.loads((folder / "config.json").read_text()), self.overrides)
        except OSError:
            hint = (
                "restore that folder of the bundle"
                if self.source == EMBEDDED
                else "give a folder in the embedded layout"
            )
            raise WeightsError(f"{where} holds no readable config.json: {hint}, or name MAISI's files") from None
        except ValueError as error:
            raise WeightsError(f"config.json in {where} is not valid JSON: {error}") from None
        absent = {"autoencoder", "unet", "scheduler", "scale_factor", "spacing", "modalities"} - set(self.config)
        if absent:
            raise WeightsError(f"config.json in {where} lacks {', '.join(sorted(absent))}: copy the folder again")
        sums = verify_sums(folder)
        parts = ("autoencoder", "unet")
        self.weights = {n: h for n, h in sums.items() if n.split(".")[0] in parts}
        states = {}
        for part in parts:
            path = folder / f"{part}.safetensors"
            if not path.is_file():
                raise WeightsError(f"{where} lacks {path.name}: copy the folder again")
            try:
                states[part] = load_file(path)
            except Exception as error:  # safetensors raises its own kinds, none documented
                raise WeightsError(f"cannot read {path.name} in {where}: {_first_line(error)}") from error
        return states

    def _from_files(self) -> dict[str, dict[str, Tensor]]:
        """Config and states of NVIDIA's released files."""
        states, self.weights = {}, {}
        config = copy.deepcopy(PUBLISHED[self.kind])
        for part, given in self.files.items():
            path = Path(str(given)).expanduser()
            if not path.is_file():
                raise WeightsError(f"{part} file {path.name} does not exist: give the path of MAISI's released file")
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise WeightsError(
                    f"cannot read {path.name} as plain tensors ({_first_line(error)}): files that need code to be run are refused"
                ) from error
            self.weights[path.name] = file_sha256(path)
            state = content.get("unet_state_dict", content) if isinstance(content, Mapping) else None
            if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
                raise WeightsError(f"{path.name} holds no state dict, bare or under unet_state_dict")
            if part == "unet":
                if "scale_factor" not in content:
                    raise WeightsError(f"{path.name} lacks scale_factor: it is no released MAISI diffusion model")
                config["scale_factor"] = float(content["scale_factor"])
            states[part] = dict(state)
        self.name = Path(str(self.files["unet"])).name
        self.config = _merged(config, self.overrides)
        return states

    def _network(self, build, state: dict[str, Tensor] | None) -> nn.Module:
        part = "autoencoder" if build is build_autoencoder else "unet"
        try:
            network = build(self._on_this_device())
            if state is not None and not self.untrained:
                network.load_state_dict({k.removeprefix("module."): v.float() for k, v in state.items()})
        except (RuntimeError, ValueError, TypeError) as error:
            raise WeightsError(f"the {part} of {self.name} does not fit its config: {_first_line(error)}") from error
        return network.to(self.device).eval().requires_grad_(False)

    def _on_this_device(self) -> dict[str, Any]:
        """The config without the settings that fail off a CUDA device."""
        config = copy.deepcopy(self.config)
        if self.device.type != "cuda":
            config["autoencoder"]["norm_float16"] = False
            config["autoencoder"]["use_flash_attention"] = config["unet"]["use_flash_attention"] = False
        return config

    def describe(self) -> dict[str, Any]:
        """What a manifest records of the backbone: source, SHA-256 of its weights, kind, spacing, device and dtype."""
        self.load()
        return {
            "source": self.name,
            "sha256": self.fingerprint,
            "files": self.weights,
            "scheduler": self.config["scheduler"]["kind"],
            "spacing_mm": list(self.spacing),
            "untrained": self.untrained,
            "overrides": self.overrides,
            "device": str(self.device),
            "dtype": self._dtype_name,
        }

    # Shapes ------------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Voxels per latent position along an axis."""
        self.load()
        return 2 ** (len(self.config["autoencoder"]["num_channels"]) - 1)

    @property
    def latent_multiple(self) -> int:
        """A latent's sides must be multiples of this, or the UNet's skip connections do not meet."""
        self.load()
        return 2 ** (len(self.config["unet"]["num_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """A volume's sides must be multiples of this many voxels."""
        return self.factor * self.latent_multiple

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the encoder's stages."""
        self.load()
        return tuple(self.config["autoencoder"]["num_channels"])

    @property
    def window(self) -> tuple[int, int, int]:
        """Largest piece of a volume, in voxels, that goes through the autoencoder at once."""
        self.load()
        step = self.size_multiple
        return tuple(max(step, int(w) // step * step) for w in self.config.get("window", COMPACT["window"]))

    def scheduler(self) -> RFlowScheduler | DDPMScheduler:
        """A new scheduler of the model's kind; it carries state while sampling, so every sampling takes its own."""
        self.load()
        return make_scheduler(self.config)

    # Networks ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def read(self, volume: Tensor) -> EncoderReading:
        """Latent and features of one piece of a volume by a single encoder pass, without windows.

        Args:
            volume: (1, 1, X, Y, Z) in [0, 1], sides multiples of ``size_multiple``.

        Raises:
            ZeroSegError: the shape is another.
        """
        self._check(volume)
        with self._lock, self._precision(), record_stages(self.autoencoder.encoder) as features:
            latent = self.autoencoder.encode(volume.to(self.device, torch.float32))[0]
        return EncoderReading(latent.float() * self.scale_factor, tuple(f.float() for f in features))

    def features(self, volume: Tensor) -> tuple[Tensor, ...]:
        """The three encoder stages of one piece of a volume.

        Args:
            volume: (1, 1, X, Y, Z) in [0, 1], sides multiples of ``size_multiple``.

        Returns:
            One (1, C_l, X/2^l, Y/2^l, Z/2^l) float32 tensor per stage l = 0, 1, 2.
        """
        return self.read(volume).features

    @torch.inference_mode()
    def encode(self, volume: Tensor) -> Tensor:
        """Volume -> latent in the diffusion model's space: the posterior mean, never a sample, times ``scale_factor``.

        Args:
            volume: (1, 1, X, Y, Z) in [0, 1], sides multiples of ``size_multiple``; in windows where larger than
                ``window``.

        Returns:
            (1, C, X/f, Y/f, Z/f) float32.
        """
        self._check(volume)
        return self._windowed(volume, self.window, lambda piece: self.read(piece).latent)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent in the diffusion model's space -> volume, not clipped to [0, 1].

        Args:
            latent: (1, C, X/f, Y/f, Z/f); in windows where larger than ``window`` / f.

        Returns:
            (1, 1, X, Y, Z) float32.
        """
        self.load()

        def decode(piece: Tensor) -> Tensor:
            with self._precision():
                return self.autoencoder.decode((piece / self.scale_factor).to(self.device, torch.float32)).float()

        return self._windowed(latent, tuple(w // self.factor for w in self.window), decode)

    @torch.inference_mode()
    def predict(
        self,
        latent: Tensor,
        timestep: float,
        spacing_mm: Sequence[float],
        modality: str,
        regions: tuple[int, int] = (2, 2),
    ) -> Tensor:
        """The UNet's output for a noisy latent: v = x_0 - noise (rectified flow), or the noise (DDPM).

        Args:
            latent: (1, C, x, y, z), sides multiples of ``latent_multiple``.
            timestep: noise level on the scheduler's scale, 0..1000.
            spacing_mm: of the volume's voxels.
            modality: ct, mr or pet; one the model has no class for is told class 0, MAISI's "unknown".
            regions: top and bottom body region as indices of ``BODY_REGIONS``, for the DDPM release.

        Returns:
            (1, C, x, y, z) float32.
        """
        self.load()
        options: dict[str, Tensor] = {}
        unet = self.config["unet"]
        if unet.get("include_spacing_input"):
            options["spacing_tensor"] = spacing_condition(spacing_mm, self.device)
        if unet.get("num_class_embeds") is not None:
            options["class_labels"] = torch.tensor([self.modalities.get(modality, 0)], device=self.device)
        for name, region in zip(("top", "bottom"), regions, strict=True):
            if unet.get(f"include_{name}_region_index_input"):
                one_hot = torch.zeros(1, len(BODY_REGIONS), device=self.device)
                one_hot[0, region] = 100.0  # MAISI scales its conditions by 100, regions as well as spacing
                options[f"{name}_region_index_tensor"] = one_hot
        times = torch.full((len(latent),), float(timestep), device=self.device)
        with self._precision():
            return self.unet(latent.to(self.device, torch.float32), timesteps=times, **options).float()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _check(self, volume: Tensor) -> None:
        step = self.size_multiple
        if volume.ndim != 5 or volume.shape[:2] != (1, 1) or any(s % step or s == 0 for s in volume.shape[2:]):
            raise ZeroSegError(
                f"a volume must be (1, 1, X, Y, Z) with sides multiple of {step}, not {tuple(volume.shape)}"
            )

    def _windowed(self, tensor: Tensor, window: Sequence[int], run) -> Tensor:
        if all(s <= w for s, w in zip(tensor.shape[2:], window, strict=True)):
            return run(tensor)
        roi = [min(s, w) for s, w in zip(tensor.shape[2:], window, strict=True)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using a non-tuple sequence")
            return sliding_window_inference(tensor, roi, 1, run, overlap=_OVERLAP, mode="gaussian")


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with entries replaced; where both hold a mapping, its keys are merged, unless a new ``kind`` starts it
    afresh."""
    merged = copy.deepcopy(dict(config))
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "kind" not in value
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]) if lines else type(error).__name__
