"""Dice and normalised surface distance of ``learned`` against submitted labels, label by label."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.engine import Engine
from lib.heads import Heads
from lib.mends.responsive import stop_if_abandoned
from lib.submissions import Submission, read_all
from zeroseg.evaluation.volume_metrics import score_volume, tolerance_of


class LearnedScore(ScoringMethod):
    """Scores the head that is served. MONAI Label's own Dice multiplies label maps, which is wrong beyond one label.

    Args:
        engine: encodes the images.
        heads: the head, and where the scores are kept.
    """

    def __init__(self, engine: Engine, heads: Heads):
        super().__init__("Dice and surface distance of learned against the submitted labels, label by label")
        self.engine, self.heads = engine, heads

    def info(self) -> dict[str, Any]:
        """As MONAI Label's, and the last scores."""
        return {**super().info(), **self.heads.scores()}

    def __call__(self, request: dict[str, Any], datastore) -> dict[str, Any]:
        """Score, and keep the scores.

        Returns:
            ``seen`` and ``unseen``: of labels that the head learned from, and of those submitted since, each
            ``{label: {"dice", "nsd", "images"}}``; ``images``: the same for each image; ``progress``: one entry a training, what the
            head before it made of the labels it had not seen.
        """
        record = self.heads.record()
        submissions = read_all(datastore, self.engine) if record else []
        images = {one.image: score(one, self.engine, self.heads) for one in submissions}
        known = (record or {}).get("images", {})
        # A label that was submitted anew is another one.
        seen = {one.image for one in submissions if known.get(one.image) == one.time}
        scores = {
            "head": (record or {}).get("name"),
            "seen": mean_by_label([images[name] for name in images if name in seen]),
            "unseen": mean_by_label([images[name] for name in images if name not in seen]),
            "images": images,
            "progress": self.heads.scores().get("progress", []),
        }
        self.heads.write_scores(scores)
        return scores


def score(one: Submission, engine: Engine, heads: Heads) -> dict[str, dict[str, float]]:
    """Label -> ``dice`` and ``nsd`` (tolerance: two voxels), of every label of one submission."""
    stop_if_abandoned()
    head = heads.head()
    found = engine.learned(one.entry, head).labels
    scores = {}
    sides = one.entry.image.spacing or (1.0,) * one.labels.ndim
    spacing = (*sides, 1.0)[:3]
    for name, value in one.names.items():
        truth, mask = one.labels == value, found == head.labels.get(name, -1)
        shape = truth.shape if truth.ndim == 3 else (*truth.shape, 1)
        figures = score_volume(mask.reshape(shape), truth.reshape(shape), spacing, tolerance_of(spacing[: truth.ndim]))
        scores[name] = {key: round(figures[key], 4) for key in ("dice", "nsd")}
    return scores


def unseen_scores(heads: Heads, engine: Engine, submissions: Sequence[Submission]) -> dict[str, Any] | None:
    """What the head that is served makes of the labels submitted since it was trained; None where there is neither."""
    record = heads.record()
    new = [one for one in submissions if record and record["images"].get(one.image) != one.time]
    if not new:
        return None
    scores = mean_by_label([score(one, engine, heads) for one in new])
    return {"time": int(time.time()), "learned_from": len(record["images"]), "unseen": len(new), "labels": scores}


def mean_by_label(each: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Label -> mean ``dice`` and ``nsd`` over the images that show it, and how many ``images`` do."""
    names = sorted({name for scores in each for name in scores})
    means = {}
    for name in names:
        rows = [scores[name] for scores in each if name in scores]
        means[name] = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in ("dice", "nsd")}
        means[name]["images"] = len(rows)
    return means
