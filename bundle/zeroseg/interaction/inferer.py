"""ADZUS as a MONAI inferer: one pass of a frozen diffusion model, any number of prompts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from zeroseg.attention import rules
from zeroseg.attention.aggregate import aggregate_self_attention
from zeroseg.attention.encoding import EncodedImage
from zeroseg.attention.features import feature_affinity
from zeroseg.attention.merge import merge_attention, merge_to
from zeroseg.attention.prepare import prepare
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.backbones.weights import EMBEDDED
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.clicks import answer_clicks, certainty, inside_box
from zeroseg.interaction.naming import BACKGROUND, Naming, name_segments
from zeroseg.interaction.promptable import answer_by_head, find_whole
from zeroseg.interaction.prompts import Prompts, check_prompts, check_text, contradicts
from zeroseg.interaction.settings import ENCODING, MERGE, Settings, with_preset
from zeroseg.interaction.synonyms import sentence_encoder
from zeroseg.interaction.text import TextEvidence, TextProbe, standardise
from zeroseg.interaction.vocabulary import Meaning, read_vocabulary
from zeroseg.interaction.volume import segment_volume
from zeroseg.interaction.volume_session import VolumeSessions, affines_of, answer_volume, spacing_of
from zeroseg.interaction.word_head import WordProbe
from zeroseg.segmentation import Segmentation, scores_of
from zeroseg.timing import timed

SALIENCE = 2.0
"""Weight, for a text, of standing out from the frame, beside the standardised evidence for the words. Words say well whether a
thing is there and poorly where it ends. 2 was the best of 0, 0.5, 1 and 2 on development images of four sets."""


class AttentionSegmentationInferer(Inferer):
    """Zero-shot segmentation by the self-attention of a frozen diffusion model (ADZUS, arXiv 2503.18170).

    ``inferer(images)`` is MONAI's way in and returns label maps; ``segment`` also returns confidence and scores;
    ``encode`` once and ``predict`` often serves several prompts on one image. No ``network`` is needed: the frozen
    backbone is an argument. Settings are checked on first use, the weights load on first use.

    Args:
        backbone: the frozen model; the embedded one by default.
        preset: settings by one word, see ``settings.PRESETS``; what ``settings`` says otherwise than the default stays.
        **settings: of ``zeroseg.interaction.settings.Settings``; each can be read as an attribute of the inferer, and
            ``replace`` varies them.

    Raises:
        TypeError: a setting has no such name.
    """

    def __init__(self, backbone: StableDiffusionBackbone | None = None, preset: str | None = None, **settings: Any):
        super().__init__()
        self.backbone = backbone if backbone is not None else StableDiffusionBackbone()
        self._settings = Settings(**with_preset(preset, settings))
        self._checked = False
        # Shared by all that ``replace`` makes: an answer in a volume depends on no setting.
        self._volumes = VolumeSessions()

    def __getattr__(self, name: str) -> Any:
        """The value of a setting."""
        if name.startswith("_") or name not in Settings.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self._settings, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Settings.__dataclass_fields__:
            raise AttributeError(f"settings are fixed: use replace({name}=...), which shares the backbone")
        super().__setattr__(name, value)

    def replace(self, **settings: Any) -> AttentionSegmentationInferer:
        """The same inferer with other settings; the backbone is shared.

        Raises:
            TypeError: a setting has no such name.
        """
        other = copy.copy(self)
        other._settings = dataclasses.replace(self._settings, **settings)
        other._checked = False
        return other

    def settings(self) -> dict:
        """Every setting as JSON-serialisable values, for the manifest."""
        return self._settings.record()

    @property
    def encoding_key(self) -> tuple:
        """The settings an encoding depends on, hashable; with the backbone and the image they decide it."""
        return self._settings.key(ENCODING)

    def check(self) -> None:
        """Check the settings and load the weights; once, because neither changes.

        Raises:
            ZeroSegError: a setting is out of its range; the message names what is allowed.
            WeightsError: the backbone cannot be loaded.
        """
        if self._checked:
            return
        self._settings.check()
        if self.vocabulary is not None:
            if self.backbone.source != EMBEDDED:
                raise ZeroSegError("a vocabulary goes with the embedded backbone only: others know words themselves")
            read_vocabulary(self.vocabulary)
        self.backbone.load()
        self.backbone.check_timestep(self.timestep)
        self._settings.check_sizes(self.backbone.size_multiple)
        self._checked = True

    # One image ---------------------------------------------------------------------------------------------------------

    def encode(self, image: Tensor | np.ndarray, text: str | None = None) -> EncodedImage:
        """Run the backbone on one image.

        Args:
            image: (C, H, W), any channel count and value range; see ``prepare``.
            text: words the UNet is told while it reads the image, in place of the setting ``condition``. Every prompt on this
                encoding is answered in their light.

        Raises:
            ZeroSegError: the image is empty or not finite, or a setting is wrong.
        """
        image = torch.as_tensor(np.asarray(image)) if not isinstance(image, Tensor) else image.as_subclass(Tensor)
        if image.ndim != 3:
            raise ZeroSegError(f"an image must be (C, H, W), not {tuple(image.shape)}")
        return self.encode_prepared(prepare(image), text)

    def encode_prepared(self, full: Tensor, text: str | None = None) -> EncodedImage:
        """``encode`` of an image that ``prepare`` already brought to (3, H, W) in [0, 1]."""
        self.check()
        condition = self.condition if text is None else check_text(text)
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
                self.backbone.embed_text([condition or ""]),
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
                parts.append(feature_affinity(record.features, latents.shape[-1] // self.backbone.attention_factor))
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
        scribbles: np.ndarray | Tensor | None = None,
        mask: np.ndarray | Tensor | None = None,
        candidate: int | None = None,
    ) -> Segmentation:
        """Segment an encoded image; the backbone runs again only for text. The answer depends on the encoding and the ordered
        prompts alone.

        Args:
            encoded: from ``encode``.
            select: overrides the inferer's rule for this call.
            points: (x, y) = (column, row) of clicks, in pixels of the original image, in the order they were made.
            labels: 1 (object) or 0 (not the object) per click; all 1 by default.
            box: (x0, y0, x1, y1), corners inside the image; with points it says where the object is before they correct it.
            text: the words to look for. Rule ``segments``: nouns with commas between, to name the segments by; the k-th noun is
                label k, and segments that no noun fits keep labels of their own after those.
            scribbles: (H, W) integers, 1 object, 2 background, 0 neither.
            mask: (H, W) bool, an answer to be corrected by clicks and scribbles.
            candidate: 1..3, which of several nested answers.

        Raises:
            ZeroSegError: the rule is unknown, its prompt is missing, or a prompt is malformed or outside the image.
        """
        prompts = check_prompts(
            encoded.size, select or self.select, points, labels, box, text, scribbles, mask, candidate
        )
        answer = {"segments": self._segments, "points": self._points, "text": self._text}.get(prompts.rule, self._frame)
        result = answer(encoded, prompts, dict(encoded.seconds))
        shown = prompts.rule in ("points", "box")
        if prompts.candidate is not None and not (shown and self.refiner == "head"):
            one = "refiner rules" if shown else f"select {prompts.rule}"
            result.notes.append(f"{one} has one answer: candidate is ignored")
        return result

    def proposals(self, encoded: EncodedImage) -> tuple[Tensor, list[float]]:
        """(K, N) merged object proposals of an encoded image and the thresholds taken; computed once and kept with it."""

        def merge() -> tuple[Tensor, list[float]]:
            if self.thresholds == "auto":
                return merge_to(encoded.distance, self.max_segments, self.grid)
            return merge_attention(encoded.attention, self.thresholds, self.grid), list(self.thresholds)

        return encoded.keep("proposals", self._settings.key(MERGE), merge)

    def _segments(self, encoded: EncodedImage, prompts: Prompts, seconds: dict[str, float]) -> Segmentation:
        with timed(seconds, "merge"):
            proposals, thresholds = self.proposals(encoded)
        with timed(seconds, "select"):
            if self.assign == "nearest":
                distance = encoded.distance(proposals)
                posterior = (-distance / distance.amin(0).mean().clamp_min(1e-12)).softmax(0)
            else:
                # DiffSeg enlarges the proposals as they are; a guided filter needs shares.
                whole = proposals.max() if self.refine == "none" else proposals.sum(0, keepdim=True)
                posterior = proposals / whole.clamp_min(1e-12)
            frame = rules.border_tokens(encoded.side).to(proposals.device)
            unlike_frame = rules.frame_relevance(encoded.distance, frame)
            owner = posterior.argmax(0)
        naming = self._name_segments(encoded, prompts.nouns, owner, len(proposals), seconds) if prompts.nouns else None
        with timed(seconds, "refine"):
            posterior = encoded.upsample(posterior, self.refine).clamp(0, 1)
            if naming is not None:
                # What has one name is one object: its segments do not compete.
                posterior = posterior.new_zeros(naming.groups, *posterior.shape[1:]).index_add(
                    0, naming.group.to(posterior.device), posterior
                )
            top = posterior.topk(min(2, len(posterior)), dim=0)
            labels = top.indices[0].cpu().numpy()
            margin = top.values[0] - (top.values[1] if len(posterior) > 1 else 0)
            confidence = margin.clamp(0, 1).cpu().numpy()
        named = naming.named if naming is not None else 0
        group = naming.group.to(owner.device)[owner] if naming is not None else owner
        present = [k for k in range(named, len(posterior)) if (labels == k).any()]
        objectness = {k: float(unlike_frame[group == k].mean()) if (group == k).any() else 0.0 for k in present}
        ranked = sorted(present, key=lambda k: -objectness[k])[: 255 - named]
        table = np.zeros(len(posterior), np.uint8)
        table[:named] = np.arange(1, named + 1)
        table[ranked] = np.arange(named + 1, named + len(ranked) + 1)
        labels = table[labels]
        details = {
            "segments": len(np.unique(labels[labels > 0])),
            "objectness": [round(objectness[k], 4) for k in ranked],
            "thresholds": [float(f"{t:.4g}") for t in thresholds],
        }
        if naming is not None:
            details |= naming.describe(labels)
        result = self._finish(encoded, labels, confidence, prompts, seconds, details)
        if naming is not None:
            result.notes += naming.notes
        return result

    def _name_segments(
        self, encoded: EncodedImage, nouns: tuple[str, ...], owner: Tensor, count: int, seconds: dict[str, float]
    ) -> Naming:
        """Names for the segments whose tokens are ``owner``, by the evidence for each noun that is present."""
        # "background" is no evidence of its own: it names what no other noun fits.
        plain = [noun.casefold() == BACKGROUND for noun in nouns]
        meanings = [Meaning(noun) if p else self.meaning(noun) for noun, p in zip(nouns, plain, strict=True)]
        first: dict[str, str] = {}
        for noun, meaning in zip(nouns, meanings, strict=True):
            if meaning.text is not None and first.setdefault(meaning.text.casefold(), noun) != noun:
                other = first[meaning.text.casefold()]
                raise ZeroSegError(f"{other!r} and {noun!r} are both taken for {meaning.text!r}: give one of them")
        with timed(seconds, "text"):
            evidence = [
                None if m.text is None or p else self._evidence(encoded, m.text)
                for m, p in zip(meanings, plain, strict=True)
            ]
            where = partial(self._where, encoded)
            return name_segments(nouns, meanings, evidence, where, owner, count, self.text_certainty)

    def _points(self, encoded: EncodedImage, prompts: Prompts, seconds: dict[str, float]) -> Segmentation:
        if self.refiner == "rules" and prompts.mask is None and not prompts.shows_object:
            # Only a box says where the object is: its answer is what the background clicks correct.
            first = self._frame(encoded, dataclasses.replace(prompts, rule="box"), {}).labels > 0
            prompts = dataclasses.replace(prompts, mask=first)
        refine = answer_by_head if self.refiner == "head" else answer_clicks
        with timed(seconds, "select"):
            mask, confidence, details = refine(encoded, prompts, self._settings)
        result = self._finish(encoded, mask.astype(np.uint8), confidence, prompts, seconds, details)
        # Pixels that are one on the working grid may have been marked differently: the user's word stands.
        if prompts.scribbles is not None:
            result.labels[prompts.scribbles == 1], result.labels[prompts.scribbles == 2] = 1, 0
        for (x, y), kind in zip(prompts.points, prompts.labels, strict=True):
            result.labels[int(y + 0.5), int(x + 0.5)] = kind
        if contradicts(prompts):
            result.notes.append("a pixel was marked both as object and as background: the later mark stands")
        return result

    def _frame(self, encoded: EncodedImage, prompts: Prompts, seconds: dict[str, float]) -> Segmentation:
        corners = prompts.box if prompts.rule == "box" else None
        if corners is not None and self.refiner == "head":
            return self._points(encoded, prompts, seconds)
        with timed(seconds, "select"):
            if corners is None:
                relevance = encoded.salience
            else:
                frame = self._surroundings(corners, encoded.size, encoded.side)
                relevance = rules.frame_relevance(encoded.distance, frame.to(encoded.attention.device))
        return self._split(encoded, relevance, prompts, seconds, inside_box(encoded, corners), {})

    def meaning(self, text: str) -> Meaning:
        """What the backbone is told for a prompt: words the embedded one was trained with, any other one the prompt itself."""
        if self.backbone.source != EMBEDDED:
            return Meaning(text)
        return read_vocabulary(self.vocabulary).look_up(text, sentence_encoder() if self.alike else None)

    def _evidence(self, encoded: EncodedImage, text: str) -> TextEvidence:
        """What is said about words that ``meaning`` gave: by the word head, where it knows them, else by the backbone."""
        if self.words == "head" and self.backbone.source == EMBEDDED:
            things = read_vocabulary(self.vocabulary).things(text)
            probe = encoded.keep("words", (), lambda: WordProbe(self.backbone, encoded.image, encoded.side))
            if probe.knows(things):
                return probe(things)
        return self._probe(encoded)(text)

    def _probe(self, encoded: EncodedImage) -> TextProbe:
        def probe() -> TextProbe:
            latents = self._text_latents(encoded)
            return TextProbe(self.backbone, latents, encoded.attention, timestep=self.timestep, seed=self.seed)

        return encoded.keep("probe", (self.text_resolution, self.timestep, self.seed), probe)

    def _text(self, encoded: EncodedImage, prompts: Prompts, seconds: dict[str, float]) -> Segmentation:
        assert prompts.text is not None
        meaning = self.meaning(prompts.text)
        if meaning.text is None:
            return unknown_words(prompts, meaning, seconds)
        with timed(seconds, "text"):
            evidence = self._evidence(encoded, meaning.text)
        details = {"text": prompts.text, **meaning.describe(), **evidence.record()}
        if evidence.certainty < self.text_certainty:
            empty = np.zeros(encoded.size, np.uint8)
            confidence = np.full(encoded.size, evidence.doubt(self.text_certainty), np.float32)
            reason = evidence.absent_because
            notes = meaning.notes(prompts.text)
            return Segmentation(empty, confidence, [], "text", True, seconds, details, prompts.text, reason, notes)
        with timed(seconds, "select"):
            relevance = self._placed(encoded, evidence)
        result = self._split(encoded, relevance, prompts, seconds, None, details)
        result.notes += meaning.notes(prompts.text)
        return result

    @staticmethod
    def _placed(encoded: EncodedImage, evidence: TextEvidence) -> Tensor:
        """(N,) how much every token is a part of what was named: what is said of it, and how it stands out."""
        salience = standardise(encoded.salience)
        return standardise(evidence.relevance).to(salience.device) + SALIENCE * salience

    def _where(self, encoded: EncodedImage, evidence: TextEvidence) -> Tensor:
        """(N,) bool, which tokens are a part of what was named, whether or not it is there."""
        relevance = self._placed(encoded, evidence).view(encoded.side, encoded.side)
        return torch.from_numpy(rules.split(relevance.cpu().numpy())[0]).flatten()

    def _text_latents(self, encoded: EncodedImage) -> Tensor:
        """Latents of the image at ``text_resolution``."""
        step = self.backbone.size_multiple
        half = (self.resolution or self.backbone.image_size) // 2 // step * step
        side = self.text_resolution or max(step, half, self.backbone.text_size)
        square = F.interpolate(encoded.image[None], (side, side), mode="bilinear", antialias=True)
        return self.backbone.encode_image(square)

    def _split(self, encoded, relevance: Tensor, prompts, seconds, allowed, details: dict) -> Segmentation:
        """The relevant half of an image, or of the part of it that is allowed; or, of an image, the object that half points at."""
        with timed(seconds, "refine"):
            full = encoded.upsample(relevance[None], self.refine)[0].cpu().numpy()
        with timed(seconds, "cut"):
            mask, threshold = rules.split(full, allowed)
            confidence = certainty(full, mask, threshold)
        details = {**details, "threshold": round(threshold, 5)}
        if allowed is None and self.refiner == "head":
            with timed(seconds, "head"):
                answer, details["mask"] = find_whole(encoded, mask, self._settings)
            if answer is not None:
                mask, confidence = answer.mask, answer.confidence
        return self._finish(encoded, mask.astype(np.uint8), confidence, prompts, seconds, details)

    def _finish(self, encoded, labels, confidence, prompts, seconds, details) -> Segmentation:
        if labels.shape != encoded.size:
            full = torch.from_numpy(np.stack([labels.astype(np.float32), confidence]))[:, None]
            labels = F.interpolate(full[:1], encoded.size, mode="nearest-exact")[0, 0].numpy().astype(np.uint8)
            confidence = F.interpolate(full[1:], encoded.size, mode="bilinear")[0, 0].numpy()
        confidence = confidence.astype(np.float32)
        scores = scores_of(labels, confidence)
        return Segmentation(labels, confidence, scores, prompts.rule, False, seconds, details, prompts.text)

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
        self,
        image: Tensor | np.ndarray,
        select: str | None = None,
        *,
        prepared: bool = False,
        affine: np.ndarray | None = None,
        **prompt,
    ) -> Segmentation:
        """Encode and predict one image (C, H, W), or one volume (C, X, Y, Z).

        In a volume, points are (x, y, z) and a box is (x0, y0, z0, x1, y1, z1), in voxel indices; scribbles and mask have the
        volume's shape. ``points`` and ``box`` are answered in three dimensions by the head for volumes (``volume_session``), or,
        with ``refiner`` rules, slice by slice: the clicked object is followed to its neighbours until it ends. ``segments`` links
        segments across slices; ``auto`` and ``text`` decide slice by slice.

        Args:
            image: the image or volume.
            select: overrides the inferer's rule for this call.
            prepared: ``prepare`` already brought the image to (3, ...) in [0, 1]: a server does that once per image.
            affine: (4, 4) voxel index -> mm of a volume, for the size of its voxels; None: of a MetaTensor its own, else cubes.
            **prompt: as ``predict``.

        Raises:
            ZeroSegError: as ``encode`` and ``predict``, or the affine is none.
        """
        if affine is None and isinstance(image, MetaTensor):
            affine = np.asarray(image.affine)
        self.check()
        if image.ndim == 3:
            return self.predict(self.encode_prepared(image) if prepared else self.encode(image), select, **prompt)
        if image.ndim != 4:
            raise ZeroSegError(f"expected (C, H, W) or (C, X, Y, Z), not {tuple(image.shape)}")
        prompts = check_prompts(image.shape[1:], select or self.select, **prompt)
        if prompts.rule == "text" and (meaning := self.meaning(str(prompts.text))).text is None:
            # No slice needs to be read for that.
            return unknown_words(prompts, meaning, {})
        single = image.shape[1 + self.slice_axis % 3] == 1
        clicked = prompts.rule == "points" or (prompts.rule == "box" and prompts.box is not None)
        if clicked and not single and self.refiner == "head":
            return self._clicked_volume(image, prompts, prepared, affine)
        # The head for images has not learned how an object goes on from slice to slice.
        return segment_volume(self if single else self.replace(refiner="rules"), image, prompts, prepared)

    def _clicked_volume(
        self, image: Tensor | np.ndarray, prompts: Prompts, prepared: bool, affine: np.ndarray | None
    ) -> Segmentation:
        seconds: dict[str, float] = {}
        with timed(seconds, "prepare"):
            volume = torch.as_tensor(np.asarray(image)) if not isinstance(image, Tensor) else image.as_subclass(Tensor)
            volume = volume if prepared else prepare(volume)
            # Channels that are one in memory need no mean.
            gray = volume[0] if len(volume) == 1 or volume.stride(0) == 0 else volume.mean(0)
            session = self._volumes.get(gray, spacing_of(affine))
        return answer_volume(session, prompts, self.pause, seconds)

    def pause(self, done: int = 0, total: int = 0) -> None:
        """Called between the steps of long answers; a server may raise here where nobody waits any more.

        Args:
            done, total: how many of how many steps are done, such as slices; 0 of 0: unknown.
        """

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
            prompts: keyword arguments of ``predict`` for all items, or one dict each.
            **kwargs: ``affine`` of all volumes of the batch, (4, 4), or of each, (B, 4, 4), see ``segment``.

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
        affines = affines_of(inputs, kwargs.get("affine"))
        masks = [
            torch.from_numpy(self.segment(image, affine=one, **prompt).labels)[None]
            for image, one, prompt in zip(inputs.as_subclass(Tensor), affines, each, strict=True)
        ]
        labels = torch.stack(masks).to(inputs.device)
        if hasattr(inputs, "meta"):
            from monai.utils import convert_to_dst_type

            labels = convert_to_dst_type(labels, inputs, dtype=torch.uint8)[0]
        return labels


def unknown_words(prompts: Prompts, meaning: Meaning, seconds: dict[str, float]) -> Segmentation:
    """The answer "absent" to words the backbone was never told, with the nearest it was."""
    empty, sure = np.zeros(prompts.shape, np.uint8), np.zeros(prompts.shape, np.float32)
    details = {"text": prompts.text, **meaning.describe()}
    return Segmentation(empty, sure, [], "text", True, seconds, details, prompts.text, meaning.reason)
