"""What every evaluation shares: its command line, pairs of images and masks, means with their uncertainty, tables, files."""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from zeroseg.evaluation.confidence import summarise_confidence
from zeroseg.errors import ZeroSegError
from zeroseg.io import Case, atomic_path, find_cases

# Command line.


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, without the usage."""

    def error(self, message: str):
        raise ZeroSegError(message)


def run_evaluation(
    parse: Callable[[list[str] | None], argparse.Namespace],
    evaluate: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """Run an evaluation as ``evaluate.py``; what the user can mend is one line on stderr.

    Args:
        parse: command line -> arguments, of which ``out`` is the folder of the results.
        evaluate: does the work and returns how many cases failed.
        argv: the command line, None for the process's own.

    Returns:
        Exit code: 0; or 2 when the arguments were refused or some cases failed (the others are evaluated).
    """
    try:
        args = parse(argv)
        failures = evaluate(args)
    except ZeroSegError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    if failures:
        print(f"evaluate.py: {failures} failed, see settings.failed in summary.json", file=sys.stderr)
        return 2
    print(f"results: {args.out}")
    return 0


# Cases.


def half_of(stem: str) -> str:
    """``dev`` or ``test``, fixed by the SHA-256 of the stem, whatever else is in the set."""
    return ("dev", "test")[int(hashlib.sha256(stem.encode()).hexdigest(), 16) % 2]


def find_pairs(
    images: Path, masks: Path, out: Path, half: str = "all", limit: int | None = None
) -> tuple[list[tuple[Case, Case]], list[str]]:
    """Cases that have an image and a mask.

    Returns:
        list of (image, mask), and the stems of images without a mask.

    Raises:
        ZeroSegError: a folder is missing or empty, or nothing is left to evaluate.
    """
    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise ZeroSegError(f"{folder}: no such folder; give an existing one as --{name}")
    found = find_cases(images, exclude=out)
    truths = {case.stem: case for case in find_cases(masks, exclude=out)}
    pairs = [(case, truths[case.stem]) for case in found if case.stem in truths]
    if not pairs:
        raise ZeroSegError(f"no mask in {masks} has the name of an image in {images} (without extension)")
    chosen = [pair for pair in pairs if half in ("all", half_of(pair[0].stem))][:limit]
    if not chosen:
        raise ZeroSegError(f"none of the {len(pairs)} cases of {images} belongs to the half {half!r}; use --half all")
    return chosen, [case.stem for case in found if case.stem not in truths]


# Numbers.


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


# Tables.


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
    return {name: float(np.mean([table[name]["dice"] for table in tables])) for name in _common(tables)}


def _common(tables: list[dict[str, dict]]) -> list[str]:
    """The methods that every table has."""
    return [name for name in tables[0] if all(name in table for table in tables)]


def markdown_table(summaries: dict[str, dict]) -> str:
    """Mean Dice, a row per method and a column per set; below the control, what the trained model has over it."""
    tables = {name: methods_of(summary) | differences(summary) for name, summary in summaries.items()}
    counts = [str(next(iter(table.values()))["n"]) for table in tables.values()]
    return _table("Dice", tables, "dice", [["n", *counts, ""]])


def seconds_table(summaries: dict[str, dict]) -> str:
    """Mean seconds per case, a row per method and a column per set; the model's encoding and prompt apart."""
    tables = {}
    for name, summary in summaries.items():
        tables[name] = table = {}
        for method, values in methods_of(summary).items():
            if method.endswith("_component"):  # the same predictions, scored against less
                continue
            if method.startswith("baseline: ") and not method.endswith("_best_polarity"):
                table[method] = values
            for part in ("encode", "prompt"):
                if f"{part}_seconds" in values:
                    table[f"{method}: {part}"] = {"seconds": values[f"{part}_seconds"]}
    return _table("Seconds per case", tables, "seconds")


CONFIDENCE_COLUMNS = {
    "Dice": lambda m: m["dice"],
    "score": lambda m: m["score"],
    "Spearman": lambda m: m["spearman"],
    "AURC": lambda m: m["aurc"],
    "best AURC": lambda m: m["aurc_best"],
    "ECE image": lambda m: m["reliability"]["image"]["ece"],
    "ECE mask": lambda m: m["reliability"]["mask"]["ece"],
}


def confidence_table(summaries: dict[str, dict]) -> str:
    """How well the score ranks failures and pixels know their accuracy, a row per set and method; "" without scores."""
    lines = [
        [name, method, *(_cell(column(values)) for column in CONFIDENCE_COLUMNS.values())]
        for name, summary in summaries.items()
        for method, values in methods_of(summary).items()
        if "reliability" in values
    ]
    if not lines:
        return ""
    head = [["Set", "Confidence of", *CONFIDENCE_COLUMNS], ["---"] * 2 + ["---:"] * len(CONFIDENCE_COLUMNS)]
    return markdown_rows(head + lines)


def report_tables(summaries: dict[str, dict]) -> str:
    """All tables of an evaluation in Markdown."""
    return "\n".join(filter(None, (make(summaries) for make in (markdown_table, seconds_table, confidence_table))))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(title: str, tables: dict[str, dict[str, dict]], key: str, first: Iterable[list[str]] = ()) -> str:
    """One number in a row per method and a column per set, with the mean where every set has the number."""
    methods = list(dict.fromkeys(method for table in tables.values() for method in table))
    common = _common(list(tables.values()))
    lines = [[title, *tables, "mean"], ["---"] + ["---:"] * (len(tables) + 1), *first]
    for method in methods:
        values = [table[method][key] if method in table else None for table in tables.values()]
        mean = float(np.mean(values)) if method in common else None
        lines.append([method, *map(_cell, values), _cell(mean)])
    return markdown_rows(lines)


def markdown_rows(lines: Iterable[Iterable[str]]) -> str:
    """Cells -> lines of a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write the named columns of the rows; keys that are no column are left out."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
