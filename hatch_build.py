"""Puts the bundle's configs and embedded weights into a wheel; an editable install finds them in the checkout."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundleFiles(BuildHookInterface):
    """``bundle/configs`` -> ``zeroseg/bundle/configs`` and so on, where ``zeroseg.places`` looks for them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"] = {
                f"bundle/{name}": f"zeroseg/bundle/{name}" for name in ("configs", "models", "docs", "LICENSE")
            }
