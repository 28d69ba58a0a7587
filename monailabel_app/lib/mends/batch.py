"""MONAI Label's batch divides by zero without a GPU, and one image stops the rest; until test_mends.py::test_batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.mends.errors import status_and_detail

logger = logging.getLogger(__name__)


class CarefulBatch(BatchInferTask):
    """Batch inference that survives an image it cannot segment, and a machine without a GPU."""

    def __call__(self, request: dict[str, Any], datastore, infer: Callable[..., dict]) -> dict[str, Any]:
        """As MONAI Label's; an image that fails has ``error``, its reason, in place of a label."""

        def careful(one: dict[str, Any], store) -> dict[str, Any]:
            try:
                return infer(one, store)
            except Exception as error:
                reason = status_and_detail(error)[1]
                logger.warning("batch: %s: %s", one.get("image"), reason)
                return {"error": reason}

        request = {**request, "absent": request.get("absent", "empty mask")}
        if not torch.cuda.is_available():
            request["multi_gpu"] = False
        return super().__call__(request, datastore, careful)
