"""What was measured, summed up and as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from zeroseg.evaluation.confidence import spearman
from zeroseg.evaluation.tables import markdown_rows


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """method -> shots -> mean Dice over choices, its deviation between them, and Spearman of the expected Dice."""
    groups: dict = defaultdict(list)
    for row in rows:
        groups[row["method"], row["shots"]].append(row)
    out: dict = defaultdict(dict)
    for (method, shots), group in groups.items():
        seeds = sorted({row["seed"] for row in group})
        means = [float(np.mean([row["dice"] for row in group if row["seed"] == seed])) for seed in seeds]
        entry: dict[str, float | int | None] = {
            "dice": float(np.mean(means)),
            "std": float(np.std(means)),
            "choices": len(seeds),
        }
        if group[0]["expected_dice"] is not None:
            each = [
                spearman(*zip(*((r["expected_dice"], r["dice"]) for r in group if r["seed"] == seed), strict=True))
                for seed in seeds
            ]
            known = [value for value in each if value is not None]
            entry["spearman"] = float(np.mean(known)) if known else None
        out[method][str(shots)] = entry
    return dict(out)


def tables(summaries: dict[str, dict]) -> str:
    """Dice in Markdown, a row per method and number of images, a column per set, the mean where all sets have it; then Spearman."""
    parts = []
    for title, key in (("Dice", "dice"), ("Spearman of the expected Dice with Dice", "spearman")):
        wanted = [
            (method, shots)
            for summary in summaries.values()
            for method, values in summary.items()
            for shots, value in values.items()
            if key in value
        ]
        lines = [[title, "images", *summaries, "mean"], ["---", *["---:"] * (len(summaries) + 2)]]
        for method, shots in sorted(set(wanted), key=lambda w: (int(w[1]), w[0])):
            values = [summary.get(method, {}).get(shots, {}).get(key) for summary in summaries.values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            known = [value for value in values if value is not None]
            mean = f"{np.mean(known):.3f}" if len(known) == len(values) else "-"
            lines.append([method, shots, *cells, mean])
        parts.append(markdown_rows(lines))
    return "\n".join(parts)
