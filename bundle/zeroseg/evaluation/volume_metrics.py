"""How well a mask of a volume fits: voxels (Dice, IoU), surface (NSD, HD95) and lesions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from scipy import ndimage

METRICS = ("dice", "iou", "hd95", "nsd", "lesion_recall", "lesion_precision", "lesion_f1")
DETECTED = 0.1
"""Share of a lesion a mask has to cover for it to count as found (ZeroSeg's choice: of the conventions in use, a loose
one, because Dice and NSD judge the outline already)."""


def tolerance_of(spacing: tuple[float, ...], voxels: float = 2.0) -> float:
    """Tolerance of the NSD in mm: ``voxels`` times the side of a cube of the voxel's volume."""
    return voxels * float(np.prod(spacing)) ** (1 / len(spacing))


def score_volume(
    prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> dict[str, float]:
    """All metrics of one case; a volume of one slice is scored in that plane.

    Args:
        prediction: (X, Y, Z) bool. An empty one scores 0, its HD95 is the volume's diagonal.
        truth: (X, Y, Z) bool, not empty.
        spacing: voxel size in mm.
        tolerance: mm within which surfaces count as equal in the normalised surface distance (NSD).

    Returns:
        ``METRICS`` by name; HD95, the 95th percentile of the Hausdorff distance, in mm, all others in 0..1.
    """
    wide = [axis for axis, side in enumerate(truth.shape) if side > 1]
    shape, sides = [truth.shape[axis] for axis in wide], [float(spacing[axis]) for axis in wide]
    prediction, truth = prediction.reshape(shape), truth.reshape(shape)
    found = lesions(prediction, truth)
    if not prediction.any():
        diagonal = float(np.linalg.norm(np.multiply(shape, sides)))
        return {"dice": 0.0, "iou": 0.0, "hd95": diagonal, "nsd": 0.0, **found}
    p, t = (torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (prediction, truth))
    with _quiet():
        hd95 = compute_hausdorff_distance(p, t, percentile=95, include_background=True, spacing=sides).item()
        nsd = compute_surface_dice(p, t, [tolerance], include_background=True, spacing=sides).item()
    return {"dice": compute_dice(p, t).item(), "iou": compute_iou(p, t).item(), "hd95": hd95, "nsd": nsd, **found}


def surface_dice(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """Normalised surface distance alone, by MONAI; arguments as ``score_volume``. 0 for an empty prediction."""
    if not prediction.any():
        return 0.0
    # Cut to what holds both, because distances are worked out for every voxel.
    both = prediction | truth
    around = tuple(
        slice(max(0, s.start - 1), s.stop + 1) for s in ndimage.find_objects(both.astype(np.uint8), max_label=1)[0]
    )
    wide = [axis for axis, side in enumerate(truth.shape) if side > 1]
    masks = [mask[around].reshape([mask[around].shape[axis] for axis in wide]) for mask in (prediction, truth)]
    p, t = (torch.from_numpy(np.pad(mask, 1))[None, None].float() for mask in masks)
    sides = [float(spacing[axis]) for axis in wide]
    with _quiet():
        return compute_surface_dice(p, t, [tolerance], include_background=True, spacing=sides).item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what MONAI says of its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="monai.metrics")
        warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges")
        yield


def lesions(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Lesion-wise detection; a lesion is a component connected by faces, edges or corners.

    Recall is the share of lesions of which the prediction covers at least ``DETECTED``; precision the share of predicted
    components of which at least that much lies in the truth (0 for an empty prediction); F1 their harmonic mean.
    """
    recall, precision = _covered(truth, prediction), _covered(prediction, truth)
    both = recall + precision
    return {
        "lesion_recall": recall,
        "lesion_precision": precision,
        "lesion_f1": 2 * recall * precision / both if both else 0.0,
    }


def _covered(mask: np.ndarray, other: np.ndarray) -> float:
    """Share of the components of ``mask`` of which ``other`` covers enough."""
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if not count:
        return 0.0
    shares = np.bincount(parts[other], minlength=count + 1)[1:] / np.bincount(parts.ravel())[1:]
    return float((shares >= DETECTED).mean())
