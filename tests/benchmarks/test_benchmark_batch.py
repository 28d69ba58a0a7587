"""The simulated clock of the scaling benchmark against what can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmark_batch import simulate

BASIS = {"load_s": 5.0, "io_s": 0.0, "dispatch_s": 0.0, "case_seconds": [2.0]}


def rates(workers: int, **changes) -> tuple[float, float]:
    row = simulate(BASIS | changes, workers)
    return row["store_each_per_min"], row["store_shared_per_min"]


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_without_anything_shared_the_rate_grows_with_the_workers(workers):
    assert rates(workers) == pytest.approx((30 * workers, 30 * workers))


def test_a_single_store_is_the_limit_of_all_that_share_it():
    each, shared = rates(64, io_s=0.1)
    assert each == pytest.approx(30 * 64)
    assert shared == pytest.approx(60 / 0.1, rel=0.01)


def test_the_driver_is_the_limit_of_all_workers():
    assert rates(64, dispatch_s=0.05) == pytest.approx((60 / 0.05, 60 / 0.05), rel=0.01)


def test_uneven_cases_are_drawn_the_same_way_every_time():
    uneven = {"case_seconds": [1.0, 3.0]}
    assert rates(16, **uneven) == rates(16, **uneven)
    assert 0.9 * 30 * 16 < rates(16, **uneven)[0] < 1.1 * 30 * 16
