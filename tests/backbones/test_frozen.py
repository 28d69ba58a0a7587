"""Loading once, and where a frozen model computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zeroseg.backbones.frozen import FrozenModel, pick_device
from zeroseg.errors import WeightsError, ZeroSegError


class Counting(FrozenModel):
    """Counts its loads; the first ``failures`` of them fail."""

    def __init__(self, failures: int = 0, **options: str):
        super().__init__(**options)
        self.failures, self.loads = failures, 0

    def _load(self) -> None:
        self._place()
        self.loads += 1
        if self.loads <= self.failures:
            raise WeightsError("no weights yet")


def test_weights_load_once_and_not_before_they_are_asked_for():
    model = Counting(device="cpu")
    assert model.loads == 0 and not hasattr(model, "device")
    with ThreadPoolExecutor(4) as pool:
        assert all(loaded is model for loaded in pool.map(lambda _: model.load(), range(8)))
    assert model.loads == 1 and (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_a_load_that_failed_is_tried_again():
    model = Counting(failures=1, device="cpu")
    with pytest.raises(WeightsError):
        model.load()
    assert model.load().loads == 2 and model.load().loads == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "cpu", "dtype": "fp64"}, "unknown dtype 'fp64': use one of fp32, bf16, fp16"),
        ({"device": "cpu", "dtype": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_a_place_that_is_not_there_is_refused(options, message):
    with pytest.raises(ZeroSegError, match=message):
        Counting(**options).load()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cuda") == torch.device("cuda")
    with pytest.raises(ZeroSegError, match="device 'cuda:2' is not available on this machine"):
        pick_device("cuda:2")
