"""Protocols: how an image is asked for its object, by whom, and what its answers score.

Those that a user could run, because no mask takes part in the choice of the object:
  auto     the label-free rule
  points   ONE positive click: the innermost point of the largest component of the mask
  anywhere one positive click at a random pixel of that component, the same in every run: how much it matters where one clicks
  box      the tight bounding box of that component
  text     a prompt; the answer "absent" is an empty mask and scores Dice 0
and upper bounds, because the mask chooses among the segments: see ``oracles``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.annotator import any_point, bounding_box, innermost_point
from zeroseg.evaluation.baselines import AUTOMATIC, BRIGHT, CLICKS
from zeroseg.evaluation.confidence import image_score, pixel_bins
from zeroseg.evaluation.metrics import score
from zeroseg.evaluation.oracles import ORACLES
from zeroseg.io import Case, read_image, to_unit_range
from zeroseg.regions import largest_component


@dataclass(frozen=True)
class Sample:
    """An image and its mask.

    Attributes:
        stem: name of the case.
        image: (C, H, W) float32 in [0, 1].
        truth: (H, W) bool, never empty.
        component: (H, W) bool, its largest component.
    """

    stem: str
    image: np.ndarray
    truth: np.ndarray
    component: np.ndarray


CLICKED: dict[str, Callable[[Sample], tuple[int, int]]] = {
    "points": lambda sample: innermost_point(sample.component),
    "anywhere": lambda sample: any_point(sample.component, sample.stem),
}
"""Protocol -> its click (x, y)."""
PROTOCOLS = (*ORACLES, "auto", *CLICKED, "box", "text")


def load_sample(image_case: Case, mask_case: Case) -> Sample:
    """Read one pair.

    Raises:
        ZeroSegError: a file cannot be read, the image is a volume, or the mask is empty or of another size.
    """
    image, mask = read_image(image_case), read_image(mask_case)
    if image.is_volume:
        raise ZeroSegError(f"{image_case.paths[0]}: a volume; this evaluation takes 2-D images")
    if mask.shape != image.shape:
        sizes = ("x".join(map(str, shape)) for shape in (mask.shape, image.shape))
        raise ZeroSegError("{}: the mask is {}, its image {} (height x width)".format(mask_case.paths[0], *sizes))
    truth = (mask.array != 0).any(axis=0)
    if not truth.any():
        raise ZeroSegError(f"{mask_case.paths[0]}: the mask is empty, so there is nothing to score against")
    return Sample(image_case.stem, to_unit_range(image), truth, largest_component(truth))


def run_protocols(inferer, sample: Sample, protocols: list[str], text: str | None) -> tuple[list[dict], dict]:
    """Encode the image once and run every protocol on it.

    Returns:
        rows (without the case), and protocol -> predicted mask (H, W) bool.
    """
    start = time.perf_counter()
    encoded = inferer.encode(sample.image)
    encode_seconds = time.perf_counter() - start
    prompts = {name: {"points": [list(click(sample))], "labels": [1]} for name, click in CLICKED.items()}
    prompts |= {"box": {"box": bounding_box(sample.component)}, "text": {"text": text}}
    rows, masks, answers = [], {}, {}
    for protocol in protocols:
        asked = "segments" if protocol in ORACLES else protocol
        if asked not in answers:
            # What one prompt computes and keeps must not make the next look fast.
            fresh = encoded.fresh()
            start = time.perf_counter()
            select = "points" if protocol in CLICKED else asked
            result = inferer.predict(fresh, select=select, **prompts.get(protocol, {}))
            answers[asked] = result, time.perf_counter() - start
        result, prompt_seconds = answers[asked]
        oracle = ORACLES.get(protocol)
        masks[protocol] = mask = oracle(result.labels, sample.truth) if oracle else result.labels > 0
        targets = {protocol: sample.truth}
        if protocol in CLICKED or protocol == "box":
            targets[f"{protocol}_component"] = sample.component
        for name, target in targets.items():
            row = {"protocol": name, "encode_seconds": encode_seconds, "prompt_seconds": prompt_seconds}
            row |= {"seconds": encode_seconds + prompt_seconds, **score(mask, target)}
            if not oracle:
                row |= {"score": image_score(result), "bins": pixel_bins(result, target)}
            if protocol == "text":
                row["absent"] = bool(result.absent)
            rows.append(row)
    return rows, masks


def run_baselines(sample: Sample, protocols: list[str]) -> list[dict]:
    """Rows of every method that needs no model; one-click ones with the click of each such protocol."""
    rows = []
    for name, method in AUTOMATIC.items():
        mask, seconds = _timed(method, sample.image)
        rows.append({"protocol": f"baseline/{name}", "seconds": seconds, **score(mask, sample.truth)})
    for name, method in BRIGHT.items():
        bright, seconds = _timed(method, sample.image)
        for side, mask in (("bright", bright), ("dark", ~bright)):
            rows.append({"protocol": f"polarity/{name}_{side}", "seconds": seconds, **score(mask, sample.truth)})
    for name, clicked in CLICKS.items():
        for protocol in [p for p in CLICKED if p in protocols]:
            mask, seconds = _timed(clicked, sample.image, *CLICKED[protocol](sample))
            full = f"baseline/{name}" if protocol == "points" else f"baseline/{name}_{protocol}"
            for suffix, target in (("", sample.truth), ("_component", sample.component)):
                rows.append({"protocol": full + suffix, "seconds": seconds, **score(mask, target)})
    return rows


def _timed(method: Callable, *arguments) -> tuple[np.ndarray, float]:
    """What a method returns, and its seconds."""
    start = time.perf_counter()
    return method(*arguments), time.perf_counter() - start
