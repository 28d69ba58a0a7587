"""One loaded model that works off the jobs of a cohort: what runs in every worker process of a cohort."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from zeroseg.cases import CaseRunner
from zeroseg.cohort.jobs import Job
from zeroseg.cohort.records import digest, failed, read_record, record_path
from zeroseg.configs import build_runner
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import DRAWN
from zeroseg.io import file_sha256, write_json


class CaseWorker:
    """Does jobs with one model, which is loaded once, and records each when it is done.

    A record is written after all files of its job, whole or not at all. So a process that dies at any moment leaves
    either a job with its record, or a job that is done again.

    Args:
        config, settings, output: see ``build_runner``.
        retry_failed: do failed jobs again even if nothing about them has changed.
    """

    def __init__(self, config: Path, settings: Mapping[str, Any], output: Path, retry_failed: bool = False):
        self.config, self.settings, self.output, self.retry_failed = config, dict(settings), output, retry_failed
        self.load_seconds = 0.0

    @cached_property
    def runner(self) -> CaseRunner:
        """The evaluator with its weights loaded.

        Raises:
            ZeroSegError: a setting or the weights are wrong.
        """
        started = time.perf_counter()
        runner = build_runner(self.config, self.settings, self.output)
        runner.inferer.check()
        self.load_seconds = time.perf_counter() - started
        return runner

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that makes a result of an input: settings, weights and version.

        The device is left out: a cohort half done may be finished on another machine.
        """
        header = self.runner.header()
        weights = {k: v for k, v in header["backbone"].items() if k not in ("device", "source", "revision")}
        given = {k: v for k, v in self.settings.items() if k != "device"}
        return digest([header["zeroseg"], header["inferer"], header["settings"], weights, given])

    def load(self) -> dict[str, Any]:
        """Load the model; returns the ``header`` of the manifest, ``fingerprint`` and ``seconds`` it took.

        Raises:
            ZeroSegError: a setting or the weights are wrong.
        """
        return {"header": self.runner.header(), "fingerprint": self.fingerprint, "seconds": self.load_seconds}

    def work(self, job: Job) -> dict[str, Any]:
        """Do a job, unless it was done before with the same input, prompt, settings and weights.

        Returns:
            ``entries`` of the manifest, one per case; ``skipped``; and ``defect``, the traceback of a fault of the
            program, or None.
        """
        key, entries, defect = None, [], None
        try:
            # What is drawn is told by what its file holds, not by its name.
            drawn = {n: file_sha256(p) for n in DRAWN if n in job.prompt and (p := Path(job.prompt[n])).is_file()}
            key = digest([job.identity(), job.prompt | drawn, self.fingerprint])
            before = read_record(self.output, job.stem)
            if before and before["key"] == key and self._stands(before["entries"]):
                return {"entries": before["entries"], "skipped": True, "defect": None}
            with job.cases() as cases:
                for case in cases:
                    entries.append(self.runner.segment_case(case, job.prompt, self.output))
        except ZeroSegError as error:
            entries.append(failed(job.stem, str(error)))
        except OSError as error:
            entries.append(failed(job.stem, f"cannot read or write: {error.strerror or error}"))
        except Exception as error:  # of thousands of cases one must not stop the others; it is shown, not hidden
            defect = traceback.format_exc()
            entries.append(
                failed(job.stem, f"a fault of the program, please report it: {type(error).__name__}: {error}")
            )
        if key is not None:  # an input that cannot be reached today says nothing about what was done before
            record = {"key": key, "fingerprint": self.fingerprint, "entries": entries}
            try:
                write_json(record_path(self.output, job.stem), record)
            except ZeroSegError as error:
                entries = [failed(job.stem, str(error))]
        return {"entries": entries, "skipped": False, "defect": defect}

    def _stands(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a record still speaks for the job: its files are there, and a failure is not to be retried."""
        if any(entry["status"] == "failed" for entry in entries):
            return not self.retry_failed
        return all((self.output / name).is_file() for entry in entries for name in entry["files"])
