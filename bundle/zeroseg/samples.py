"""Real images that arrive inside the installed packages: for the demo, the tutorial and a first look at the server."""

from __future__ import annotations

from pathlib import Path

import nibabel
import skimage
from pydicom.data import get_testdata_file


def sample_files() -> list[Path]:
    """Real images inside scikit-image, pydicom and nibabel; those a distribution leaves out are skipped."""
    pictures = Path(skimage.__file__).parent / "data"
    files = [pictures / name for name in ("cell.png", "ihc.png", "microaneurysms.png", "retina.jpg")]
    files += [Path(str(get_testdata_file(name, download=False))) for name in ("CT_small.dcm", "MR_small.dcm")]
    files.append(Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii")
    return [f for f in files if f.is_file()]
