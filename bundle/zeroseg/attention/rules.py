"""Which pixels are the object: rules over one image's aggregated attention, none of which knows a ground truth.

Every rule makes a relevance map on the token grid from distances between attention maps (symmetric KL: how differently two
tokens look at the image), straight or along the shortest path. ``cut`` then turns relevance at pixel resolution into a mask.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from zeroseg.attention.geodesic import TokenPaths
from zeroseg.attention.merge import KLDistance

MIN_AREA, MAX_AREA = 0.0005, 0.95
"""Share of the image an object may cover; beyond it a cut is no candidate."""
FRAME_TOKENS = 64
"""About so many tokens of the frame are compared with; more do not move a quantile."""
JUDGED_SIZE = 256
"""Pixels a side at which thresholds are compared."""
EDGE_SCALE = 3 / 256
"""Gaussian scale at which steepness is measured, as a share of the image's longer side."""
MIDWAY_STEPS = 50
"""Most steps from the best bin of the histogram to the threshold midway between the classes' means."""
REACH = 2.0
"""Geodesic distance at which a click's relevance has fallen to 1/e, in mean distances of the image."""


def token_at(x: float, y: float, size: tuple[int, int], side: int) -> int:
    """Index of the token under pixel (x, y) = (column, row) of an (H, W) image."""
    height, width = size
    column = min(side - 1, int((x + 0.5) * side / width))
    row = min(side - 1, int((y + 0.5) * side / height))
    return row * side + column


def click_relevance(paths: TokenPaths, tokens: list[int]) -> Tensor:
    """How easily every token is reached from the clicked ones: exp(-d / (REACH x mean d)), the best over the clicks.

    d is the geodesic distance over the attention: a click means the thing under it, not everything of its kind. How far
    tokens lie apart depends on the model and the image by orders of magnitude; the mean takes that out. A longer reach
    favours the larger of several nested objects, because ``cut`` looks for the steepest fall.

    Args:
        paths: through the image's attention.
        tokens: indices of the clicked tokens.

    Returns:
        (N,) in [0, 1]; 1 at a clicked token.
    """
    away = paths(tokens)
    return torch.exp(-away / (REACH * away.mean(1, keepdim=True)).clamp_min(1e-12)).amax(0)


def frame_relevance(distance: KLDistance, frame: Tensor, paths: TokenPaths | None = None) -> Tensor:
    """How unlike the frame every token's attention is, and with ``paths`` also how well it is fenced off from it.

    The boundary priors of salient-object detection (Wei et al. 2012), of both their kinds:

    - the 25 % quantile of a token's distances to the frame's tokens, the distance being the root of the divergence, which
      grows with the square of a small difference. A token that resembles a quarter of the frame is background, however
      unlike the other three quarters may be; and an object may touch up to that share of the frame and still stand out;
    - times the 10 % quantile of its geodesic distances to them: what is reached from a tenth of the frame
      without crossing an edge is background too, however its look may drift on the way.

    Args:
        distance: to the (N, N) aggregated attention of the image.
        frame: (N,) bool, the tokens taken for background.
        paths: through the attention; None leaves the second prior out (a tight box hardly fences anything off).

    Returns:
        (N,) in [0, 1], scaled so that the lowest is 0 and the highest 1.
    """
    tokens = frame.nonzero().flatten()
    tokens = tokens[:: max(1, len(tokens) // FRAME_TOKENS)]
    unlike = _unit(_quantile(distance(distance.maps[tokens]).sqrt(), 0.25))
    if paths is None:
        return unlike
    return _unit(unlike * _unit(_quantile(paths(tokens.tolist()), 0.1)).to(unlike.device))


def _quantile(values: Tensor, share: float) -> Tensor:
    """(N,) quantiles of the columns of (A, N)."""
    # Transposed, for sorting what lies apart in memory takes twice as long.
    return values.T.contiguous().quantile(share, dim=1)


def _unit(values: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]; all 0 where they are constant."""
    values = values - values.min()
    return values / values.max().clamp_min(1e-12)


def border_tokens(side: int, width: int = 1) -> Tensor:
    """(side * side,) bool: the outermost ``width`` rings of the grid."""
    frame = torch.ones(side, side, dtype=torch.bool)
    frame[width : side - width, width : side - width] = False
    return frame.flatten()


def cut(
    relevance: np.ndarray,
    seeds: list[tuple[int, int]],
    allowed: np.ndarray | None = None,
    levels: int = 32,
) -> tuple[np.ndarray, float]:
    """Threshold a relevance map where its contour fits best, and keep what is connected to the seeds.

    An object's edge is where relevance falls fastest, and an object rarely fills the image's frame. So of many thresholds
    the one is taken that maximises: mean steepness of the relevance along the contour x share of the frame left free. Large
    images are judged at 256 pixels a side and cut at full size.

    Args:
        relevance: (H, W) float.
        seeds: (row, column) pixels that must be inside; at least one.
        allowed: (H, W) bool, pixels the mask may use.
        levels: thresholds tried of each kind: evenly spaced values, and quantiles of the relevance.

    Returns:
        (H, W) bool mask, never empty, and the threshold taken.
    """
    step = -(-max(relevance.shape) // JUDGED_SIZE)
    small = relevance[::step, ::step]
    mask = np.ones(small.shape, bool) if allowed is None else allowed[::step, ::step]
    at = [(r // step, c // step) for r, c in seeds]
    steepness = ndimage.gaussian_gradient_magnitude(small, EDGE_SCALE * max(small.shape))
    sides = np.zeros(small.shape, np.uint8)  # how many of the image's four sides a pixel lies on
    for side in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        sides[side] += 1
    frame = int(sides.sum())
    least, most = MIN_AREA * small.size, MAX_AREA * small.size
    low, high = float(np.quantile(small, 0.02)), float(min(small[s] for s in at))
    thresholds = np.concatenate(
        [np.linspace(low, high, levels + 2)[1:-1], np.quantile(small[small <= high], np.linspace(0.05, 0.995, levels))]
    )
    best_score, best_threshold, last = -1.0, None, 0
    for threshold in np.unique(thresholds):
        # They rise: each mask lies in the last one, so only that one's bounding box is searched.
        mask = keep_seeded(mask & (small >= threshold), at)
        size = np.count_nonzero(mask)
        if size < least:
            break
        window = _bounding_window(mask)
        mask, small, steepness, sides = mask[window], small[window], steepness[window], sides[window]
        at = [(r - window[0].start, c - window[1].start) for r, c in at]
        if size > most or size == last:
            continue
        last = size
        contour = mask & ~_eroded(mask)
        if not contour.any():
            continue
        score = float(steepness[contour].mean() * (1 - sides[mask].sum() / frame))
        if score > best_score:
            best_score, best_threshold = score, float(threshold)
    if best_threshold is None:  # nothing stands out: the clicked pixels alone are the honest answer
        mask = np.zeros(relevance.shape, bool)
        for seed in seeds:
            mask[seed] = True
        return mask, high
    mask = relevance >= best_threshold
    if allowed is not None:
        mask &= allowed
    for seed in seeds:  # at full size the guided filter may put a clicked pixel just below the threshold
        mask[seed] = True
    return keep_seeded(mask, seeds), best_threshold


def _bounding_window(mask: np.ndarray) -> tuple[slice, slice]:
    """A mask's bounding box, and one free pixel around it where there is room."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.s_[max(0, rows[0] - 1) : rows[-1] + 2, max(0, columns[0] - 1) : columns[-1] + 2]


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Binary erosion by a cross, the outside counting as inside; a few times faster than the general one."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def keep_seeded(mask: np.ndarray, seeds: list[tuple[int, int]]) -> np.ndarray:
    """The connected parts of a mask that hold at least one seed."""
    parts, _ = ndimage.label(mask)
    kept = np.zeros_like(mask)
    for part in {parts[s] for s in seeds} - {0}:
        kept |= parts == part
    return kept


def split(relevance: np.ndarray, allowed: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Threshold a relevance map between its two classes (Otsu 1979); every part of the image counts.

    Args:
        relevance: (H, W) float.
        allowed: (H, W) bool, pixels the mask may use.

    Returns:
        (H, W) bool mask, empty where the relevance is constant, and the threshold taken.
    """
    values = relevance if allowed is None else relevance[allowed]
    if values.size == 0 or values.min() == values.max():
        return np.zeros(relevance.shape, bool), float(relevance.max())
    threshold = float(threshold_otsu(values))
    # Otsu's best threshold lies midway between the means of its two classes. Of the histogram's bins two may be equally
    # good up to rounding; midway is one place, whichever of them it is looked for from.
    for _ in range(MIDWAY_STEPS):
        above = values > threshold
        if not above.any() or above.all():
            break
        midway = float(values[above].mean(dtype=np.float64) + values[~above].mean(dtype=np.float64)) / 2
        if midway == threshold:
            break
        threshold = midway
    mask = relevance > threshold
    return mask if allowed is None else mask & allowed, threshold
