"""Tables of an evaluation in Markdown, and its files."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zeroseg.evaluation.summaries import common_methods, differences, methods_of
from zeroseg.io import atomic_path


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
    common = common_methods(list(tables.values()))
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
