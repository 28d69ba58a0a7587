"""Means over cases and sets, with their uncertainty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from zeroseg.evaluation.confidence import summarise_confidence


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % percentile bootstrap interval of the mean over cases; the seed is fixed."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return np.percentile(values[draws].mean(axis=1), (2.5, 97.5)).tolist()


def summarise(rows: list[dict], metrics: Iterable[str] = ("dice", "iou", "hd95")) -> dict:
    """Means over cases, and how far to trust them.

    Args:
        rows: one per case, with ``dice``, ``seconds`` and the metrics. Where they are given, ``absent`` is counted,
            ``encode_seconds`` and ``prompt_seconds`` are averaged, and ``score`` and ``bins`` judged (``confidence.py``).
        metrics: what to average.
    """
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in metrics}
    out = {name: float(values.mean()) for name, values in columns.items()} | {"n": len(rows)}
    out |= {f"{name}_std": float(values.std()) for name, values in columns.items()}
    out |= {f"{name}_median": float(np.median(values)) for name, values in columns.items()}
    out["dice_ci95"] = bootstrap_interval(columns["dice"])
    for name in ("seconds", "encode_seconds", "prompt_seconds"):
        if name in rows[0]:
            out[name] = float(np.mean([row[name] for row in rows]))
    if "absent" in rows[0]:
        out["absent"] = sum(row["absent"] for row in rows)
    if "score" in rows[0]:
        out |= summarise_confidence(rows)
    return out


def summarise_groups(rows: list[dict], run: dict, metrics: Iterable[str] = ("dice", "iou", "hd95")) -> dict:
    """All rows of a set -> {"protocols": ..., "baselines": ...} with what describes the run added.

    A row's ``protocol`` is a name, ``baseline/<name>``, ``untrained/<name>``, or ``polarity/<name>_bright`` and
    ``polarity/<name>_dark``, of which the better one becomes the baseline ``<name>_best_polarity``.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["protocol"]].append(row)
    out = {"protocols": {}, "baselines": {}, **run}
    for name, group in groups.items():
        kind, _, method = name.rpartition("/")
        if kind == "untrained":
            out["baselines"].setdefault(kind, {})[method] = summarise(group, metrics)
        elif kind != "polarity":
            out["baselines" if kind else "protocols"][method] = summarise(group, metrics)
    for method in (name[len("polarity/") : -len("_bright")] for name in groups if name.endswith("_bright")):
        both = [summarise(groups[f"polarity/{method}_{side}"], metrics) for side in ("bright", "dark")]
        best = max(range(2), key=lambda k: both[k]["dice"])
        out["baselines"][f"{method}_best_polarity"] = both[best] | {"polarity": ("bright", "dark")[best]}
    return out


def best_median_worst(rows: list[dict]) -> list[tuple[str, dict]]:
    """("best", row), ("median", row), ("worst", row) by Dice; fewer where there are fewer cases."""
    ranked = sorted(rows, key=lambda row: (-row["dice"], row["case"]))
    places = {"median": len(ranked) // 2, "worst": len(ranked) - 1, "best": 0}
    names = {place: name for name, place in places.items()}  # a case that holds two places is shown once
    return [(name, ranked[place]) for place, name in sorted(names.items())]


def methods_of(summary: dict) -> dict[str, dict]:
    """Every method of a summary by a flat name, in the order of the table."""
    flat = dict(summary["protocols"])
    flat |= {f"untrained: {k}": v for k, v in summary["baselines"].get("untrained", {}).items()}
    return flat | {f"baseline: {k}": v for k, v in summary["baselines"].items() if k != "untrained"}


def differences(summary: dict) -> dict[str, dict]:
    """What training is worth: the model's Dice minus its untrained control's, of every protocol both ran."""
    control = summary["baselines"].get("untrained", {})
    return {
        f"trained minus untrained: {name}": {"dice": own["dice"] - control[name]["dice"]}
        for name, own in summary["protocols"].items()
        if name in control
    }


def mean_over_sets(summaries: dict[str, dict]) -> dict[str, float]:
    """Mean Dice over sets of every method that was run on all of them, and the mean differences to the control."""
    tables = [methods_of(summary) | differences(summary) for summary in summaries.values()]
    return {name: float(np.mean([table[name]["dice"] for table in tables])) for name in common_methods(tables)}


def common_methods(tables: list[dict[str, dict]]) -> list[str]:
    """The methods that every table has."""
    return [name for name in tables[0] if all(name in table for table in tables)]
