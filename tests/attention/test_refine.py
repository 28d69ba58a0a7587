"""Upsampling that follows the image's edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from zeroseg.attention.refine import GuidedFilter, Upsampler


def dice(a, b) -> float:
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def slow_mean(values: np.ndarray, radius: int) -> np.ndarray:
    """Window means, cut off at the border, written out."""
    height, width = values.shape
    rows = [slice(max(0, y - radius), y + radius + 1) for y in range(height)]
    columns = [slice(max(0, x - radius), x + radius + 1) for x in range(width)]
    return np.array([[values[r, c].mean() for c in columns] for r in rows])


def slow_guided_filter(guide: np.ndarray, p: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """Eq. 19-21 of He, Sun and Tang, pixel by pixel in float64."""
    mean = lambda v: slow_mean(v, radius)  # noqa: E731
    mu, mean_p = np.stack([mean(c) for c in guide]), mean(p)
    slope, offset = np.zeros_like(guide), np.zeros_like(p)
    covariance = np.array([[mean(a * b) - mean(a) * mean(b) for b in guide] for a in guide])
    cross = np.stack([mean(c * p) for c in guide]) - mu * mean_p
    for y, x in np.ndindex(p.shape):
        slope[:, y, x] = np.linalg.solve(covariance[:, :, y, x] + eps * np.eye(3), cross[:, y, x])
        offset[y, x] = mean_p[y, x] - slope[:, y, x] @ mu[:, y, x]
    return (np.stack([mean(c) for c in slope]) * guide).sum(0) + mean(offset)


def test_equals_the_published_equations():
    rng = np.random.default_rng(0)
    guide, maps = rng.random((3, 13, 17)), rng.random((2, 13, 17))
    result = GuidedFilter(torch.from_numpy(guide), radius=3, eps=1e-2)(torch.from_numpy(maps))
    assert result.shape == (2, 13, 17) and result.dtype == torch.float32
    for k in range(2):
        np.testing.assert_allclose(result[k], slow_guided_filter(guide, maps[k], 3, 1e-2), atol=1e-4)


def test_a_constant_map_is_unchanged(disc):
    image = torch.from_numpy(disc[0])
    maps = torch.tensor([0.0, 0.3, -7.0]).view(3, 1, 1).expand(3, 96, 96)
    torch.testing.assert_close(GuidedFilter(image, 8)(maps), maps.contiguous(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Upsampler(image, 12)(maps[:, :12, :12]), maps.contiguous(), atol=1e-4, rtol=1e-4)


def test_edges_follow_the_image(disc):
    image, mask = disc
    shifted = ndimage.shift(mask.astype(np.float32), (3, -3), order=1)  # soft and off by three pixels
    coarse = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(shifted)[None], 16)
    plain, guided = (Upsampler(torch.from_numpy(image), 16, refine)(coarse)[0] for refine in ("none", "guided"))
    assert plain.shape == guided.shape == (96, 96)
    assert dice(guided > 0.5, mask) > dice(plain > 0.5, mask) + 0.03
    edge = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)
    steps_guided, steps_plain = (np.abs(np.gradient(m.numpy())[0])[edge].mean() for m in (guided, plain))
    assert steps_guided > 1.5 * steps_plain


def test_a_flat_image_only_smooths():
    maps = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    result = GuidedFilter(torch.full((3, 32, 32), 0.4), 3)(maps)
    assert result.min() >= maps.min() and result.max() <= maps.max()
    assert result.std() < 0.3 * maps.std()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 7), (2, 2)])
def test_small_and_narrow_images(size):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    result = Upsampler(image, 8)(maps)
    assert result.shape == (2, *size)
    assert torch.isfinite(result).all()


def test_a_radius_beyond_the_image_is_cut_to_it(disc):
    image = torch.from_numpy(disc[0])[:, :20, :30]
    maps = torch.rand(1, 20, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(GuidedFilter(image, 1000)(maps), GuidedFilter(image, 10)(maps))


def test_errors():
    image, maps = torch.rand(3, 8, 8), torch.rand(1, 8, 8)
    with pytest.raises(ValueError, match="of the guide's size"):
        GuidedFilter(image, 1)(maps[:, :4])
    with pytest.raises(ValueError, match=r"guide must be \(3, H, W\)"):
        GuidedFilter(image[:1], 1)
    with pytest.raises(ValueError, match=r"radius .*at least 1 pixel, not 0"):
        GuidedFilter(image, 0)
    with pytest.raises(ValueError, match="unknown refine 'sharp'"):
        Upsampler(image, 8, "sharp")
