"""A runner for the tests of killed workers: it kills its own process in the middle of writing a case named ``poison``."""

from __future__ import annotations

import os
import signal

from zeroseg.cases import CaseRunner


class PoisonRunner(CaseRunner):
    """``CaseRunner`` that ends the process, without a chance to tidy up, when the mask of ``poison`` is half written."""

    def _write(self, case, image, unit, result, prompt, output):
        if case.stem == "poison":
            (output / ".zeroseg-0123456789abcdef.png").write_bytes(b"\x89PNG half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._write(case, image, unit, result, prompt, output)
