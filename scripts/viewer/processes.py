"""A server as a process of its own: started, waited for, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    url: str,
    patience: float,
    environment: Mapping[str, str] | None = None,
    alive: Sequence[int] = (200,),
) -> Iterator[subprocess.Popen]:
    """Start a server in a process group of its own and stop the group at the end of the block.

    Args:
        command: program and arguments.
        log: file that receives all it prints.
        url: what it answers once it has started.
        patience: seconds to wait for that.
        environment: of the process; this process's own by default.
        alive: status codes that count as an answer.

    Raises:
        RuntimeError: it did not start; the message holds the end of its log.
    """
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + patience
        while not _answers(url, alive):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{log.stem} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # the group: a batch runs in a process of its own
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str, alive: Sequence[int]) -> bool:
    try:
        return requests.get(url, timeout=5).status_code in alive
    except requests.RequestException:
        return False
