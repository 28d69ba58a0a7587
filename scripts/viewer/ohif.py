#!/usr/bin/env python
"""OHIF with something to click on: an Orthanc with sample studies, and the ZeroSeg server in front of it.

    python scripts/viewer/ohif.py [--port 8000] [--folder out/ohif] [OPTIONS OF zeroseg serve]

The studies are a brain MR and an echo-planar MR that arrive inside nibabel, and a drawn abdominal CT, written as DICOM. Both
servers answer on this machine only; Ctrl+C stops them. What was stored stays in the folder for the next time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from dicom_studies import Series, oblique, write
from orthanc import missing, orthanc
from processes import running
from zeroseg.cli.parser import guarded
from zeroseg.cli.serve import free, free_port
from zeroseg.errors import ZeroSegError
from zeroseg.signals import sigterm_like_ctrl_c

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--port", type=int, default=8000, help="of the ZeroSeg server; 0 takes a free one (default 8000)"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "ohif", help="for the store and the logs (default out/ohif)"
    )
    args, options = parser.parse_known_args()
    return guarded(lambda: run(args.port, args.folder, options))


def run(port: int, folder: Path, options: list[str]) -> int:
    """Start both servers and wait for the second.

    Raises:
        ZeroSegError: Orthanc is not installed, or the port is taken.
    """
    lack = missing()
    if lack:
        raise ZeroSegError(lack)
    if not free("127.0.0.1", port):
        raise ZeroSegError(f"port {port} is taken: choose another one, make ohif PORT=8001")
    port = port or free_port("127.0.0.1")
    folder.mkdir(parents=True, exist_ok=True)
    with sigterm_like_ctrl_c(), orthanc(folder) as store, tempfile.TemporaryDirectory() as scratch:
        studies = sample_studies(Path(scratch))
        for study in studies:
            store.push(study.folder)
        command = [
            sys.executable,
            str(ROOT / "scripts" / "serve.py"),
            "--studies",
            store.dicom_web,
            "--port",
            str(port),
            *options,
        ]
        address = f"http://127.0.0.1:{port}"
        print("starting ...", flush=True)
        with running(command, folder / "server.log", f"{address}/info/", patience=300) as server:
            print(f"open  {address}/ohif/monai-label?StudyInstanceUIDs={studies[0].study}")
            print("      the refresh button of the panel MONAI Label connects; other studies: /ohif/", flush=True)
            return server.wait()


def sample_studies(folder: Path) -> list[Series]:
    """Write the sample studies as DICOM; the first is the one to open."""
    data = Path(nib.__file__).parent / "tests" / "data"
    studies = [abdomen(folder / "ct")]
    for name, file in (("Brain MR of nibabel", "anatomical.nii"), ("EPI of nibabel", "example4d.nii.gz")):
        if (data / file).is_file():
            studies.append(from_nifti(folder / file, data / file, name))
    return studies


def from_nifti(folder: Path, file: Path, name: str) -> Series:
    """A volume, of a series of volumes the first, as an MR study."""
    image = nib.load(file)
    volume, affine = np.asarray(image.dataobj, np.float64), image.affine.copy()
    volume = volume[..., 0] if volume.ndim == 4 else volume
    # DICOM's slices are stacked along the cross product of rows and columns.
    if np.linalg.det(affine[:3, :3]) < 0:
        volume = volume[..., ::-1]
        affine[:3, 3] += affine[:3, 2] * (volume.shape[2] - 1)
        affine[:3, 2] *= -1
    return write(folder, "MR", np.rint(volume), affine, range(1, volume.shape[2] + 1), name=name)


def abdomen(folder: Path, size: int = 160, slices: int = 24) -> Series:
    """A drawn CT: a trunk with a liver, two kidneys, a spine, and a round mass in the liver."""
    x, y, z = np.ogrid[:size, :size, :slices]
    x, y, z = x / size - 0.5, y / size - 0.5, z / slices - 0.5

    def ellipsoid(centre, radii) -> np.ndarray:
        return sum(((v - c) / r) ** 2 for v, c, r in zip((x, y, z), centre, radii, strict=True)) < 1

    volume = np.full((size, size, slices), -1000.0)
    mass = ellipsoid((-0.2, -0.02, 0.05), (0.06, 0.06, 0.25))
    for where, hounsfield in (
        (ellipsoid((0, 0, 0), (0.42, 0.33, 9)), -90),
        (ellipsoid((0, 0, 0), (0.38, 0.29, 9)), 40),
        (ellipsoid((-0.17, -0.04, 0), (0.19, 0.17, 0.6)), 100),
        (ellipsoid((-0.2, 0.15, -0.1), (0.055, 0.07, 0.4)), 160),
        (ellipsoid((0.2, 0.15, -0.1), (0.055, 0.07, 0.4)), 160),
        (ellipsoid((0, 0.17, 0), (0.06, 0.06, 9)), 400),
        (mass, 30),
    ):
        volume[where] = hounsfield
    volume += np.random.default_rng(0).normal(0, 8, volume.shape)
    affine = oblique((2.0, 2.0, 4.0), (0, 0), (160, 160, -48))
    return write(folder, "CT", np.rint(volume), affine, range(1, slices + 1), object=mass, name="Drawn abdomen")


if __name__ == "__main__":
    raise SystemExit(main())
