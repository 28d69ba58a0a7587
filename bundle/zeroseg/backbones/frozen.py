"""What all frozen models share: weights that load on first use, and the device and precision they compute in."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from zeroseg.errors import ZeroSegError

if TYPE_CHECKING:
    from typing import Self

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str) -> torch.device:
    """``auto``: CUDA, else MPS, else the CPU; anything else is taken as torch spells it.

    Raises:
        ZeroSegError: the device does not exist on this machine.
    """
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        picked = torch.device(device)
    except RuntimeError:
        msg = f"unknown device {device!r}: use auto, cpu, cuda, cuda:0 or mps"
        raise ZeroSegError(msg) from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there = available.get(picked.type, False)
    if picked.type == "cuda" and picked.index is not None:
        there = there and picked.index < torch.cuda.device_count()
    if not there:
        msg = f"device {device!r} is not available on this machine: use auto or cpu"
        raise ZeroSegError(msg)
    return picked


class FrozenModel:
    """A model whose weights load on first use, once, also when several threads ask at the same time.

    Until then building one costs nothing, so that settings can be checked and described without weights. A subclass
    says in ``_load`` what loading is.

    Args:
        device: auto, or as torch spells it.
        dtype: fp32, bf16 or fp16; fp16 needs a GPU.
    """

    def __init__(self, device: str = "auto", dtype: str = "fp32"):
        self._device_name, self._dtype_name = str(device), str(dtype)
        self._lock = threading.RLock()
        self._loaded = False

    def load(self) -> Self:
        """Load the weights if they are not there yet; safe to call from several threads.

        Raises:
            WeightsError: a file is missing, incomplete, damaged, a pickle, or of another shape than its config says.
            ZeroSegError: a setting is wrong, or the device or the dtype cannot be used here.
        """
        with self._lock:
            if not self._loaded:
                self._load()
                self._loaded = True
        return self

    def _load(self) -> None:
        """Check the settings and load all weights; called once, under the lock."""
        raise NotImplementedError

    def _place(self) -> None:
        """Choose ``device`` and ``dtype``.

        Raises:
            ZeroSegError: one of them cannot be used here.
        """
        self.device = pick_device(self._device_name)
        if self._dtype_name not in DTYPES:
            raise ZeroSegError(f"unknown dtype {self._dtype_name!r}: use one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[self._dtype_name]
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ZeroSegError("fp16 needs a GPU: use fp32 or bf16 on the CPU")
