"""Pictures to judge a mask by: contours on the image, slices of a volume, contact sheets."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from scipy import ndimage

from zeroseg.io.writing import atomic_path

# Okabe and Ito's colours, safe for colour-blind readers, without black; label 1 gets the first.
_COLORS = np.array(
    [(240, 228, 66), (86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (0, 114, 178)],
    dtype=np.uint8,
)
_MIN_SIDE, _MAX_SIDE = 512, 1024  # px of the long side: contours of 2 px stay visible, files stay small
_TITLE_HEIGHT = 24


def draw_overlay(
    image01: np.ndarray,
    labels: np.ndarray,
    points: Sequence[Sequence[float]] | None = None,
    box: Sequence[float] | None = None,
    title: str | None = None,
    point_labels: Sequence[int] | None = None,
    legend: Mapping[int, str] | None = None,
) -> PILImage.Image:
    """Draw the labels' contours and the prompts on an image.

    Contours are 2 px wide in a colour per label, with a dark rim, so that they show on bright and dark ground. Labels
    that reach the border of the image are closed along it. The image is shown 512 to 1024 px long, whatever its size.

    Args:
        image01: (C, H, W) in [0, 1]; 3 channels are shown as RGB, any other number as the gray of their mean.
        labels: (H, W) integers, 0 is background.
        points: clicks (x, y) in pixels of the image; positive ones are drawn as discs, negative ones as crosses.
        box: (x0, y0, x1, y1) in pixels of the image.
        title: a line written above the image.
        point_labels: 1 (positive) or 0 (negative) per point; all positive if not given.
        legend: label -> its name, written above the image beside its colour.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the shapes of image and labels differ.
    """
    height, width = np.asarray(labels).shape
    longest = max(height, width)
    # A whole factor keeps pixels square.
    side = min(max(longest * math.ceil(_MIN_SIDE / longest), _MIN_SIDE), _MAX_SIDE)
    size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    picture = _contours(image01, labels, size)
    _draw_prompts(picture, (size[0] / width, size[1] / height), points, box, point_labels)
    picture = _with_legend(picture, legend) if legend else picture
    return _titled(picture, title) if title else picture


def _contours(image01: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> PILImage.Image:
    """The image at ``size`` (width, height) with the contours on it."""
    image01, labels = np.asarray(image01), np.asarray(labels)
    if image01.ndim != 3 or image01.shape[1:] != labels.shape:
        raise ValueError(f"image of shape {image01.shape} and labels of shape {labels.shape} do not fit")
    shown = image01.transpose(1, 2, 0) if len(image01) == 3 else image01.mean(axis=0)
    pixels = (np.clip(shown, 0, 1) * 255 + 0.5).astype(np.uint8)
    enlarged = size[0] >= labels.shape[1]
    smooth = PILImage.Resampling.BICUBIC if enlarged else PILImage.Resampling.BOX
    canvas = np.array(PILImage.fromarray(np.ascontiguousarray(pixels)).resize(size, smooth).convert("RGB"))
    big = np.asarray(PILImage.fromarray(labels.astype(np.uint8)).resize(size, PILImage.Resampling.NEAREST))

    highest = ndimage.maximum_filter(big, size=3, mode="constant", cval=0)
    line = highest != ndimage.minimum_filter(big, size=3, mode="constant", cval=0)  # one pixel on each side of a border
    rim = ndimage.maximum_filter(line, size=3) & ~line
    canvas[rim] = 0
    owner = np.where(big > 0, big, highest)[line].astype(int)
    canvas[line] = _COLORS[(owner - 1) % len(_COLORS)]
    return PILImage.fromarray(canvas)


def _draw_prompts(
    picture: PILImage.Image,
    scale: tuple[float, float],
    points: Sequence[Sequence[float]] | None,
    box: Sequence[float] | None,
    point_labels: Sequence[int] | None,
) -> None:
    draw = ImageDraw.Draw(picture)
    if box is not None:
        x0, x1 = sorted((box[0] * scale[0], box[2] * scale[0]))
        y0, y1 = sorted((box[1] * scale[1], box[3] * scale[1]))
        for width, color in ((4, "black"), (2, "white")):
            draw.rectangle((x0, y0, x1, y1), outline=color, width=width)
    points = [] if points is None else points
    signs = [1] * len(points) if point_labels is None else point_labels
    radius = 6
    for (x, y), sign in zip(points, signs, strict=True):
        x, y = (x + 0.5) * scale[0], (y + 0.5) * scale[1]  # the middle of the pixel
        if sign:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="lime", outline="black", width=2)
        else:
            for width, color in ((6, "black"), (3, "red")):
                draw.line((x - radius, y - radius, x + radius, y + radius), fill=color, width=width)
                draw.line((x - radius, y + radius, x + radius, y - radius), fill=color, width=width)


def _titled(picture: PILImage.Image, title: str) -> PILImage.Image:
    """The picture below a line of text, which is cut to its width."""
    sheet = PILImage.new("RGB", (picture.width, picture.height + _TITLE_HEIGHT), "white")
    sheet.paste(picture, (0, _TITLE_HEIGHT))
    font = ImageFont.load_default(15)
    title = " ".join(title.split())[: picture.width // 2]  # no letter is narrower than 2 px
    while title and font.getlength(title) > picture.width - 8:
        title = title[:-2].rstrip("…") + "…" if len(title) > 2 else ""
    ImageDraw.Draw(sheet).text((4, 3), title, fill="black", font=font)
    return sheet


def _with_legend(picture: PILImage.Image, legend: Mapping[int, str]) -> PILImage.Image:
    """The picture below the names of its labels, each after a square of its colour, in as many lines as they take."""
    font, left, gap = ImageFont.load_default(15), 22, 12
    lines: list[list[tuple[int, int, str]]] = [[]]
    x = 4
    for label, name in sorted(legend.items()):
        name = " ".join(name.split())[: picture.width // 2]
        while len(name) > 1 and left + font.getlength(name) > picture.width - 8:
            name = name[:-2].rstrip("…") + "…"
        width = left + math.ceil(font.getlength(name)) + gap
        if lines[-1] and x + width > picture.width:
            lines.append([])
            x = 4
        lines[-1].append((label, x, name))
        x += width
    sheet = PILImage.new("RGB", (picture.width, picture.height + _TITLE_HEIGHT * len(lines)), "white")
    sheet.paste(picture, (0, _TITLE_HEIGHT * len(lines)))
    draw = ImageDraw.Draw(sheet)
    for row, entries in enumerate(lines):
        top = row * _TITLE_HEIGHT
        for label, at, name in entries:
            colour = tuple(int(v) for v in _COLORS[(label - 1) % len(_COLORS)])
            draw.rectangle((at, top + 5, at + 14, top + 19), fill=colour, outline="black")
            draw.text((at + left, top + 3), name, fill="black", font=font)
    return sheet


def overlay_slices(
    volume01: np.ndarray,
    labels: np.ndarray,
    axis: int = 2,
    affine: np.ndarray | None = None,
    title: str | None = None,
    legend: Mapping[int, str] | None = None,
) -> PILImage.Image:
    """Up to nine slices through the objects of a volume, contours drawn, as one picture.

    With an affine, slices are shown the radiological way (patient's right on the left, anterior or superior up) and
    with the voxels' aspect ratio. Without one, x runs to the right, y down (z up when it is in the
    slice), voxels are cubes.

    Args:
        volume01: (C, X, Y, Z) in [0, 1].
        labels: (X, Y, Z) integers, 0 is background. Slices are spread over those that hold a label, over all if none
            does.
        axis: 0, 1 or 2: the voxel axis across the slices.
        affine: (4, 4) voxel index -> RAS mm.
        title: a line written above the picture.
        legend: label -> its name, written above the picture beside its colour.

    Returns:
        An RGB picture; each slice carries its index along ``axis`` in the input's voxel order.

    Raises:
        ValueError: shapes or axis do not fit.
    """
    volume01, labels = np.asarray(volume01), np.asarray(labels)
    if volume01.ndim != 4 or volume01.shape[1:] != labels.shape or axis not in (0, 1, 2):
        raise ValueError(f"volume of shape {volume01.shape}, labels of shape {labels.shape} and axis {axis} do not fit")
    others = tuple(k for k in range(3) if k != axis)
    occupied = np.flatnonzero(labels.any(axis=others))
    occupied = occupied if len(occupied) else np.arange(labels.shape[axis])
    chosen = occupied[np.unique(np.linspace(0, len(occupied) - 1, 9).round().astype(int))]

    # Where each voxel axis points on the display: axes of an LPS patient run to the right, down (P) or up (S).
    patient, signs, spacing = np.arange(3), np.ones(3), np.ones(3)
    if affine is not None:
        orientation = nib.orientations.io_orientation(np.asarray(affine, dtype=np.float64))
        if not np.isnan(orientation).any():
            patient = orientation[:, 0].astype(int)
            signs = orientation[:, 1] * np.where(patient < 2, -1, 1)
        sizes = voxel_sizes(affine)
        spacing = np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)
    # The horizontal axis is the earlier patient axis: left in axial and coronal, posterior in sagittal slices.
    across, down = sorted(others, key=lambda k: patient[k])
    flip_across, flip_down = signs[across] < 0, (signs[down] < 0) != (patient[down] == 2)
    extent = np.array([labels.shape[across] * spacing[across], labels.shape[down] * spacing[down]])
    width, height = (max(1, round(float(length))) for length in extent * 320 / extent.max())

    tiles = []
    for k in chosen:
        gray, mask = np.take(volume01, k, axis=axis + 1), np.take(labels, k, axis=axis)
        if down > across:  # (first, second) voxel axis -> (rows, columns) = (down, across)
            gray, mask = gray.swapaxes(1, 2), mask.T
        if flip_down:
            gray, mask = gray[:, ::-1], mask[::-1]
        if flip_across:
            gray, mask = gray[:, :, ::-1], mask[:, ::-1]
        tiles.append((f"{'xyz'[axis]} = {k}", _contours(gray, mask, (width, height))))
    sheet = _grid(tiles, columns=math.ceil(math.sqrt(len(tiles))))
    sheet = _with_legend(sheet, legend) if legend else sheet
    return _titled(sheet, title) if title else sheet


def _grid(tiles: Sequence[tuple[str, PILImage.Image]], columns: int) -> PILImage.Image:
    """Titled tiles in rows, each centred in a cell of the largest tile's size."""
    titled = [_titled(picture, title) for title, picture in tiles]
    gap = 6
    width, height = max(tile.width for tile in titled) + gap, max(tile.height for tile in titled) + gap
    sheet = PILImage.new("RGB", (columns * width + gap, math.ceil(len(titled) / columns) * height + gap), "white")
    for i, tile in enumerate(titled):
        row, column = divmod(i, columns)
        sheet.paste(tile, (gap + column * width + (width - gap - tile.width) // 2, gap + row * height))
    return sheet


def contact_sheet(
    entries: Sequence[tuple[str, PILImage.Image]], path: str | os.PathLike, columns: int | None = None
) -> Path:
    """Write pictures as one grid with their titles, each at most 360 px in a cell of its own.

    Args:
        entries: (title, picture), at least one.
        path: target, e.g. ``index.png``.
        columns: pictures in a row; by default about as many as rows, at most 4.

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
        ValueError: no entries.
    """
    if not entries:
        raise ValueError("a contact sheet needs at least one picture")
    cell = 360
    tiles = []
    for title, picture in entries:
        thumbnail = PILImage.new("RGB", (cell, cell), "white")
        factor = cell / max(picture.size)
        size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        small = picture.convert("RGB").resize(size, PILImage.Resampling.LANCZOS)
        thumbnail.paste(small, ((cell - size[0]) // 2, (cell - size[1]) // 2))
        tiles.append((title, thumbnail))
    with atomic_path(path) as temporary:
        _grid(tiles, columns or min(4, math.ceil(math.sqrt(len(tiles))))).save(temporary)
    return Path(path)


def contact_html(
    entries: Sequence[tuple[str, PILImage.Image]], path: str | os.PathLike, title: str = "ZeroSeg"
) -> Path:
    """Write pictures at full size as one HTML page that needs no other file.

    Args:
        entries: (title, picture).
        path: target, e.g. ``index.html``.
        title: the page's heading.

    Returns:
        The path written.

    Raises:
        ZeroSegError: the folder cannot be written to.
    """
    figures = []
    for name, picture in entries:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        name = html.escape(name)
        figures.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
        )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font-family: sans-serif; margin: 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} img {{ width: 100%; }}
</style></head>
<body><h1>{html.escape(title)}</h1><main>
{chr(10).join(figures)}
</main></body></html>
"""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)
