"""Segmentation by clicks, boxes, strokes and masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.infers.base import ZeroSegTask
from lib.prompts import drawn, region_of, uploaded, window_of
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import from_viewer
from zeroseg.segmentation import Segmentation


class Points(ZeroSegTask):
    """``foreground`` and ``background`` clicks as OHIF and 3D Slicer send them: voxel indices (i, j, k) of the image shown.

    Both viewers show the file's own voxel order, which is that of ``zeroseg.io``: no flip between LPS and RAS comes between.
    ``roi`` bounds the answer, and is the box where nothing else says where the object is; a label map sent along holds strokes or
    an answer to start from, see ``lib.prompts``; ``candidate`` picks one of three nested answers.
    """

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        image = entry.image
        region = region_of(options.get("roi"), image)
        prompt: dict[str, Any] = {**drawn(options, image)}
        box = options.get("box") or region
        prompt |= from_viewer(
            options.get("foreground"), options.get("background"), box, image.is_volume, drawn=bool(prompt)
        )
        if options["candidate"] != "best":
            prompt["candidate"] = int(options["candidate"])
        wanted = [p for p, kind in zip(prompt.get("points", ()), prompt.get("labels", ()), strict=True) if kind]
        if region is not None:
            _check_inside(wanted, region)
        at = None
        if image.is_volume and options["extent"] == "slice":
            at = self._slice(prompt, wanted)
        rule = "points" if "points" in prompt or "scribbles" in prompt or "mask" in prompt else "box"
        result = self.engine.segment(entry, rule, at, {"refine": options["refine"]}, **prompt)
        if region is not None:
            outside = np.ones(result.labels.shape, bool)
            outside[window_of(region, image.is_volume)] = False
            result.labels[outside] = 0
        return result

    def _slice(self, prompt: dict[str, Any], wanted: list[list[float]]) -> int:
        """The slice of a volume that is meant: of the last click, or with most strokes or mask, or in the middle of the box."""
        axis = self.engine.inferer.slice_axis % 3
        if wanted:
            return round(wanted[-1][axis])
        for name in ("scribbles", "mask"):
            if name in prompt:
                others = tuple(a for a in range(3) if a != axis)
                return int(np.count_nonzero(prompt[name], others).argmax())
        return round((prompt["box"][axis] + prompt["box"][axis + 3]) / 2)

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """The segment picked in 3D Slicer names the answer; OHIF gives it to the label picked there."""
        if not result.labels.any():
            return {}
        picked = options.get("selected_label_name") or (options.get("label") if uploaded(options) is None else None)
        return {picked if isinstance(picked, str) and picked else "object": 1}


class Scribbles(Points):
    """The same for 3D Slicer's panel of scribbles, which sends the strokes as a label map."""

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        if uploaded(options) is None and not options.get("roi"):
            raise ZeroSegError("no label map was sent: draw scribbles on the object, and on the background beside it")
        return super().segment(entry, options)


def _check_inside(clicks: list[list[float]], region: list[int]) -> None:
    half = len(region) // 2
    for click in clicks:
        if not all(a - 0.5 <= v <= b + 0.5 for a, v, b in zip(region[:half], click, region[half:], strict=True)):
            raise ZeroSegError(f"the click {click} lies outside the roi: move the roi, or remove it")
