"""From a scan's own values and grid to what the frozen model was trained on, and exactly back.

Values: CT in HU through the model's window, MR by percentiles, PET relative to its own maximum. Grid: axes reordered
and flipped to RAS, resampled to the model's spacing, padded by edge values to a multiple of what the networks need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import voxel_sizes
from scipy import ndimage
from torch import Tensor

from zeroseg.errors import ZeroSegError
from zeroseg.tumor.prompts import check_modality

MR_PERCENTILES = (0.0, 99.5)
"""Mapped to 0 and 1: MAISI's own choice for MR."""
PET_PERCENTILE = 99.9
"""Mapped to 1. Relative, because SUV needs dose and weight, which few files carry."""
HU_RANGE = (-1024.0, 3071.0)
"""What 12-bit CT can hold; more is metal, or another unit."""
QUARTER_HU, QUARTER_HU_FLOOR = 4.0, -250.0
"""CT may be stored as HU / 4, to keep it in few bits; its air is then the second number."""
QUARTER_HU_LUNG = -150.0
"""In HU no tissue is so dark and yet above air; in HU / 4 lungs are."""
WORKING_VOXELS = 2**26
"""Working volumes beyond 406^3 voxels are worked on at a coarser spacing."""
MIN_SIDE = 16
"""A longest side below this many working voxels shows nothing: smaller fields of view are worked on at a finer
spacing."""


@dataclass
class Intensity:
    """How a volume's values became [0, 1]: unit = ((value - low) / (high - low)) ** power.

    Without ``clip`` what is brighter than ``high`` stays above 1, as MAISI's MR releases saw it.
    """

    low: float
    high: float
    power: float = 1.0
    clip: bool = True

    @property
    def most(self) -> float | None:
        """The highest value after the mapping; None: there is no bound."""
        return 1.0 if self.clip else None

    def to_unit(self, values: np.ndarray) -> np.ndarray:
        """Values -> float32 in [0, 1], or from 0 without ``clip``; all zero where low equals high."""
        if self.high <= self.low:
            return np.zeros(values.shape, np.float32)
        unit = np.clip((values.astype(np.float64) - self.low) / (self.high - self.low), 0, self.most)
        return (unit**self.power).astype(np.float32)

    def to_values(self, unit: np.ndarray) -> np.ndarray:
        """[0, 1] -> values; what was clipped comes back as the range's end."""
        return (np.clip(unit, 0, self.most) ** (1 / self.power) * (self.high - self.low) + self.low).astype(np.float32)


def intensity_of(
    values: np.ndarray, modality: str, ct_window: Sequence[float] = (-1000.0, 1000.0), mr_clip: bool = True
) -> Intensity:
    """The mapping of a volume's values to [0, 1].

    CT: the window, the same for every volume. MR: percentiles 0 to 99.5. PET: the square root of the share of the
    99.9th percentile; the root evens out the noise of counts and keeps a tumour's rim visible beside a bladder many
    times as hot (ZeroSeg's choice: MAISI knows no PET).

    Args:
        values: of any shape, finite; HU for CT.
        modality: ct, mr or pet.
        ct_window: HU that become 0 and 1.
        mr_clip: cut MR at 1.
    """
    modality = check_modality(modality)
    if modality == "ct":
        return Intensity(float(ct_window[0]), float(ct_window[1]))
    if modality == "mr":
        low, high = np.percentile(values, MR_PERCENTILES)
        if low == high:  # nearly everything is one value: what differs is the object, not an outlier
            low, high = values.min(), values.max()
        return Intensity(float(low), float(high), clip=mr_clip)
    high = float(np.percentile(values, PET_PERCENTILE))
    return Intensity(0.0, high if high > 0 else float(max(values.max(), 0)), 0.5)


def guess_modality(values: np.ndarray) -> str:
    """``ct`` where a volume holds values only HU have (well below zero), else ``mr``: PET cannot be told from MR by its
    values."""
    return "ct" if np.percentile(values, 1) < -100 else "mr"


def check_scan(values: np.ndarray, modality: str) -> tuple[float, Intensity | None, list[str]]:
    """Compare a volume's values with what its modality allows.

    Args:
        values: of any shape, finite.
        modality: as given by the user or the file: ct, mr or pet.

    Returns:
        What the values are to be multiplied by; the mapping to [0, 1] where it is not the modality's usual one, else
        None; and one line per doubt.
    """
    notes = []
    low, high = float(values.min()), float(values.max())
    if low == high:
        notes.append("the volume is constant: there is nothing to find")
        return 1.0, None, notes
    if modality == "ct":
        if _in_quarter_hu(values, low, high):
            notes.append(
                f"CT whose lowest value is {low:.4g} is taken as HU / 4 and multiplied by 4; rescale says otherwise"
            )
            return QUARTER_HU, None, notes
        if low >= 0 and high <= 255:
            notes.append(
                "given as CT, but the values lie in 0..255: taken as a picture of a soft-tissue window, not as HU; "
                "if it is MR, say so"
            )
            return 1.0, Intensity(0.0, 255.0), notes
        middle = float(np.percentile(values, 50))
        if low >= 0 and 900 <= float(np.percentile(values, 75)) <= 1400:
            notes.append("given as CT, but the values look like HU + 1024: set rescale to [1, -1024]")
        elif low > -100:
            notes.append(
                f"given as CT, but no value is below {low:.4g}: no air and no fat, so these are hardly HU; "
                "is it MR? the result cannot be trusted"
            )
        elif not -1100 <= middle <= 1000:
            notes.append(
                f"given as CT, but the median is {middle:.4g}: these are hardly HU; the result cannot be trusted"
            )
        outside = float(np.mean((values < 2 * HU_RANGE[0]) | (values > HU_RANGE[1])))
        if outside > 0:
            notes.append(
                f"{outside:.2%} of the values lie outside HU {HU_RANGE[0]:.0f}..{HU_RANGE[1]:.0f} and are clipped"
            )
    elif np.percentile(values, 1) < -100:
        notes.append(
            f"given as {modality.upper()}, but 1 % of the values are below -100, as only HU are; is it CT? "
            "the result cannot be trusted"
        )
    return 1.0, None, notes


def _in_quarter_hu(values: np.ndarray, low: float, high: float) -> bool:
    """Whether CT is stored as HU / 4: its lowest value is air's to the digit, or it shows lung and no air around the body, and its
    darkest twentieth lies where in HU there is nothing but the floor of a window."""
    if high >= HU_RANGE[1] / 4:
        return False
    if low == QUARTER_HU_FLOOR:
        return True
    above_air = HU_RANGE[0] / 4 <= low < QUARTER_HU_LUNG
    return above_air and np.percentile(values, 5) < QUARTER_HU_LUNG and float(np.mean(values == low)) < 0.01


@dataclass
class Prepared:
    """A volume ready for the model, and the way back.

    Attributes:
        volume: (1, 1, X', Y', Z') float32 in [0, 1] (MR that is not clipped: from 0), RAS order, padded.
        content: the three slices of it that are not padding.
        spacing: working voxel size in mm, as resampled (the sides are whole voxels, so it differs a little from the
            model's).
        shape: (X, Y, Z) of the input.
        orientation: nibabel's (3, 2) array that brought the input's axes to RAS.
        intensity: how values became [0, 1].
        modality: ct, mr or pet.
        notes: what was changed or doubted, one sentence each.
        to_hu: (slope, intercept) from stored values to HU; None: they are not to be had.
    """

    volume: Tensor
    content: tuple[slice, ...]
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    orientation: np.ndarray
    intensity: Intensity
    modality: str
    notes: list[str] = field(default_factory=list)
    to_hu: tuple[float, float] | None = None

    @property
    def sides(self) -> list[int]:
        """Working voxels along each axis that are not padding."""
        return [s.stop - s.start for s in self.content]

    @property
    def inside(self) -> Tensor:
        """(X', Y', Z') bool: True where the working volume is not padding."""
        mask = torch.zeros(self.volume.shape[2:], dtype=torch.bool)
        mask[self.content] = True
        return mask

    def to_input(self, values: Tensor | np.ndarray) -> np.ndarray:
        """A map on the working grid, on the input's own grid.

        Args:
            values: (X', Y', Z'); bool masks go back by nearest neighbour, all else linearly.

        Returns:
            (X, Y, Z), bool or float32.
        """
        values = torch.as_tensor(np.asarray(values)) if not isinstance(values, Tensor) else values.detach().cpu()
        is_mask = values.dtype == torch.bool
        values = values[self.content].float()
        back = nib.orientations.ornt_transform(_RAS, self.orientation)
        size = [self.shape[axis] for axis in np.argsort(self.orientation[:, 0])]  # the input's sides in RAS order
        values = _resize(values, size, "nearest-exact" if is_mask else "trilinear").numpy()
        values = forwards(nib.orientations.apply_orientation(values, back))
        return values > 0.5 if is_mask else values

    def from_input(self, mask: np.ndarray) -> Tensor:
        """A mask of the input on the working grid: what adapters train on.

        Args:
            mask: (X, Y, Z), non-zero inside.

        Returns:
            (X', Y', Z') bool: at least half of the voxel lies in the mask; in the padding as at its edge, which is what the volume
            shows there.
        """
        share = self.shrunk((mask > 0).astype(np.float32))
        return _padded(share, self.content, self.volume.shape[2:])[0, 0] >= 0.5

    def shrunk(self, values: np.ndarray) -> Tensor:
        """(X, Y, Z) float32 on the input's grid -> the working grid without its padding, in RAS order."""
        return _shrink(nib.orientations.apply_orientation(values, self.orientation), self.sides)


_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)


def prepare(
    volume: Tensor | np.ndarray,
    affine: np.ndarray | None = None,
    modality: str | None = None,
    spacing: Sequence[float] = (3.0, 3.0, 3.0),
    multiple: int = 16,
    ct_window: Sequence[float] = (-1000.0, 1000.0),
    rescale: Sequence[float] | None = None,
    mr_clip: bool = True,
) -> Prepared:
    """Bring a volume to the model's values and grid.

    Sides shrink by a Gaussian of half the reduction and linear interpolation between voxel centres, grow by the same
    interpolation. A single slice stays one and is repeated by the padding, so that the model sees an object as deep as
    its window; this is how 2-D images are served.

    Args:
        volume: (1, X, Y, Z), or (3, X, Y, Z) which is averaged to gray; finite values, HU for CT.
        affine: (4, 4) voxel index -> RAS mm; None: 1 mm, the axes as they are.
        modality: ct, mr or pet in any usual spelling; None: guessed from the values, and noted.
        spacing: working voxel size in mm.
        multiple: the padded sides are multiples of this.
        ct_window: HU that become 0 and 1.
        rescale: (slope, intercept) that bring stored values to HU (or SUV) first.
        mr_clip: cut MR at 1; a model that was trained on MR beyond it wants False.

    Raises:
        ZeroSegError: the shape is no volume's, a value is not finite, the affine has no inverse, or the modality is
            unknown.
    """
    array = np.asarray(volume.detach().cpu() if isinstance(volume, Tensor) else volume, dtype=np.float32)
    if array.ndim == 5 or (array.ndim == 4 and array.shape[0] not in (1, 3)):
        raise ZeroSegError(
            f"a volume must be (1, X, Y, Z), not {array.shape}: of a time series or several sequences, give one volume"
        )
    if array.ndim != 4 or 0 in array.shape:
        raise ZeroSegError(f"a volume must be (1, X, Y, Z) and not empty, not {array.shape}")
    if not np.isfinite(array).all():
        raise ZeroSegError("the volume holds NaN or infinite values: replace them, e.g. by the value of air")
    array = array[0] if len(array) == 1 else array.mean(0)
    notes = []
    if affine is None:
        affine = np.eye(4)
        notes.append("no voxel size is known: 1 mm is assumed")
    affine = np.asarray(affine, dtype=float)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ZeroSegError("the affine must be a finite 4 x 4 matrix with an inverse: correct the file's geometry")
    if rescale is not None:
        array = array * np.float32(rescale[0]) + np.float32(rescale[1])
    if modality is None:
        modality = guess_modality(array)
        notes.append(f"the modality is not given: taken as {modality.upper()} by the values")
    modality = check_modality(modality)
    intensity = None
    slope, intercept = (1.0, 0.0) if rescale is None else map(float, rescale)
    if rescale is None:
        slope, intensity, doubts = check_scan(array, modality)
        array = array if slope == 1 else array * np.float32(slope)
        notes += doubts
    to_hu = (slope, intercept) if modality == "ct" and intensity is None else None
    intensity = intensity or intensity_of(array, modality, ct_window, mr_clip)
    shape = array.shape
    orientation = nib.orientations.io_orientation(affine)
    unit = nib.orientations.apply_orientation(intensity.to_unit(array), orientation)
    sizes = voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    size, extent_note = _working_size(unit.shape, sizes, spacing)
    notes += extent_note
    reduction = [n / m for n, m in zip(unit.shape, size, strict=True)]
    unit = _shrink(unit, size).clamp(0, intensity.most)
    pads = [(-n) % multiple for n in size]
    content = tuple(slice(p // 2, p // 2 + n) for p, n in zip(pads, size, strict=True))
    padded = _padded(unit, content, [n + p for n, p in zip(size, pads, strict=True)])
    working = tuple(float(s * r) for s, r in zip(sizes, reduction, strict=True))
    return Prepared(padded, content, working, shape, orientation, intensity, modality, notes, to_hu)


def _working_size(
    shape: Sequence[int], sizes: Sequence[float], spacing: Sequence[float]
) -> tuple[list[int], list[str]]:
    """Whole voxels per side at the working spacing, which is made finer or coarser for extents it does not fit."""
    extent = [n * float(s) for n, s in zip(shape, sizes, strict=True)]
    spread = [n for n in range(3) if shape[n] > 1]  # a single slice stays one
    wanted = [e / s for e, s in zip(extent, spacing, strict=True)]
    longest = max((wanted[i] for i in spread), default=1.0)
    total = math.prod(max(1.0, wanted[i]) for i in spread)
    factor, notes = 1.0, []
    if spread and longest < MIN_SIDE:
        factor = min(MIN_SIDE, max(shape)) / longest
        notes.append(
            f"the field of view is only {max(extent[i] for i in spread):.3g} mm: worked on at {spacing[0] / factor:.2g} mm, "
            "far from what the model was trained on"
        )
    elif total > WORKING_VOXELS:
        factor = (WORKING_VOXELS / total) ** (1 / len(spread))
        notes.append(f"the volume is very large: worked on at {spacing[0] / factor:.2g} mm")
    return [max(1, round(w * factor)) if n in spread else 1 for n, w in enumerate(wanted)], notes


def forwards(values: np.ndarray) -> np.ndarray:
    """Contiguous and with no axis stored backwards, which torch refuses; an axis of one voxel numpy leaves so."""
    values = np.ascontiguousarray(values)
    return values.copy() if any(stride < 0 for stride in values.strides) else values


def _shrink(values: np.ndarray, size: Sequence[int]) -> Tensor:
    """(X, Y, Z) -> ``size``, smoothed by half the reduction along each axis that shrinks; axes that grow are not."""
    sigma = [max(0.0, (n / m - 1) / 2) for n, m in zip(values.shape, size, strict=True)]
    if any(sigma):
        values = ndimage.gaussian_filter(values, sigma, mode="nearest")
    return _resize(torch.from_numpy(forwards(values)), size, "trilinear")


def _padded(values: Tensor, content: Sequence[slice], sides: Sequence[int]) -> Tensor:
    """(X, Y, Z) -> (1, 1, *sides), where ``content`` holds the values and their edge is repeated around it."""
    around = [(part.start, side - part.stop) for part, side in zip(content, sides, strict=True)]
    return F.pad(values[None, None], [v for pair in reversed(around) for v in pair], mode="replicate")


def _resize(values: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """(X, Y, Z) float -> ``size``, voxel centres kept in proportion (half-voxel convention)."""
    if tuple(values.shape) == tuple(size):
        return values
    options = {"align_corners": False} if mode == "trilinear" else {}
    return F.interpolate(values[None, None], tuple(size), mode=mode, **options)[0, 0]
