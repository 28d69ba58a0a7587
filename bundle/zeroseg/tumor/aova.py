"""AOVA maps of whole volumes: windows, prompts, and whether there is anything at all (paper section 2.1)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from torch import Tensor

from zeroseg.backbones.convolution import use_onednn
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.weights import EMBEDDED, EMBEDDED_SETS, verify_sums
from zeroseg.errors import WeightsError, first_line
from zeroseg.hashing import file_sha256
from zeroseg.tumor.adapters import VOXEL_ML, AovaAdapters
from zeroseg.tumor.residuals import feature_residual

FEATURE_BYTES = 2**31
"""Adapted features are kept for further prompts while they take less than this; beyond it windows are encoded anew per
prompt."""
OVERLAP = 0.25
"""Share of the longest window that neighbours have in common."""

ENTRIES = ("fusion", "presence", "presence_of", "beside", "head", "cut")
"""Of ``config.json`` beside the adapters' options, see ``load_adapters``."""

Slices = tuple[slice, slice, slice]


@dataclass
class AovaMap:
    """What the adapters say about a whole volume.

    Attributes:
        margin: (X, Y, Z) log-odds of the abnormal prompts against normal and null ones.
        image_logit: log-odds that the volume holds what was asked for: the highest of its windows.
        null_contrast: log-odds of the abnormal against the null prompts where they are highest; the highest of its
            windows.
    """

    margin: Tensor
    image_logit: float
    null_contrast: float

    def times(self, other: AovaMap, weight: float = 1.0) -> AovaMap:
        """Where it is, by both as a product of experts: margins add up, as those of the stages do. Whether it is there at all remains
        this one's word.

        Args:
            other: of the same volume and prompts.
            weight: of its margin.
        """
        return replace(self, margin=self.margin + weight * other.margin)


@dataclass
class EncodedFeatures:
    """A volume's adapted features, window by window, and its latent.

    Attributes:
        latent: (1, C, x, y, z) in the diffusion model's space.
        pieces: per window its place and its adapted features, or None where they are made again on demand.
        volume: (1, 1, X, Y, Z), what the windows are cut from.
        voxel_ml: millilitres of one of its voxels.
        reader: SHA-256 of the adapters.
    """

    latent: Tensor
    pieces: list[tuple[Slices, tuple[Tensor, ...] | None]]
    volume: Tensor
    voxel_ml: float = VOXEL_ML
    reader: str | None = None


def window_slices(shape: Sequence[int], window: Sequence[int], multiple: int) -> list[Slices]:
    """Overlapping windows that cover a volume, each side a multiple of ``multiple``, at places that are multiples of
    it."""
    per_axis = []
    for size, wanted in zip(shape, window, strict=True):
        longest = max(multiple, wanted // multiple * multiple)
        shared = int(longest * OVERLAP) // multiple * multiple
        count = max(1, math.ceil((size - shared) / max(multiple, longest - shared)))
        # As many windows as the longest would need, but no longer than that many have to be.
        length = min(size, longest, math.ceil((size + (count - 1) * shared) / count / multiple) * multiple)
        starts = [round(i * (size - length) / max(1, count - 1) / multiple) * multiple for i in range(count)]
        per_axis.append([slice(s, s + length) for s in starts])
    return list(itertools.product(*per_axis))


def blend(pieces: Iterator[tuple[Slices, Tensor]], size: Sequence[int]) -> Tensor:
    """Overlapping pieces (C, x, y, z) -> (C, *size), weighted by a Gaussian that falls towards a piece's border.

    Raises:
        ValueError: there is no piece.
    """
    total = weight = None
    for place, piece in pieces:
        if piece.shape[1:] == tuple(size):
            return piece
        if total is None or weight is None:
            total = piece.new_zeros((len(piece), *size))
            weight = piece.new_zeros(tuple(size))
        importance = compute_importance_map(tuple(piece.shape[1:]), mode="gaussian", device=piece.device)
        importance = importance.to(piece.dtype).clamp_min(1e-3)
        total[(slice(None), *place)] += piece * importance
        weight[place] += importance
    if total is None or weight is None:
        raise ValueError("there is no piece to blend")
    return total / weight


@torch.inference_mode()
def encode_features(
    backbone: MaisiBackbone,
    adapters: AovaAdapters,
    volume: Tensor,
    voxel_ml: float = VOXEL_ML,
    latent: Tensor | None = None,
) -> EncodedFeatures:
    """Encode a volume once for any number of prompts: latent and adapted features by one encoder pass per window.

    Args:
        backbone: the frozen model.
        adapters: on the backbone's device.
        volume: (1, 1, X, Y, Z) in [0, 1], sides multiples of ``backbone.size_multiple``.
        voxel_ml: millilitres of a voxel.
        latent: of the volume, where it is known: adapters that read it as a whole then need no window.
    """
    places = window_slices(volume.shape[2:], backbone.window, backbone.size_multiple)
    channels = backbone.feature_channels
    floats = sum(c / 8**level for level, c in enumerate(channels)) * sum(_voxels(p) for p in places)
    keep = len(places) == 1 or 4 * floats <= FEATURE_BYTES
    pieces: list[tuple[Slices, tuple[Tensor, ...] | None]] = []
    whole = adapters.whole_mm is not None
    if whole:
        (everything,) = window_slices(volume.shape[2:], volume.shape[2:], backbone.size_multiple)
        pieces.append((everything, _adapted(backbone, adapters, volume, voxel_ml)))

    def latents() -> Iterator[tuple[Slices, Tensor]]:
        for place in places:
            reading = backbone.read(volume[(..., *place)])
            if not whole:
                pieces.append((place, adapters.adapt(reading.features) if keep else None))
            x, y, z = (slice(s.start // backbone.factor, s.stop // backbone.factor) for s in place)
            yield (x, y, z), reading.latent[0]

    if latent is None or not whole:
        size = [s // backbone.factor for s in volume.shape[2:]]
        gathered = list(latents())  # latents are small: every window is read before blending
        latent = blend(iter(gathered), size)[None]
    return EncodedFeatures(latent, pieces, volume, voxel_ml, adapters.sha256)


@torch.inference_mode()
def aova_map(
    backbone: MaisiBackbone,
    adapters: AovaAdapters,
    encoded: EncodedFeatures,
    prompts: Tensor,
    roles: Sequence[str],
) -> AovaMap:
    """The AOVA map of an encoded volume for one set of prompts.

    Args:
        backbone: only used where windows are encoded anew.
        adapters: as in ``encode_features``.
        encoded: the volume.
        prompts: (N, d) text embeddings.
        roles: one per prompt.
    """
    logits, contrasts = [], []

    def margins() -> Iterator[tuple[Slices, Tensor]]:
        for place, adapted in encoded.pieces:
            if adapted is None:
                adapted = _adapted(backbone, adapters, encoded.volume[(..., *place)], encoded.voxel_ml)
            size = [s.stop - s.start for s in place]
            # A scan read as a whole has other voxels.
            voxel_ml = encoded.voxel_ml * math.prod(size) / math.prod(adapted[0].shape[:3])
            output = adapters.attend(adapted, prompts, roles, voxel_ml)
            logits.append(float(output.image_logit))
            contrasts.append(float(output.null_contrast) if output.null_contrast is not None else math.inf)
            yield place, _resized(output.margin[None], size)

    margin = blend(margins(), encoded.volume.shape[2:])[0]
    return AovaMap(margin, max(logits), max(contrasts))


@torch.inference_mode()
def healthy_margin_loss(
    backbone: MaisiBackbone,
    adapters: AovaAdapters,
    encoded: EncodedFeatures,
    change: Tensor,
    region: np.ndarray,
    prompts: Tensor,
    roles: Sequence[str],
) -> np.ndarray:
    """The feature residual of a whole volume: what the margin loses when the pseudo-healthy change is applied to the
    input.

    Only windows that touch the region are encoded again; elsewhere nothing changed.

    Args:
        backbone, adapters, encoded: as in ``encode_features``.
        change: (1, 1, X, Y, Z) pseudo-healthy volume minus reconstruction.
        region: (X, Y, Z) bool, where it was regenerated.
        prompts, roles: as in ``aova_map``.

    Returns:
        (X, Y, Z) float32, see ``residuals.feature_residual``.
    """
    most = max(1.0, float(encoded.volume.max()))  # MR may go beyond 1

    def losses() -> Iterator[tuple[Slices, Tensor]]:
        for place, adapted in encoded.pieces:
            size = [s.stop - s.start for s in place]
            if not region[place].any():
                yield place, torch.zeros(1, *size, device=change.device)
                continue
            part = (..., *place)
            if adapted is None:
                adapted = _adapted(backbone, adapters, encoded.volume[part], encoded.voxel_ml)
            changed = (encoded.volume[part] + change[part]).clamp(0, most)
            healthy = _adapted(backbone, adapters, changed, encoded.voxel_ml)
            yield place, _resized(feature_residual(adapters, adapted, healthy, prompts, roles)[None], size)

    return blend(losses(), encoded.volume.shape[2:])[0].float().cpu().numpy()


def load_adapters(source: str | Path = EMBEDDED, text_dim: int | None = None) -> AovaAdapters:
    """Trained adapters from a folder with ``adapters.safetensors`` and the entry ``adapters`` in ``config.json``.

    Further entries, each per modality, become the module's attributes where they are there:
      ``fusion``       the learned weights of ``residuals.fuse``;
      ``presence``     the log-odds that count as even odds of there being a tumour at all;
      ``presence_of``  of what: "image", the adapters' answer of the volume as a whole, as where nothing is said, or "mask";
      ``beside``       what the general adapters' margins weigh beside these, where both answer together; 1 where nothing is said;
      ``head``         what the words weigh beside the candidates of the promptable head; in other modalities it is not asked;
      ``cut``          the share of the surest voxels' log-odds from which on a voxel is tumour; 0 where nothing is said.

    Args:
        source: ``"embedded"``, that folder, or the path of ``adapters.safetensors`` in it.
        text_dim: of the text encoder in use, which the adapters must be made for.

    Raises:
        WeightsError: a file is missing or damaged, or the adapters are made for another text encoder.
    """
    from safetensors.torch import load_file

    folder = EMBEDDED_SETS.get(str(source), Path(source).expanduser())
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    name = f"models/{folder.name}" if str(source) in EMBEDDED_SETS else folder.name
    try:
        config = json.loads((folder / "config.json").read_text())
        options = dict(config["adapters"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(
            f"{name} holds no config.json with an entry adapters: give a folder train_tumor wrote"
        ) from None
    if "top" in options:  # older folders name a number of voxels of 3 mm
        options["top_ml"] = options.pop("top") * VOXEL_ML
    path = folder / "adapters.safetensors"
    if not path.is_file():
        raise WeightsError(
            f"{name} lacks adapters.safetensors: train them by configs/train_tumor.yaml, or copy it again"
        )
    verify_sums(folder)
    try:
        adapters = AovaAdapters(**options)
        adapters.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except Exception as error:  # safetensors raises its own kinds, none documented
        raise WeightsError(f"the adapters in {name} cannot be loaded: {first_line(error)}") from error
    if text_dim is not None and adapters.options["text_dim"] != text_dim:
        raise WeightsError(
            f"the adapters in {name} read text vectors of {adapters.options['text_dim']} numbers, the text encoder gives {text_dim}: "
            "adapters fit only the encoder they were trained with"
        )
    for entry in ENTRIES:
        setattr(adapters, entry, config.get(entry))
    adapters.sha256 = file_sha256(path)
    return use_onednn(adapters).eval().requires_grad_(False)


def _adapted(backbone: MaisiBackbone, adapters: AovaAdapters, volume: Tensor, voxel_ml: float) -> tuple[Tensor, ...]:
    """What the adapters make of a (1, 1, X, Y, Z) window, or of a whole scan on the grid that they read it on."""
    if adapters.whole_mm is not None:
        volume = _resized(volume[0], adapters.whole_size(volume.shape[2:], voxel_ml, backbone.size_multiple))[None]
    return adapters.adapt(backbone.features(volume))


def _resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """(C, X, Y, Z) -> (C, *size); means where it shrinks, linear where it grows."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    if math.prod(size) < math.prod(values.shape[1:]):
        return F.interpolate(values[None], tuple(size), mode="area")[0]
    return F.interpolate(values[None], tuple(size), mode="trilinear", align_corners=False)[0]


def _voxels(place: Slices) -> int:
    return math.prod(s.stop - s.start for s in place)
