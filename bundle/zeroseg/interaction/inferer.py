"""ADZUS as a MONAI inferer: one pass of a frozen diffusion model, any number of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor

from zeroseg.attention import select as rules
from zeroseg.attention.aggregate import aggregate_self_attention, grid_side
from zeroseg.attention.features import feature_affinity
from zeroseg.attention.geodesic import TokenPaths
from zeroseg.attention.merge import KLDistance, merge_attention, merge_to
from zeroseg.attention.prepare import prepare
from zeroseg.attention.refine import Upsampler
from zeroseg.attention.segmentation import Segmentation
from zeroseg.attention.text import TextProbe, check_prompt, standardise
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.errors import ZeroSegError
from zeroseg.timing import timed

SELECTS = ("segments", "auto", "points", "box", "text")
AFFINITIES = ("attention", "features", "both")
SALIENCE = 2.0
"""Weight, for a text, of standing out from the frame, beside the standardised evidence for the words. Words say well whether a
thing is there and poorly where it ends. 2 was the best of 0, 0.5, 1 and 2 on development images of four sets."""

TEXT_CERTAINTY = -0.5
"""Default t-value below which a prompt is called absent, here and in the app: slightly below 0, because a bare noun explains an
image less well than the captions a model learned from."""


@dataclass
class EncodedImage:
    """One image after the backbone's pass: all that prompts need, so that the pass is never repeated.

    Attributes:
        image: (3, h, w) in [0, 1], the guide of the refinement; at most ``working_size`` pixels a side.
        size: (H, W) of the original image.
        latents: (1, C, h', w') clean latents.
        attention: (N, N) aggregated attention, rows sum to 1.
        seconds: time per stage so far.
    """

    image: Tensor
    size: tuple[int, int]
    latents: Tensor
    attention: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    _proposals: tuple[Tensor, list[float]] | None = None
    _distance: KLDistance | None = None
    _paths: TokenPaths | None = None
    _salience: Tensor | None = None
    _probe: TextProbe | None = None
    _upsampler: tuple[str, Upsampler] | None = None

    @property
    def side(self) -> int:
        """Tokens along a side of the attention grid."""
        return grid_side(self.attention.shape[0])

    @property
    def distance(self) -> KLDistance:
        """Distances to the tokens' attention maps, whose logarithms are taken on first use and kept."""
        if self._distance is None:
            self._distance = KLDistance(self.attention)
        return self._distance

    @property
    def paths(self) -> TokenPaths:
        """Shortest paths between tokens, whose steps are measured on first use and kept."""
        if self._paths is None:
            self._paths = TokenPaths(self.distance)
        return self._paths

    @property
    def salience(self) -> Tensor:
        """(N,) in [0, 1], how every token stands out from the image's frame, see ``select.frame_relevance``; kept."""
        if self._salience is None:
            frame = rules.border_tokens(self.side).to(self.attention.device)
            self._salience = rules.frame_relevance(self.distance, frame, self.paths)
        return self._salience

    def upsample(self, maps: Tensor, refine: str) -> Tensor:
        """(K, N) maps over the tokens -> (K, h, w) over the pixels of ``image``; what needs no map is computed once."""
        if self._upsampler is None or self._upsampler[0] != refine:
            self._upsampler = refine, Upsampler(self.image, self.side, refine)
        return self._upsampler[1](maps.view(-1, self.side, self.side))


class AttentionSegmentationInferer(Inferer):
    """Zero-shot segmentation by the self-attention of a frozen diffusion model (ADZUS, arXiv 2503.18170).

    ``inferer(images)`` is MONAI's way in and returns label maps; ``segment`` also returns confidence and scores;
    ``encode`` once and ``predict`` often serves several prompts on one image. No ``network`` is needed: the frozen
    backbone is an argument. Settings are checked on first use, the weights load on first use.

    Defaults follow DiffSeg, which ADZUS builds on (clean latent, timestep 300, 16 x 16 anchors, three iterations); the
    paper leaves open how a mask is chosen among the segments, so ``select`` is ZeroSeg's own.

    Args:
        backbone: the frozen model; the embedded one by default.
        select: which segments are the object, unless a call says otherwise:
            ``segments`` all of them as a ranked label map; ``auto`` what differs from the image's frame;
            ``points`` what attends like the clicked pixels; ``box`` what differs from the surroundings of a box;
            ``text`` what a prompt explains better than no prompt, or absent. None: by the prompt given, else auto.
        thresholds: largest symmetric KL divergence, in nats, of maps that are merged, one per iteration (DiffSeg takes
            0.9 to 1.1, three times, for Stable Diffusion); or ``auto``: found per image, see ``merge_to``.
        max_segments: most segments that ``auto`` thresholds leave.
        grid: anchors along a side.
        resolution: side in pixels the image is resized to; default the backbone's own. A multiple of ``size_multiple``.
        timestep: noise level the UNet is told, 0..999.
        noise_draws: 0 passes the clean latent once; n > 0 averages n noised passes.
        assign: to which segment a token goes: ``nearest``, the one whose map its own map is closest to (DiffSeg's
            K-means refinement, one step), or ``argmax``, the one that attends to it most (DiffSeg's NMS).
        affinity: ``attention`` (ADZUS), ``features`` of the decoder, or ``both``.
        refine: ``guided`` for edges that follow the image, ``none`` for bilinear.
        slice_axis: axis of a volume (0, 1, 2 or negative) along which it is cut into slices.
        text_resolution: side in pixels at which text is tested; default half of ``resolution``, because a prompt takes eight
            passes. A multiple of ``size_multiple``.
        text_certainty: least t-value of the evidence for a prompt; below it the object is called absent.
        working_size: masks are computed on at most this many pixels a side and enlarged by nearest neighbour.
        progress: show a bar over the slices of a volume.
        seed: of every noise draw; equal input, settings and weights give equal masks.
    """

    def __init__(
        self,
        backbone: StableDiffusionBackbone | None = None,
        select: str | None = None,
        thresholds: str | Sequence[float] = "auto",
        max_segments: int = 24,
        grid: int = 16,
        resolution: int | None = None,
        timestep: int = 300,
        noise_draws: int = 0,
        assign: str = "nearest",
        affinity: str = "attention",
        refine: str = "guided",
        slice_axis: int = -1,
        text_resolution: int | None = None,
        text_certainty: float = TEXT_CERTAINTY,
        working_size: int = 1024,
        progress: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.backbone = backbone if backbone is not None else StableDiffusionBackbone()
        self.select = select
        self.thresholds = thresholds
        self.max_segments = max_segments
        self.grid = grid
        self.resolution = resolution
        self.timestep = timestep
        self.noise_draws = noise_draws
        self.assign = assign
        self.affinity = affinity
        self.refine = refine
        self.slice_axis = slice_axis
        self.text_resolution = text_resolution
        self.text_certainty = text_certainty
        self.working_size = working_size
        self.progress = progress
        self.seed = seed

    def settings(self) -> dict:
        """Every setting as JSON-serialisable values, for the manifest."""
        hidden = ("backbone", "progress")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k not in hidden}

    def check(self) -> None:
        """Check the settings and load the weights.

        Raises:
            ZeroSegError: a setting is out of its range; the message names what is allowed.
            WeightsError: the backbone cannot be loaded.
        """
        _choice("select", self.select, (*SELECTS, None))
        _choice("affinity", self.affinity, AFFINITIES)
        _choice("assign", self.assign, ("nearest", "argmax"))
        _choice("refine", self.refine, ("guided", "none"))
        if self.thresholds != "auto":
            values = self.thresholds if isinstance(self.thresholds, (list, tuple)) else ()
            if not values or not all(isinstance(t, (int, float)) and 0 < t < float("inf") for t in values):
                raise ZeroSegError(
                    "thresholds must be auto, or positive numbers, one per iteration, e.g. [1.0, 1.0, 1.0]"
                )
        if not isinstance(self.max_segments, int) or not 1 <= self.max_segments <= 255:
            raise ZeroSegError(f"max_segments must be a whole number from 1 to 255, not {self.max_segments!r}")
        if not isinstance(self.slice_axis, int) or self.slice_axis not in range(-3, 3):
            raise ZeroSegError(f"slice_axis must be 0, 1 or 2, not {self.slice_axis!r}")
        if not isinstance(self.grid, int) or self.grid < 1:
            raise ZeroSegError(f"grid must be a positive number of anchors a side, not {self.grid!r}")
        if not isinstance(self.noise_draws, int) or self.noise_draws < 0:
            raise ZeroSegError(
                f"noise_draws must be 0 (clean latent) or a positive number of draws, not {self.noise_draws!r}"
            )
        if not isinstance(self.working_size, int) or self.working_size < 1:
            raise ZeroSegError(f"working_size must be a positive number of pixels, not {self.working_size!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ZeroSegError(f"seed must be a whole number from 0, not {self.seed!r}")
        if not isinstance(self.text_certainty, (int, float)):
            raise ZeroSegError(f"text_certainty must be a number, not {self.text_certainty!r}")
        self.backbone.load()
        self.backbone.check_timestep(self.timestep)
        step = self.backbone.size_multiple
        for name in ("resolution", "text_resolution"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value % step or value <= 0):
                raise ZeroSegError(
                    f"{name} must be a positive multiple of {step} pixels for this backbone, not {value!r}"
                )

    # One image ---------------------------------------------------------------------------------------------------------

    def encode(self, image: Tensor | np.ndarray) -> EncodedImage:
        """Run the backbone on one image.

        Args:
            image: (C, H, W), any channel count and value range; see ``prepare``.

        Raises:
            ZeroSegError: the image is empty or not finite, or a setting is wrong.
        """
        image = torch.as_tensor(np.asarray(image)) if not isinstance(image, Tensor) else image.as_subclass(Tensor)
        if image.ndim != 3:
            raise ZeroSegError(f"an image must be (C, H, W), not {tuple(image.shape)}")
        return self.encode_prepared(prepare(image))

    def encode_prepared(self, full: Tensor) -> EncodedImage:
        """``encode`` of an image that ``prepare`` already brought to (3, H, W) in [0, 1]."""
        self.check()
        seconds: dict[str, float] = {}
        with timed(seconds, "resize"):
            size = (full.shape[1], full.shape[2])
            side = self.resolution or self.backbone.image_size
            # Squeezed to a square: the whole image is seen, and token grids stay square whatever its shape.
            square = F.interpolate(full[None], (side, side), mode="bilinear", antialias=True)
            scale = min(1.0, self.working_size / max(size))
            working = [max(1, round(s * scale)) for s in size]
            guide = full if scale == 1 else F.interpolate(full[None], working, mode="bilinear", antialias=True)[0]
        with timed(seconds, "encode"):
            latents = self.backbone.encode_image(square)
            record = self.backbone.read(
                latents,
                self.timestep,
                self.backbone.embed_text([""]),
                self_attention=self.affinity != "features",
                features=self.affinity != "attention",
                noise_draws=self.noise_draws,
                seed=self.seed,
            )
        with timed(seconds, "aggregate"):
            parts = []
            if self.affinity != "features":
                parts.append(aggregate_self_attention([m[0] for m in record.self_attention.values()]))
            if self.affinity != "attention":
                parts.append(feature_affinity(record.features, latents.shape[-1]))
            attention = parts[0] if len(parts) == 1 else (parts[0] + parts[1]) / 2
        return EncodedImage(guide.to(attention.device), size, latents, attention, seconds)

    def predict(
        self,
        encoded: EncodedImage,
        select: str | None = None,
        points: Sequence[Sequence[float]] | None = None,
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
        text: str | None = None,
    ) -> Segmentation:
        """Segment an encoded image; the backbone runs again only for text.

        Args:
            encoded: from ``encode``.
            select: overrides the inferer's rule for this call.
            points: (x, y) = (column, row) of clicks, in pixels of the original image.
            labels: 1 (object) or 0 (not the object) per click; all 1 by default.
            box: (x0, y0, x1, y1), corners inside the image; with points it bounds the mask.
            text: the words to look for.

        Raises:
            ZeroSegError: the rule is unknown, its prompt is missing, or a prompt lies outside the image.
        """
        rule = resolve_select(select or self.select, points, box, text)
        clicks, kinds = check_points(points, labels, encoded.size[::-1])
        corners = check_box(box, encoded.size[::-1])
        seconds = dict(encoded.seconds)
        if rule == "segments":
            return self._segments(encoded, seconds)
        if rule == "points" and not any(kinds):
            raise ZeroSegError("select points needs at least one click with label 1 (on the object)")
        if rule == "box" and corners is None:
            raise ZeroSegError("select box needs a box [x0, y0, x1, y1]")
        if rule == "points":
            return self._points(encoded, clicks, kinds, corners, seconds)
        if rule == "text":
            return self._text(encoded, check_prompt(text), seconds)
        return self._frame(encoded, corners if rule == "box" else None, rule, seconds)

    def proposals(self, encoded: EncodedImage) -> tuple[Tensor, list[float]]:
        """(K, N) merged object proposals of an encoded image and the thresholds taken; computed once and kept with it."""
        if encoded._proposals is None:
            if self.thresholds == "auto":
                encoded._proposals = merge_to(encoded.distance, self.max_segments, self.grid)
            else:
                encoded._proposals = (
                    merge_attention(encoded.attention, self.thresholds, self.grid),
                    list(self.thresholds),
                )
        return encoded._proposals

    def _segments(self, encoded: EncodedImage, seconds: dict[str, float]) -> Segmentation:
        with timed(seconds, "merge"):
            proposals, thresholds = self.proposals(encoded)
        side = encoded.side
        with timed(seconds, "select"):
            if self.assign == "nearest":
                distance = encoded.distance(proposals)
                posterior = (-distance / distance.amin(0).mean().clamp_min(1e-12)).softmax(0)
            else:
                posterior = proposals / proposals.sum(0, keepdim=True).clamp_min(1e-12)
            unlike_frame = rules.frame_relevance(encoded.distance, rules.border_tokens(side).to(proposals.device))
            owner = posterior.argmax(0)
        with timed(seconds, "refine"):
            posterior = encoded.upsample(posterior, self.refine).clamp(0, 1)
            top = posterior.topk(min(2, len(posterior)), dim=0)
            labels = top.indices[0].cpu().numpy()
            margin = top.values[0] - (top.values[1] if len(posterior) > 1 else 0)
            confidence = margin.clamp(0, 1).cpu().numpy()
        present = [k for k in range(len(proposals)) if (labels == k).any()]
        objectness = {k: float(unlike_frame[owner == k].mean()) if (owner == k).any() else 0.0 for k in present}
        ranked = sorted(present, key=lambda k: -objectness[k])[:255]
        table = np.zeros(len(proposals), np.uint8)
        table[ranked] = np.arange(1, len(ranked) + 1)
        details = {
            "segments": len(ranked),
            "objectness": [round(objectness[k], 4) for k in ranked],
            "thresholds": [float(f"{t:.4g}") for t in thresholds],
        }
        return self._finish(encoded, table[labels], confidence, "segments", seconds, details)

    def _points(self, encoded, clicks, kinds, corners, seconds) -> Segmentation:
        side, size = encoded.side, encoded.size
        with timed(seconds, "select"):
            wanted = [rules.token_at(*c, size, side) for c, k in zip(clicks, kinds, strict=True) if k]
            unwanted = [rules.token_at(*c, size, side) for c, k in zip(clicks, kinds, strict=True) if not k]
            maps = [rules.click_relevance(encoded.paths, wanted)]
            if unwanted:
                maps.append(rules.click_relevance(encoded.paths, unwanted))
        seeds = [self._pixel(encoded, c) for c, k in zip(clicks, kinds, strict=True) if k]
        allowed = self._inside(encoded, corners)
        with timed(seconds, "refine"):
            full = encoded.upsample(torch.stack(maps), self.refine).cpu().numpy()
        if unwanted:
            allowed = (full[0] > full[1]) & (True if allowed is None else allowed)
            for c, k in zip(
                clicks, kinds, strict=True
            ):  # the guided filter may blur a click away; the user's word stands
                allowed[self._pixel(encoded, c)] = bool(k)
        return self._cut(encoded, full[0], "points", seconds, seeds, allowed)

    def _frame(self, encoded, corners, rule: str, seconds) -> Segmentation:
        with timed(seconds, "select"):
            if corners is None:
                relevance = encoded.salience
            else:
                frame = self._surroundings(corners, encoded.size, encoded.side)
                relevance = rules.frame_relevance(encoded.distance, frame.to(encoded.attention.device))
        with timed(seconds, "refine"):
            full = encoded.upsample(relevance[None], self.refine)[0].cpu().numpy()
        return self._cut(encoded, full, rule, seconds, None, self._inside(encoded, corners))

    def _text(self, encoded, text: str, seconds) -> Segmentation:
        with timed(seconds, "text"):
            if encoded._probe is None:
                encoded._probe = TextProbe(
                    self.backbone,
                    self._text_latents(encoded),
                    encoded.attention,
                    timestep=self.timestep,
                    seed=self.seed,
                )
            evidence = encoded._probe(text)
        details = {"text": text, "gain": round(evidence.gain, 6), "certainty": round(evidence.certainty, 3)}
        if evidence.certainty < self.text_certainty:
            empty = np.zeros(encoded.size, np.uint8)
            sure = math.erf((self.text_certainty - evidence.certainty) / math.sqrt(2))  # of a normal deviate
            confidence = np.full(encoded.size, sure, np.float32)
            return Segmentation(empty, confidence, [], "text", True, seconds, details)
        with timed(seconds, "select"):
            relevance = evidence.relevance + SALIENCE * standardise(encoded.salience)
        with timed(seconds, "refine"):
            full = encoded.upsample(relevance[None], self.refine)[0].cpu().numpy()
        return self._cut(encoded, full, "text", seconds, None, None, details)

    def _text_latents(self, encoded: EncodedImage) -> Tensor:
        """Latents of the image at ``text_resolution``."""
        step = self.backbone.size_multiple
        side = self.text_resolution or max(step, (self.resolution or self.backbone.image_size) // 2 // step * step)
        square = F.interpolate(encoded.image[None], (side, side), mode="bilinear", antialias=True)
        return self.backbone.encode_image(square)

    def _cut(self, encoded, relevance, rule, seconds, seeds, allowed, details=None) -> Segmentation:
        with timed(seconds, "cut"):
            if seeds:
                mask, threshold = rules.cut(relevance, seeds, allowed)
            else:
                mask, threshold = rules.split(relevance, allowed)
            # How far a pixel's relevance lies from the threshold, as a share of the room there is on its side.
            room = np.where(mask, max(relevance.max() - threshold, 1e-6), max(threshold - relevance.min(), 1e-6))
            confidence = np.clip(np.abs(relevance - threshold) / room, 0, 1).astype(np.float32)
        details = {**(details or {}), "threshold": round(threshold, 5)}
        return self._finish(encoded, mask.astype(np.uint8), confidence, rule, seconds, details)

    def _finish(self, encoded, labels, confidence, rule, seconds, details) -> Segmentation:
        if labels.shape != encoded.size:
            full = torch.from_numpy(np.stack([labels.astype(np.float32), confidence]))[:, None]
            labels = F.interpolate(full[:1], encoded.size, mode="nearest-exact")[0, 0].numpy().astype(np.uint8)
            confidence = F.interpolate(full[1:], encoded.size, mode="bilinear")[0, 0].numpy()
        scores = [float(confidence[labels == k].mean()) for k in range(1, int(labels.max()) + 1)]
        return Segmentation(labels, confidence.astype(np.float32), scores, rule, False, seconds, details)

    @staticmethod
    def _pixel(encoded: EncodedImage, click) -> tuple[int, int]:
        """(row, column) on the working grid of a click given in original pixels."""
        height, width = encoded.image.shape[1:]
        row = min(height - 1, int((click[1] + 0.5) * height / encoded.size[0]))
        return row, min(width - 1, int((click[0] + 0.5) * width / encoded.size[1]))

    def _inside(self, encoded: EncodedImage, corners) -> np.ndarray | None:
        if corners is None:
            return None
        (top, left), (bottom, right) = (self._pixel(encoded, c) for c in (corners[:2], corners[2:]))
        inside = np.zeros(tuple(encoded.image.shape[1:]), bool)
        inside[top : bottom + 1, left : right + 1] = True
        return inside

    @staticmethod
    def _surroundings(corners, size, side: int) -> Tensor:
        """(N,) bool: tokens just outside a box, or the image's border where the box leaves no room."""
        height, width = size
        x0, x1 = (corners[0] * side / width, (corners[2] + 1) * side / width)
        y0, y1 = (corners[1] * side / height, (corners[3] + 1) * side / height)
        at = torch.arange(side) + 0.5
        margin = max(2.0, 0.15 * max(x1 - x0, y1 - y0))

        def between(low, high):
            return (at >= low) & (at <= high)

        inner = between(y0, y1)[:, None] & between(x0, x1)[None]
        outer = between(y0 - margin, y1 + margin)[:, None] & between(x0 - margin, x1 + margin)[None]
        ring = (outer & ~inner).flatten()
        return ring if ring.sum() >= 4 else rules.border_tokens(side)

    # Volumes ------------------------------------------------------------------------------------------------------------

    def segment(
        self, image: Tensor | np.ndarray, select: str | None = None, *, prepared: bool = False, **prompt
    ) -> Segmentation:
        """Encode and predict one image (C, H, W), or one volume (C, X, Y, Z) slice by slice.

        ``prepared`` says that ``prepare`` already brought the image to (3, ...) in [0, 1]: a server does that once per image.

        In a volume, points are (x, y, z) and a box is (x0, y0, z0, x1, y1, z1), in voxel indices. ``segments`` links
        segments across slices; ``auto`` and ``text`` decide slice by slice; ``points`` follows the clicked object from its
        slice to its neighbours until it ends; ``box`` fills the slices between its faces.

        Raises:
            ZeroSegError: as ``encode`` and ``predict``.
        """
        self.check()
        if image.ndim == 3:
            return self.predict(self.encode_prepared(image) if prepared else self.encode(image), select, **prompt)
        if image.ndim != 4:
            raise ZeroSegError(f"expected (C, H, W) or (C, X, Y, Z), not {tuple(image.shape)}")
        from zeroseg.attention.volume import segment_volume

        return segment_volume(self, image, select, prepared=prepared, **prompt)

    def __call__(
        self,
        inputs: Tensor,
        network: Callable | None = None,
        *args,
        prompts: dict | Sequence[dict] | None = None,
        **kwargs,
    ) -> Tensor:
        """Label maps of a batch, MONAI's inferer interface.

        Args:
            inputs: (B, C, H, W) or (B, C, X, Y, Z).
            network: ignored; the backbone is the inferer's own.
            prompts: keyword arguments of ``predict`` (select, points, labels, box, text) for all items, or one dict each.

        Returns:
            (B, 1, ...) uint8 labels on the inputs' device; affine and metadata of a MetaTensor are kept.

        Raises:
            ZeroSegError: wrong dimensions, or as ``predict``.
        """
        if inputs.ndim not in (4, 5):
            raise ZeroSegError(f"inputs must be (B, C, H, W) or (B, C, X, Y, Z), not {tuple(inputs.shape)}")
        each = prompts if isinstance(prompts, (list, tuple)) else [prompts or {}] * len(inputs)
        if len(each) != len(inputs):
            raise ZeroSegError(f"{len(each)} prompts were given for a batch of {len(inputs)}")
        masks = [torch.from_numpy(self.segment(i, **p).labels)[None] for i, p in zip(inputs, each, strict=True)]
        labels = torch.stack(masks).to(inputs.device)
        if hasattr(inputs, "meta"):
            from monai.utils import convert_to_dst_type

            labels = convert_to_dst_type(labels, inputs, dtype=torch.uint8)[0]
        return labels


def _choice(name: str, value: object, allowed: Sequence) -> None:
    if value not in allowed:
        names = ", ".join(str(a) for a in allowed if a is not None)
        raise ZeroSegError(f"unknown {name} {value!r}: use one of {names}")


def resolve_select(select: str | None, points, box, text) -> str:
    """The rule of a call: the one named, else the one its prompt implies, else ``auto``.

    Raises:
        ZeroSegError: the rule is unknown or its prompt is missing.
    """
    _choice("select", select, (*SELECTS, None))
    if select is None:
        select = (
            "points" if points is not None else "box" if box is not None else "text" if text is not None else "auto"
        )
    needs = {"points": points, "box": box, "text": text}
    if select in needs and needs[select] is None:
        raise ZeroSegError(f"select {select} needs a prompt: give {select} for this image")
    return select


def check_points(points, labels, extent: Sequence[int]) -> tuple[list[tuple[float, ...]], list[int]]:
    """Clicks and their labels, checked against the image.

    Args:
        points: sequence of (x, y) or (x, y, z), or None.
        labels: sequence of 0 and 1, or None for all 1.
        extent: number of pixels along x, y (and z).

    Raises:
        ZeroSegError: a click is malformed or outside, or the labels do not match or have no clicks.
    """
    if points is None:
        if labels is not None:
            raise ZeroSegError("labels are given without points: give the points they belong to, or leave labels out")
        return [], []
    axes = "xyz"[: len(extent)]
    clicks = []
    try:
        for point in points:
            clicks.append(tuple(float(v) for v in point))
    except (TypeError, ValueError):
        raise ZeroSegError(f"points must be a list of [{', '.join(axes)}] numbers, not {points!r}") from None
    for click in clicks:
        if len(click) != len(extent):
            raise ZeroSegError(f"point {list(click)} must have {len(extent)} numbers: {', '.join(axes)}")
        if not all(0 <= v <= n - 1 for v, n in zip(click, extent, strict=True)):
            inside = ", ".join(f"{a} 0..{n - 1}" for a, n in zip(axes, extent, strict=True))
            raise ZeroSegError(f"point {list(click)} lies outside the image: {inside}")
    kinds = [1] * len(clicks) if labels is None else list(labels) if hasattr(labels, "__iter__") else []
    if len(kinds) != len(clicks) or any(k not in (0, 1) for k in kinds):
        raise ZeroSegError(f"labels must hold one 0 or 1 for each of the {len(clicks)} points, not {labels!r}")
    if not clicks:
        raise ZeroSegError("points is empty: give at least one click [x, y], or leave points out")
    return clicks, [int(k) for k in kinds]


def check_box(box, extent: Sequence[int]) -> tuple[float, ...] | None:
    """A box's corners, checked against the image: low corner first, both inside, not empty.

    Raises:
        ZeroSegError: otherwise.
    """
    if box is None:
        return None
    n = len(extent)
    try:
        corners = tuple(float(v) for v in box)
    except (TypeError, ValueError):
        raise ZeroSegError(f"box must be {2 * n} numbers, not {box!r}") from None
    if len(corners) != 2 * n:
        raise ZeroSegError(f"box must be {2 * n} numbers (low corner, high corner), not {len(corners)}")
    low, high = corners[:n], corners[n:]
    if not all(0 <= a <= b <= size - 1 for a, b, size in zip(low, high, extent, strict=True)):
        raise ZeroSegError(
            f"box {list(corners)} must have its low corner first and lie inside the image of {list(extent)} pixels"
        )
    return corners
