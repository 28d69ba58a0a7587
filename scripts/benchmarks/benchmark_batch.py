#!/usr/bin/env python
"""Measure how a cohort scales with workers: cases per minute, model loading and input/output apart.

    python scripts/benchmarks/benchmark_batch.py --workers 1 2 --cases 24 --json scaling.json
    python scripts/benchmarks/benchmark_batch.py --input CASES -- --config inference_tumor.yaml --set organ=liver

Measured: zeroseg batch itself, once per number of workers, each worker with one core; by default on copies of an image of
scikit-image. What follows ``--`` goes to it.
  start_s         from the first process started to the first model loaded: Ray, imports, weights; once per run
  load_s          of that, a worker's model
  case_s          median seconds of a case in its worker
  io_s            of that, reading and writing
  cases_per_min   from the first model loaded to the last case done
  dispatch_s      handing out a case and taking in its result, from a second run in which every case is skipped

Simulated, on a clock that only counts: no process runs. Each worker loads its model (load_s, all at once), then takes case
after case, with the seconds of the measured cases drawn at random; the driver hands out one at a time (dispatch_s each).
Two bounds for storage: a store per worker, or one that serves one case at a time (io_s each) to all. A real cluster lies
between the two. The clock leaves out slow nodes, the network, and the memory bandwidth that workers of one machine share;
the measured rows show the last.

How to plan with it: N cases on W workers take start_s + 60 * N / cases_per_min(W) seconds. The driver limits beyond
case_s / dispatch_s workers, one shared store beyond case_s / io_s; then give every part of the cohort a driver and an
output folder of its own.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zeroseg.cli.parser import Parser, guarded
from zeroseg.errors import ZeroSegError

CASES_A_WORKER = 200
"""Simulated cases per worker: enough that the model's loading and the last cases hardly count."""


def main() -> int:
    """Run the command line; returns the exit code."""
    return guarded(_main)


def _main() -> int:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="zeroseg-benchmark-") as folder:
        images = args.input or draw_cases(Path(folder, "images"), args.cases)
        measured = [measure(images, Path(folder, f"out{n}"), n, args.options) for n in args.workers]
    report = {"measured": measured, "simulated": [simulate(measured[0], workers) for workers in args.simulate]}
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="to measure (default %(default)s)")
    parser.add_argument("--cases", type=int, default=24, help="copies of the sample image (default %(default)s)")
    parser.add_argument("--input", type=Path, help="a folder or CSV of your own instead")
    parser.add_argument(
        "--simulate", type=int, nargs="*", default=[1, 2, 4, 16, 64, 256], help="workers (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("options", nargs="*", help="after --: options of zeroseg batch")
    return parser.parse_args(arguments)


def draw_cases(folder: Path, count: int) -> Path:
    """Copies of a stained tissue, 512 x 512, each turned and mirrored another way."""
    import numpy as np
    from PIL import Image
    from skimage.data import immunohistochemistry

    folder.mkdir()
    for i in range(count):
        picture = np.rot90(immunohistochemistry(), i % 4)
        Image.fromarray(np.ascontiguousarray(picture[:, :: -1 if i % 8 > 3 else 1])).save(folder / f"case{i:04}.png")
    return folder


def measure(images: Path, output: Path, workers: int, options: Sequence[str]) -> dict[str, Any]:
    """Run the cohort with so many workers, and once more to skip it; returns the figures of the module's text.

    Raises:
        ZeroSegError: zeroseg batch failed.
    """
    command = [
        sys.executable,
        "-m",
        "zeroseg",
        "batch",
        images,
        "--output-dir",
        output,
        "--workers",
        workers,
        "--cpus-per-worker",
        1,
    ]
    manifests = []
    for _ in range(2):
        environment = {
            k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"
        }  # Ray sets it to the worker's cores
        done = subprocess.run([*map(str, command), *options], env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise ZeroSegError(f"zeroseg batch ended with {done.returncode}; its reasons are above")
        manifests.append(json.loads((output / "manifest.json").read_text()))
    first, second = manifests
    seconds = [entry["seconds"] for entry in first["cases"]]
    return {
        "workers": workers,
        "cases": len(seconds),
        "start_s": first["batch"]["start_seconds"],
        "load_s": statistics.median(first["batch"]["load_seconds"]),
        "case_s": statistics.median(s["total"] for s in seconds),
        "io_s": statistics.median(s["read"] + s["write"] for s in seconds),
        "cases_per_min": 60 * len(seconds) / first["batch"]["work_seconds"],
        "dispatch_s": second["batch"]["work_seconds"] / len(seconds),
        "case_seconds": [s["total"] for s in seconds],
    }


def simulate(basis: dict[str, Any], workers: int, seed: int = 0) -> dict[str, Any]:
    """Cases per minute of many workers, for both bounds of storage.

    Args:
        basis: a row of ``measure``.
        workers: how many.
        seed: of the drawn case times.
    """
    return {
        "workers": workers,
        "store_each_per_min": _simulated_rate(basis, workers, seed, shared=False),
        "store_shared_per_min": _simulated_rate(basis, workers, seed, shared=True),
    }


def _simulated_rate(basis: dict[str, Any], workers: int, seed: int, shared: bool) -> float:
    draw, cases = random.Random(seed), workers * CASES_A_WORKER
    free = [basis["load_s"]] * workers  # when each worker, the driver and the store are free again
    driver = store = end = 0.0
    for _ in range(cases):
        driver = max(driver, heapq.heappop(free)) + basis["dispatch_s"]
        seconds = draw.choice(basis["case_seconds"])
        if shared:
            store = max(store, driver) + min(basis["io_s"], seconds)
            finished = store + max(0.0, seconds - basis["io_s"])
        else:
            finished = driver + seconds
        heapq.heappush(free, finished)
        end = max(end, finished)
    return 60 * cases / (end - basis["load_s"])


def show(report: dict[str, Any]) -> None:
    """Print both tables as Markdown."""
    names = ["workers", "cases", "start_s", "load_s", "case_s", "io_s", "dispatch_s", "cases_per_min"]
    for rows, columns in ((report["measured"], names), (report["simulated"], list((report["simulated"] or [{}])[0]))):
        if rows:
            print("| " + " | ".join(columns) + " |\n|" + "---:|" * len(columns))
            for row in rows:
                print("| " + " | ".join(f"{row[name]:.4g}" for name in columns) + " |")
            print()


if __name__ == "__main__":
    sys.exit(main())
