"""Does the confidence mean something? Whether the score ranks failures, and whether pixels are right as often as they say.

The score is what the inferer reports of a mask (``Segmentation.scores[0]``: mean confidence over the object); the
confidence of a pixel is the margin by which its label beats the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from zeroseg.io import atomic_path
from zeroseg.segmentation import Segmentation

BINS = 10  # of equal width, on [0, 1]


def image_score(result: Segmentation) -> float:
    """The score of the object, or the mean confidence in the image where no object was found."""
    return float(result.scores[0] if result.scores else result.confidence.mean())


def _ranked_by(scores: np.ndarray, risks: np.ndarray) -> np.ndarray:
    """Risks in order of falling score; cases of one score share their mean risk, as they would in random order."""
    _, group = np.unique(-scores, return_inverse=True)
    return (np.bincount(group, risks) / np.bincount(group))[np.sort(group)]


def aurc(scores: Sequence[float], risks: Sequence[float]) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv 2017, Selective classification for deep networks).

    The mean, over the coverages 1/n, 2/n, ..., 1, of the mean risk of the cases of highest score. A useless score has
    the mean risk on average, and no score does better than ``aurc(-risks, risks)``.

    Args:
        scores: (n,), higher is surer.
        risks: (n,), here 1 - Dice.
    """
    ranked = _ranked_by(np.asarray(scores, np.float64), np.asarray(risks, np.float64))
    return float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1)).mean())


def spearman(scores: Sequence[float], dice: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than 3 cases, or where all scores or all Dice are equal."""
    if len(scores) < 3 or np.ptp(scores) == 0 or np.ptp(dice) == 0:
        return None
    return float(spearmanr(scores, dice).statistic)


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """One image's part of a reliability diagram.

    Args:
        confidence: float in [0, 1], of any shape.
        correct: bool of the same shape: the pixel has its true label.

    Returns:
        (3, BINS): per bin the share of the pixels, and the sums of their confidence and of their correctness as shares
        of all pixels; a bin holds its upper edge. All 0 where there is no pixel.
    """
    values = np.ravel(confidence).astype(np.float64)
    bins = np.clip(np.ceil(values * BINS).astype(np.intp) - 1, 0, BINS - 1)
    sums = [np.bincount(bins, weights, BINS) for weights in (None, values, np.ravel(correct).astype(np.float64))]
    return np.stack(sums) / max(values.size, 1)


def pixel_bins(result: Segmentation, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Bins of all pixels of an image, and of those of its mask alone, which much background cannot flatter."""
    mask = result.labels > 0
    return {
        "image": reliability_bins(result.confidence, mask == truth),
        "mask": reliability_bins(result.confidence[mask], truth[mask]),
    }


def reliability(bins: Sequence[np.ndarray]) -> dict:
    """Reliability over images of equal weight, whatever their size (Guo et al. 2017, On calibration of modern networks).

    Args:
        bins: from ``reliability_bins``, one per image.

    Returns:
        ``share``, ``confidence`` and ``accuracy`` per bin (the last two None in an empty one), and two expected
        calibration errors: ``ece`` of the confidence as it stands, and ``ece_margin`` of (1 + confidence) / 2, the
        accuracy that a margin between two classes promises. Both None where no image has a pixel.
    """
    share, confidence, correct = np.sum(bins, axis=0)
    total = share.sum()
    if total == 0:
        empty = [None] * BINS
        return {"share": [0.0] * BINS, "confidence": empty, "accuracy": empty, "ece": None, "ece_margin": None}

    def per_pixel(sums: np.ndarray) -> list[float | None]:
        return [float(a / n) if n > 0 else None for a, n in zip(sums, share, strict=True)]

    return {
        "share": (share / total).tolist(),
        "confidence": per_pixel(confidence),
        "accuracy": per_pixel(correct),
        "ece": float(np.abs(correct - confidence).sum() / total),
        "ece_margin": float(np.abs(correct - (share + confidence) / 2).sum() / total),
    }


def summarise_confidence(rows: list[dict]) -> dict:
    """What the scores and pixels of one protocol on one set are worth.

    Args:
        rows: one per case, with ``dice``, ``score`` and ``bins`` (from ``pixel_bins``).
    """
    scores, dice = (np.array([row[key] for row in rows], np.float64) for key in ("score", "dice"))
    return {
        "score": float(scores.mean()),
        "spearman": spearman(scores, dice),
        "aurc": aurc(scores, 1 - dice),
        "aurc_best": aurc(dice, 1 - dice),
        "reliability": {part: reliability([row["bins"][part] for row in rows]) for part in rows[0]["bins"]},
    }


def reliability_diagram(protocols: dict[str, dict], path: Path, title: str) -> None:
    """Draw accuracy against confidence, a column per protocol; bars show where the pixels are.

    Args:
        protocols: name -> summary with ``reliability``; none is an error.
        path: PNG to write.
        title: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(protocols), figsize=(3.4 * len(protocols), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    centres = (np.arange(BINS) + 0.5) / BINS
    for ax, (name, summary) in zip(axes[0], protocols.items(), strict=True):
        ax.plot([0, 1], [0, 1], color="gray", linewidth=1, label="accuracy = confidence")
        ax.plot([0, 1], [0.5, 1], color="gray", linewidth=1, linestyle=":", label="accuracy = (1 + confidence) / 2")
        for (part, values), color in zip(summary["reliability"].items(), ("#0072B2", "#D55E00"), strict=True):
            known = [k for k in range(BINS) if values["accuracy"][k] is not None]
            x, y = ([values[key][k] for k in known] for key in ("confidence", "accuracy"))
            ax.plot(x, y, "o-", color=color, markersize=3, label=f"pixels of the {part}")
            ax.bar(centres, values["share"], 1 / BINS, color=color, alpha=0.15)
        ax.set(title=name, xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    axes[0, 0].set_ylabel("accuracy; bars: share of pixels")
    axes[0, 0].legend(fontsize=6, loc="lower right")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
