"""A whole cohort on Ray: workers with a model each, what becomes of the jobs, and the manifest of all of them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zeroseg.cohort.jobs import Job, list_jobs
from zeroseg.cohort.records import failed, read_record, remove_leftovers, sole_writer
from zeroseg.cohort.worker import CaseWorker
from zeroseg.configs import build_runner, find_config
from zeroseg.errors import ZeroSegError
from zeroseg.io import write_json


@dataclass(frozen=True)
class Cohort:
    """What is to be done, and with what.

    Attributes:
        input: folder, image, ``.csv``, or URL of DICOMweb services.
        output_dir: folder for the results.
        config: path of a config, or the name of one of the bundle's.
        settings: config id -> value.
        prompts: path of a ``prompts.json``.
        retry_failed: do failed cases again.
        filters: DICOM attributes a series of a server must have.
        workers: processes, each with a model.
        cpus_per_worker: cores of each; None: this machine's, shared out.
        gpus_per_worker: GPUs of each; 0 hides them.
        address: of a Ray cluster; None: this machine.
    """

    input: str
    output_dir: Path
    config: str = "inference.yaml"
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: str | None = None
    retry_failed: bool = False
    filters: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    cpus_per_worker: float | None = None
    gpus_per_worker: float = 0
    address: str | None = None


def run(cohort: Cohort) -> Report:
    """Do the whole cohort; the report says what became of it.

    Raises:
        ZeroSegError: nothing could be begun, or a worker could not load the model.
    """
    if cohort.cpus_per_worker is None:
        cohort = replace(cohort, cpus_per_worker=max(1, _cores() // max(1, cohort.workers)))
    if cohort.workers < 1 or cohort.cpus_per_worker <= 0 or cohort.gpus_per_worker < 0:
        raise ZeroSegError("--workers must be at least 1, --cpus-per-worker above 0, --gpus-per-worker 0 or more")
    if cohort.address:
        _check_reachable(cohort.address)
    output = cohort.output_dir.resolve()
    if Path(cohort.input).resolve() == output:
        raise ZeroSegError("output_dir is the input folder: give another one")
    plan = (find_config(cohort.config), cohort.settings, output)
    keys = build_runner(*plan).prompt_keys  # and a wrong setting is found before anything is started
    # Other nodes have other working folders.
    source = cohort.input if "://" in cohort.input else os.path.abspath(cohort.input)
    jobs, unused = list_jobs(source, cohort.prompts, keys, exclude=output, filters=cohort.filters)
    if unused:
        print(f"zeroseg: warning: prompts for {', '.join(unused)} match no case", file=sys.stderr)
    with ExitStack() as stack:
        stack.enter_context(sole_writer(output))
        report = Report(cohort, output, jobs, unused)
        stack.callback(report.write)  # when the workers have ended, whatever ended them
        workers = stack.enter_context(started_workers(cohort, *plan, cohort.retry_failed))
        for job, result in results(workers, jobs):
            report.add(job, result)
    report.print_summary()
    return report


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Report:
    """What became of the jobs: progress on the terminal and the manifest of the run.

    Args:
        cohort: what is done.
        output: folder of the results.
        jobs: all jobs of the cohort, in the manifest's order.
        unused: names of prompts that match no job.
    """

    def __init__(self, cohort: Cohort, output: Path, jobs: Sequence[Job], unused: Sequence[str]):
        self.cohort, self.output, self.jobs, self.unused = cohort, output, jobs, unused
        self.started = time.gmtime()
        # ready: the first model is loaded; last: answer of a job
        self.begun = self.ready = self.last = time.perf_counter()
        self.header: dict[str, Any] | None = None
        self.manifest: dict[str, Any] | None = None
        self.fingerprint = ""
        self.load_seconds: list[float] = []
        self.entries: dict[str, list[dict]] = {}
        self.skipped = self.failed = 0
        self.bar = tqdm(total=len(jobs), desc="cases", disable=None)

    def add(self, job: Job | None, result: Mapping[str, Any]) -> None:
        """Take in a worker's answer; ``job`` None: it has loaded its model.

        Raises:
            ZeroSegError: this worker has other weights or settings than those before it.
        """
        if job is None:
            if self.header is not None and result["fingerprint"] != self.fingerprint:
                raise ZeroSegError("workers loaded different weights or versions: every node needs the same")
            if self.header is None:
                self.ready = time.perf_counter()
            self.header, self.fingerprint = result["header"], result["fingerprint"]
            self.load_seconds.append(round(result["seconds"], 3))
            return
        self.entries[job.stem], self.last = result["entries"], time.perf_counter()
        self.skipped += result["skipped"]
        for entry in result["entries"]:
            if entry["status"] == "failed":
                self.failed += 1
                earlier = " (in an earlier run; --retry-failed does it again)" if result["skipped"] else ""
                self.bar.write(f"zeroseg: {entry['case']}: {entry['reason']}{earlier}", file=sys.stderr)
        if result["defect"]:
            self.bar.write(result["defect"], file=sys.stderr)
        self.bar.set_postfix(failed=self.failed, skipped=self.skipped, refresh=False)
        self.bar.update()

    def write(self) -> None:
        """Write the manifest of all that is done, in earlier runs with the same settings too."""
        self.bar.close()
        remove_leftovers(self.output)
        if self.header is None:  # no model was loaded: what an earlier run wrote stands
            return
        entries = []
        for job in self.jobs:
            found = self.entries.get(job.stem)
            if found is None and (record := read_record(self.output, job.stem)) is not None:
                found = record["entries"] if record["fingerprint"] == self.fingerprint else None
            entries += found or []
        self.manifest = {
            **self.header,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", self.started),
            "unused_prompts": list(self.unused),
            "batch": {
                "workers": self.cohort.workers,
                "cpus_per_worker": self.cohort.cpus_per_worker,
                "gpus_per_worker": self.cohort.gpus_per_worker,
                "load_seconds": self.load_seconds,
                "start_seconds": round(self.ready - self.begun, 3),
                "work_seconds": round(max(0.0, self.last - self.ready), 3),
                "skipped": self.skipped,
            },
            "cases": entries,
        }
        write_json(self.output / "manifest.json", self.manifest)

    def print_summary(self) -> None:
        """Say how many cases were segmented, and where the results are."""
        total = sum(len(entries) for entries in self.entries.values())
        before = f" ({self.skipped} known from before)" if self.skipped else ""
        retry = "; --retry-failed does the failed ones again" if self.failed else ""
        print(
            f"{total - self.failed} of {total} cases segmented{before}; results and manifest.json are in {self.output}{retry}"
        )


def results(workers: Sequence[Any], jobs: Sequence[Job]) -> Iterator[tuple[Job | None, dict[str, Any]]]:
    """Load the models and hand out the jobs, one at a time to every worker; answers come as they are ready.

    Args:
        workers: handles of ``CaseWorker`` actors.
        jobs: to be done, in this order.

    Yields:
        (job, what ``CaseWorker.work`` returned), and per worker (None, what ``CaseWorker.load`` returned).

    Raises:
        ZeroSegError: the model cannot be loaded.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    queue = deque(jobs)
    running: dict[Any, tuple[Any, Job | None]] = {worker.load.remote(): (worker, None) for worker in workers}
    while running:
        (done, *_), _ = ray.wait(list(running))
        worker, job = running.pop(done)
        try:
            result = ray.get(done)
        except RayActorError as error:
            if job is None:
                raise ZeroSegError(
                    "a worker died while it loaded the model: is there memory for all of them?"
                ) from error
            entry = failed(
                job.stem, "the worker died at this case, twice: most likely it needs more memory than there is"
            )
            result = {"entries": [entry], "skipped": False, "defect": None}
        except RayTaskError as error:
            raise error.cause from None
        yield job, result
        if queue:
            job = queue.popleft()
            running[worker.work.remote(job)] = (worker, job)


@contextmanager
def started_workers(cohort: Cohort, *plan: Any) -> Iterator[list[Any]]:
    """Start Ray, or join it, and one ``CaseWorker`` process per worker; all ends with the block.

    Args:
        cohort: of which ``workers``, ``cpus_per_worker`` (given), ``gpus_per_worker`` and ``address`` count.
        plan: arguments of ``CaseWorker``.

    Raises:
        ZeroSegError: there is no Ray, no cluster at that address, or not enough CPUs or GPUs.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not cohort.address:
        # Ray has no documented option that binds to the loopback interface on Linux, but it does so where it takes the
        # machine for one that cannot be in a cluster. The token keeps other users of this machine out.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise ZeroSegError("Ray is not installed: pip install 'zeroseg[batch]'") from None
    needed = {"CPU": cohort.workers * cohort.cpus_per_worker, "GPU": cohort.workers * cohort.gpus_per_worker}
    # Ray's sockets need a short path; its logs go with the folder.
    with tempfile.TemporaryDirectory(prefix="zeroseg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        here = {
            "num_cpus": max(1, int(-(-needed["CPU"] // 1))),
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,  # only jobs and entries travel
            "_temp_dir": folder,
        }
        try:
            options = {"log_to_driver": False, "logging_level": "ERROR"} | ({} if cohort.address else here)
            ray.init(cohort.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"the cluster at {cohort.address}" if cohort.address else "on this machine"
            raise ZeroSegError(f"Ray cannot start: {where}: {str(error).splitlines()[0]}") from error
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray has set its own
        workers: list[Any] = []
        try:
            there = ray.cluster_resources()
            for kind, amount in needed.items():
                if amount > there.get(kind, 0):
                    raise ZeroSegError(
                        f"{cohort.workers} workers need {amount:g} {kind}s, there are {there.get(kind, 0):g}: lower --workers "
                        f"or --{kind.lower()}s-per-worker"
                    )
            resources = f"{cohort.cpus_per_worker:g} CPU, {cohort.gpus_per_worker:g} GPU"
            print(f"workers: {cohort.workers}, each with a model of its own, {resources}", flush=True)
            actor = ray.remote(CaseWorker).options(
                num_cpus=cohort.cpus_per_worker, num_gpus=cohort.gpus_per_worker, max_restarts=-1, max_task_retries=1
            )
            workers += [actor.remote(*plan) for _ in range(cohort.workers)]
            yield workers
        finally:
            for worker in workers:
                ray.kill(worker)
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse at once what Ray would try to reach for minutes: ``host:port``, with or without ``ray://``."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ZeroSegError(f"--address takes HOST:PORT of a Ray cluster, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ZeroSegError(
            f"no Ray cluster answers at {address}: {getattr(error, 'strerror', None) or error}"
        ) from error
