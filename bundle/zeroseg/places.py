"""Where the bundle's own files are: in a checkout or a copied bundle folder beside the package, in a wheel inside of it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSIDE = _PACKAGE / "bundle"

BUNDLE = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent
"""The bundle's root, with ``configs`` and ``models`` in it."""
CONFIGS = BUNDLE / "configs"
MODELS = BUNDLE / "models"
