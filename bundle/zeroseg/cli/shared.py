"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from zeroseg.cli.parser import Parser
from zeroseg.errors import ZeroSegError

if TYPE_CHECKING:  # numpy and torch come with it
    from zeroseg.cases import CaseRunner

DTYPES = ("fp32", "bf16", "fp16")


def add_json(parser: Parser, what: str) -> None:
    """``--json``: for programs."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON; all else goes to stderr")


def add_set(parser: Parser, what: str = "any setting of the config, as monai.bundle takes it; may be repeated") -> None:
    """``--set KEY=VALUE``."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)


def add_model(parser: Parser, backbone: str) -> None:
    """Where the weights are and where they compute."""
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", help=backbone)
    group.add_argument("--device", help="auto (default), cpu, cuda, cuda:0 or mps")
    group.add_argument("--dtype", choices=DTYPES, help="default fp32; fp16 on a GPU only")


@contextmanager
def spoken_to_stderr(wanted: bool) -> Iterator[None]:
    """Where JSON is wanted on stdout, what is meant for people goes to stderr."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(content: Any) -> None:
    """Print JSON on stdout."""
    json.dump(content, sys.stdout, indent=1)
    print()


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The settings among the options that were given: the config's defaults stand for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run_cases(runner: CaseRunner, source: str, as_json: bool) -> int:
    """Segment the cases of a folder or file as ``python -m monai.bundle run`` does; returns the exit code."""
    from zeroseg.cases import CaseDataset

    runner.dataset = CaseDataset(source)
    code = 0
    with spoken_to_stderr(as_json):
        try:
            runner.run()
        except SystemExit as end:
            code = int(end.code or 0)
    if as_json and runner.manifest is not None:
        print_json(runner.manifest)
    return code


def measured(args: argparse.Namespace, evaluate: Callable[[], int]) -> int:
    """Run an evaluation that writes to ``args.out`` and returns how many cases failed; returns the exit code."""
    with spoken_to_stderr(args.json):
        failures = evaluate()
    name = "table.json" if getattr(args, "suite", None) is not None else "summary.json"
    if args.json:
        print_json(json.loads((args.out / name).read_text(encoding="utf-8")))
    if failures:
        print(f"zeroseg: {failures} failed, see settings.failed in summary.json", file=sys.stderr)
        return 2
    if not args.json:
        print(f"results: {args.out}")
    return 0


def numbers(text: str, option: str, count: int | None = None) -> list[float]:
    """Numbers with commas between, or as a JSON list.

    Raises:
        ZeroSegError: they are none, or not ``count``.
    """
    try:
        found = [float(part) for part in text.strip().strip("[]").split(",")]
    except ValueError:
        found = []
    if not found or (count is not None and len(found) != count):
        wanted = f"{count} numbers" if count else "numbers"
        raise ZeroSegError(f"{option} takes {wanted} with commas between, not {text!r}")
    return [int(value) if value.is_integer() else value for value in found]


def words(text: str) -> str:
    """Words for a config, in which text that begins with $, @ or % has a meaning of its own.

    Raises:
        ZeroSegError: they begin so.
    """
    if text.lstrip().startswith(("$", "@", "%")):
        raise ZeroSegError(f"words cannot begin with $, @ or %: {text!r}")
    return text
