"""A real server process for tests: started on a free port, waited for, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from processes import running
from zeroseg.cli.serve import free_port

SERVE = Path(__file__).resolve().parents[1] / "scripts" / "serve.py"


@dataclass
class Server:
    """A running server.

    Attributes:
        url: http://127.0.0.1:<port>, without a slash at the end.
        process: of the server itself.
        log: file that receives all it prints.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def alive(self) -> bool:
        """Whether the process runs and answers."""
        return self.process.poll() is None and requests.get(f"{self.url}/info/", timeout=30).status_code == 200

    def memory(self) -> int:
        """Resident memory of the process in bytes."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def serving(
    studies: str | Path,
    folder: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    patience: float = 300,
) -> Iterator[Server]:
    """Start ``scripts/serve.py`` and stop it at the end of the block.

    Args:
        studies: folder or DICOMweb URL.
        folder: where the log, the sessions and the DICOM cache go; made when missing.
        options: further options of ``scripts/serve.py``.
        environment: variables beside this process's own.
        patience: seconds to wait until the server answers.

    Raises:
        RuntimeError: it did not start; the message holds the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port("127.0.0.1"), folder / "server.log"
    command = [sys.executable, str(SERVE), "--studies", str(studies), "--port", str(port), *options]
    own = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "dicom"),
        **(environment or {}),
    }
    url = f"http://127.0.0.1:{port}"
    with running(command, log, f"{url}/info/", patience, own, alive=(200, 401)) as process:
        yield Server(url, process, log)
