"""Segmentation by clicks."""

from __future__ import annotations

from typing import Any

from lib.infers.base import ZeroSegTask
from lib.sources import OpenImage
from zeroseg.interaction.prompts import from_viewer
from zeroseg.segmentation import Segmentation


class Points(ZeroSegTask):
    """``foreground`` and ``background`` clicks as OHIF and 3D Slicer send them: voxel indices (i, j, k) of the image shown.

    Both viewers show the file's own voxel order, which is that of ``zeroseg.io``: no flip between LPS and RAS comes between.
    """

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        volume = entry.image.is_volume
        prompt = from_viewer(options.get("foreground"), options.get("background"), options.get("box"), volume)
        wanted = [p for p, kind in zip(prompt.get("points", ()), prompt.get("labels", ()), strict=True) if kind]
        at = None
        if volume and options["extent"] == "slice":
            axis = self.engine.inferer.slice_axis % 3
            at = round(wanted[-1][axis]) if wanted else round(prompt["box"][axis])
            if wanted:
                kept = [i for i, p in enumerate(prompt["points"]) if round(p[axis]) == at]
                prompt = {**prompt, **{k: [prompt[k][i] for i in kept] for k in ("points", "labels")}}
        rule = "points" if wanted else "box"
        return self.engine.segment(entry, rule, at, {"refine": options["refine"]}, **prompt)
