"""Lesions grown into real volumes: real anatomy, and a truth that is exact because it was put there."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

RADIUS_MM = (3.0, 40.0)
"""Of lesions, drawn evenly on a logarithmic scale."""
LEAST_CONTRAST = 0.09
"""Of a lesion against its surroundings, as a share of the model's range of values."""
TRIES = 12


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """(X, Y, Z) noise of unit spread that varies over ``sigma`` voxels."""
    coarse = [max(2, int(np.ceil(n / max(sigma, 1))) + 2) for n in shape]
    drawn = rng.standard_normal(coarse).astype(np.float32)
    grown = ndimage.zoom(
        drawn, [n / c for n, c in zip(shape, coarse, strict=True)], order=1, mode="nearest", grid_mode=True
    )
    return grown / max(float(grown.std()), 1e-6)


def grow_lesion(
    volume: np.ndarray, spacing_mm: tuple[float, ...], rng: np.random.Generator, modality: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Grow one lesion at a random place of a body.

    Its shape is an ellipsoid, or several that overlap, with an uneven border; its values are those of another tissue of the same
    volume or its surroundings' with a step up or down, even, mottled, with a dead core, a rim or a halo, and it keeps some
    of the texture beneath it. PET lesions are hot.

    Args:
        volume: (X, Y, Z) float32 in [0, 1], the working grid.
        spacing_mm: of it.
        rng: of everything.
        modality: ct, mr or pet.

    Returns:
        The volume with the lesion and its (X, Y, Z) bool mask; None where no place was found for one that shows.
    """
    body = ndimage.gaussian_filter(volume, 1.0) > 0.04
    body |= _enclosed(body)
    places = np.argwhere(body)
    if len(places) < 50:
        return None
    for _ in range(TRIES):
        mask, depth = _shape(volume.shape, spacing_mm, places[rng.integers(len(places))], rng)
        mask &= body
        count = int(mask.sum())
        if count < 8 or count > 0.35 * body.sum():
            continue
        rim = ndimage.binary_dilation(mask, iterations=3) & ~mask & body
        if rim.sum() < 8:
            continue
        around = float(np.median(volume[rim]))
        value = _value(volume, body, around, rng, modality)
        if value is None:
            continue
        return _filled(volume, mask, depth, value, around, rng, modality), mask
    return None


def _enclosed(body: np.ndarray) -> np.ndarray:
    """What lies within a body's outline in every slice along the last axis, such as lungs."""
    filled = np.zeros_like(body)
    for k in range(body.shape[2]):
        filled[:, :, k] = ndimage.binary_fill_holes(body[:, :, k])
    return filled


def _shape(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], centre: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) bool mask, and the depth below its surface as a share of the radius."""
    extent = max(n * s for n, s in zip(shape, spacing_mm, strict=True))
    largest = min(RADIUS_MM[1], 0.3 * extent)
    radius = float(np.exp(rng.uniform(np.log(RADIUS_MM[0]), np.log(max(largest, RADIUS_MM[0] * 1.2)))))
    radius = max(radius, 1.3 * min(spacing_mm))
    grid = np.meshgrid(
        *[(np.arange(n) - c) * s for n, c, s in zip(shape, centre, spacing_mm, strict=True)], indexing="ij", sparse=True
    )
    parts = 1 if rng.random() < 0.6 else int(rng.integers(2, 6))
    depth = np.full(shape, -9.0, np.float32)
    for part in range(parts):
        offset = np.zeros(3) if part == 0 else rng.standard_normal(3) * 0.5 * radius
        axes = radius * (1 if parts == 1 else rng.uniform(0.4, 0.8)) * rng.uniform(0.7, 1.35, 3)
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        moved = [g - o for g, o in zip(grid, offset, strict=True)]
        turned = [sum(turn[i, j] * moved[j] for j in range(3)) / axes[i] for i in range(3)]
        depth = np.maximum(depth, 1 - np.sqrt(sum(t**2 for t in turned)))
    wobble = rng.uniform(0.02, 0.3)
    depth = depth + wobble * smooth_noise(rng, shape, max(1.5, 0.5 * radius / float(np.mean(spacing_mm))))
    return depth > 0, depth


def _value(
    volume: np.ndarray, body: np.ndarray, around: float, rng: np.random.Generator, modality: str
) -> float | None:
    """What fills a lesion; None where it would not show."""
    if modality == "pet":
        value = min(1.0, max(around * rng.uniform(1.25, 3), around + rng.uniform(0.1, 0.5)))
    elif rng.random() < 0.5:
        value = float(volume[body][rng.integers(int(body.sum()))])
    else:
        value = around + rng.choice([-1, 1]) * rng.uniform(LEAST_CONTRAST, 0.45)
    value = float(np.clip(value, 0.01, max(1.0, float(volume.max()))))
    return value if abs(value - around) >= LEAST_CONTRAST else None


def _filled(
    volume: np.ndarray,
    mask: np.ndarray,
    depth: np.ndarray,
    value: float,
    around: float,
    rng: np.random.Generator,
    modality: str,
) -> np.ndarray:
    step = value - around
    filling = np.full(volume.shape, value, np.float32)
    kind = rng.random()
    if kind < 0.25:  # mottled
        filling += np.float32(rng.uniform(0.1, 0.35) * step) * smooth_noise(rng, volume.shape, rng.uniform(1, 4))
    elif kind < 0.5:  # dead core, or a rim
        inner = depth + 0.1 * smooth_noise(rng, volume.shape, 3) > rng.uniform(0.25, 0.6)
        core = around - step * rng.uniform(0, 0.8) if rng.random() < 0.5 else around + step * rng.uniform(0.2, 0.6)
        filling[inner] = max(core, 0.0) if modality != "pet" else around + 0.3 * step
    texture = volume - ndimage.gaussian_filter(volume, 2.0)
    filling += np.float32(rng.uniform(0.3, 1.0)) * texture
    share = ndimage.gaussian_filter(mask.astype(np.float32), rng.uniform(0.3, 1.0))
    mixed = volume + share * (filling - volume)
    if rng.random() < 0.25:  # a halo: what swells around it, weaker and not part of it
        halo = np.clip(depth + rng.uniform(0.2, 0.6), 0, 0.6) / 0.6 * (depth <= 0)
        mixed += np.float32(step * rng.uniform(0.15, 0.35)) * halo
    return np.clip(mixed, 0, None if modality == "mr" else 1).astype(np.float32)
