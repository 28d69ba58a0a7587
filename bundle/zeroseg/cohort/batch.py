#!/usr/bin/env python
"""Segment a cohort: a folder, a CSV of paths, or the series of a DICOMweb server, on several processes or a cluster.

    python scripts/batch.py IMAGES --output_dir OUT --workers 4
    python scripts/batch.py cohort.csv --output_dir OUT --config inference_tumor.yaml --set organ=liver
    python scripts/batch.py http://127.0.0.1:8042/dicom-web --output_dir OUT --modality CT --filter StudyDate=20260101-

Every case gets the files that ``python -m monai.bundle run`` writes, and manifest.json lists them all. --set gives any
setting of the config, as on the bundle's command line. The columns of a CSV: path, and as needed case, select, points,
labels, box, text (tumour config: organ, tumor, modality).

The same command again takes up where the last one ended: what is done is known by the SHA-256 of its input (DICOMweb: the
UIDs of its instances), its prompt, the settings and the weights, and is skipped. A case that fails is listed with its
reason and stays failed until something about it changes or --retry-failed is given. A worker that dies is replaced, and
its case begun again, once.

Ray runs the workers (one loaded model each) on this machine, reachable from this machine only and with a token of its
own; --address joins a cluster instead. There the images, the output folder and this repository with its environment must
lie at the same paths on every node.

Exit code: 0; 2 when something the user can mend went wrong, failed cases included; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from zeroseg.cli.parser import Parser, end
from zeroseg.cohort.records import failed, read_record, remove_leftovers, sole_writer
from zeroseg.errors import ZeroSegError

if TYPE_CHECKING:  # what is heavy is imported after the arguments are read
    from zeroseg.cohort.jobs import Job


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end(
        lambda: 2 if run(parse_args()) else 0,
        interrupted="interrupted; finished cases are complete, the same command goes on",
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("input", help="folder, image, .csv, or URL of DICOMweb services")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the results")
    parser.add_argument("--config", default="inference.yaml", help="of the bundle, or a path (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; may be repeated")
    parser.add_argument("--prompts", help="prompts.json, as the bundle takes it")
    parser.add_argument("--retry-failed", action="store_true", help="do failed cases again")
    server = parser.add_argument_group("DICOMweb (a login is taken from ~/.netrc)")
    server.add_argument("--study", help="study instance UID")
    server.add_argument("--modality", help="such as CT")
    server.add_argument(
        "--filter", action="append", default=[], metavar="KEYWORD=VALUE", help="any attribute, e.g. PatientID=17"
    )
    pool = parser.add_argument_group("workers")
    pool.add_argument("--workers", type=int, default=1, help="processes, each with a model (default %(default)s)")
    pool.add_argument(
        "--cpus-per-worker", type=float, help="cores (and threads) of each (default: this machine's, shared out)"
    )
    pool.add_argument(
        "--gpus-per-worker", type=float, default=0, help="GPUs of each, 0.5 for two on one; 0, the default, hides them"
    )
    pool.add_argument("--address", help="of a Ray cluster (default: this machine)")
    args = parser.parse_args(arguments)
    if args.cpus_per_worker is None:
        args.cpus_per_worker = max(1, len(os.sched_getaffinity(0)) // max(1, args.workers))
    return args


def run(args: argparse.Namespace) -> int:
    """Do the whole cohort and return how many cases failed.

    Raises:
        ZeroSegError: nothing could be begun, or a worker could not load the model.
    """
    from zeroseg.cohort.worker import build_runner, find_config, parse_settings
    from zeroseg.cohort.jobs import list_jobs

    if args.workers < 1 or args.cpus_per_worker <= 0 or args.gpus_per_worker < 0:
        raise ZeroSegError("--workers must be at least 1, --cpus-per-worker above 0, --gpus-per-worker 0 or more")
    if args.address:
        _check_reachable(args.address)
    output = args.output_dir.resolve()
    if Path(args.input).resolve() == output:
        raise ZeroSegError("output_dir is the input folder: give another one")
    plan = (find_config(args.config), parse_settings(args.set), output)
    keys = build_runner(*plan).prompt_keys  # and a wrong setting is found before anything is started
    source = (
        args.input if "://" in args.input else os.path.abspath(args.input)
    )  # other nodes have other working folders
    jobs, unused = list_jobs(source, args.prompts, keys, exclude=output, filters=_filters(args))
    if unused:
        print(f"zeroseg: warning: prompts for {', '.join(unused)} match no case", file=sys.stderr)
    with ExitStack() as stack:
        stack.enter_context(sole_writer(output))
        report = Report(args, output, jobs, unused)
        stack.callback(report.write)  # when the workers have ended, whatever ended them
        workers = stack.enter_context(started_workers(args, *plan, args.retry_failed))
        for job, result in results(workers, jobs):
            report.add(job, result)
    return report.summary()


class Report:
    """What became of the jobs: progress on the terminal and the manifest of the run.

    Args:
        args: the command line.
        output: folder of the results.
        jobs: all jobs of the cohort, in the manifest's order.
        unused: names of prompts that match no job.
    """

    def __init__(self, args: argparse.Namespace, output: Path, jobs: Sequence[Job], unused: Sequence[str]):
        self.args, self.output, self.jobs, self.unused = args, output, jobs, unused
        self.started = time.gmtime()
        self.begun = self.ready = self.last = (
            time.perf_counter()
        )  # ready: the first model is loaded; last: answer of a job
        self.header: dict[str, Any] | None = None
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
        from zeroseg.io import write_json

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
        manifest = {
            **self.header,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", self.started),
            "unused_prompts": list(self.unused),
            "batch": {
                "workers": self.args.workers,
                "cpus_per_worker": self.args.cpus_per_worker,
                "gpus_per_worker": self.args.gpus_per_worker,
                "load_seconds": self.load_seconds,
                "start_seconds": round(self.ready - self.begun, 3),
                "work_seconds": round(max(0.0, self.last - self.ready), 3),
                "skipped": self.skipped,
            },
            "cases": entries,
        }
        write_json(self.output / "manifest.json", manifest)

    def summary(self) -> int:
        """Print the result and return the number of failed cases."""
        total = sum(len(entries) for entries in self.entries.values())
        before = f" ({self.skipped} known from before)" if self.skipped else ""
        retry = "; --retry-failed does the failed ones again" if self.failed else ""
        print(
            f"{total - self.failed} of {total} cases segmented{before}; results and manifest.json are in {self.output}{retry}"
        )
        return self.failed


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
def started_workers(args: argparse.Namespace, *plan: Any) -> Iterator[list[Any]]:
    """Start Ray, or join it, and one ``CaseWorker`` process per worker; all ends with the block.

    Args:
        args: ``workers``, ``cpus_per_worker``, ``gpus_per_worker`` and ``address``.
        plan: arguments of ``CaseWorker``.

    Raises:
        ZeroSegError: there is no Ray, no cluster at that address, or not enough CPUs or GPUs.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not args.address:
        # Ray has no documented option that binds to the loopback interface on Linux, but it does so where it takes the
        # machine for one that cannot be in a cluster. The token keeps other users of this machine out.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise ZeroSegError("Ray is not installed: pip install -r requirements.txt") from None
    from zeroseg.cohort.worker import CaseWorker

    needed = {"CPU": args.workers * args.cpus_per_worker, "GPU": args.workers * args.gpus_per_worker}
    # Ray's sockets need a short path; its logs go with the folder.
    with tempfile.TemporaryDirectory(prefix="zeroseg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        here = {
            "num_cpus": max(1, int(-(-needed["CPU"] // 1))),
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,  # only jobs and entries travel
            "_temp_dir": folder,
        }
        try:
            options = {"log_to_driver": False, "logging_level": "ERROR"} | ({} if args.address else here)
            ray.init(args.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"the cluster at {args.address}" if args.address else "on this machine"
            raise ZeroSegError(f"Ray cannot start: {where}: {str(error).splitlines()[0]}") from error
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray has set its own
        workers: list[Any] = []
        try:
            there = ray.cluster_resources()
            for kind, amount in needed.items():
                if amount > there.get(kind, 0):
                    raise ZeroSegError(
                        f"{args.workers} workers need {amount:g} {kind}s, there are {there.get(kind, 0):g}: lower --workers "
                        f"or --{kind.lower()}s-per-worker"
                    )
            resources = f"{args.cpus_per_worker:g} CPU, {args.gpus_per_worker:g} GPU"
            print(f"workers: {args.workers}, each with a model of its own, {resources}", flush=True)
            actor = ray.remote(CaseWorker).options(
                num_cpus=args.cpus_per_worker, num_gpus=args.gpus_per_worker, max_restarts=-1, max_task_retries=1
            )
            workers += [actor.remote(*plan) for _ in range(args.workers)]
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


def _filters(args: argparse.Namespace) -> dict[str, str]:
    filters = {"StudyInstanceUID": args.study, "Modality": args.modality}
    for pair in args.filter:
        keyword, separator, value = pair.partition("=")
        if not separator:
            raise ZeroSegError(f"--filter takes KEYWORD=VALUE, such as PatientID=17, not {pair!r}")
        filters[keyword] = value
    return {key: value for key, value in filters.items() if value}


if __name__ == "__main__":
    main()
