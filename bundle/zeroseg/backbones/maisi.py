"""A frozen 3-D latent diffusion model of the MAISI shape, and how features and latents are read out of it.

One interface serves the embedded compact model, a folder in the embedded layout, and NVIDIA's released MAISI files. All
are built from the same two MONAI classes, ``AutoencoderKlMaisi`` and ``DiffusionModelUNetMaisi``.

Embedded layout: ``config.json``, ``autoencoder.safetensors``, ``unet.safetensors``, ``SHA256SUMS``.
Released files (``RELEASES``): ``autoencoder_v1.pt`` or ``_v2.pt`` and ``diff_unet_3d_*.pt``, read with
``weights_only=True``; the UNet's state is under ``unet_state_dict`` beside ``scale_factor``, the autoencoder's is bare
or under the same key.
"""

from __future__ import annotations

import copy
import json
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from monai.utils.enums import MetaKeys, SpaceKeys, TraceKeys
from torch import Tensor, nn

from zeroseg.backbones.convolution import use_onednn
from zeroseg.backbones.frozen import DTYPES, FrozenModel
from zeroseg.backbones.weights import (
    EMBEDDED,
    MODELS,
    fill,
    fingerprint,
    read_tensors,
    verify_sums,
)
from zeroseg.errors import WeightsError, ZeroSegError, first_line
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

CHECKPOINT_GLOBALS = (MetaTensor, MetaKeys, SpaceKeys, TraceKeys)
"""What NVIDIA's trainer leaves in a checkpoint beside tensors: its ``scale_factor`` is 1 / std of a batch that MONAI loaded,
hence a MetaTensor with that batch's metadata. Three enums and a tensor class; whatever else a file asks for is refused."""
_READING = threading.Lock()

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
    "modalities": {"ct": 1},
    "ct_window": [-1000.0, 1000.0],
    "mr_clip": False,
    "window": [128, 128, 128],
    "whole_latent": True,
    "steps": 30,
    "guidance": 0.0,
    "field_of_view_mm": [256.0, 256.0, 128.0],
}
"""The published rectified-flow release for CT. Two published values are changed, neither of which changes a result:
``norm_float16`` is off (it fails on the CPU; ``dtype`` says the precision instead) and ``num_splits`` is 1 (windows
bound the memory instead, and splits fail on small volumes). ``scale_factor`` is a placeholder: the checkpoint carries
its own. ``spacing`` is ZeroSeg's choice: it lies inside what MAISI was trained on (0.5..3 mm in plane, 0.5..5 mm along
z). ``modalities``: class labels that the release was trained with, of MAISI's table. ``whole_latent``: the UNet saw whole
scans, never a part of one, so it gets the whole latent. ``steps`` and ``guidance``: of the release's inference config.
``field_of_view_mm``: least extents of its training."""

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
    "steps": 1000,
}
"""The published DDPM release, which the paper used by its date: body regions and spacing as conditions, no modality
class. Its 1000 steps are mandatory by its makers' word."""

MAISI_RFLOW_MR: dict[str, Any] = {
    **MAISI_RFLOW,
    "spacing": [1.2, 1.2, 1.2],
    "modalities": {"mr": 8, "mr_t1": 9, "mr_t2": 10, "mr_flair": 11},
    "guidance": 15.0,
    "field_of_view_mm": [160.0, 160.0, 90.0],
}
"""The published release for MR of brain, prostate, breast and abdomen without contrast agent."""

MAISI_RFLOW_MR_BRAIN: dict[str, Any] = {
    **MAISI_RFLOW_MR,
    "spacing": [1.0, 1.0, 1.2],
    "modalities": {
        "mr": 8,
        "mr_t1": 9,
        "mr_t2": 10,
        "mr_flair": 11,
        "mr_mra": 16,
        "mr_swi": 20,
        "mr_t1_skull_stripped": 29,
        "mr_t2_skull_stripped": 30,
        "mr_flair_skull_stripped": 31,
        "mr_swi_skull_stripped": 32,
        "mr_mra_skull_stripped": 33,
    },
    "guidance": 2.0,
    "field_of_view_mm": [140.0, 140.0, 140.0],
}
"""The published release for MR of the head, with and without the skull."""

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

RELEASES = {
    "ddpm-ct": MAISI_DDPM,
    "rflow-ct": MAISI_RFLOW,
    "rflow-mr": MAISI_RFLOW_MR,
    "rflow-mr-brain": MAISI_RFLOW_MR_BRAIN,
}
"""Name of a release, as its files are named -> its config."""
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
    if kind not in ("rflow", "ddpm"):
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
        autoencoder: path of a released autoencoder file (``autoencoder_v1.pt``, ``_v2.pt`` for ``rflow-mr``).
        unet: path of a released UNet file (``diff_unet_3d_rflow-ct.pt``).
        kind: which of ``RELEASES`` the UNet is; None: by the file's content and name.
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
        kind: str | None = None,
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
        self.release: str | None = None

    # Loading -----------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self._dtype_name not in DTYPES:
            raise ZeroSegError(f"dtype must be one of {', '.join(DTYPES)}, not {self._dtype_name!r}")
        if self.kind is not None and self.kind not in RELEASES:
            raise ZeroSegError(f"kind must be one of {', '.join(RELEASES)}, or null, not {self.kind!r}")
        self._place()
        given = [n for n, path in self.files.items() if path is not None]
        if len(given) == 1:
            missing = "unet" if given == ["autoencoder"] else "autoencoder"
            raise ZeroSegError(f"{given[0]} is given without {missing}: give both released files, or neither")
        states = self._from_files() if given else self._from_folder()
        _check_entries(self.config, self.name)
        self.scale_factor = float(self.config["scale_factor"])
        self.spacing = tuple(float(s) for s in self.config["spacing"])
        self.modalities = {str(k): int(v) for k, v in self.config["modalities"].items()}
        self.ct_window = tuple(float(v) for v in self.config.get("ct_window", MAISI_RFLOW["ct_window"]))
        self.mr_clip = bool(self.config.get("mr_clip", True))
        try:
            make_scheduler(self.config)
        except (TypeError, ValueError, KeyError) as error:
            raise WeightsError(f"the scheduler of {self.name} cannot be built: {first_line(error)}") from error
        with torch.random.fork_rng(devices=[]):  # building draws weights; the caller's random state stays its own
            torch.manual_seed(0)
            self.autoencoder = self._network(build_autoencoder, states.get("autoencoder"))
            self.unet = self._network(build_unet, states.get("unet"))
        self.fingerprint = fingerprint(self.weights) + ("-untrained" if self.untrained else "")

    def _from_folder(self) -> dict[str, dict[str, Tensor]]:
        """Config and states of a folder in the embedded layout."""
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
        except (ValueError, TypeError) as error:
            raise WeightsError(f"config.json in {where} is not valid JSON: {first_line(error)}") from None
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
            states[part] = read_tensors(folder, [path.name])
        return states

    def _from_files(self) -> dict[str, dict[str, Tensor]]:
        """Config and states of NVIDIA's released files."""
        states, self.weights = {}, {}
        scale_factor = None
        for part, given in self.files.items():
            path = Path(str(given)).expanduser()
            if not path.is_file():
                raise WeightsError(f"{part} file {path.name} does not exist: give the path of MAISI's released file")
            content = read_checkpoint(path)
            self.weights[path.name] = file_sha256(path)
            state = content.get("unet_state_dict", content) if isinstance(content, Mapping) else None
            if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
                raise WeightsError(f"{path.name} holds no state dict, bare or under unet_state_dict")
            if part == "unet":
                scale_factor = _scale_factor(content, path.name)
            states[part] = {str(k).removeprefix("module."): v.as_subclass(Tensor) for k, v in state.items()}
        self.name = Path(str(self.files["unet"])).name
        self.release = release_of(states["unet"], self.name, self.kind)
        self.config = _merged({**RELEASES[self.release], "scale_factor": scale_factor}, self.overrides)
        if self.release == "ddpm-ct" and not self.config["unet"].get("include_fc"):
            states["unet"] = without_unused_projections(states["unet"], self.name)
        return states

    def _network(self, build, state: dict[str, Tensor] | None) -> nn.Module:
        part = "autoencoder" if build is build_autoencoder else "unet"
        try:
            network = build(self._on_this_device())
        except (RuntimeError, ValueError, TypeError) as error:
            raise WeightsError(f"the {part} of {self.name} does not fit its config: {first_line(error)}") from error
        use_onednn(network)
        if state is None or self.untrained:
            return network.to(self.device).eval().requires_grad_(False)
        return fill(network, state, f"the {part} of {self.name}", device=self.device)

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
            "release": self.release,
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
        x, y, z = (max(step, int(w) // step * step) for w in self.config.get("window", COMPACT["window"]))
        return x, y, z

    @property
    def steps(self) -> int:
        """Steps of the noise path by the release's own config; 20 for a folder that names none."""
        self.load()
        return int(self.config.get("steps", 20))

    @property
    def whole_latent(self) -> bool:
        """Whether the UNet was trained on whole scans, so that a part of one would be strange to it."""
        self.load()
        return bool(self.config.get("whole_latent", False))

    def doubts(self, modality: str, steps: int, extent_mm: Sequence[float]) -> list[str]:
        """What of a request lies outside the diffusion model's training, one sentence each.

        Args:
            modality: as ``predict`` takes it.
            steps: of the whole noise path.
            extent_mm: the volume's field of view along x, y, z.
        """
        self.load()
        name, found = self.release or self.name, []
        if modality not in self.modalities:
            known = ", ".join(self.modalities)
            asked = "" if self._classes is None else ', and is told "unknown" (class 0)'
            found.append(f"the diffusion model {name} was not trained on {modality} (but on {known}){asked}")
        if "steps" in self.config and steps != self.steps:
            word = "needs" if self.config["scheduler"]["kind"] == "ddpm" and steps < self.steps else "is made for"
            found.append(f"the diffusion model {name} {word} {self.steps} steps, and {steps} were asked for")
        least = self.config.get("field_of_view_mm")
        if least and any(e < m for e, m in zip(extent_mm, least, strict=True)):
            found.append(
                f"the field of view is {' x '.join(f'{e:.0f}' for e in extent_mm)} mm; {name} was trained on at least "
                f"{' x '.join(f'{m:.0f}' for m in least)} mm"
            )
        return found

    @property
    def _classes(self) -> int | None:
        return self.config["unet"].get("num_class_embeds")

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
        guidance: float | None = None,
    ) -> Tensor:
        """The UNet's output for a noisy latent: v = x_0 - noise (rectified flow), or the noise (DDPM).

        Args:
            latent: (1, C, x, y, z), sides multiples of ``latent_multiple``.
            timestep: noise level on the scheduler's scale, 0..1000.
            spacing_mm: of the volume's voxels.
            modality: ct, mr or pet, or one with its contrast where the release knows it (mr_t1, mr_flair, ...); one
                the model has no class for is told class 0, MAISI's "unknown", and ``doubts`` says so.
            regions: top and bottom body region as indices of ``BODY_REGIONS``, for the DDPM release.
            guidance: classifier-free guidance on the modality: out(unknown) + guidance (out(modality) - out(unknown)),
                for a second pass; 0 is one plain pass. None: the release's own.

        Returns:
            (1, C, x, y, z) float32.
        """
        self.load()
        options: dict[str, Tensor] = {}
        unet = self.config["unet"]
        if unet.get("include_spacing_input"):
            options["spacing_tensor"] = spacing_condition(spacing_mm, self.device)
        for name, region in zip(("top", "bottom"), regions, strict=True):
            if unet.get(f"include_{name}_region_index_input"):
                one_hot = torch.zeros(1, len(BODY_REGIONS), device=self.device)
                one_hot[0, region] = 100.0  # MAISI scales its conditions by 100, regions as well as spacing
                options[f"{name}_region_index_tensor"] = one_hot
        latent = latent.to(self.device, torch.float32)
        times = torch.full((len(latent),), float(timestep), device=self.device)

        def output(label: int | None) -> Tensor:
            labels = {} if label is None else {"class_labels": torch.tensor([label], device=self.device)}
            with self._precision():
                return self.unet(latent, timesteps=times, **options, **labels).float()

        if self._classes is None:
            return output(None)
        label = self.modalities.get(modality, 0)
        guidance = float(self.config.get("guidance", 0.0) if guidance is None else guidance)
        if guidance == 0 or label == 0:
            return output(label)
        unknown = output(0)
        return unknown + guidance * (output(label) - unknown)

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


def _check_entries(config: Mapping[str, Any], name: str) -> None:
    """Refuse entries of a config, its own or overridden, that nothing else checks before they are used.

    Raises:
        ZeroSegError: one of them is of another kind or range.
    """

    def numbers(value: Any, count: int = 3, least: float = 0.0) -> bool:
        listed = isinstance(value, (list, tuple)) and len(value) == count
        return listed and all(isinstance(v, (int, float)) and math.isfinite(v) and v > least for v in value)

    def classes(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(v, int) and v >= 0 for v in value.values())

    wanted: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "scale_factor": ("a positive number", lambda value: numbers([value], 1)),
        "spacing": ("three positive numbers", numbers),
        "modalities": ("names with the numbers of their classes", classes),
        "ct_window": ("two rising numbers", lambda value: numbers(value, 2, -math.inf) and value[0] < value[1]),
        "window": ("three positive numbers", numbers),
        "steps": ("a positive whole number", lambda value: isinstance(value, int) and value > 0),
    }
    for entry, (what, fits) in wanted.items():
        if entry in config and not fits(config[entry]):
            raise ZeroSegError(f"{entry} in the config of {name} must be {what}, not {config[entry]!r}")


# Released files ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Any:
    """The content of a ``.pt`` file of plain tensors, containers and ``CHECKPOINT_GLOBALS``, on the CPU.

    Raises:
        WeightsError: the file is damaged, or asks for anything else, which might run code.
    """
    # One at a time: the list of allowed globals is the whole process's, and another thread must not end this scope. What MONAI
    # itself has put on it is left out of the scope, for its end would take that away.
    with _READING:
        more = [g for g in CHECKPOINT_GLOBALS if g not in torch.serialization.get_safe_globals()]
        try:
            with torch.serialization.safe_globals(more):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            asked = re.search(r"(?:GLOBAL |Unsupported class |function )([\w.]+\.[\w.]+)", str(error))
            reason = f"it asks for {asked[1]}" if asked else first_line(error)
            raise WeightsError(
                f"cannot read {path.name} as plain tensors ({reason}): files that need code to be run are refused"
            ) from error


def release_of(state: Mapping[str, Tensor], name: str, kind: str | None = None) -> str:
    """Which of ``RELEASES`` a diffusion UNet belongs to.

    DDPM and rectified flow are told apart by the layers; CT, MR and brain MR share theirs and are told apart by the file's
    name.

    Args:
        state: of the UNet.
        name: of the file.
        kind: what the user says it is.

    Raises:
        WeightsError: the layers are of neither kind or contradict ``kind``, or the name does not say what for.
    """
    regions, classes = "top_region_index_layer.0.weight" in state, "class_embedding.weight" in state
    if regions == classes:
        raise WeightsError(
            f"{name} has the layers of no MAISI release: body regions or a modality class, one of the two"
        )
    flow = "rflow" if classes else "ddpm"
    if kind is not None:
        if not kind.startswith(flow):
            raise WeightsError(f"{name} has the layers of a {flow} release, and kind says {kind}: leave kind out")
        return kind
    if not classes:
        return "ddpm-ct"
    lower = name.lower().replace("_", "-")
    for release in ("rflow-mr-brain", "rflow-mr", "rflow-ct"):
        if release in lower:
            return release
    raise WeightsError(
        f"{name} is a rectified-flow model, and its name does not say of what: set kind to one of "
        f"{', '.join(k for k in RELEASES if k.startswith(flow))}"
    )


def without_unused_projections(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The DDPM release without the output projections of its attention layers, which were saved but never applied.

    MONAI/issues/7991, tutorials/issues/2042: the released file holds ``attn.out_proj.weight`` and ``.bias`` of its 11
    attention blocks. Either all blocks have both, or none: half of them would mean another network.

    Raises:
        WeightsError: only some attention layers have one.
    """
    attention = {k.removesuffix("to_q.weight") for k in state if k.endswith(".attn.to_q.weight")}
    unused = {f"{layer}out_proj.{end}" for layer in attention for end in ("weight", "bias")}
    if (found := unused & state.keys()) and found != unused:
        raise WeightsError(
            f"{name} holds {len(found)} of {len(unused)} attn.out_proj.* weights: it is no MAISI release"
        )
    return {k: v for k, v in state.items() if k not in unused}


def _scale_factor(content: Mapping, name: str) -> float:
    value = content.get("scale_factor")
    if value is None:
        raise WeightsError(f"{name} lacks scale_factor: it is no released MAISI diffusion model")
    number = torch.as_tensor(value.as_subclass(Tensor) if isinstance(value, Tensor) else value)
    if number.numel() != 1 or not 0 < float(number) < float("inf"):
        raise WeightsError(f"the scale_factor of {name} is no positive number")
    return float(number)
