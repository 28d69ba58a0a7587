"""Serve ZeroSeg to OHIF and 3D Slicer: a MONAI Label server with the ZeroSeg app.

    zeroseg serve                                                 sample images, to try 3D Slicer with
    zeroseg serve --studies /data/images                          a folder: NIfTI, NRRD, DICOM folders, PNG, JPEG
    zeroseg serve --studies http://127.0.0.1:8042/dicom-web       a DICOMweb server (Orthanc ...), for OHIF

The server answers on this machine only. A server that others reach needs an authenticating proxy in front of it, see
monailabel_app/README.md; --host then names the address to listen on. MONAI Label and the app, monailabel_app of the
repository, are not in the package: make install sets up both.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from zeroseg.cli.parser import Parser
from zeroseg.errors import ZeroSegError
from zeroseg.places import BUNDLE


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--studies", help="folder of images, or URL of a DICOMweb server (default: sample images)")
    parser.add_argument(
        "--modalities", default="CT,MR,CR,DX,US", help="shown of a DICOMweb server (default %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="port; 0 takes a free one (default 8000)")
    parser.add_argument("--backbone", help="embedded (default), the folder of a Stable Diffusion pipeline, or a hub id")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:0 or mps")
    parser.add_argument("--dtype", help="fp32 (default), bf16 or fp16 (GPU)")
    parser.add_argument(
        "--cache-mb",
        type=whole(0),
        help="memory for encoded slices, as much for images and for volumes of the tumour task (default 1024)",
    )
    parser.add_argument("--threads", type=whole(1, 1024), help="threads of an inference (default: torch's choice)")
    parser.add_argument(
        "--resolution", type=whole(1), help="side in pixels a slice is resized to (default: the backbone's own)"
    )
    parser.add_argument(
        "--strategy",
        choices=("uncertain", "diverse", "first", "random"),
        help="which image comes next where a viewer asks for a random one, as OHIF does (default uncertain)",
    )
    parser.add_argument("--app", help="folder monailabel_app (default: the one of the checkout, or $ZEROSEG_APP)")
    parser.add_argument("--verbose", action="store_true", help="log every request")


def run(args: argparse.Namespace) -> int:
    app = find_app(args.app)
    remote = args.studies is not None and args.studies.startswith(("http://", "https://"))
    if args.studies is None:
        args.studies = str(sample_studies(app.parent / "out" / "serve"))
    elif not remote and not Path(args.studies).is_dir():
        raise ZeroSegError(f"{args.studies} is neither a folder nor a URL: give one of them, --studies")
    try:
        with bound(args.host, args.port) as probe:
            args.port = probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ZeroSegError(f"port {args.port} of {args.host} is taken: choose another one, --port") from error
        where = f"port {args.port} of {args.host}"
        raise ZeroSegError(f"cannot listen on {where} ({error.strerror}): give others, --host, --port") from error
    check_limits()
    # MONAI Label lists CT only unless told otherwise; the app asks for a list of modalities one by one.
    os.environ.setdefault("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", json.dumps({"Modality": args.modalities.split(",")}))

    studies = args.studies if remote else str(Path(args.studies).resolve())
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", studies]
    command += ["--host", args.host, "--port", str(args.port), "--verbose", "INFO" if args.verbose else "WARNING"]
    for name in ("backbone", "revision", "device", "dtype", "cache_mb", "threads", "resolution", "strategy"):
        value = getattr(args, name)
        if value is not None:
            folder = name == "backbone" and Path(value).is_dir()
            command += ["--conf", name, str(Path(value).resolve()) if folder else str(value)]
    print_addresses(args, remote)
    # MONAI Label reads a .env file from the folder it is started in, whatever lies about there; the root has none.
    os.chdir(os.sep)
    os.execv(sys.executable, command)


def find_app(given: str | None) -> Path:
    """The folder of the app: the one given, that of the environment's ``ZEROSEG_APP``, or the one beside the bundle.

    Raises:
        ZeroSegError: it is not there, or MONAI Label is not installed.
    """
    app = Path(given or os.environ.get("ZEROSEG_APP") or BUNDLE.parent / "monailabel_app").expanduser().resolve()
    if not (app / "main.py").is_file():
        raise ZeroSegError(f"there is no app in {app}: give the folder monailabel_app of the repository, --app")
    if find_spec("monailabel") is None:
        raise ZeroSegError(
            "MONAI Label is not installed: pip install 'zeroseg[app]', then pip install --no-deps monailabel pydicom-seg"
        )
    return app


def print_addresses(args: argparse.Namespace, remote: bool) -> None:
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{host}:{args.port}"
    print(f"ZeroSeg serves {args.studies}")
    print(f"  3D Slicer   MONAI Label module, server {address}")
    if remote:
        print(f"  OHIF        {address}/ohif/  (choose a study, then MONAI Label)")
    else:
        print("  OHIF        needs a DICOMweb server: --studies http://.../dicom-web")
    print(f"  API         {address}/\nCtrl+C stops it.", flush=True)


def sample_studies(folder: Path) -> Path:
    """The demo's real sample images, copied once: MONAI Label keeps its labels beside the images."""
    from zeroseg.samples import sample_files

    folder.mkdir(parents=True, exist_ok=True)
    for file in sample_files():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder


def check_limits() -> None:
    """Read the limits that the environment sets, which the server would read at every request.

    Raises:
        ZeroSegError: one is no positive whole number.
    """
    from zeroseg.io.limits import PIXELS_VARIABLE, VOXELS_VARIABLE, limit_of

    for variable in ("ZEROSEG_MAX_UPLOAD_MB", VOXELS_VARIABLE, PIXELS_VARIABLE):
        limit_of(variable, 1)


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to an address, IPv4 or IPv6, or a name of one; port 0 is a free one.

    Raises:
        OSError: there is no such address on this machine, or the port is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    probe = socket.socket(family, kind, protocol)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
    except OSError:
        probe.close()
        raise
    return probe


def free(host: str, port: int) -> bool:
    try:
        bound(host, port).close()
    except OSError:
        return False
    return True


def free_port(host: str) -> int:
    with bound(host, 0) as probe:
        return probe.getsockname()[1]


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads a whole number in a range from a command line."""

    def read(word: str) -> int:
        value = int(word) if word.removeprefix("-").isdecimal() else None
        if value is None or value < low or (high is not None and value > high):
            span = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{word[:40]!r} is no whole number {span}")
        return value

    return read
