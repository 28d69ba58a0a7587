"""An Orthanc of its own, for samples and tests: a DICOMweb server that this machine alone reaches."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom
import requests

from processes import running
from zeroseg.cli.serve import free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def missing() -> str | None:
    """Why no Orthanc can be started here; None when one can."""
    if program() is None or not PLUGIN.exists():
        return (
            "Orthanc or its DICOMweb plugin is not installed: sh scripts/install_e2e.sh, as root, on Debian or Ubuntu"
        )
    return None


def program() -> str | None:
    return shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")


@dataclass
class Orthanc:
    """A running server.

    Attributes:
        url: http://127.0.0.1:<port>.
        process: of the server.
    """

    url: str
    process: subprocess.Popen

    @property
    def dicom_web(self) -> str:
        """Root of its DICOMweb services."""
        return f"{self.url}/dicom-web"

    def push(self, folder: Path) -> None:
        """Store every file of a folder."""
        for file in sorted(folder.iterdir()):
            self.store(file.read_bytes())

    def store(self, content: bytes) -> None:
        """Store one DICOM file."""
        answer = requests.post(f"{self.url}/instances", data=content, timeout=30)
        answer.raise_for_status()

    def instances(self, **attributes: str) -> list[pydicom.Dataset]:
        """All instances with the given attributes, as stored; e.g. ``Modality="SEG"``."""
        query = {"Level": "Instance", "Query": attributes}
        found = requests.post(f"{self.url}/tools/find", json=query, timeout=30)
        found.raise_for_status()
        files = [requests.get(f"{self.url}/instances/{one}/file", timeout=30).content for one in found.json()]
        return [pydicom.dcmread(io.BytesIO(content)) for content in files]


@contextmanager
def orthanc(folder: Path, patience: float = 60, port: int = 0) -> Iterator[Orthanc]:
    """Start Orthanc and stop it at the end of the block.

    Args:
        folder: for its configuration, store and log; made when missing.
        patience: seconds to wait until it answers.
        port: where it listens; 0: a free one.

    Raises:
        RuntimeError: it did not start; the message holds the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = port or free_port("127.0.0.1"), folder / "orthanc.log"
    settings = {
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,  # it listens everywhere, and answers this machine only
        "AuthenticationEnabled": False,
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full", "SeriesMetadata": "Full"},
    }
    configuration = folder / "orthanc.json"
    configuration.write_text(json.dumps(settings, indent=1))
    url = f"http://127.0.0.1:{port}"
    with running([program(), str(configuration)], log, f"{url}/dicom-web/studies", patience) as process:
        yield Orthanc(url, process)
