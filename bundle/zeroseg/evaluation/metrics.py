"""How well a mask of an image fits: Dice, IoU and the 95th percentile of the Hausdorff distance, from MONAI."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou


def score(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice, IoU and HD95 (pixels) of a bool mask (H, W) against a non-empty one of the same shape."""
    p, t = (torch.from_numpy(np.ascontiguousarray(m))[None, None].float() for m in (prediction, truth))
    if prediction.any():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges")  # MONAI's call of itself
            hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95).item()
    else:
        hd95 = float(np.hypot(*truth.shape))
    return {"dice": compute_dice(p, t).item(), "iou": compute_iou(p, t).item(), "hd95": hd95}
