"""Measuring sets, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.clicks import overlap
from zeroseg.evaluation.few_shot.images import ImageMethods, read_sample
from zeroseg.evaluation.few_shot.plan import Methods, Plan, S
from zeroseg.evaluation.few_shot.report import summarise, tables
from zeroseg.evaluation.few_shot.volumes import read_volume, volume_methods
from zeroseg.evaluation.pairs import find_pairs
from zeroseg.evaluation.tables import write_csv, write_text
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import Case, versions, write_json

COLUMNS = ("set", "seed", "shots", "method", "case", "dice", "expected_dice")


def measure_set(name: str, samples: Sequence[S], methods: Methods[S], plan: Plan) -> list[dict]:
    """Rows (see ``COLUMNS``) of one set; shots that leave fewer than two cases to score on are left out."""
    rows = []
    for seed in range(plan.choices):
        order = np.random.default_rng(seed).permutation(len(samples))
        for shots in [k for k in plan.shots if k <= len(samples) - 2]:
            given, rest = [samples[i] for i in order[:shots]], [samples[i] for i in order[shots:][-plan.rest :]]
            for method, answer in methods(given, plan, seed):
                for sample in rest:
                    mask, expected = answer(sample)
                    dice, _ = overlap(mask, sample.truth)
                    row = {"set": name, "seed": seed, "shots": shots, "method": method, "case": sample.stem}
                    rows.append(row | {"dice": dice, "expected_dice": expected})
    return rows


def evaluate_few_shot(
    sets: Mapping[str, tuple[Path, Path, bool]],
    out: Path,
    inferer: AttentionSegmentationInferer,
    plan: Plan,
    cache: Path | None = None,
    limit: int | None = None,
) -> int:
    """Measure every set and write ``few_shot.csv``, ``summary.json`` and ``table.md``; returns how many cases and sets failed.

    Args:
        sets: name -> folders of images and masks, and whether they are volumes.
        out: folder to write to; results so far are written after each set.
        inferer: with its weights loaded; volumes are learned from without it.
        plan: what is measured.
        cache: folder for what the frozen model gave, so that a further run does not encode again.
        limit: most cases of a set.

    Raises:
        ZeroSegError: no set could be measured.
    """
    rows: list[dict] = []
    summaries: dict[str, dict] = {}
    failed: list[dict] = []

    def read_all(name: str, pairs: Sequence[tuple[Case, Case]], read: Callable[[tuple[Case, Case]], S]) -> list[S]:
        samples = []
        for pair in tqdm(pairs, desc=f"{name}: reading", unit="case", disable=None):
            try:
                samples.append(read(pair))
            except ZeroSegError as error:
                failed.append({"set": name, "case": pair[0].stem, "error": str(error)})
                tqdm.write(f"{name}: {pair[0].stem} failed: {error}", file=sys.stderr)
        return samples

    for name, (images, masks, of_volumes) in sets.items():
        try:
            pairs, _ = find_pairs(images, masks, out, limit=limit)
        except ZeroSegError as error:
            failed.append({"set": name, "error": str(error)})
            continue
        if of_volumes:
            found = measure_set(name, read_all(name, pairs, read_volume), volume_methods, plan)
        else:
            samples = read_all(name, pairs, lambda pair: read_sample(inferer, pair, cache))
            found = measure_set(name, samples, ImageMethods(inferer), plan)
        if not found:
            failed.append({"set": name, "error": "too few cases for any of the shots"})
            continue
        rows += found
        summaries[name] = summarise(found)
        write_csv(out / "few_shot.csv", COLUMNS, rows)
        write_json(
            out / "summary.json",
            {
                "few_shot": summaries,
                "settings": {"plan": plan, "inferer": inferer.settings(), "failed": failed, "versions": versions()},
                "backbone": inferer.backbone.describe(),
            },
        )
        write_text(out / "table.md", tables(summaries))
        print(f"{name}: done", flush=True)
    if not summaries:
        raise ZeroSegError(f"no set could be measured, the first: {failed[0]['error'] if failed else 'none was given'}")
    print(tables(summaries))
    return len(failed)
