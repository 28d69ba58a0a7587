#!/usr/bin/env python
"""``scripts/benchmarks/benchmark_attention.py``, for those who know it by this name: python scripts/benchmark.py --help"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "benchmarks" / "benchmark_attention.py"), run_name="__main__")
