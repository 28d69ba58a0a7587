#!/usr/bin/env python
"""Serve ZeroSeg to OHIF and 3D Slicer: a MONAI Label server with the ZeroSeg app.

    python scripts/serve.py                                          sample images, to try 3D Slicer with
    python scripts/serve.py --studies /data/images                   a folder: NIfTI, NRRD, DICOM folders, PNG, JPEG
    python scripts/serve.py --studies http://127.0.0.1:8042/dicom-web    a DICOMweb server (Orthanc ...), for OHIF

The server answers on this machine only. A server that others reach needs an authenticating proxy in front of it, see
monailabel_app/README.md; --host then names the address to listen on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from _path import ROOT

APP = ROOT / "monailabel_app"


def main() -> None:
    args = parse_args()
    remote = args.studies is not None and args.studies.startswith(("http://", "https://"))
    if args.studies is None:
        args.studies = str(sample_studies(ROOT / "out" / "serve"))
    elif not remote and not Path(args.studies).is_dir():
        sys.exit(f"serve: {args.studies} is neither a folder nor a URL: give one of them, --studies")
    if not free(args.host, args.port):
        sys.exit(f"serve: port {args.port} of {args.host} is taken: choose another one, --port")
    if args.port == 0:
        args.port = free_port(args.host)
    # MONAI Label lists CT only unless told otherwise; the app asks for a list of modalities one by one.
    os.environ.setdefault("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", json.dumps({"Modality": args.modalities.split(",")}))
    os.environ.setdefault("MONAI_LABEL_TASKS_TRAIN", "false")
    os.environ.setdefault("MONAI_LABEL_TASKS_SCORING", "false")

    studies = args.studies if remote else str(Path(args.studies).resolve())
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(APP), "--studies", studies]
    command += ["--host", args.host, "--port", str(args.port), "--verbose", "INFO" if args.verbose else "WARNING"]
    for name in ("backbone", "revision", "device", "dtype", "cache_mb", "threads", "resolution", "bundle"):
        value = getattr(args, name)
        if value is not None:
            value = (
                str(Path(value).resolve()) if name in ("backbone", "bundle") and Path(value).is_dir() else str(value)
            )
            command += ["--conf", name, value]
    print_addresses(args, remote)
    # MONAI Label reads a .env file from the folder it is started in; an empty one has none, whatever lies about here.
    os.chdir(tempfile.mkdtemp(prefix="zeroseg-serve-"))
    os.execv(sys.executable, command)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", help="folder of images, or URL of a DICOMweb server (default: sample images)")
    parser.add_argument(
        "--modalities", default="CT,MR,CR,DX,US", help="shown of a DICOMweb server (default %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default 8000)")
    parser.add_argument("--backbone", help="embedded (default), the folder of a Stable Diffusion pipeline, or a hub id")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:0 or mps")
    parser.add_argument("--dtype", help="fp32 (default), bf16 or fp16 (GPU)")
    parser.add_argument(
        "--cache_mb",
        type=int,
        help="memory for encoded slices, as much for images and for volumes of the tumour task (default 1024)",
    )
    parser.add_argument("--threads", type=int, help="threads of an inference (default: torch's choice)")
    parser.add_argument(
        "--resolution", type=int, help="side in pixels a slice is resized to (default: the backbone's own)"
    )
    parser.add_argument("--bundle", help="folder of the bundle (default: the one beside the app)")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    return parser.parse_args()


def print_addresses(args: argparse.Namespace, remote: bool) -> None:
    address = f"http://{args.host}:{args.port}"
    print(f"ZeroSeg serves {args.studies}")
    print(f"  3D Slicer   MONAI Label module, server {address}")
    if remote:
        print(f"  OHIF        {address}/ohif/  (choose a study, then MONAI Label)")
    else:
        print("  OHIF        needs a DICOMweb server: --studies http://.../dicom-web")
    print(f"  API         {address}/\nCtrl+C stops it.", flush=True)


def sample_studies(folder: Path) -> Path:
    """The demo's real sample images, copied once: MONAI Label keeps its labels beside the images."""
    from demo import sample_files

    folder.mkdir(parents=True, exist_ok=True)
    for file in sample_files():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder


def free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
