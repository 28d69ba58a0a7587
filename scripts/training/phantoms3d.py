"""Procedural volumes: CT, MR and PET phantoms with organs, and in half of them a lesion with its exact mask.

Four scenes (limb, abdomen, chest, head) in millimetres, each drawn as a map of tissues that a table per modality turns into
HU, signal or SUV, with marbling, bias field, blur and noise. They teach the embedded 3-D model what healthy bodies look like and
the adapters what a lesion is. A phantom is reproducible from its seed: ``make_volume(seed)`` always draws the same one.

    python scripts/training/phantoms.py --volumes 24 --out out/volumes      # images/, masks/, cases.json

Some kinds of lesion (``HELD_OUT``) are never drawn for training: they measure what the model does with the unseen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

SPACING = 3.0
"""mm per voxel, along all axes."""
KINDS = ("solid", "heterogeneous", "necrotic", "ring", "infiltrating", "small")
HELD_OUT = ("lobulated", "cluster", "calcified")
MODALITIES = ("ct", "mr", "pet")
TUMOURS = {
    "limb": ("soft tissue sarcoma", "muscle tumour"),
    "liver": ("liver tumour", "hepatic metastasis"),
    "kidney": ("kidney tumour", "renal cell carcinoma"),
    "spleen": ("spleen tumour", "splenic lesion"),
    "abdomen": ("abdominal tumour", "abdominal mass"),
    "lung": ("lung tumour", "lung nodule"),
    "brain": ("brain tumour", "glioma", "brain metastasis"),
}
"""Organ -> what a lesion in it is called."""

AIR, SKIN, FAT, MUSCLE, CORTEX, MARROW, VESSEL, LUNG, HEART, LIVER, SPLEEN, KIDNEY, BOWEL, GAS, BLADDER, CSF, GREY, WHITE, COUCH = range(19)  # fmt: skip
VALUES: dict[str, tuple[tuple[float, float], ...]] = {
    # air, skin, fat, muscle, cortex, marrow, vessel, lung, heart, liver, spleen, kidney, bowel, gas, bladder, csf, grey, white, couch
    "ct": ((-1000, -1000), (-20, 30), (-115, -85), (40, 72), (500, 1200), (-40, 250), (40, 180), (-870, -750), (35, 160),
           (50, 125), (45, 135), (40, 200), (10, 70), (-950, -800), (0, 20), (3, 15), (33, 42), (23, 31), (-700, 100)),
    "mr": ((0, 0.02), (0.3, 0.6), (0.85, 1.0), (0.24, 0.42), (0.02, 0.1), (0.6, 0.95), (0.05, 0.5), (0.01, 0.05), (0.1, 0.45),
           (0.35, 0.55), (0.22, 0.4), (0.25, 0.45), (0.2, 0.6), (0, 0.05), (0.1, 0.3), (0.05, 0.2), (0.28, 0.42), (0.4, 0.6), (0, 0)),
    "pet": ((0, 0.03), (0.3, 0.6), (0.1, 0.35), (0.35, 0.9), (0.3, 0.9), (0.4, 1.4), (0.8, 1.8), (0.2, 0.5), (0.8, 7),
            (1.4, 2.8), (1.2, 2.4), (2.5, 9), (0.7, 3), (0.1, 0.3), (8, 40), (0.4, 1.2), (5, 11), (2, 4), (0, 0)),
}  # fmt: skip
"""Modality -> per tissue the range its value is drawn from: HU, T1-like signal relative to fat, SUV."""


@dataclass
class Case:
    """What a phantom shows, in words.

    Attributes:
        organ: where the lesion is, or, in a healthy one, the organ in the middle.
        tumor: what the lesion is called; None in a healthy phantom.
        modality: ct, mr or pet.
        kind: of lesion, one of ``KINDS`` or ``HELD_OUT``; None in a healthy phantom.
        scene: one of ``SCENES``.
        caption: all of it in a sentence.
        seed: draws it again.
    """

    organ: str
    tumor: str | None
    modality: str
    kind: str | None
    scene: str
    caption: str
    seed: int


@dataclass
class Volume:
    """One phantom: (X, Y, Z) float32 ``image`` in HU, signal or SUV, (X, Y, Z) bool ``mask`` of the lesion, its ``case``, and
    (X, Y, Z) ``tissue``, ``AIR`` to ``COUCH``, as it was before the lesion grew."""

    image: np.ndarray
    mask: np.ndarray
    case: Case
    tissue: np.ndarray


class Body:
    """A field of view in millimetres and the tissues drawn into it.

    Args:
        rng: of everything that is drawn.
        shape: voxels per axis.
        middle: (3,) mm, where the field of view is centred in the scene's coordinates.
        push: (centre (3,), radius) of a mass that pushes the anatomy aside, or None.
    """

    def __init__(self, rng: np.random.Generator, shape: Sequence[int], middle: Sequence[float], push=None):
        self.rng, self.shape = rng, tuple(shape)
        axes = [
            ((np.arange(n) - (n - 1) / 2) * SPACING + m).astype(np.float32) for n, m in zip(shape, middle, strict=True)
        ]
        self.fixed = np.stack(np.meshgrid(*axes, indexing="ij"))
        self.place = self.fixed
        if (
            push is not None
        ):  # what was at distance d' of the centre is now at d, with d^3 = d'^3 + radius^3: volume is kept
            centre = np.asarray(push[0], np.float32)[:, None, None, None]
            away = self.fixed - centre
            d = np.sqrt((away**2).sum(0)) + 1e-3
            self.place = centre + away * (np.cbrt(np.maximum(d**3 - push[1] ** 3, 0)) / d)
        bend = np.stack([self.noise(45) for _ in range(3)]) * np.float32(rng.uniform(1, 4))
        self.place = self.place + bend
        self.tissue = np.full(self.shape, AIR, np.uint8)

    def noise(self, scale_mm: float | Sequence[float]) -> np.ndarray:
        """(X, Y, Z) smooth zero-mean noise of unit spread with features of about ``scale_mm``."""
        scales = np.broadcast_to(np.asarray(scale_mm, float) / SPACING, 3)
        small = self.rng.standard_normal(
            [math.ceil(n / max(s, 1)) + 3 for n, s in zip(self.shape, scales, strict=True)]
        )
        for axis, (n, s) in enumerate(zip(self.shape, scales, strict=True)):
            at = self.rng.uniform(0, 1) + np.arange(n) / max(s, 1)
            low = at.astype(int)
            part = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
            part = part * part * (3 - 2 * part)
            small = small.take(low, axis) * (1 - part) + small.take(low + 1, axis) * part
        return ((small - small.mean()) / (small.std() + 1e-6)).astype(np.float32)

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float], rigid: bool = False) -> np.ndarray:
        """Signed distance in mm, about, to an ellipsoid's surface; positive inside. An infinite radius makes a cylinder."""
        where = self.fixed if rigid else self.place
        total = 0
        for axis in range(3):
            if math.isfinite(radii[axis]):
                total = total + ((where[axis] - np.float32(centre[axis])) / np.float32(radii[axis])) ** 2
        return (1 - np.sqrt(total)) * np.float32(min(radii))

    def fill(self, where: np.ndarray, tissue: int) -> None:
        self.tissue[where] = tissue

    def septa(self, where: np.ndarray, count: int, spread: float, thickness: float) -> None:
        """Divide a region into ``count`` muscle bellies along z, with fat between them."""
        seeds = self.rng.uniform(-spread, spread, (count, 2)).astype(np.float32)
        drift = self.rng.uniform(-0.3, 0.3, (count, 2)).astype(np.float32)
        first = np.full(self.shape, np.inf, np.float32)
        second = first.copy()
        x, y, z = self.place
        for (sx, sy), (dx, dy) in zip(seeds, drift, strict=True):
            d = np.hypot(x - sx - dx * z, y - sy - dy * z)
            second = np.minimum(second, np.maximum(first, d))
            first = np.minimum(first, d)
        self.fill(where & (second - first < thickness), FAT)

    def bone(self, sdf: np.ndarray, cortex: float) -> None:
        self.fill(sdf > 0, CORTEX)
        self.fill(sdf > cortex, MARROW)

    def render(self, modality: str, values: np.ndarray) -> np.ndarray:
        """Tissue map -> values with muscle marbling and a little texture everywhere."""
        image = values[self.tissue].astype(np.float32)
        muscle = self.tissue == MUSCLE
        streaks = np.clip(self.noise((7, 7, 30)) - 0.6, 0, 2) * np.float32(self.rng.uniform(0, 0.3))
        image[muscle] += (streaks * (values[FAT] - values[MUSCLE]))[muscle]
        scale = {"ct": 8.0, "mr": 0.05, "pet": 0.12}[modality]
        grain = self.noise(self.rng.uniform(6, 14)) * np.float32(self.rng.uniform(0.2, 1) * scale)
        if modality == "pet":
            grain *= image
        image[self.tissue != AIR] += grain[self.tissue != AIR]
        return image


def _limb(body: Body, rng: np.random.Generator, modality: str, geometry: dict) -> None:
    radius, muscle, paired = geometry["radius"], geometry["muscle"], geometry["paired"]
    if paired:  # the other leg: the plane between them is a mirror
        wall = radius * 1.04
        for place in (body.place, body.fixed):
            place[0] = np.where(place[0] > wall, 2 * wall - place[0], place[0])
    oval = geometry["oval"]
    wobble = body.noise(60) * np.float32(0.05 * radius)
    outer = body.ellipsoid((0, 0, 0), (radius * oval, radius / oval, np.inf)) + wobble
    inner = body.ellipsoid((0, 0, 0), (muscle * oval, muscle / oval, np.inf)) + wobble
    body.fill(outer > 0, SKIN)
    body.fill(outer > rng.uniform(1, 3), FAT)
    body.fill(inner > 0, MUSCLE)
    body.septa(inner > 0, int(rng.integers(5, 14)), muscle, rng.uniform(0, 5))
    for _ in range(rng.integers(2, 6)):  # vessels and nerves between the bellies
        at, r = rng.uniform(-0.6, 0.6, 2) * muscle, rng.uniform(2.5, 5)
        body.fill(body.ellipsoid((*at, 0), (r, r, np.inf)) > 0, VESSEL)
    for x, y, r in geometry["bones"]:
        body.bone(body.ellipsoid((x, y, 0), (r, r * rng.uniform(0.8, 1.2), np.inf), rigid=True), rng.uniform(2.5, 5))
    if modality == "ct" and rng.random() < 0.5:
        table = body.fixed[1] - radius / oval - rng.uniform(0, 25)
        body.fill((table > 0) & (table < rng.uniform(6, 20)) & (body.tissue == AIR), COUCH)


def _limb_geometry(rng: np.random.Generator) -> dict:
    radius = rng.uniform(45, 120)
    muscle = radius - rng.uniform(4, 0.4 * radius)
    if rng.random() < 0.65:
        bones = [(*rng.uniform(-0.25, 0.25, 2) * muscle, rng.uniform(0.13, 0.2) * muscle + 4)]
    else:
        gap = 0.35 * muscle
        bones = [
            (-gap, rng.uniform(-0.3, 0.3) * muscle, 0.2 * muscle),
            (gap, rng.uniform(-0.3, 0.3) * muscle, 0.13 * muscle),
        ]
    return {
        "radius": radius,
        "muscle": muscle,
        "bones": bones,
        "paired": rng.random() < 0.25,
        "oval": rng.uniform(0.85, 1.2),
    }


def _trunk(body: Body, rx: float, ry: float, fat: float) -> np.ndarray:
    """Skin, fat and the muscle of the wall; returns the signed distance to the wall's inside."""
    outer = body.ellipsoid((0, 0, 0), (rx, ry, np.inf))
    body.fill(outer > 0, SKIN)
    body.fill(outer > 3, FAT)
    body.fill(outer > fat, MUSCLE)
    return outer - fat - 11


def _spine(body: Body, ry: float) -> None:
    body.bone(body.ellipsoid((0, 0.5 * ry, 0), (22, 18, np.inf), rigid=True), 4)
    body.bone(body.ellipsoid((0, 0.5 * ry + 30, 0), (9, 16, np.inf), rigid=True), 4)
    for side in (-1, 1):
        body.fill(body.ellipsoid((side * 35, 0.5 * ry + 22, 0), (22, 20, np.inf)) > 0, MUSCLE)
    body.fill(body.ellipsoid((10, 0.5 * ry - 30, 0), (10, 10, np.inf)) > 0, VESSEL)


def _abdomen(body: Body, rng: np.random.Generator, modality: str, geometry: dict) -> None:
    rx, ry = geometry["rx"], geometry["ry"]
    cavity = _trunk(body, rx, ry, geometry["fat"])
    body.fill(cavity > 0, FAT)
    for _ in range(rng.integers(4, 12)):
        at = rng.uniform(-1, 1, 3) * (0.5 * rx, 0.4 * ry, 90) - (0, 0.2 * ry, 0)
        loop = body.ellipsoid(at, rng.uniform(10, 26, 3))
        body.fill((loop > 0) & (cavity > 0), BOWEL)
        if rng.random() < 0.4:
            body.fill((loop > 5) & (body.fixed[1] < at[1]), GAS)
    for name, tissue in (("liver", LIVER), ("spleen", SPLEEN)):
        body.fill((body.ellipsoid(*geometry[name]) + 4 * body.noise(35) > 0) & (cavity > 0), tissue)
    for side in ("kidney", "kidney left"):
        sdf = body.ellipsoid(*geometry[side])
        body.fill(sdf > 0, KIDNEY)
        body.fill(sdf > 16, FAT)
    for _ in range(4):  # vessels of the liver
        at = np.asarray(geometry["liver"][0]) + rng.uniform(-30, 30, 3)
        tube = body.ellipsoid(at, rng.permutation([rng.uniform(3, 5), rng.uniform(3, 5), rng.uniform(30, 60)]))
        body.fill((tube > 0) & (body.tissue == LIVER), VESSEL)
    _spine(body, ry)


def _abdomen_geometry(rng: np.random.Generator) -> dict:
    rx, ry = rng.uniform(120, 170), rng.uniform(85, 125)
    jitter = lambda *r: np.asarray(r) * rng.uniform(0.85, 1.15, 3)  # noqa: E731
    return {
        "rx": rx,
        "ry": ry,
        "fat": rng.uniform(6, 30),
        "liver": (jitter(-0.42 * rx, -0.08 * ry, 25), jitter(0.45 * rx, 0.6 * ry, 75)),
        "spleen": (jitter(0.6 * rx, 0.15 * ry, 35), jitter(26, 34, 50)),
        "kidney": (jitter(-0.42 * rx, 0.42 * ry, -25), jitter(26, 26, 52)),
        "kidney left": (jitter(0.42 * rx, 0.42 * ry, -15), jitter(26, 26, 52)),
        "abdomen": (jitter(0, -0.15 * ry, -20), jitter(0.45 * rx, 0.35 * ry, 60)),
    }


def _chest(body: Body, rng: np.random.Generator, modality: str, geometry: dict) -> None:
    rx, ry = geometry["rx"], geometry["ry"]
    cavity = _trunk(body, rx, ry, geometry["fat"])
    ribs = (np.abs(cavity + 5) < 4) & (np.sin((body.fixed[2] + 0.4 * body.fixed[1]) / 4.2) > 0.35)
    body.fill(ribs, CORTEX)
    body.fill(cavity > 0, FAT)
    for side in ("lung", "lung left"):
        lung = (body.ellipsoid(*geometry[side]) > 0) & (cavity > 0)
        body.fill(lung, LUNG)
        streaks = body.noise((8, 8, 14)) > rng.uniform(1.6, 2.2)
        body.fill(lung & streaks, VESSEL)
    heart = body.ellipsoid((18, -0.2 * ry, -25), (48, 42, 50))
    body.fill(heart > 0, HEART)
    body.fill(heart > 14, VESSEL)
    _spine(body, ry)


def _chest_geometry(rng: np.random.Generator) -> dict:
    rx, ry = rng.uniform(125, 170), rng.uniform(90, 120)
    return {
        "rx": rx,
        "ry": ry,
        "fat": rng.uniform(5, 22),
        "lung": ((-0.46 * rx, 0, 0), (0.36 * rx, 0.7 * ry, 150)),
        "lung left": ((0.5 * rx, 0, 0), (0.33 * rx, 0.68 * ry, 150)),
    }


def _head(body: Body, rng: np.random.Generator, modality: str, geometry: dict) -> None:
    radii = np.asarray(geometry["brain"][1])
    skull = rng.uniform(5, 8)
    outer = body.ellipsoid((0, 0, 0), radii + skull + 8)
    body.fill(outer > 0, SKIN)
    body.fill(outer > 3, FAT)
    body.bone(body.ellipsoid((0, 0, 0), radii + skull), 2.5)
    brain = body.ellipsoid((0, 0, 0), radii)
    body.fill(brain > 0, CSF)
    folds = brain + 2.5 * body.noise(12)
    body.fill(folds > 3, GREY)
    body.fill(folds + 2 * body.noise(18) > 11, WHITE)
    body.fill((np.abs(body.place[0]) < 1.6) & (brain > 0) & (body.place[2] > 5), CSF)
    wide = rng.uniform(4, 11)
    for side in (-1, 1):
        body.fill(body.ellipsoid((side * 14, 0, 8), (wide, 32, 14)) > 0, CSF)
        body.fill(body.ellipsoid((side * 28, 4, 0), (9, 15, 13)) > 0, GREY)


def _head_geometry(rng: np.random.Generator) -> dict:
    return {"brain": ((0.0, 0.0, 0.0), rng.uniform((58, 72, 55), (72, 88, 72)))}


SCENES: dict[str, tuple[Callable, Callable]] = {
    "limb": (_limb_geometry, _limb),
    "abdomen": (_abdomen_geometry, _abdomen),
    "chest": (_chest_geometry, _chest),
    "head": (_head_geometry, _head),
}
"""Scene -> (draws its geometry, draws its tissues)."""
ORGANS_OF = {"limb": ("limb",), "abdomen": ("liver", "liver", "kidney", "spleen", "abdomen"), "chest": ("lung",), "head": ("brain",)}  # fmt: skip
HOMES = {
    "limb": (MUSCLE, FAT, SKIN, VESSEL),
    "liver": (LIVER, VESSEL),
    "kidney": (KIDNEY, FAT),
    "spleen": (SPLEEN,),
    "abdomen": (FAT, BOWEL, GAS, VESSEL, MUSCLE),
    "lung": (LUNG, VESSEL, FAT),
    "brain": (GREY, WHITE, CSF),
}
"""Organ -> tissues its lesions replace."""


def _spot(rng: np.random.Generator, organ: str, geometry: dict, radius: float) -> np.ndarray:
    """(3,) mm: where a lesion of that radius, or the middle of a healthy field of view, is put."""
    if organ == "limb":
        angle, far = rng.uniform(0, 2 * np.pi), geometry["muscle"] * rng.uniform(0.25, 0.95)
        return np.array([far * np.cos(angle), far * np.sin(angle), 0.0])
    name = organ if organ not in ("lung", "kidney") or rng.random() < 0.5 else f"{organ} left"
    centre, radii = geometry[name]
    room = np.maximum(np.asarray(radii) - 0.7 * radius, 0.25 * np.asarray(radii))
    direction = rng.standard_normal(3)
    direction *= rng.uniform(0, 0.9) / np.linalg.norm(direction)
    return np.asarray(centre) + direction * np.minimum(room, 70)


def _lesion(body: Body, rng: np.random.Generator, kind: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """(X, Y, Z) signed distance in mm, about, to the lesion's surface; positive inside."""

    def ball(at, r, wobble):
        axes = r * rng.uniform(0.75, 1.3, 3)
        return body.ellipsoid(at, axes, rigid=True) + wobble * r * body.noise(max(12, 0.8 * r))

    if kind in ("lobulated", "cluster"):
        count, share = (int(rng.integers(3, 6)), 0.62) if kind == "lobulated" else (int(rng.integers(3, 7)), 0.36)
        reach = 0.55 if kind == "lobulated" else 1.0
        offsets = rng.standard_normal((count, 3))
        offsets *= reach * radius / np.linalg.norm(offsets, axis=1, keepdims=True)
        return np.max([ball(centre + o, share * radius * rng.uniform(0.8, 1.2), 0.05) for o in offsets], 0)
    return ball(centre, radius, {"infiltrating": 0.22, "heterogeneous": 0.12}.get(kind, rng.uniform(0.03, 0.12)))


def _paint(body, rng, modality, kind, organ, image, values, mask, sdf, radius) -> np.ndarray:
    """The image with the lesion's values in it."""
    under = {"limb": MUSCLE, "liver": LIVER, "kidney": KIDNEY, "spleen": SPLEEN, "abdomen": MUSCLE, "lung": MUSCLE, "brain": GREY}  # fmt: skip
    base = float(values[under[organ]])
    sign = -1 if rng.random() < 0.75 else 1
    if modality == "ct":
        step = rng.uniform(12, 45) if organ in ("limb", "brain", "abdomen") else rng.uniform(22, 70)
        value, core, texture = base + sign * step, base - rng.uniform(25, 60), 7.0
        if kind == "ring":
            value = base + rng.uniform(20, 70)
    elif modality == "mr":
        factor = rng.uniform(0.68, 0.9) if sign < 0 else rng.uniform(1.12, 1.9)
        value, core, texture = base * factor, base * rng.choice([0.5, 0.65, 1.6, 2.0]), 0.05
        if kind == "ring":
            value = base * rng.uniform(1.5, 2.2)
            core = base * rng.uniform(0.4, 0.8)
    else:
        background = float(np.median(image[mask])) if mask.any() else base
        value = max(rng.uniform(2.2, 4) * background, rng.lognormal(1.6, 0.5))
        core, texture = value * rng.uniform(0.1, 0.5), 0.12 * value
    filling = np.full(body.shape, value, np.float32)
    filling += (
        texture * body.noise(rng.uniform(9, 20)) * np.float32(2.2 if kind == "heterogeneous" else rng.uniform(0.1, 0.6))
    )
    depth = sdf / radius
    if kind == "necrotic":
        inner = depth + 0.15 * body.noise(0.6 * radius + 6) > rng.uniform(0.35, 0.6)
        filling[inner] = core
    elif kind == "ring":
        filling[sdf > max(4.5, rng.uniform(0.2, 0.4) * radius)] = core
    elif kind == "calcified":
        specks = body.noise(7) > 1.6
        filling[specks] = {"ct": 400, "mr": 0.05, "pet": 0.6 * value}[modality]
    image = image.copy()
    image[mask] = filling[mask]
    return image


def make_volume(
    seed: int,
    kinds: Sequence[str] = KINDS,
    modality: str | None = None,
    scene: str | None = None,
    lesion: bool | None = None,
    largest: int = 64,
    field: Sequence[float] | None = None,
) -> Volume:
    """Draw one phantom.

    Args:
        seed: draws the same phantom again, with the same other arguments.
        kinds: of lesion to choose from.
        modality: ct, mr or pet; None: drawn.
        scene: one of ``SCENES``; None: drawn, limbs most often.
        lesion: whether there is one; None: in every second phantom.
        largest: voxels of the longest side at most.
        field: (3,) half the width of the field of view in mm, across the middle of the body; None: drawn, around the lesion.
    """
    rng = np.random.default_rng([seed, 3])
    drawn = (MODALITIES[rng.integers(3)], str(rng.choice(list(SCENES), p=[0.46, 0.28, 0.11, 0.15])), bool(rng.random() < 0.5))  # fmt: skip
    modality = modality or drawn[0]
    scene = scene or drawn[1]
    lesion = drawn[2] if lesion is None else lesion
    organ = str(rng.choice(ORGANS_OF[scene]))
    kind = str(rng.choice(list(kinds)))
    geometry = SCENES[scene][0](rng)
    for _ in range(20):  # a lesion that anatomy leaves too little of is drawn again
        radius = {"limb": rng.uniform(11, 52), "abdomen": rng.uniform(15, 40)}.get(organ, rng.uniform(8, 26))
        if kind == "small":
            radius = rng.uniform(6, 11)
        if kind in ("ring", "necrotic", "cluster"):
            radius = max(radius, 13)
        spot = _spot(rng, organ, geometry, radius)
        around = (
            radius * rng.uniform(1.5, 2.7, 3) if scene == "limb" and rng.random() < 0.75 else rng.uniform(55, 96, 3)
        )
        around = around if field is None else np.array(field, float)
        shape = np.clip(np.round(2 * around / SPACING), 1 if field else 16, largest).astype(int)
        middle = spot + rng.uniform(-0.25, 0.25, 3) * np.minimum(around, shape * SPACING / 2)
        if field is not None:
            middle[:2] = rng.normal(0, 6, 2)
        pushes = lesion and organ in ("limb", "abdomen", "brain") and kind != "infiltrating"
        body = Body(rng, shape, middle, (spot, radius * 0.9) if pushes else None)
        SCENES[scene][1](body, rng, modality, geometry)
        mask = np.zeros(body.shape, bool)
        if not lesion:
            break
        sdf = _lesion(body, rng, kind, spot, radius)
        mask = (sdf > 0) & np.isin(body.tissue, HOMES[organ])
        if mask.sum() >= max(20, 0.4 * (sdf > 0).sum()) and mask.mean() < 0.5:
            break
    else:
        return make_volume(seed + 10_000_019, kinds, modality, scene, lesion, largest, field)
    values = np.array([rng.uniform(*span) for span in VALUES[modality]])
    if modality == "mr" and scene == "head" and rng.random() < 0.5:  # T2 and FLAIR: fluid or grey matter bright
        values[[GREY, WHITE, CSF]] = rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4), rng.choice([0.05, 1.1])
    image = body.render(modality, values)
    if lesion:
        image = _paint(body, rng, modality, kind, organ, image, values, mask, sdf, radius)
    image = _scan(body, rng, image, modality)
    words = str(rng.choice(TUMOURS[organ])) if lesion else None
    what = f"{kind} {words}" if lesion else "nothing abnormal"
    case = Case(organ, words, modality, kind if lesion else None, scene, f"{modality} of {organ} with {what}", seed)
    return Volume(image, mask, case, body.tissue)


def _scan(body: Body, rng: np.random.Generator, image: np.ndarray, modality: str) -> np.ndarray:
    """What the scanner adds: blur, bias field, noise."""
    if modality == "pet":
        image = ndimage.gaussian_filter(np.maximum(image, 0), rng.uniform(0.7, 1.1))
        noise = ndimage.gaussian_filter(rng.standard_normal(image.shape), 0.6)
        return np.maximum(image + rng.uniform(0.05, 0.25) * np.sqrt(image + 0.02) * noise, 0).astype(np.float32)
    image = ndimage.gaussian_filter(image, rng.uniform(0.35, 0.7))
    if modality == "mr":
        image = image * np.exp(rng.uniform(0, 0.3) * body.noise(150)) * 400
        noise = rng.uniform(2, 16) * rng.standard_normal((2, *image.shape))
        return np.hypot(image + noise[0], noise[1]).astype(np.float32)  # magnitude images carry Rician noise
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape), 0.4)
    return np.maximum(image + rng.uniform(4, 22) * noise / noise.std(), -1024).astype(np.float32)


def write_volumes(out: Path, count: int, first_seed: int = 0, **options) -> list[Case]:
    """Write phantoms as NIfTI: ``images/``, ``masks/`` (empty for healthy ones) and ``cases.json``.

    Args:
        out: folder, made if need be.
        count: how many.
        first_seed: of the first; the others follow it.
        **options: of ``make_volume``.
    """
    for part in ("images", "masks"):
        (out / part).mkdir(parents=True, exist_ok=True)
    cases = {}
    for seed in range(first_seed, first_seed + count):
        volume = make_volume(seed, **options)
        stem = f"{volume.case.modality}_{volume.case.scene}_{seed:07d}"
        affine = np.diag([SPACING] * 3 + [1.0])
        image = nib.Nifti1Image(volume.image, affine)
        image.set_data_dtype(np.int16)  # nibabel finds slope and intercept
        nib.save(image, out / "images" / f"{stem}.nii.gz")
        nib.save(nib.Nifti1Image(volume.mask.astype(np.uint8), affine), out / "masks" / f"{stem}.nii.gz")
        cases[stem] = volume.case
    text = json.dumps({stem: asdict(case) for stem, case in cases.items()}, indent=1)
    (out / "cases.json").write_text(text + "\n")
    return list(cases.values())
