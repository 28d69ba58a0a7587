"""Segmentation by clicks."""

from __future__ import annotations

import math
from typing import Any

from lib.infers.base import ZeroSegTask
from lib.sources import OpenImage
from zeroseg.attention import Segmentation
from zeroseg.errors import ZeroSegError


class Points(ZeroSegTask):
    """``foreground`` and ``background`` clicks as OHIF and 3D Slicer send them: voxel indices (i, j, k) of the image shown.

    Both viewers show the file's own voxel order, which is that of ``zeroseg.io``: no flip between LPS and RAS comes between.
    """

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        volume = entry.image.is_volume
        wanted, unwanted = (_clicks(name, options.get(name), volume) for name in ("foreground", "background"))
        box = _box(options.get("box") or None, volume)
        if not wanted and box is None:
            raise ZeroSegError("no click was given: place at least one point on the object")
        prompt: dict[str, Any] = {}
        if wanted:
            prompt = {"points": wanted + unwanted, "labels": [1] * len(wanted) + [0] * len(unwanted)}
        if box is not None:
            prompt["box"] = box
        at = None
        if volume and options["extent"] == "slice":
            axis = self.engine.inferer.slice_axis % 3
            at = round(wanted[-1][axis]) if wanted else round(box[axis])
            if wanted:
                kept = [i for i, p in enumerate(prompt["points"]) if round(p[axis]) == at]
                prompt = {**prompt, **{k: [prompt[k][i] for i in kept] for k in ("points", "labels")}}
        rule = "points" if wanted else "box"
        return self.engine.segment(entry, rule, at, {"refine": options["refine"]}, **prompt)


def _clicks(name: str, points: Any, volume: bool) -> list[list[float]]:
    """Clicks as the inferer takes them: (x, y, z) in a volume, (x, y) in a picture, where a viewer adds the slice 0.

    Raises:
        ZeroSegError: they are not a list of points.
    """
    if points is None:
        return []
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) in (2, 3) for p in points):
        raise ZeroSegError(f"{name} must be a list of voxel indices [[i, j, k]], not {points!r}")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for p in points for v in p):
        raise ZeroSegError(f"{name} must hold numbers only, not {points!r}")
    if not all(math.isfinite(v) and abs(v) < 1e9 for p in points for v in p) or (
        volume and any(len(p) < 3 for p in points)
    ):
        raise ZeroSegError(f"{name} must hold voxel indices of the image, i, j, k in a volume, not {str(points)[:200]}")
    if not volume and any(len(p) == 3 and round(p[2]) != 0 for p in points):
        raise ZeroSegError(
            f"{name}: the image has one slice, so k must be 0, not {[p[2] for p in points if len(p) == 3]}"
        )
    return points if volume else [p[:2] for p in points]


def _box(box: Any, volume: bool) -> list[float] | None:
    """A box as the inferer takes it.

    Raises:
        ZeroSegError: it is not a list of as many finite numbers as a box has.
    """
    count = 6 if volume else 4
    numbers = isinstance(box, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
    if box is not None and not (numbers and len(box) == count and all(math.isfinite(v) and abs(v) < 1e9 for v in box)):
        raise ZeroSegError(f"box must be a list of {count} voxel indices, first corner then last, not {str(box)[:200]}")
    return box
