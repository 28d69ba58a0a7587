"""Settings of the 2-D inferer: what each may be, and what has to be worked out again when it changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroseg.errors import ZeroSegError
from zeroseg.hashing import file_sha256
from zeroseg.interaction.prompts import SELECTS

AFFINITIES = ("attention", "features", "both")
REFINERS = ("head", "rules")
WORDS = ("head", "backbone")
TEXT_CERTAINTY = -0.5
"""Default t-value below which a prompt is called absent, here and in the app: slightly below 0, because a bare noun explains an
image less well than the captions a model learned from."""

PRESETS: dict[str, dict[str, Any]] = {
    "diffseg": {
        "select": "segments",
        "thresholds": (1.1, 1.1, 1.1),
        "grid": 16,
        "timestep": 300,
        "noise_draws": 0,
        "assign": "argmax",
        "affinity": "attention",
        "refine": "none",
    }
}
"""Settings by one word. ``diffseg``: DiffSeg as its authors released and benchmarked it (COCO-Stuff), on which ADZUS builds:
clean latent, timestep 300, 16 x 16 anchors, three iterations at 1.1, each pixel to the map that is highest there, bilinear
enlargement, no refinement. One thing differs: DiffSeg cuts out the centre square, here the whole image is squeezed to a square,
because a mask has to cover the image; for a square image both are one."""

ENCODING, MERGE, ANSWER = "encoding", "merge", "answer"
"""What a setting changes: the encoding of an image, the proposals kept with it, or an answer only."""


def _setting(default: Any, changes: str, allowed: str, fits: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"changes": changes, "allowed": allowed, "fits": fits})


def _choice(default: Any, changes: str, choices: Sequence) -> Any:
    names = ", ".join(str(c) for c in choices if c is not None)
    return dataclasses.field(
        default=default,
        # A list or an array may come from a config: it is equal to no choice, and not hashable.
        metadata={"changes": changes, "choices": names, "fits": lambda v: any(v is c or v == c for c in choices)},
    )


def _whole(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _optional_side(value: Any) -> bool:
    return value is None or _whole(1)(value)


def _are_thresholds(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto"
    numbers = isinstance(value, (list, tuple)) and all(isinstance(t, (int, float)) for t in value)
    return numbers and len(value) > 0 and all(0 < t < math.inf for t in value)


def _are_words(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


@dataclass(frozen=True)
class Settings:
    """Defaults follow DiffSeg, which ADZUS builds on (clean latent, timestep 300, 16 x 16 anchors, three iterations); the
    paper leaves open how a mask is chosen among the segments, so ``select`` is ZeroSeg's own.

    Attributes:
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
        refiner: what answers clicks: ``rules``, see ``clicks``, or ``head``, a trained one, which also takes the object that
            ``auto`` and ``text`` point at where it is sure of it, see ``promptable.find_whole``.
        words: what answers words with the embedded backbone: ``head``, a trained one, see ``word_head``, or ``backbone``, the model's own
            words, see ``text``. Any other backbone answers itself.
        slice_axis: axis of a volume (0, 1, 2 or negative) along which it is cut into slices.
        vocabulary: file with terms of one's own for what the embedded backbone knows, see ``vocabulary.read_vocabulary``; they
            come before those shipped. None: those shipped. Any other backbone gets words as they are typed.
        alike: words the vocabulary does not hold are taken for the term that means most alike, where the sentence encoder is installed
            (``pip install "zeroseg[words]"``), see ``synonyms``; else, or where none is alike enough, they are absent.
        condition: words the UNet is told while it reads the image (the text guidance of Beyond Labels, arXiv 2504.17628);
            None: the empty prompt, as DiffSeg.
        text_resolution: side in pixels at which text is tested; default half of ``resolution``, because a prompt takes eight
            passes, but never below ``text_size`` of the backbone. A multiple of ``size_multiple``.
        text_certainty: least t-value of the evidence for a prompt, or log-odds of the word head; below it the object is called absent.
        working_size: masks are computed on at most this many pixels a side and enlarged by nearest neighbour.
        progress: show a bar over the slices of a volume.
        seed: of every noise draw; equal input, settings and weights give equal masks.
    """

    select: str | None = _choice(None, ANSWER, (*SELECTS, None))
    thresholds: str | Sequence[float] = _setting(
        "auto", MERGE, "auto, or positive numbers, one per iteration, e.g. [1.0, 1.0, 1.0]", _are_thresholds
    )
    max_segments: int = _setting(24, MERGE, "a whole number from 1 to 255", _whole(1, 255))
    grid: int = _setting(16, MERGE, "a positive number of anchors a side", _whole(1))
    resolution: int | None = _setting(
        None, ENCODING, "a positive multiple of {step} pixels for this backbone", _optional_side
    )
    timestep: int = _setting(300, ENCODING, "a whole number from 0 to 999", lambda v: True)
    noise_draws: int = _setting(0, ENCODING, "0 (clean latent) or a positive number of draws", _whole(0))
    assign: str = _choice("nearest", ANSWER, ("nearest", "argmax"))
    affinity: str = _choice("attention", ENCODING, AFFINITIES)
    refine: str = _choice("guided", ANSWER, ("guided", "none"))
    refiner: str = _choice("head", ANSWER, REFINERS)
    words: str = _choice("head", ANSWER, WORDS)
    slice_axis: int = _setting(-1, ANSWER, "0, 1 or 2", _whole(-3, 2))
    text_resolution: int | None = _setting(
        None, ANSWER, "a positive multiple of {step} pixels for this backbone", _optional_side
    )
    text_certainty: float = _setting(TEXT_CERTAINTY, ANSWER, "a number", _is_number)
    vocabulary: str | None = _setting(None, ANSWER, "the path of a text file, or null", _are_words)
    alike: bool = _choice(True, ANSWER, (True, False))
    condition: str | None = _setting(None, ENCODING, "words, or null", _are_words)
    working_size: int = _setting(1024, ENCODING, "a positive number of pixels", _whole(1))
    progress: bool = _setting(False, ANSWER, "true or false", lambda v: isinstance(v, (bool, int)))
    seed: int = _setting(0, ENCODING, "a whole number from 0", _whole(0))

    def check(self) -> None:
        """Check every setting that no backbone is needed for.

        Raises:
            ZeroSegError: one is out of its range; the message names what is allowed.
        """
        for name, about, value in self._each():
            if not about["fits"](value) and "choices" in about:
                raise ZeroSegError(f"unknown {name} {value!r}: use one of {about['choices']}")
            # How large a multiple a backbone takes is known once it is loaded.
            if not about["fits"](value) and "{step}" not in about["allowed"]:
                raise ZeroSegError(f"{name} must be {about['allowed']}, not {value!r}")

    def check_sizes(self, step: int) -> None:
        """Check the settings that have to be a multiple of the backbone's ``size_multiple``.

        Raises:
            ZeroSegError: one is not.
        """
        for name, about, value in self._each():
            if "{step}" in about.get("allowed", "") and not (about["fits"](value) and (value or 0) % step == 0):
                raise ZeroSegError(f"{name} must be {about['allowed'].format(step=step)}, not {value!r}")

    def _each(self) -> list[tuple[str, Mapping[str, Any], Any]]:
        return [(f.name, f.metadata, getattr(self, f.name)) for f in dataclasses.fields(self)]

    def key(self, changes: str) -> tuple:
        """The settings of one kind, hashable: equal where nothing of that kind has to be worked out again.

        Args:
            changes: ``ENCODING``, ``MERGE`` or ``ANSWER``.
        """
        return tuple(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, about, value in self._each()
            if about["changes"] == changes
        )

    def record(self) -> dict[str, Any]:
        """Every setting that shapes results, as JSON-serialisable values, for the manifest; of a file its name and SHA-256."""
        values = {n: list(v) if isinstance(v, tuple) else v for n, _, v in self._each() if n != "progress"}
        if self.vocabulary is not None:
            values["vocabulary"] = {"file": Path(self.vocabulary).name, "sha256": file_sha256(Path(self.vocabulary))}
        return values


def with_preset(preset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of a preset in place of every one that is missing or at its default.

    Args:
        preset: a key of ``PRESETS``, or None.
        settings: as ``Settings`` takes them.

    Raises:
        ZeroSegError: there is no such preset.
    """
    if preset is None:
        return settings
    if preset not in PRESETS:
        raise ZeroSegError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    default = Settings()
    return {**settings, **{k: v for k, v in PRESETS[preset].items() if settings.get(k, v) in (getattr(default, k), v)}}
