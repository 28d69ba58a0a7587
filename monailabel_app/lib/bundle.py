"""Finds the bundle and puts its package on the path; imported before anything of `zeroseg` is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from monailabel.config import settings


def bundle_root() -> Path:
    """The bundle's folder: ``--conf bundle PATH``, else the environment's ``ZEROSEG_BUNDLE``, else ``bundle`` beside the app.

    Raises:
        FileNotFoundError: the folder holds no ``zeroseg`` package.
    """
    beside = Path(__file__).resolve().parents[2] / "bundle"
    chosen = settings.MONAI_LABEL_APP_CONF.get("bundle") or os.environ.get("ZEROSEG_BUNDLE") or beside
    root = Path(chosen).expanduser().resolve()
    if not (root / "zeroseg" / "__init__.py").is_file():
        raise FileNotFoundError(f"{root} is no ZeroSeg bundle: give its folder, --conf bundle PATH")
    return root


ROOT = bundle_root()
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
