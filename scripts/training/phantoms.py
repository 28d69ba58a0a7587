#!/usr/bin/env python
"""Procedural biomedical phantoms: images with captions that say what is present and what is absent.

Twelve kinds of scene (CT abdomen, brain MR, ultrasound, dermoscopy, blood smear, fluorescence, histology, chest X-ray,
PET, endoscopy, fundus, and abstract "dead leaves") drawn from random shapes, textures, bias fields and noise. They
teach the embedded backbone what an object is and what words mean, without any real patient or annotation.
A phantom is reproducible from its seed: ``make_phantom(seed)`` always draws the same image.

    python scripts/training/phantoms.py --count 36 --out out/phantoms.png     # look at them
    python scripts/training/phantoms.py --volumes 24 --out out/volumes        # volumes, see phantoms3d.py
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

Colour = tuple[float, float, float]


@dataclass
class Phantom:
    """One drawn scene.

    Attributes:
        image: (H, W, 3) uint8.
        caption: what the image shows, in words; the only thing training reads besides the pixels.
        masks: object name -> (H, W) bool, for tests of text grounding; never read by training.
    """

    image: np.ndarray
    caption: str
    masks: dict[str, np.ndarray] = field(default_factory=dict)


class Canvas:
    """A float RGB image in [0, 1] with the drawing operations the scenes share."""

    def __init__(self, rng: np.random.Generator, size: int, background: Colour | float):
        self.rng, self.size = rng, size
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32) / size
        self.rgb = np.ones((size, size, 3), np.float32) * np.asarray(background, np.float32)
        self.masks: dict[str, np.ndarray] = {}

    def noise(self, scale: float) -> np.ndarray:
        """Smooth zero-mean noise of unit spread; ``scale`` is the feature size as a fraction of the image."""
        n = max(2, round(1 / scale) + 2)
        small = self.rng.standard_normal((n, n)).astype(np.float32)
        field = ndimage.zoom(small, self.size / (n - 1), order=1)[: self.size, : self.size]
        return field / (field.std() + 1e-6)

    def blob(self, cx: float, cy: float, rx: float, ry: float, wobble: float = 0.15, soft: float = 0.008) -> np.ndarray:
        """Soft mask in [0, 1] of an irregular ellipse: random angle, radius modulated by random harmonics."""
        angle = self.rng.uniform(0, np.pi)
        dx, dy = self.x - cx, self.y - cy
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / rx
        v = (-dx * np.sin(angle) + dy * np.cos(angle)) / ry
        theta = np.arctan2(v, u)
        radius = np.ones_like(u)
        for k in range(2, 7):
            radius += wobble / k * self.rng.standard_normal() * np.cos(k * theta + self.rng.uniform(0, 2 * np.pi))
        edge = (radius - np.hypot(u, v)) * min(rx, ry)
        return np.clip(edge / max(soft, 1e-4) + 0.5, 0, 1)

    def axis_ellipse(self, cx: float, cy: float, rx: float, ry: float, soft: float = 0.008) -> np.ndarray:
        edge = (1 - np.hypot((self.x - cx) / rx, (self.y - cy) / ry)) * min(rx, ry)
        return np.clip(edge / soft + 0.5, 0, 1)

    def stroke(self, thickness: float, length: float = 0.6, start=None, heading=None, bend: float = 0.25) -> np.ndarray:
        """Soft mask of a wandering line (hair, vessel, catheter)."""
        px, py = start if start is not None else self.rng.uniform(0, 1, 2)
        heading = self.rng.uniform(0, 2 * np.pi) if heading is None else heading
        canvas = np.ones((self.size, self.size), bool)
        for _ in range(int(length * self.size)):
            heading += self.rng.standard_normal() * bend * 0.15
            px, py = px + np.cos(heading) / self.size, py + np.sin(heading) / self.size
            if not (0 <= px < 1 and 0 <= py < 1):
                break
            canvas[int(py * self.size), int(px * self.size)] = False
        if canvas.all():
            return np.zeros((self.size, self.size), np.float32)
        return np.clip(thickness * self.size - ndimage.distance_transform_edt(canvas) + 0.5, 0, 1).astype(np.float32)

    def paint(
        self, mask: np.ndarray, colour: Colour | float, texture: float = 0.0, scale: float = 0.05, name: str = ""
    ):
        """Lay a colour with optional texture over a soft mask; a name records the object's mask and hides what it covers."""
        layer = np.asarray(colour, np.float32) * np.ones(3, np.float32)
        if texture:
            layer = layer + texture * self.noise(scale)[..., None]
        self.rgb += mask[..., None] * (layer - self.rgb)
        for other in self.masks.values():
            other &= mask < 0.5
        if name:
            self.masks[name] = self.masks.get(name, np.zeros_like(mask, bool)) | (mask >= 0.5)

    def finish(self, noise: float, bias: float = 0.0, blur: float = 0.0) -> np.ndarray:
        rgb = self.rgb
        if bias:
            rgb = rgb * (1 + bias * self.noise(0.7))[..., None]
        if blur:
            rgb = ndimage.gaussian_filter(rgb, (blur, blur, 0))
        grey_noise = self.rng.standard_normal(rgb.shape[:2])[..., None]
        return (np.clip(rgb + noise * grey_noise, 0, 1) * 255).astype(np.uint8)


def _caption(rng: np.random.Generator, opening: str, present: list[str], absent: list[str] = ()) -> str:
    """An opening, what is there, sometimes what is not: the contrast that grounds words without masks."""
    present = list(present)
    rng.shuffle(present)
    if len(present) > 1 and rng.random() < 0.25:
        present = present[: rng.integers(1, len(present))]
    words = opening + (" with " + ", ".join(present) if present else "")
    if absent and rng.random() < 0.5:
        words += ", no " + str(rng.choice(list(absent)))
    return words


def _scatter(rng, count, radius, margin=0.02, tries=30, keep=()):
    """Up to ``count`` centres whose discs of ``radius`` barely overlap each other and those in ``keep``."""
    placed = list(keep)
    for _ in range(count):
        for _ in range(tries):
            c = rng.uniform(margin, 1 - margin, 2)
            if all(np.hypot(*(c - p[:2])) > 0.85 * (radius + p[2]) for p in placed):
                placed.append(np.array([*c, radius]))
                break
    return placed[len(keep) :]


def _ct_abdomen(rng, size):
    c = Canvas(rng, size, 0.02)
    flip = rng.choice([-1, 1])
    sx, sy = rng.uniform(0.4, 0.47), rng.uniform(0.28, 0.36)
    at = lambda dx, dy: (0.5 + flip * dx * sx / 0.45, 0.5 + dy * sy / 0.33)  # noqa: E731
    c.paint(c.blob(0.5, 0.5, sx, sy, 0.0) * 0 + c.axis_ellipse(0.5, 0.5, sx, sy), rng.uniform(0.15, 0.3))
    c.paint(c.axis_ellipse(0.5, 0.5, sx - 0.03, sy - 0.03), rng.uniform(0.4, 0.5), 0.03, 0.04)
    present = []
    soft = rng.uniform(0.5, 0.68)
    tumour = None
    if rng.random() < 0.85:
        x, y = at(-0.19, -0.03)
        m = c.blob(x, y, rng.uniform(0.12, 0.19), rng.uniform(0.1, 0.16), 0.2)
        m = m * c.axis_ellipse(0.5, 0.5, sx - 0.035, sy - 0.035)
        c.paint(m, soft, 0.012, 0.02, "liver")
        present.append("liver")
        if rng.random() < 0.5:
            tx, ty = x + rng.normal(0, 0.05), y + rng.normal(0, 0.04)
            r = rng.uniform(0.02, 0.07)
            t = c.blob(tx, ty, r, r * rng.uniform(0.7, 1), 0.2, 0.012) * m
            c.paint(t, soft + rng.choice([-1, 1], p=[0.8, 0.2]) * rng.uniform(0.1, 0.2), 0.02, 0.03, "liver tumour")
            tumour = "liver tumour"
    if rng.random() < 0.7:
        c.paint(c.blob(*at(0.28, 0.0), 0.06, 0.09, 0.15), soft - 0.02, 0.012, 0.02, "spleen")
        present.append("spleen")
    if rng.random() < 0.6:
        for side in (-0.17, 0.17):
            c.paint(c.blob(*at(side, 0.15), 0.045, 0.06, 0.12), soft + 0.13, 0.02, 0.02, "kidney")
        present.append("kidneys")
    if rng.random() < 0.5:
        c.paint(c.blob(*at(0.15, -0.12), 0.08, 0.06, 0.3), rng.choice([0.03, 0.5, 0.9]), 0.02, 0.03, "stomach")
        present.append("stomach")
    c.paint(c.axis_ellipse(0.5, 0.5 + 0.55 * sy, 0.055, 0.05), 0.92, 0.06, 0.02, "spine")
    c.paint(c.axis_ellipse(0.5 + 0.03 * flip, 0.5 + 0.25 * sy, 0.024, 0.024), soft + 0.15, 0, 0, "aorta")
    present += ["spine", "aorta"]
    if tumour:
        present.append(tumour)
    image = c.finish(rng.uniform(0.01, 0.05), 0, 0.5)
    return Phantom(image, _caption(rng, "abdominal ct", present, () if tumour else ["liver tumour", "tumour"]), c.masks)


def _mr_brain(rng, size):
    c = Canvas(rng, size, 0.02)
    rx, ry = rng.uniform(0.3, 0.37), rng.uniform(0.37, 0.44)
    c.paint(c.axis_ellipse(0.5, 0.5, rx, ry), rng.uniform(0.5, 0.9), 0.05, 0.05)
    c.paint(c.axis_ellipse(0.5, 0.5, rx - 0.03, ry - 0.03), 0.06)
    grey, white = rng.uniform(0.3, 0.6, 2)
    inner = c.axis_ellipse(0.5, 0.5, rx - 0.045, ry - 0.045)
    c.paint(inner, grey, 0.03, 0.03, "brain")
    wm = inner * np.clip((c.noise(0.08) + 1.2 - 9 * ((c.x - 0.5) ** 2 + (c.y - 0.5) ** 2) / rx) * 3, 0, 1)
    c.rgb += (wm * (white - grey))[..., None]
    present = ["brain"]
    csf = rng.choice([0.05, 0.95])
    for s in (-1, 1):
        c.paint(c.blob(0.5 + s * 0.05, 0.47, 0.025, 0.08, 0.2) * inner, csf, 0, 0, "ventricles")
    present.append("ventricles")
    absent = ["brain tumour", "tumour"]
    if rng.random() < 0.5:
        a, d = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.75)
        r = rng.uniform(0.04, 0.12)
        t = c.blob(
            0.5 + d * (rx - r) * np.cos(a), 0.5 + d * (ry - r) * np.sin(a), r, r * rng.uniform(0.6, 1), 0.35, 0.02
        )
        c.paint(t * inner, rng.choice([0.15, 0.8, 0.95]), 0.06, 0.04, "brain tumour")
        present.append("brain tumour")
        absent = []
    return Phantom(c.finish(rng.uniform(0.01, 0.05), 0.15, 0.6), _caption(rng, "brain mr", present, absent), c.masks)


def _ultrasound(rng, size):
    c = Canvas(rng, size, 0.4)
    depth = c.y + 0.05 * c.noise(0.3)
    for _ in range(rng.integers(2, 6)):
        top, thick = rng.uniform(0, 0.9), rng.uniform(0.04, 0.3)
        c.paint(np.clip((thick - np.abs(depth - top)) * 40, 0, 1), rng.uniform(0.2, 0.7), 0.08, 0.05)
    present, absent = ["tissue"], ["breast tumour", "tumour"]
    if rng.random() < 0.7:
        r = rng.uniform(0.07, 0.22)
        cx, cy = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.7)
        m = c.blob(cx, cy, r, r * rng.uniform(0.5, 0.9), 0.25, 0.03)
        c.paint(m, rng.uniform(0.04, 0.2), 0.04, 0.06, "breast tumour")
        if rng.random() < 0.5:
            below = np.clip(1 - np.abs(c.x - cx) / r, 0, 1) * (c.y > cy) * (1 - m)
            c.rgb *= (1 + rng.uniform(-0.7, 0.4) * below)[..., None]
        present.append("breast tumour")
        absent = []
    speckle = ndimage.gaussian_filter(rng.rayleigh(1.0, (size, size)), rng.uniform(0.6, 1.6))
    c.rgb *= (speckle / speckle.mean())[..., None] ** rng.uniform(0.4, 1.2)
    return Phantom(c.finish(0.01, 0.2), _caption(rng, "breast ultrasound", present, absent), c.masks)


def _dermoscopy(rng, size):
    skin = np.array([rng.uniform(0.6, 0.95), rng.uniform(0.45, 0.75), rng.uniform(0.4, 0.7)])
    c = Canvas(rng, size, tuple(skin))
    c.rgb += 0.02 * c.noise(0.03)[..., None]
    present, absent = ["skin"], ["skin lesion", "lesion"]
    if rng.random() < 0.85:
        r = rng.uniform(0.1, 0.4)
        colour = skin * rng.uniform(0.25, 0.8) * np.array([1, rng.uniform(0.65, 0.95), rng.uniform(0.5, 0.95)])
        m = c.blob(
            0.5 + rng.normal(0, 0.06),
            0.5 + rng.normal(0, 0.06),
            r,
            r * rng.uniform(0.65, 1),
            0.25,
            rng.uniform(0.01, 0.08),
        )
        c.paint(m, tuple(colour), rng.uniform(0.01, 0.08), rng.uniform(0.02, 0.2), "skin lesion")
        for _ in range(rng.integers(0, 4)):
            q = c.blob(0.5 + rng.normal(0, r / 2), 0.5 + rng.normal(0, r / 2), r * 0.4, r * 0.3, 0.4, 0.05) * m
            c.rgb += q[..., None] * (colour * rng.uniform(0.4, 1.3) - c.rgb) * 0.6
        present.append("skin lesion")
        absent = []
    if rng.random() < 0.35:
        for _ in range(rng.integers(2, 9)):
            c.rgb *= 1 - 0.6 * c.stroke(0.004, 0.7)[..., None]
        present.append("hair")
    image_bias = rng.uniform(0, 0.12)
    if rng.random() < 0.25:
        c.rgb *= c.axis_ellipse(0.5, 0.5, 0.62, 0.62, 0.08)[..., None]
    return Phantom(c.finish(0.012, image_bias, 0.5), _caption(rng, "dermoscopy", present, absent), c.masks)


def _blood_smear(rng, size):
    base = np.array([rng.uniform(0.75, 0.95), rng.uniform(0.7, 0.92), rng.uniform(0.65, 0.95)])
    c = Canvas(rng, size, tuple(base))
    red = base * np.array([rng.uniform(0.85, 1), rng.uniform(0.6, 0.8), rng.uniform(0.55, 0.85)])
    r = rng.uniform(0.04, 0.13)
    whites = []
    if rng.random() < 0.85:
        whites = _scatter(rng, rng.integers(1, 3), r * rng.uniform(1.3, 2.4), 0.12)
    present, absent = [], ["white blood cell"]
    for x, y, q in _scatter(rng, rng.integers(0, 60), r, 0, 8, whites):
        q *= rng.uniform(0.85, 1.1)
        c.paint(
            c.blob(x, y, q, q * rng.uniform(0.85, 1), 0.06),
            tuple(red * rng.uniform(0.93, 1.05)),
            0,
            0,
            "red blood cell",
        )
        c.rgb += 0.12 * c.blob(x, y, q * 0.45, q * 0.45, 0.05, 0.03)[..., None]
    if "red blood cell" in c.masks:
        present.append("red blood cells")
    for x, y, q in whites:
        cyto = base * np.array([rng.uniform(0.7, 0.95), rng.uniform(0.65, 0.9), rng.uniform(0.85, 1)])
        body = c.blob(x, y, q, q * rng.uniform(0.85, 1), 0.08)
        c.paint(body, tuple(cyto), 0.03, 0.02, "white blood cell")
        nucleus = (rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.35), rng.uniform(0.4, 0.65))
        for _ in range(rng.integers(1, 5)):
            nx, ny = x + rng.normal(0, q * 0.25), y + rng.normal(0, q * 0.25)
            n = c.blob(nx, ny, q * rng.uniform(0.35, 0.6), q * rng.uniform(0.3, 0.5), 0.15) * body
            c.rgb += n[..., None] * (np.asarray(nucleus) + 0.05 * c.noise(0.03)[..., None] - c.rgb)
        present, absent = [*present, "white blood cell"], []
    image = c.finish(0.015, 0.06, rng.uniform(0.3, 1))
    return Phantom(image, _caption(rng, "blood smear", list(dict.fromkeys(present)), absent), c.masks)


def _fluorescence(rng, size):
    c = Canvas(rng, size, rng.uniform(0, 0.12))
    hue = np.ones(3) if rng.random() < 0.6 else rng.uniform(0.1, 1, 3)
    r = np.exp(rng.uniform(np.log(0.015), np.log(0.12)))
    for x, y, q in _scatter(rng, min(120, int(0.35 / r**2 * rng.uniform(0.1, 0.6))), r, 0, 6):
        q *= rng.uniform(0.7, 1.2)
        level = rng.uniform(0.25, 1) * hue
        c.paint(c.blob(x, y, q, q * rng.uniform(0.55, 1), 0.12, 0.01), tuple(level), 0.05, q / 2, "nuclei")
    image = c.finish(rng.uniform(0.005, 0.05), 0.1, rng.uniform(0.3, 1.5))
    return Phantom(image, _caption(rng, "fluorescence microscopy", ["cell nuclei"] if c.masks else []), c.masks)


def _histology(rng, size):
    pink = np.array([rng.uniform(0.8, 0.95), rng.uniform(0.55, 0.8), rng.uniform(0.7, 0.9)])
    c = Canvas(rng, size, tuple(pink))
    c.rgb *= (1 + 0.08 * c.noise(0.04) + 0.06 * c.noise(0.2))[..., None]
    present = ["tissue"]
    if rng.random() < 0.6:
        for x, y, q in _scatter(rng, rng.integers(1, 8), rng.uniform(0.08, 0.2), 0.05):
            c.paint(c.blob(x, y, q, q * 0.8, 0.25), tuple(pink * [0.85, 0.75, 0.95]), 0.05, 0.03, "glands")
            c.paint(c.blob(x, y, q * 0.45, q * 0.35, 0.3), (0.96, 0.93, 0.96), 0.01, 0.05)
        present.append("glands")
    r = rng.uniform(0.012, 0.045)
    purple = np.array([rng.uniform(0.3, 0.55), rng.uniform(0.2, 0.4), rng.uniform(0.5, 0.7)])
    for x, y, q in _scatter(rng, rng.integers(15, 110), r, 0, 4):
        c.paint(
            c.blob(x, y, q, q * rng.uniform(0.5, 1), 0.12), tuple(purple * rng.uniform(0.8, 1.3)), 0.05, 0.01, "nuclei"
        )
    present.append("cell nuclei")
    return Phantom(c.finish(0.02, 0.05, 0.6), _caption(rng, "histology", present), c.masks)


def _chest_xray(rng, size):
    c = Canvas(rng, size, rng.uniform(0, 0.15))
    c.paint(
        c.axis_ellipse(0.5, 0.62, rng.uniform(0.42, 0.52), rng.uniform(0.55, 0.65), 0.06),
        rng.uniform(0.5, 0.75),
        0.03,
        0.1,
    )
    lung_level = rng.uniform(0.1, 0.3)
    present, absent = ["lungs"], ["lung opacity", "opacity"]
    lungs = np.zeros((size, size), np.float32)
    for s in (-1, 1):
        m = c.axis_ellipse(
            0.5 + s * rng.uniform(0.18, 0.22), 0.48, rng.uniform(0.11, 0.15), rng.uniform(0.26, 0.33), 0.04
        )
        c.paint(m * np.clip((0.76 + 0.03 * s - c.y) * 20, 0, 1), lung_level, 0.03, 0.04, "lungs")
        lungs = np.maximum(lungs, m)
    for k in range(9):
        y0 = 0.14 + 0.075 * k
        rib = np.abs(c.y - y0 - 0.35 * np.abs(np.abs(c.x - 0.5) - 0.18) + 0.04) < 0.012
        c.rgb += 0.07 * ndimage.gaussian_filter((rib & (np.abs(c.x - 0.5) < 0.4)).astype(np.float32), 1.2)[..., None]
    c.paint(c.axis_ellipse(0.5, 0.5, 0.06, 0.5, 0.04) * 0.8, rng.uniform(0.75, 0.9))
    c.paint(c.blob(0.55, 0.62, 0.13, 0.14, 0.1, 0.04), rng.uniform(0.75, 0.9), 0.02, 0.1, "heart")
    present.append("heart")
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 4)):
            x = 0.5 + rng.choice([-1, 1]) * rng.uniform(0.13, 0.26)
            m = c.blob(x, rng.uniform(0.3, 0.68), rng.uniform(0.04, 0.12), rng.uniform(0.04, 0.14), 0.35, 0.06) * lungs
            c.paint(m * rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.8), 0.08, 0.04, "lung opacity")
        present, absent = [*present, "lung opacity"], []
    if rng.random() < 0.2:
        c.rgb += 0.3 * c.stroke(0.004, 0.9)[..., None]
    return Phantom(c.finish(rng.uniform(0.01, 0.03), 0.1, 1.0), _caption(rng, "chest x-ray", present, absent), c.masks)


def _pet(rng, size):
    c = Canvas(rng, size, 0.0)
    c.paint(
        c.axis_ellipse(0.5, 0.5, rng.uniform(0.3, 0.45), rng.uniform(0.25, 0.4), 0.05),
        rng.uniform(0.08, 0.25),
        0.04,
        0.06,
        "body",
    )
    for _ in range(rng.integers(0, 4)):
        c.paint(c.blob(*rng.uniform(0.3, 0.7, 2), 0.06, 0.05, 0.2, 0.04), rng.uniform(0.2, 0.45), 0.03, 0.05, "organ")
    present, absent = ["body"], ["tumour"]
    if rng.random() < 0.6:
        r = rng.uniform(0.025, 0.1)
        c.paint(c.blob(*rng.uniform(0.3, 0.7, 2), r, r * 0.8, 0.2, 0.04), rng.uniform(0.6, 1), 0.05, 0.04, "tumour")
        present, absent = ["body", "tumour"], []
    if rng.random() < 0.3:
        c.rgb = 1 - c.rgb
    return Phantom(c.finish(0.02, 0, rng.uniform(1, 2)), _caption(rng, "pet scan", present, absent), c.masks)


def _endoscopy(rng, size):
    mucosa = np.array([rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.5), rng.uniform(0.2, 0.42)])
    c = Canvas(rng, size, tuple(mucosa))
    c.rgb *= (1 + 0.15 * c.noise(0.3))[..., None]
    if rng.random() < 0.6:
        c.paint(c.blob(*rng.uniform(0.2, 0.8, 2), 0.2, 0.16, 0.2, 0.2), tuple(mucosa * 0.25))
    for _ in range(rng.integers(0, 6)):
        c.rgb *= 1 - 0.3 * c.stroke(0.006, 0.8, bend=1)[..., None]
    present, absent = ["mucosa"], ["polyp"]
    if rng.random() < 0.65:
        x, y, r = *rng.uniform(0.25, 0.75, 2), rng.uniform(0.07, 0.25)
        m = c.blob(x, y, r, r * rng.uniform(0.7, 1), 0.15, 0.015)
        shade = 1 + 0.5 * np.clip(1 - np.hypot(c.x - x + r / 3, c.y - y + r / 3) / (1.3 * r), -0.5, 1)
        colour = mucosa * rng.uniform(0.8, 1.15, 3)
        c.rgb += m[..., None] * (colour * shade[..., None] * (1 + 0.05 * c.noise(0.04)[..., None]) - c.rgb)
        c.masks["polyp"] = m >= 0.5
        present, absent = ["mucosa", "polyp"], []
    for _ in range(rng.integers(0, 12)):
        c.paint(c.blob(*rng.uniform(0.1, 0.9, 2), 0.01, 0.006, 0.3), (1, 1, 0.97))
    return Phantom(c.finish(0.012, 0.15, 0.6), _caption(rng, "endoscopy", present, absent), c.masks)


def _fundus(rng, size):
    c = Canvas(rng, size, 0.01)
    field = c.axis_ellipse(0.5, 0.5, rng.uniform(0.44, 0.6), rng.uniform(0.44, 0.6), 0.01)
    base = np.array([rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.45), rng.uniform(0.05, 0.2)])
    c.paint(field, tuple(base), 0.03, 0.06, "retina")
    side = rng.choice([-1, 1])
    ox, oy = 0.5 + side * rng.uniform(0.1, 0.28), 0.5 + rng.normal(0, 0.03)
    c.paint(c.axis_ellipse(0.5 - side * 0.1, 0.5, 0.09, 0.09, 0.1) * 0.5, tuple(base * 0.55))
    c.paint(c.axis_ellipse(ox, oy, 0.065, 0.07, 0.02), (0.98, 0.85, 0.5), 0.02, 0.03, "optic disc")
    vessels = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(6, 14)):
        vessels = np.maximum(
            vessels, c.stroke(rng.uniform(0.003, 0.009), 0.6, (ox, oy), rng.uniform(0, 2 * np.pi), 0.6)
        )
    c.rgb *= 1 - 0.5 * (vessels * field)[..., None]
    c.masks["vessels"] = vessels * field > 0.5
    return Phantom(
        c.finish(0.012, 0.15, 0.5), _caption(rng, "retinal fundus", ["optic disc", "vessels", "retina"]), c.masks
    )


def _dead_leaves(rng, size):
    c = Canvas(rng, size, tuple(rng.uniform(0, 1, 3)))
    c.rgb += rng.uniform(0, 0.12) * c.noise(rng.uniform(0.02, 0.3))[..., None]
    grey = rng.random() < 0.4
    for _ in range(rng.integers(1, 25)):
        r = np.exp(rng.uniform(np.log(0.03), np.log(0.35)))
        m = c.blob(*rng.uniform(0, 1, 2), r, r * rng.uniform(0.4, 1), rng.uniform(0, 0.4), rng.uniform(0.004, 0.03))
        c.paint(m, tuple(rng.uniform(0, 1, 3)), rng.uniform(0, 0.15), rng.uniform(0.01, 0.2))
    if grey:
        c.rgb = np.repeat(c.rgb.mean(-1, keepdims=True), 3, -1)
    return Phantom(c.finish(rng.uniform(0, 0.05), rng.uniform(0, 0.2), rng.uniform(0, 1)), "shapes", c.masks)


SCENES: dict[str, Callable[[np.random.Generator, int], Phantom]] = {
    "ct_abdomen": _ct_abdomen,
    "mr_brain": _mr_brain,
    "ultrasound": _ultrasound,
    "dermoscopy": _dermoscopy,
    "blood_smear": _blood_smear,
    "fluorescence": _fluorescence,
    "histology": _histology,
    "chest_xray": _chest_xray,
    "pet": _pet,
    "endoscopy": _endoscopy,
    "fundus": _fundus,
    "dead_leaves": _dead_leaves,
}


def _fractal(c: Canvas, coarse: float, power: float = 1.0) -> np.ndarray:
    """Noise of all sizes from ``coarse``, a share of the image, down to two pixels; zero mean, unit spread."""
    out, scale, weight = np.zeros((c.size, c.size), np.float32), coarse, 1.0
    while scale > 2 / c.size:
        out += weight * c.noise(scale)
        scale, weight = scale / 2, weight / 2**power
    return out / (out.std() + 1e-6)


def _dermoscopy_fine(rng, size):
    """Skin with fine relief, and a ragged lesion with a pigment network, globules or regression."""
    white, pink = np.array([0.93, 0.9, 0.9]), np.array([0.95, 0.7, 0.68])
    tan = np.array([0.85, 0.62, 0.42])
    shares = rng.dirichlet([1, 1, 1])
    skin = np.clip((shares[0] * white + shares[1] * pink + shares[2] * tan) * rng.uniform(0.65, 1.05), 0, 1)
    c = Canvas(rng, size, tuple(skin))
    c.rgb += rng.uniform(0.005, 0.03) * _fractal(c, 0.1, 0.4)[..., None]
    c.rgb += rng.uniform(0, 0.04) * c.noise(0.4)[..., None] * np.array([0.3, 1, 1], np.float32)
    present, absent = ["skin"], ["skin lesion", "lesion"]
    if rng.random() < 0.9:
        r = float(np.exp(rng.uniform(np.log(0.06), np.log(0.55))))
        x, y = 0.5 + rng.normal(0, 0.07, 2)
        u, v, turn = c.x - x, c.y - y, rng.uniform(0, np.pi)
        along, across = u * np.cos(turn) + v * np.sin(turn), -u * np.sin(turn) + v * np.cos(turn)
        depth = (
            1 - np.hypot(along, across / rng.uniform(0.6, 1)) / r + rng.uniform(0.1, 0.5) * _fractal(c, r, 0.8) * 0.5
        )
        m = np.clip(depth / rng.uniform(0.05, 0.5) + 0.5, 0, 1)
        brown = np.array([rng.uniform(0.35, 0.8), rng.uniform(0.18, 0.55), rng.uniform(0.1, 0.45)]) * rng.uniform(
            0.5, 1
        )
        dark = brown * rng.uniform(0.2, 0.7)
        cover = m * rng.uniform(0.5, 1)
        shade = np.clip(0.5 + 0.5 * rng.uniform(0.3, 1.2) * _fractal(c, r / 2, rng.uniform(0.3, 1)), 0, 1)
        if rng.random() < 0.6:
            # A network: dark lines where two fine waves of noise vanish.
            mesh = np.minimum(np.abs(c.noise(rng.uniform(0.02, 0.05))), np.abs(c.noise(rng.uniform(0.02, 0.05))))
            shade = np.clip(0.5 * shade + np.clip(1 - mesh * rng.uniform(2, 5), 0, 1), 0, 1)
        layer = brown + shade[..., None] * (dark - brown)
        if rng.random() < 0.3:
            blue = np.clip(c.noise(r / 1.5) - 0.5, 0, 1)[..., None]
            layer = layer + blue * (np.array([0.35, 0.4, 0.55]) - layer)
        c.rgb += cover[..., None] * (layer - c.rgb)
        c.masks["skin lesion"] = m >= 0.5
        present.append("skin lesion")
        absent = []
    if rng.random() < 0.35:
        for _ in range(rng.integers(2, 14)):
            c.rgb *= 1 - rng.uniform(0.4, 0.8) * c.stroke(rng.uniform(0.002, 0.006), 0.8)[..., None]
        present.append("hair")
    if rng.random() < 0.15:
        colour = np.array(rng.permutation([0.1, 0.7, 0.9]))
        disc = c.axis_ellipse(rng.choice([-0.05, 1.05]), rng.uniform(0, 1), 0.2, 0.3)
        c.rgb += disc[..., None] * (colour - c.rgb)
        for mask in c.masks.values():
            mask &= disc < 0.5
    if rng.random() < 0.3:
        rx = rng.uniform(0.42, 0.68)
        c.rgb *= c.axis_ellipse(0.5, 0.5, rx, rx, rng.uniform(0.01, 0.2))[..., None]
    return Phantom(
        c.finish(0.01, rng.uniform(0, 0.1), rng.uniform(0, 0.7)), _caption(rng, "dermoscopy", present, absent), c.masks
    )


def _retinal_oct(rng, size):
    """Layers of the retina in a cross-section, and in some of them fluid."""
    c = Canvas(rng, size, rng.uniform(0.02, 0.15))
    bend = 0.05 * c.noise(0.5)[:1].repeat(size, 0) + rng.uniform(-0.15, 0.15) * (c.x - 0.5) ** 2
    top, thick = rng.uniform(0.25, 0.5), rng.uniform(0.18, 0.35)
    pit = rng.uniform(0, 0.7) * np.exp(-(((c.x - rng.uniform(0.3, 0.7)) / rng.uniform(0.06, 0.15)) ** 2))
    at = (c.y - top - bend - pit * thick * 0.6) / (thick * (1 - 0.5 * pit))
    inside = (at >= 0) & (at <= 1)
    edges = np.sort(rng.uniform(0, 1, rng.integers(4, 8)))
    values = rng.uniform(0.15, 0.75, len(edges) + 1)
    values[[0, -1]] = rng.uniform(0.6, 0.95, 2)
    c.rgb[inside] = values[np.digitize(at[inside], edges)][:, None]
    below = at > 1
    c.rgb[below] *= 0
    c.rgb[below] += (rng.uniform(0.2, 0.45) * np.exp(-(at[below] - 1) * rng.uniform(1, 3)))[:, None]
    c.masks["retina"] = inside
    present, absent = ["retina"], ["retinal fluid"]
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 5)):
            m = c.blob(
                rng.uniform(0.2, 0.8),
                top + thick * rng.uniform(0.3, 0.9),
                rng.uniform(0.03, 0.12),
                rng.uniform(0.02, 0.06),
            )
            c.paint(m * inside, rng.uniform(0.02, 0.12), name="retinal fluid")
        present, absent = [*present, "retinal fluid"], []
    c.rgb *= np.exp(rng.uniform(0.15, 0.4) * rng.standard_normal((size, size)))[..., None]
    return Phantom(c.finish(0.02, 0.1, rng.uniform(0.3, 0.8)), _caption(rng, "retinal oct", present, absent), c.masks)


def _dental_xray(rng, size):
    """Rows of teeth with roots, pulp and fillings."""
    c = Canvas(rng, size, rng.uniform(0.15, 0.4))
    c.rgb += 0.05 * _fractal(c, 0.2)[..., None]
    count, single = int(rng.integers(3, 9)), rng.random() < 0.5
    for row in (0, 1):
        if row == 1 and single:
            continue
        for k in range(count):
            x, w = (k + 0.5 + rng.normal(0, 0.08)) / count, 0.42 / count * rng.uniform(0.85, 1.1)
            crown = 0.55 - 0.27 * (1 - row) if not single else rng.normal(0.42, 0.02)
            sign = -1 if row == 0 and not single else 1
            tooth = c.axis_ellipse(x, crown, w, rng.uniform(0.08, 0.13))
            for root in (-0.4, 0.4) if rng.random() < 0.5 else (0.0,):
                tooth = np.maximum(tooth, c.axis_ellipse(x + root * w, crown + sign * 0.17, w * 0.45, 0.17))
            c.paint(tooth, rng.uniform(0.6, 0.8), 0.04, 0.03, "teeth")
            pulp = c.axis_ellipse(x, crown + sign * 0.1, w * 0.15, 0.14)
            c.rgb *= 1 - 0.35 * pulp[..., None]
            if rng.random() < 0.2:
                c.rgb += c.blob(x, crown - sign * 0.04, w * 0.6, 0.03)[..., None] * (0.98 - c.rgb)
    return Phantom(c.finish(0.015, 0.15, rng.uniform(0.5, 1.2)), _caption(rng, "dental x-ray", ["teeth"]), c.masks)


def _bone_xray(rng, size):
    """Long bones, or the rays of a hand, in soft tissue; some are broken."""
    c = Canvas(rng, size, rng.uniform(0.0, 0.08))
    hand = rng.random() < 0.4
    count = 5 if hand else int(rng.integers(1, 3))
    lines = []
    for k in range(count):
        x = 0.5 + (k - (count - 1) / 2) * (0.16 if hand else 0.2) + rng.normal(0, 0.01)
        lines.append(
            (
                x,
                (k - 2) * rng.uniform(0.05, 0.15) if hand else rng.normal(0, 0.1),
                0.03 if hand else rng.uniform(0.05, 0.09),
            )
        )
    for x, lean, w in lines:
        away = np.abs(c.x - x - lean * (0.5 - c.y))
        c.rgb = np.maximum(c.rgb, (np.clip((2.2 * w - away) / 0.03, 0, 1) * rng.uniform(0.2, 0.35))[..., None])
    broken = rng.random() < 0.3
    for x, lean, w in lines:
        ends = rng.uniform(0.25, 0.75) if hand or rng.random() < 0.5 else 2.0
        flare = 1 + 0.5 * np.exp(-(((c.y - ends) / 0.06) ** 2))
        away = np.abs(c.x - x - lean * (0.5 - c.y)) / (w * flare)
        bone = np.clip((1 - away) * 8, 0, 1) * (np.abs(c.y - ends) > 0.012)
        value = rng.uniform(0.45, 0.6) + 0.35 * np.clip(away, 0, 1) ** 2
        c.paint(bone, 0.0, name="bone")
        c.rgb += bone[..., None] * (value[..., None] + 0.04 * _fractal(c, 0.05)[..., None] - c.rgb)
        if broken:
            crack = np.abs(c.y - 0.5 - rng.normal(0, 0.1) - rng.uniform(-1, 1) * (c.x - x)) < rng.uniform(0.006, 0.015)
            c.rgb[crack & (bone > 0.5)] *= 0.5
    return Phantom(c.finish(0.015, 0.1, rng.uniform(0.4, 1)), _caption(rng, "bone x-ray", ["bone"]), c.masks)


def _wound(rng, size):
    """A photograph of skin with an open wound: red granulation, yellow slough, dark necrosis, an inflamed rim."""
    skin = np.array([0.85, 0.62, 0.5]) * rng.uniform(0.45, 1.1)
    c = Canvas(rng, size, tuple(np.clip(skin, 0, 1)))
    c.rgb *= 1 + rng.uniform(0.03, 0.12) * _fractal(c, 0.5)[..., None]
    if rng.random() < 0.5:
        # A limb before a cloth.
        limb = np.clip((rng.uniform(0.25, 0.45) - np.abs(c.x - 0.5 - 0.1 * c.noise(0.6))) / 0.02, 0, 1)[..., None]
        cloth = np.array(rng.choice([[0.2, 0.35, 0.6], [0.85, 0.85, 0.85], [0.15, 0.4, 0.35]])) * rng.uniform(0.6, 1.1)
        c.rgb = limb * c.rgb + (1 - limb) * cloth
    r, x, y = rng.uniform(0.08, 0.32), 0.5 + rng.normal(0, 0.06), 0.5 + rng.normal(0, 0.06)
    shape = r * rng.uniform(0.5, 1)
    rim = c.blob(x, y, r * 1.25, shape * 1.25, 0.2, 0.1)[..., None]
    c.rgb += 0.5 * rim * (np.array([0.8, 0.35, 0.3]) * rng.uniform(0.7, 1.1) - c.rgb)
    m = c.blob(x, y, r, shape, 0.25, rng.uniform(0.005, 0.03))
    red, yellow, black = np.array([0.6, 0.1, 0.1]), np.array([0.8, 0.7, 0.4]), np.array([0.12, 0.08, 0.07])
    slough = np.clip(_fractal(c, r) - rng.uniform(-0.5, 1.5), 0, 1)[..., None]
    necrosis = np.clip(_fractal(c, r) - rng.uniform(0.3, 2.5), 0, 1)[..., None]
    layer = red * (1 + 0.25 * _fractal(c, 0.1)[..., None])
    layer = layer + slough * (yellow - layer)
    layer = layer + necrosis * (black - layer)
    c.rgb += m[..., None] * (layer - c.rgb)
    c.masks["wound"] = m >= 0.5
    if rng.random() < 0.5:
        c.rgb += np.clip(_fractal(c, 0.05) - 2, 0, 1)[..., None] * m[..., None]
    return Phantom(
        c.finish(0.012, rng.uniform(0, 0.1), 0.5), _caption(rng, "wound photograph", ["wound", "skin"]), c.masks
    )


FURTHER: dict[str, Callable[[np.random.Generator, int], Phantom]] = {
    "dermoscopy_fine": _dermoscopy_fine,
    "retinal_oct": _retinal_oct,
    "dental_xray": _dental_xray,
    "bone_xray": _bone_xray,
    "wound": _wound,
}
"""Kinds that the word head was trained with and the backbone was not; drawn only when asked for by name."""


def make_phantom(seed: int, size: int = 192, kind: str | None = None) -> Phantom:
    """Draw one phantom.

    Args:
        seed: any non-negative integer; the same seed, size and kind give the same image bit for bit.
        size: side of the square image in pixels.
        kind: a key of ``SCENES`` or ``FURTHER``; by default the seed walks through all of the former in turn.

    Raises:
        ValueError: the kind is unknown.
    """
    kind = kind if kind is not None else list(SCENES)[seed % len(SCENES)]
    scenes = SCENES | FURTHER
    if kind not in scenes:
        msg = f"unknown phantom kind {kind!r}; choose one of {', '.join(scenes)}"
        raise ValueError(msg)
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    return scenes[kind](rng, size)


def main() -> None:
    from phantoms3d import HELD_OUT, KINDS, write_volumes
    from phantoms3d import SCENES as VOLUME_SCENES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=36, help="how many phantoms to draw (default 36)")
    parser.add_argument("--size", type=int, default=192, help="side in pixels (default 192)")
    parser.add_argument("--out", default="out/phantoms.png", help="PNG sheet, or folder of volumes, to write")
    parser.add_argument("--volumes", type=int, help="write this many CT, MR and PET phantoms as NIfTI instead")
    parser.add_argument("--first-seed", type=int, default=0, help="of the volumes (default 0)")
    parser.add_argument("--held-out", action="store_true", help="volumes with the lesion kinds kept out of training")
    parser.add_argument("--lesions", choices=["half", "all", "none"], default="half", help="which volumes have one")
    parser.add_argument("--scene", choices=list(VOLUME_SCENES), help="what all volumes show (default: drawn)")
    args = parser.parse_args()
    from pathlib import Path

    if args.volumes is not None:
        lesion = {"half": None, "all": True, "none": False}[args.lesions]
        kinds = HELD_OUT if args.held_out else KINDS
        for case in write_volumes(
            Path(args.out), args.volumes, args.first_seed, kinds=kinds, lesion=lesion, scene=args.scene
        ):
            print(f"{case.seed:8d}  {case.caption}")
        return
    from PIL import Image

    columns = 12
    rows = -(-args.count // columns)
    sheet = Image.new("RGB", (columns * args.size, rows * args.size))
    for i in range(args.count):
        phantom = make_phantom(i, args.size)
        print(f"{i:4d}  {phantom.caption}")
        sheet.paste(Image.fromarray(phantom.image), (i % columns * args.size, i // columns * args.size))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out)


if __name__ == "__main__":
    main()
