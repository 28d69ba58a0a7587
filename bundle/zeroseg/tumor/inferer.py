"""DiffuGTS as a MONAI inferer: a volume and words in, a tumour mask and its evidence out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from zeroseg.attention.prepare import prepare as prepare_image
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import EMBEDDED, EMBEDDED_BODY, EMBEDDED_HEAD, EMBEDDED_LIMB, EMBEDDED_SETS
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.interaction.prompts import Prompts, check_prompts
from zeroseg.interaction.vocabulary import Meaning, read_vocabulary
from zeroseg.interaction.volume_session import VolumeEvent, VolumeSessions, affines_of, answer_volume, spacing_of
from zeroseg.regions import innermost, largest_component
from zeroseg.segmentation import Segmentation
from zeroseg.timing import timed
from zeroseg.tumor.adapters import AovaAdapters, top_mean
from zeroseg.tumor.aova import AovaMap, EncodedFeatures, aova_map, encode_features, healthy_margin_loss, load_adapters
from zeroseg.tumor.inpainting import pseudo_healthy
from zeroseg.tumor.lungs import SURE, Nodule, find_nodule
from zeroseg.tumor.prepare import Prepared, forwards, prepare
from zeroseg.tumor.prompts import (
    ANY_TUMOUR,
    MODALITIES,
    OF_THE_HEAD,
    OF_THE_LIMBS,
    OF_THE_LUNGS,
    REGIONS,
    check_modality,
    default_tumor,
    normalise,
    organ_note,
    place_of,
    prompt_set,
    without_place,
)
from zeroseg.tumor.residuals import dilate, fuse, keep_components, pixel_residual, reach, voxels_of

Value = TypeVar("Value")

STAGES = ("aova", "inpaint", "pixel", "feature", "lungs", "head")
EVIDENCE = ("aova", "healthy", "pixel_residual", "feature_residual")
FUSIONS = ("learned", "otsu")
OWN_ADAPTERS = {
    **{(organ, modality): EMBEDDED_HEAD for organ in OF_THE_HEAD for modality in MODALITIES},
    **{(organ, modality): EMBEDDED_LIMB for organ in OF_THE_LIMBS for modality in ("ct", "pet")},
}
"""Organ and modality -> the embedded adapters that were made for them; all others: those of the body."""
SUREST = 0.9
"""Quantile of a mask's log-odds that says how sure it is."""
TOGETHER = (EMBEDDED_LIMB, EMBEDDED_BODY)
"""Those of them that answer together with the general ones, by the same words, and do not replace them."""


def own_adapters(organ: str, modality: str) -> str:
    """The embedded adapters that answer for an organ in a modality, a key of ``EMBEDDED_SETS``."""
    return OWN_ADAPTERS.get((organ, modality), EMBEDDED_BODY)


@dataclass
class TumorSegmentation(Segmentation):
    """A tumour mask with what speaks for it.

    Attributes:
        evidence: name -> (X, Y, Z) float32 on the input's grid, for the stages that ran: ``aova`` probability of the
            abnormal prompts; ``healthy`` the pseudo-healthy volume, in HU for CT and in the input's units otherwise;
            ``pixel_residual`` in standard deviations of the reconstruction; ``feature_residual`` in log-odds.
    """

    evidence: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class EncodedVolume:
    """A volume after the frozen encoder's pass: all that prompts need, so that the pass is never repeated.

    Attributes:
        prepared: values and grid the model works on, and the way back.
        features: adapted features and latent.
        seconds: time per stage so far.
        scan: (1, X, Y, Z), the volume as it was given; clicks are answered on it.
        affine: (4, 4) of the volume, or None.
        readers: SHA-256 of the adapters -> what they made of the volume, where other ones were asked as well.
    """

    prepared: Prepared
    features: EncodedFeatures
    seconds: dict[str, float] = field(default_factory=dict)
    scan: Tensor | None = None
    affine: np.ndarray | None = None
    readers: dict[str | None, EncodedFeatures] = field(default_factory=dict)
    # What no prompt changes, found on first use; one for all copies of an encoding.
    _lasting: dict[str, Any] = field(default_factory=dict, repr=False)

    def keep(self, name: str, make: Callable[[], Value]) -> Value:
        """What ``make`` gives, worked out once for the volume."""
        if name not in self._lasting:
            self._lasting[name] = make()
        return cast(Value, self._lasting[name])

    def forget(self) -> None:
        """Let go of all that was kept."""
        self._lasting.clear()

    @property
    def nodule(self) -> Nodule | None:
        """What stands out in the lungs in CT, on the working grid; None where nothing does. Kept."""
        return self.keep("nodule", self._find_nodule)

    def _find_nodule(self) -> Nodule | None:
        prepared = self.prepared
        if self.scan is None or prepared.to_hu is None:
            raise ValueError("the encoding was made without its scan, or its HU are not known")
        slope, intercept = prepared.to_hu
        values = self.scan.float().mean(0).cpu().numpy()
        hu = prepared.shrunk(values * np.float32(slope) + np.float32(intercept)).numpy()
        found = find_nodule(hu, prepared.spacing)
        if found is None or found.score < SURE:
            return None
        mask = np.zeros(prepared.volume.shape[2:], bool)
        mask[prepared.content] = found.mask
        return replace(found, mask=mask)


@dataclass
class TumorMaps:
    """What the stages make of one volume and one prompt, on the working grid (X', Y', Z').

    Attributes:
        aova: margin and image-level evidence.
        region: bool, the dilated suspect part of the volume (never in its padding).
        healthy: (1, 1, X', Y', Z') pseudo-healthy volume in [0, 1], or None.
        residuals: ``pixel`` and ``feature``, as far as they ran.
    """

    aova: AovaMap
    region: np.ndarray
    healthy: Tensor | None = None
    residuals: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def fusion_inputs(self) -> dict[str, np.ndarray]:
        """The maps that ``residuals.fuse`` and ``residuals.fit_fusion`` take: ``aova`` and the residuals."""
        return {"aova": self.aova.margin.cpu().numpy(), **self.residuals}


class TumorSegmentationInferer(Inferer):
    """Zero-shot tumour segmentation by text, after DiffuGTS (arXiv 2505.02753).

    Stages, each of which can be switched off for an ablation:
      ``aova``     where adapted features of the frozen encoder answer to abnormal rather than normal or null prompts;
      ``inpaint``  that region, dilated, regenerated by the frozen diffusion model: the pseudo-healthy volume;
      ``pixel``    what the regeneration changed in intensity;
      ``feature``  what it changed in the abnormal prompts' log-odds;
      ``lungs``    in the lungs in CT (not of the paper): what stands out there by HU counts as well, see ``lungs.find_nodule``;
      ``head``     where the adapters ask for it (not of the paper): the promptable head for volumes is clicked where these words point.
    The mask is the fused log-odds above ``threshold`` within that region, without small parts; with the head, its mean with the head's
    candidates.

    ``inferer(volumes)`` is MONAI's way in and returns masks; ``segment`` returns evidence and confidence as well;
    ``encode`` once and ``predict`` often serves several prompts. No ``network`` is needed. Settings are checked and
    weights loaded on first use.

    Brain and head, and limbs in CT and PET, have embedded adapters of their own, small U-Nets trained with real lesions ("embedded:head",
    "embedded:limb"): where the embedded ones are in use and such an organ is asked for, those answer, of limbs together with the general
    ones.

    The answer is "absent" (an empty mask) when the text encoder knows none of the tumour's words, when the probability that
    there is one (by the volume as a whole, or by the surest tenth of the mask, as the adapters say) is below ``presence``, when
    the prompt explains no voxel better than the null prompts do, or when no part of the mask is large enough. The paper has no
    such answer; without one, every prompt finds something in every scan.

    Args:
        backbone: the frozen diffusion model; the embedded one by default.
        text_encoder: the frozen text encoder; the embedded one by default.
        adapters: trained with these two: ``"embedded"``, their folder or file, or the module.
        organ: where to look, unless a call says otherwise; free text, see ``prompts.ORGANS``.
        tumor: what to look for; None: the organ's default.
        modality: ct, mr or pet; None: as the call or the file says, else guessed from the values.
        stages: any of the six; pixel and feature need inpaint, all need aova.
        contrast: of MR, where the backbone was trained on it: t1, t2, flair, ...; None: not known.
        steps: of the noise path; see ``inpainting.repaint``. None: what the backbone is made for (20 the embedded one, 30
            rectified flow of MAISI, 1000 its DDPM); other numbers are noted.
        guidance: on the modality, see ``MaisiBackbone.predict``. None: the backbone's own.
        strength: share of the path that is gone back and forth, in (0, 1].
        resample: RePaint's repeats of each step.
        suspicion: least AOVA probability of the region that is looked into, in (0, 1); a ``threshold`` below it replaces
            it. Refinement can only take away, so the region has to be generous.
        dilation_mm: by which that region is enlarged before inpainting: its rim is tumour too.
        threshold: least probability of a tumour voxel, in (0, 1).
        presence: least probability that there is a tumour at all, in [0, 1]; 0 switches that rule off.
        min_volume_ml: smaller parts are dropped; within a single slice, the area such a ball would show.
        max_components: most parts kept, the largest first; None: all.
        fusion: ``learned`` weights of AOVA margin and residuals where the adapters' folder has them, or ``otsu``, see
            ``residuals.fuse``.
        all_evidence: run stages whose learned weight is 0 as well, for the sake of their evidence. The mask is the same.
        rescale: (slope, intercept) bringing stored values to HU or SUV; None: as they are.
        seed: of all noise; equal input, settings and weights give equal masks.
        progress: show a bar while inpainting.
    """

    def __init__(
        self,
        backbone: MaisiBackbone | None = None,
        text_encoder: TextEncoder | None = None,
        adapters: AovaAdapters | str | Path = EMBEDDED,
        organ: str = "body",
        tumor: str | None = None,
        modality: str | None = None,
        stages: Sequence[str] = STAGES,
        contrast: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        strength: float = 0.8,
        resample: int = 1,
        suspicion: float = 0.3,
        dilation_mm: float = 6.0,
        threshold: float = 0.5,
        presence: float = 0.5,
        min_volume_ml: float = 0.3,
        max_components: int | None = None,
        fusion: str = "learned",
        all_evidence: bool = False,
        rescale: Sequence[float] | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        super().__init__()
        self.backbone = backbone if backbone is not None else MaisiBackbone()
        self.text_encoder = text_encoder if text_encoder is not None else TextEncoder()
        self.adapters = adapters
        self.organ = organ
        self.tumor = tumor
        self.modality = modality
        self.stages = stages
        self.contrast = contrast
        self.steps = steps
        self.guidance = guidance
        self.strength = strength
        self.resample = resample
        self.suspicion = suspicion
        self.dilation_mm = dilation_mm
        self.threshold = threshold
        self.presence = presence
        self.min_volume_ml = min_volume_ml
        self.max_components = max_components
        self.fusion = fusion
        self.all_evidence = bool(all_evidence)
        self.rescale = rescale
        self.seed = seed
        self.progress = progress
        self._adapters: AovaAdapters | None = None
        self._beside: AovaAdapters | None = None
        self._own_adapters: dict[str, tuple[TextEncoder, AovaAdapters]] = {}
        self._volumes = VolumeSessions()

    # Settings ----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict:
        """Every setting as JSON-serialisable values, for the manifest."""
        hidden = ("backbone", "text_encoder", "adapters", "progress")
        plain = {k: v for k, v in vars(self).items() if k not in hidden and not k.startswith("_")}
        given = not isinstance(self.adapters, AovaAdapters)
        plain["adapters"] = {
            "source": Path(self.adapters).name if given else "given",
            "sha256": self._adapters.sha256 if self._adapters else None,
        }
        plain["text_encoder"] = self.text_encoder.describe()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def replace(self, **settings: Any) -> TumorSegmentationInferer:
        """The same inferer with other settings; the models are shared.

        Raises:
            TypeError: a setting has no such name.
        """
        other = copy.copy(self)
        for name, value in settings.items():
            if name.startswith("_") or name not in vars(self):
                raise TypeError(f"the inferer has no setting {name!r}")
            setattr(other, name, value)
        if {"adapters", "backbone", "text_encoder"} & set(settings):
            # Those that are loaded belong to what was before.
            other._adapters, other._own_adapters = None, {}
        return other

    def check(self) -> None:
        """Check the settings and load the weights.

        Raises:
            ZeroSegError: a setting is out of its range; the message names what is allowed.
            WeightsError: the backbone, the text encoder or the adapters cannot be loaded or do not belong together.
        """
        normalise(self.organ, "organ")
        if self.tumor is not None:
            normalise(self.tumor, "tumor")
        if self.modality is not None:
            check_modality(self.modality)
        self._check_stages()
        for name in ("steps", "resample"):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if not isinstance(value, int) or not 1 <= value <= 1000:
                raise ZeroSegError(f"{name} must be a whole number from 1 to 1000, not {value!r}")
        if not _number(self.strength) or not 0 < self.strength <= 1:
            raise ZeroSegError(f"strength must lie above 0 and at most at 1, not {self.strength!r}")
        for name in ("suspicion", "threshold"):
            value = getattr(self, name)
            if not _number(value) or not 0 < value < 1:
                raise ZeroSegError(f"{name} must lie between 0 and 1, not {value!r}")
        if not _number(self.presence) or not 0 <= self.presence <= 1:
            raise ZeroSegError(f"presence must lie in 0..1, not {self.presence!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ZeroSegError(f"seed must be a whole number from 0, not {self.seed!r}")
        for name, unit in (("dilation_mm", "millimetres"), ("min_volume_ml", "millilitres"), ("guidance", "times")):
            value = getattr(self, name)
            if (not _number(value) or value < 0) and not (name == "guidance" and value is None):
                raise ZeroSegError(f"{name} must be a number of {unit} from 0, not {value!r}")
        if self.max_components is not None and (not isinstance(self.max_components, int) or self.max_components < 1):
            raise ZeroSegError(f"max_components must be a whole number from 1, or null, not {self.max_components!r}")
        if self.fusion not in FUSIONS:
            raise ZeroSegError(f"fusion must be one of {', '.join(FUSIONS)}, not {self.fusion!r}")
        if self.rescale is not None:
            values = list(self.rescale) if isinstance(self.rescale, (list, tuple)) else []
            if len(values) != 2 or not all(map(_number, values)) or values[0] == 0:
                raise ZeroSegError(f"rescale must be [slope, intercept], e.g. [4, 0], not {self.rescale!r}")
        self.load()
        contrasts = [name.partition("_")[2] for name in self.backbone.modalities if "_" in name]
        if self.contrast is not None and self.contrast not in contrasts:
            known = f"use one of {', '.join(contrasts)}" if contrasts else "this backbone knows none, leave it out"
            raise ZeroSegError(f"unknown contrast {self.contrast!r}: {known}")

    def _check_stages(self) -> None:
        given = list(self.stages) if isinstance(self.stages, (list, tuple)) else [self.stages]
        for stage in given:
            if stage not in STAGES:
                raise ZeroSegError(f"unknown stage {stage!r}: use {', '.join(STAGES)}")
        if "aova" not in given:
            raise ZeroSegError("stages must contain aova: it says where the others look")
        if "inpaint" not in given and {"pixel", "feature"} & set(given):
            raise ZeroSegError("the stages pixel and feature need inpaint: they measure what it changed")

    def load(self) -> TumorSegmentationInferer:
        """Load backbone, text encoder and adapters unless they are.

        Raises:
            WeightsError: one of them cannot be loaded, or they do not belong together.
        """
        self.backbone.load()
        self.text_encoder.load()
        if self._adapters is None:
            adapters = self.adapters
            if not isinstance(adapters, AovaAdapters):
                adapters = load_adapters(adapters, self.text_encoder.dim)
            if tuple(adapters.options["channels"]) != self.backbone.feature_channels:
                raise WeightsError(
                    f"the adapters read features of {tuple(adapters.options['channels'])} channels, the backbone gives "
                    f"{self.backbone.feature_channels}: train adapters for it by configs/train_tumor.yaml"
                )
            self._adapters = adapters.to(self.backbone.device).eval()
        return self

    @property
    def _loaded(self) -> AovaAdapters:
        """The adapters; ``load`` comes first."""
        if self._adapters is None:
            raise RuntimeError("the adapters are not loaded")
        return self._adapters

    def _of(self, organ: str, modality: str) -> TumorSegmentationInferer:
        """The inferer that answers for an organ in a modality: this one, or the same one with the adapters made for them."""
        own = own_adapters(organ, modality)
        if not self._all_embedded or not EMBEDDED_SETS[own].is_dir():
            return self
        if own not in self._own_adapters:
            device = str(self.backbone.device)
            encoder = self.text_encoder if own in TOGETHER else TextEncoder(own, device=device).load()
            self._own_adapters[own] = encoder, load_adapters(own, encoder.dim).to(self.backbone.device)
        encoder, adapters = self._own_adapters[own]
        other = self.replace(text_encoder=encoder, adapters=adapters)
        other._adapters, other._beside = adapters, self._adapters if own in TOGETHER else None
        return other

    # One volume --------------------------------------------------------------------------------------------------------

    def encode(
        self,
        volume: Tensor | np.ndarray,
        affine: np.ndarray | None = None,
        modality: str | None = None,
        organ: str | None = None,
        tumor: str | None = None,
    ) -> EncodedVolume:
        """Run the frozen encoder on one volume.

        Args:
            volume: (1, X, Y, Z) float, HU for CT; a 2-D image is a volume of one slice.
            affine: (4, 4) voxel index -> RAS mm; None: 1 mm.
            modality: ct, mr or pet; None: the inferer's, else guessed and noted.
            organ, tumor: that will be asked for first; None: as ``predict``. Others can be asked for all the same.

        Raises:
            ZeroSegError: the volume or a setting cannot be used; see ``prepare``.
        """
        self.check()
        seconds: dict[str, float] = {}
        backbone = self.backbone
        with timed(seconds, "prepare"):
            prepared = prepare(
                volume,
                affine,
                modality or self.modality,
                backbone.spacing,
                backbone.size_multiple,
                backbone.ct_window,
                self.rescale,
                backbone.mr_clip,
            )
        with timed(seconds, "encode"):
            reader = self._of(self._place(*self._words(organ, tumor)), prepared.modality)
            # Those that read windows come first: with their latent the others need none.
            features = self._read(prepared, reader._beside or reader._loaded)
        scan = volume.as_subclass(Tensor) if isinstance(volume, Tensor) else torch.from_numpy(forwards(volume))
        encoded = EncodedVolume(prepared, features, seconds, scan, affine, {features.reader: features})
        return reader._own(encoded, seconds)

    def _read(self, prepared: Prepared, adapters: AovaAdapters, latent: Tensor | None = None) -> EncodedFeatures:
        voxel_ml = math.prod(prepared.spacing) / 1000
        return encode_features(self.backbone, adapters, prepared.volume.to(self.backbone.device), voxel_ml, latent)

    def _read_by(self, encoded: EncodedVolume, adapters: AovaAdapters, seconds: dict[str, float]) -> EncodedFeatures:
        """What adapters make of an encoded volume, which they read once."""
        if encoded.features.reader == adapters.sha256:
            return encoded.features
        if adapters.sha256 not in encoded.readers:
            with timed(seconds, "encode"):
                encoded.readers[adapters.sha256] = self._read(encoded.prepared, adapters, encoded.features.latent)
        return encoded.readers[adapters.sha256]

    def _own(self, encoded: EncodedVolume, seconds: dict[str, float]) -> EncodedVolume:
        """An encoding with what this inferer's adapters make of it."""
        features = self._read_by(encoded, self._loaded, seconds)
        # The same where it is its own already: what is kept of a volume, such as its reconstruction, is kept there.
        return encoded if features is encoded.features else replace(encoded, features=features)

    def maps(
        self,
        encoded: EncodedVolume,
        organ: str | None = None,
        tumor: str | None = None,
        seconds: dict[str, float] | None = None,
        stages: Sequence[str] | None = None,
    ) -> TumorMaps:
        """All maps of one prompt on the working grid, before fusion; what ``fit_fusion`` is trained on.

        Args:
            encoded: from ``encode``.
            organ, tumor: as ``predict``.
            seconds: time per stage is added to it.
            stages: that run, of the inferer's; None: all of those.
        """
        self.check()
        organ, tumor = self._words(organ, tumor)
        place = self._place(organ, tumor)
        return self._of(place, encoded.prepared.modality)._maps(encoded, place, tumor, seconds, stages)

    def _maps(
        self,
        encoded: EncodedVolume,
        organ: str,
        tumor: str,
        seconds: dict[str, float] | None,
        stages: Sequence[str] | None,
    ) -> TumorMaps:
        """``maps`` by this inferer's own adapters, asked with these words as they are."""
        prepared, seconds = encoded.prepared, {} if seconds is None else seconds
        encoded = self._own(encoded, seconds)
        asked = prompt_set(organ, tumor, prepared.modality)
        roles = [role for role, _ in asked]
        also = self._read_by(encoded, self._beside, seconds) if self._beside is not None else None
        with timed(seconds, "aova"):
            prompts = self.text_encoder.embed([text for _, text in asked]).to(self.backbone.device)
            aova = aova_map(self.backbone, self._adapters, encoded.features, prompts, roles)
            if self._beside is not None and also is not None:
                weight = (self._loaded.beside or {}).get(prepared.modality, 1.0)
                aova = aova.times(aova_map(self.backbone, self._beside, also, prompts, roles), weight)
            suspect = logit(min(self.suspicion, self.threshold))
            found = (aova.margin > suspect).cpu().numpy() & prepared.inside.numpy()
        if "inpaint" in self.stages:
            found = dilate(found, reach(self.dilation_mm, prepared.spacing)) & prepared.inside.numpy()
        maps = TumorMaps(aova, found)
        stages = self.stages if stages is None else stages
        if "inpaint" not in stages:
            return maps
        with timed(seconds, "inpaint"):
            reconstruction = self._reconstruction(encoded)
            maps.healthy = self._healthy(encoded, maps.region, organ)
        with torch.inference_mode():
            if "pixel" in stages:
                with timed(seconds, "pixel"):
                    inside = prepared.inside.to(reconstruction.device)
                    maps.residuals["pixel"] = pixel_residual(reconstruction, maps.healthy, inside).cpu().numpy()
            if "feature" in stages:
                with timed(seconds, "feature"):
                    change = maps.healthy - reconstruction
                    maps.residuals["feature"] = healthy_margin_loss(
                        self.backbone, self._adapters, encoded.features, change, maps.region, prompts, roles
                    )
        return maps

    def predict(
        self,
        encoded: EncodedVolume,
        organ: str | None = None,
        tumor: str | None = None,
        points: Sequence[Sequence[float]] | None = None,
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
    ) -> TumorSegmentation:
        """Segment an encoded volume for one prompt.

        The words say what, a click or a box says where: it picks one object, which the words help to tell how far it goes, and
        further clicks correct it. Then nothing is called absent.

        Args:
            encoded: from ``encode``.
            organ: overrides the inferer's.
            tumor: overrides the inferer's; None with an organ given: that organ's default.
            points: (x, y, z) voxel indices, in the order they were made.
            labels: 1 (object) or 0 per click; all 1 by default.
            box: (x0, y0, z0, x1, y1, z1), both corners inside.

        Raises:
            ZeroSegError: organ or tumor is not words, or a click or the box is malformed or outside.
        """
        self.check()
        shown = self._shown(encoded, points, labels, box)
        organ, said = self._words(organ, tumor)
        place = self._place(organ, said)
        reader = self._of(place, encoded.prepared.modality)
        result = reader._predict(encoded, place, said, shown)
        if place != organ:
            result.details |= {"organ": organ, "place": place}
            result.notes = [f"{organ!r} is asked for as: {place}", *result.notes]
        if reader is not self:
            result.details["adapters"] = own_adapters(place, encoded.prepared.modality)
        return result

    def _predict(self, encoded: EncodedVolume, organ: str, said: str, shown: Prompts | None) -> TumorSegmentation:
        """``predict`` by this inferer's own adapters, for an organ as they know it, words as they were said, and checked prompts."""
        meaning = self._meaning(said, organ)
        tumor = str(meaning.text)
        prepared, seconds = encoded.prepared, dict(encoded.seconds)
        encoded = self._own(encoded, seconds)
        weights = self._fusion_weights(prepared.modality)
        beside = (self._loaded.head or {}).get(prepared.modality)
        asked_for = {"head": beside is not None and shown is None, "lungs": self._in_lungs(prepared, organ, tumor)}
        stages = [s for s in self._stages_that_count(weights) if asked_for.get(s, True)]
        maps = self._maps(encoded, organ, tumor, seconds, stages)
        with timed(seconds, "fuse"):
            margin = maps.aova.margin.cpu().numpy()
            logits, used = fuse(maps.fusion_inputs, maps.region, weights)
            # Outside the region AOVA alone has spoken, and said no.
            logits = np.where(maps.region, logits, np.minimum(margin, logit(self.threshold)))
            cut = self._cut(prepared, maps.aova)
            logits = logits - cut
            mask = (logits > logit(self.threshold)) & maps.region
            mask = keep_components(mask, self._least_voxels(prepared.sides, prepared.spacing), self.max_components)
        nodule = None
        if "lungs" in stages:
            with timed(seconds, "lungs"):
                nodule = encoded.nodule
            if nodule is not None:
                logits, mask = nodule.joined(logits, mask)
                mask = keep_components(mask, 1, self.max_components)
        even_odds = (self._loaded.presence or {}).get(prepared.modality, 0.0)
        evidence_of_presence = self._evidence_of_presence(maps, logits[mask], prepared.modality)
        image_logit = evidence_of_presence - even_odds
        reason = self._absent(tumor, maps.aova, image_logit, mask, nodule)
        with timed(seconds, "restore"):
            restored = 1 / (1 + np.exp(-prepared.to_input(torch.from_numpy(logits.astype(np.float32)))))
            whole = np.zeros(prepared.shape, np.uint8)
            if reason is None:
                # The logits' own cut at full resolution is smoother than enlarged voxels; the kept parts bound it.
                near = prepared.to_input(torch.from_numpy(dilate(mask, 1)))
                whole = ((restored > self.threshold) & near).astype(np.uint8)
                if not whole.any():
                    whole = prepared.to_input(torch.from_numpy(mask)).astype(np.uint8)
            confidence = np.abs(2 * restored - 1).astype(np.float32)
            evidence = self._evidence(encoded, maps)
        unknown = self.text_encoder.unknown_words(f"{organ} {tumor}")
        unheard = [f"the text encoder does not know: {', '.join(unknown)}"] if unknown else []
        details = {
            "organ": organ,
            "tumor": said,
            **meaning.describe(),
            "modality": prepared.modality,
            "prompts": [list(pair) for pair in prompt_set(organ, tumor, prepared.modality)],
            "image_probability": round(sigmoid(image_logit), 4),
            "presence_log_odds": round(evidence_of_presence, 4) if math.isfinite(evidence_of_presence) else None,
            "null_contrast": round(maps.aova.null_contrast, 4),
            "unknown_words": unknown,
            "stages": stages,
            "steps": self._steps if "inpaint" in stages else None,
            "fusion": {k: round(v, 4) for k, v in used.items()},
            "region_voxels": int(maps.region.sum()),
            **({"cut_log_odds": round(cut, 4)} if cut else {}),
            **({} if nodule is None else {"nodule": nodule.describe(prepared.spacing)}),
            "working_shape": list(prepared.volume.shape[2:]),
            "working_spacing_mm": [round(s, 3) for s in prepared.spacing],
        }
        notes = [
            *prepared.notes,
            *filter(None, [organ_note(organ)]),
            *meaning.notes(said),
            *unheard,
            *self._doubts(prepared, stages),
            *([] if nodule is None else ["what stands out in the lungs by HU counts beside the words, see nodule"]),
        ]
        if shown is not None:
            clicked = answer_volume(
                self._volumes.get(_gray(encoded), spacing_of(encoded.affine)), shown, self.pause, seconds, whole > 0
            )
            by_words = bool((clicked.labels & whole).any())
            whole, confidence, reason = clicked.labels, clicked.confidence, None
            details = {**details, **clicked.details, "words_agree": by_words}
            notes += [*clicked.notes, *([] if by_words else ["the words find nothing there: the clicks alone decide"])]
        elif "head" in stages and beside is not None and whole.any():
            with timed(seconds, "head"):
                likely = np.where(whole > 0, restored, np.minimum(restored, 1 - restored))
                joined, asked = self._ask_head(encoded, likely, whole > 0, beside)
                least = self._least_voxels(prepared.shape, spacing_of(encoded.affine))
                kept = keep_components(joined > self.threshold, least, self.max_components)
                if kept.any():
                    restored, whole = joined, kept.astype(np.uint8)
                    confidence = np.abs(2 * restored - 1).astype(np.float32)
                details |= asked
        scores = [float(restored[whole > 0].mean())] if whole.any() else []
        return TumorSegmentation(
            whole,
            confidence,
            scores,
            "tumor",
            absent=reason is not None,
            seconds=seconds,
            details=details,
            name=said,
            reason=reason,
            notes=notes,
            evidence=evidence,
        )

    def segment(
        self,
        volume: Tensor | np.ndarray,
        affine: np.ndarray | None = None,
        modality: str | None = None,
        organ: str | None = None,
        tumor: str | None = None,
        points: Sequence[Sequence[float]] | None = None,
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
    ) -> TumorSegmentation:
        """``encode`` and ``predict`` at once; arguments as theirs.

        A MetaTensor brings its own affine.
        """
        if affine is None and isinstance(volume, MetaTensor):
            affine = np.asarray(volume.affine)
        encoded = self.encode(volume, affine, modality, organ, tumor)
        return self.predict(encoded, organ, tumor, points, labels, box)

    def __call__(self, inputs: Tensor, network: object = None, *args: object, **kwargs: Any) -> Tensor:
        """Masks of a batch, as MONAI's evaluators call an inferer.

        Args:
            inputs: (B, 1, X, Y, Z) volumes, or (B, 1, H, W) images, in the scan's own units.
            network: ignored; the frozen backbone is the inferer's own.
            **kwargs: ``affine`` of all volumes of the batch, (4, 4), or of each, (B, 4, 4), ``modality``, ``organ``, ``tumor``.

        Returns:
            (B, 1, X, Y, Z) or (B, 1, H, W) uint8, 1 where the tumour is.

        Raises:
            ZeroSegError: the shape is another, or as ``segment``.
        """
        if inputs.ndim not in (4, 5):
            raise ZeroSegError(f"inputs must be (B, 1, X, Y, Z) or (B, 1, H, W), not {tuple(inputs.shape)}")
        affines = affines_of(inputs, kwargs.pop("affine", None))
        masks = []
        for volume, one in zip(inputs.as_subclass(Tensor), affines, strict=True):
            volume = volume[..., None] if inputs.ndim == 4 else volume
            mask = self.segment(volume, one, **kwargs).labels
            masks.append(torch.from_numpy(mask[..., 0] if inputs.ndim == 4 else mask)[None])
        return torch.stack(masks).to(inputs.device)

    def pause(self) -> None:
        """Called between the steps of answers to clicks; a server may raise here where nobody waits any more."""

    # Parts -------------------------------------------------------------------------------------------------------------

    def _shown(self, encoded: EncodedVolume, points, labels, box) -> Prompts | None:
        """What was clicked or boxed, checked; None where nothing was."""
        if points is None and labels is None and box is None:
            return None
        return check_prompts(encoded.prepared.shape, None, points, labels, box)

    def _words(self, organ: str | None, tumor: str | None) -> tuple[str, str]:
        """The organ and tumour of a call: its own words, else the inferer's, else the organ's default."""
        asked = normalise(organ if organ is not None else self.organ, "organ")
        if tumor is None and (organ is None or asked == normalise(self.organ, "organ")):
            tumor = self.tumor
        return asked, default_tumor(asked) if tumor is None else normalise(tumor, "tumor")

    @property
    def _all_embedded(self) -> bool:
        return all(str(part) == EMBEDDED for part in (self.adapters, self.text_encoder.source, self.backbone.source))

    def _place(self, organ: str, tumor: str) -> str:
        """The organ that the embedded model is asked for, see ``prompts.place_of``, the tumour's words as they are or as the vocabulary
        takes them; other models know their own words."""
        if not self._all_embedded:
            return organ
        place = place_of(organ, tumor)
        return place if place != "body" else place_of(organ, read_vocabulary().look_up(tumor).text or tumor)

    @property
    def _steps(self) -> int:
        return self.backbone.steps if self.steps is None else self.steps

    def _condition(self, modality: str) -> str:
        """The modality as the diffusion model is told it."""
        return f"{modality}_{self.contrast}" if self.contrast is not None and modality == "mr" else modality

    def _doubts(self, prepared: Prepared, stages: Sequence[str]) -> list[str]:
        """What of the inpainting lies outside the diffusion model's training."""
        if "inpaint" not in stages:
            return []
        extent = [n * mm for n, mm in zip(prepared.sides, prepared.spacing, strict=True)]
        condition = self._condition(prepared.modality)
        doubts = self.backbone.doubts(condition, self._steps, extent)
        contrasts = [name.partition("_")[2] for name in self.backbone.modalities if name.startswith(f"{condition}_")]
        if contrasts:
            doubts.append(
                f"the contrast is not given, and the diffusion model knows {', '.join(contrasts)}: set contrast"
            )
        return doubts

    def _fusion_weights(self, modality: str) -> dict[str, float] | None:
        """The learned weights of the maps that the inferer's stages give; None where there are none."""
        fusion = self._adapters.fusion if self._adapters and self.fusion == "learned" else None
        learned = (fusion or {}).get(modality)
        residuals = [name for name in ("pixel", "feature") if name in self.stages]
        return (learned or {}).get("+".join(sorted(["aova", *residuals])))

    def _stages_that_count(self, weights: dict[str, float] | None) -> list[str]:
        """The inferer's stages without those whose learned weight is 0, and without inpainting where nothing needs it."""
        residuals = [name for name in ("pixel", "feature") if name in self.stages]
        if weights is None or not residuals or self.all_evidence:
            return list(self.stages)
        counting = [name for name in residuals if weights[name] != 0]
        return [s for s in self.stages if s in ("aova", "lungs", "head", *counting) or (s == "inpaint" and counting)]

    def _healthy(self, encoded: EncodedVolume, region: np.ndarray, organ: str) -> Tensor:
        latent, factor = encoded.features.latent, self.backbone.factor
        touched = torch.from_numpy(region)[None, None].float()
        # A latent position counts as masked when any of its voxels is: nearest-neighbour would leave thin parts standing.
        mask = F.max_pool3d(touched, factor)[0, 0] > 0
        if not mask.any():
            return self._reconstruction(encoded)
        healthy = pseudo_healthy(
            self.backbone,
            latent,
            mask,
            encoded.prepared.spacing,
            self._condition(encoded.prepared.modality),
            REGIONS.get(organ, (2, 2)),
            self._steps,
            self.strength,
            self.resample,
            self.seed,
            self.progress,
            self.guidance,
        )
        return self.backbone.decode(healthy)

    def _reconstruction(self, encoded: EncodedVolume) -> Tensor:
        """Dec(E(I)), computed once per volume."""
        return encoded.keep("reconstruction", lambda: self.backbone.decode(encoded.features.latent))

    def _ask_head(
        self, encoded: EncodedVolume, probability: np.ndarray, mask: np.ndarray, weight: float
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The mean of what the words say and of what the promptable head says of the object that they point at.

        The words find a tumour roughly and the head finds borders. It is clicked at the innermost voxel of the mask's largest part; each
        of its candidates weighs as much as the head is sure of it times its IoU with that part.

        Args:
            encoded: the volume.
            probability: (X, Y, Z) by the words.
            mask: (X, Y, Z) bool by the words, not empty.
            weight: of the words.

        Returns:
            (X, Y, Z) probability; and what a manifest records: ``click`` in voxels, ``estimated_iou`` and ``agreement`` of each candidate.
        """
        main = largest_component(mask)
        x, y, z = innermost(main)
        session = self._volumes.get(_gray(encoded), spacing_of(encoded.affine))
        answer = session.answer([VolumeEvent(((x, y, z, 1),))], pause=self.pause)
        local, total, agreements = main[answer.part], weight * probability, []
        for candidate, estimate in zip(answer.candidates, answer.estimates, strict=True):
            common = np.count_nonzero(candidate & local)
            agreement = common / (np.count_nonzero(candidate) + np.count_nonzero(main) - common)
            total[answer.part] += estimate * agreement * candidate
            agreements.append(agreement)
        total /= weight + float(np.dot(answer.estimates, agreements))
        return total, {
            "click": [x, y, z],
            "estimated_iou": [round(v, 4) for v in answer.estimates],
            "agreement": [round(v, 4) for v in agreements],
        }

    def _meaning(self, tumor: str, organ: str) -> Meaning:
        """What the text encoder is told for a tumour: where the embedded one lacks words, those of the vocabulary that it has, or the
        words without those that name the organ anyway."""
        unknown = self.text_encoder.unknown_words
        if self.text_encoder.source not in EMBEDDED_SETS or not unknown(tumor):
            return Meaning(tumor)
        meaning = read_vocabulary().look_up(tumor)
        said = meaning.text or tumor
        for words in (said, without_place(said, organ)):
            if not unknown(words):
                return Meaning(words, words != tumor, meaning.similarity if meaning.text else 1.0)
        return Meaning(tumor)

    def _cut(self, prepared: Prepared, aova: AovaMap) -> float:
        """Log-odds that count as even odds in this volume: a share of its surest voxels', as uptake is cut at a share of its highest, for
        how sure adapters are differs from one sequence to another. 0 where the adapters name no share."""
        share = (self._loaded.cut or {}).get(prepared.modality, 0.0)
        if not share:
            return 0.0
        inside = prepared.inside.to(aova.margin.device)
        top = top_mean(aova.margin[inside], voxels_of(self._loaded.top_ml, prepared.spacing))
        return max(0.0, share * float(top))

    def _evidence_of_presence(self, maps: TumorMaps, logits: np.ndarray, modality: str) -> float:
        """Log-odds that there is a tumour at all, before they are set against those that count as even: by the adapters' answer of
        the volume as a whole, or, where they say so, by how sure the surest tenth of the mask is.

        Args:
            maps: of the prompt.
            logits: (n,) of the mask's voxels.
            modality: of the volume.
        """
        if (self._loaded.presence_of or {}).get(modality) == "mask":
            return float(np.quantile(logits, SUREST)) if len(logits) else -math.inf
        return maps.aova.image_logit

    def _in_lungs(self, prepared: Prepared, organ: str, tumor: str) -> bool:
        """Whether a tumour of the lungs is looked for in a CT volume whose HU are known."""
        return (
            organ in OF_THE_LUNGS
            and tumor.split()[-1] in ANY_TUMOUR
            and prepared.to_hu is not None
            and min(prepared.sides) > 1
        )

    def _absent(
        self, tumor: str, aova: AovaMap, image_logit: float, mask: np.ndarray, nodule: Nodule | None
    ) -> str | None:
        """Why there is nothing to show, or None."""
        if len(self.text_encoder.unknown_words(tumor)) == len(tumor.split()):
            return "the text encoder knows none of the words"
        if nodule is not None:
            return None
        if mask.any() and sigmoid(image_logit) < self.presence:
            return "the volume as a whole does not look like it"
        if aova.null_contrast <= 1e-3:  # equal up to rounding
            return "the prompt explains no voxel better than no prompt does"
        if not mask.any():
            return "no part is large and certain enough"
        return None

    def _least_voxels(self, sides: Sequence[int], spacing: Sequence[float]) -> int:
        """Of a part that is kept, on a grid of so many voxels a side."""
        if self.min_volume_ml == 0:
            return 1
        flat = [axis for axis, count in enumerate(sides) if count == 1]
        if not flat:
            return voxels_of(self.min_volume_ml, spacing)
        radius = (3 * self.min_volume_ml * 1000 / (4 * math.pi)) ** (1 / 3)
        in_plane = math.prod(s for axis, s in enumerate(spacing) if axis not in flat)
        return max(1, math.ceil(math.pi * radius**2 / in_plane))

    def _evidence(self, encoded: EncodedVolume, maps: TumorMaps) -> dict[str, np.ndarray]:
        back = encoded.prepared.to_input
        evidence = {"aova": back(maps.aova.margin.sigmoid())}
        if maps.healthy is not None:
            evidence["healthy"] = encoded.prepared.intensity.to_values(back(maps.healthy[0, 0]))
        for name, values in maps.residuals.items():
            evidence[f"{name}_residual"] = back(torch.from_numpy(values))
        return evidence


def _gray(encoded: EncodedVolume) -> Tensor:
    """(X, Y, Z) in [0, 1]: the volume as the head for volumes sees it."""
    if encoded.scan is None:
        raise ValueError("the encoding was made without its scan")
    return prepare_image(encoded.scan)[0]


def sigmoid(value: float) -> float:
    """1 / (1 + e^-x), safe for any finite or infinite x."""
    return 0.5 * (1 + math.tanh(value / 2))


def logit(probability: float) -> float:
    """Log-odds of a probability in (0, 1)."""
    return math.log(probability / (1 - probability))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
