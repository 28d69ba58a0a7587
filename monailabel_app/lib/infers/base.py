"""What all tasks share: options from the viewer's panel, the mask in the viewer's grid, and the answer's parameters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from monailabel.interfaces.tasks.infer_v2 import InferTask

from lib.engine import Engine
from lib.mends import confidence
from lib.mends.errors import InternalError
from lib.mends.files import temporary
from lib.mends.responsive import Abandoned
from lib.sources import OpenImage
from zeroseg import __version__
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import check_values
from zeroseg.io import Image, to_nifti, without_shear, write_mask
from zeroseg.segmentation import Segmentation

EXTENSIONS = (".nrrd", ".nii.gz", ".nii", ".png")
DTYPES = ("uint8", "uint16", "int16", "int32", "float32")


class ZeroSegTask(InferTask):
    """A task that segments with the shared engine.

    Args:
        engine: shared by all tasks.
        type: MONAI Label's task type, which decides the panel a viewer shows it in.
        labels: name -> value, declared up front: OHIF clears every label that a model of its panel "Auto-Segmentation" does not
            declare. Where there is none, the client names the one label of the answer.
        description: shown by the viewers.
        config: the options panel: a list becomes a combo box, a bool a check box, a number or string a text box.
    """

    def __init__(self, engine: Engine, type: str, labels: dict[str, int], description: str, config: dict[str, Any]):
        super().__init__(type=type, labels=labels, dimension=3, description=description, config=config)
        self.engine = engine

    def is_valid(self) -> bool:
        return True

    def segment(self, entry: OpenImage, options: dict[str, Any]) -> Segmentation:
        """The task's own part."""
        raise NotImplementedError

    def describe_backbone(self) -> dict[str, Any]:
        """The frozen model that made the mask: source, SHA-256 of its weights, device."""
        return self.engine.inferer.backbone.describe()

    def fit_labels(self, result: Segmentation) -> dict[int, int]:
        """Make an answer, in place, one that viewers can show: no more labels than are declared, numbered without a gap.

        For labels whose number means nothing; a note says how many were left out.

        Returns:
            label before -> label now, of those kept.
        """
        kept, dropped = keep_largest(result.labels, len(self.labels) or 255)
        result.scores = [result.scores[k - 1] for k in kept if k <= len(result.scores)]
        if dropped:
            result.notes.append(f"{dropped} smaller segments left out")
        return {before: now for now, before in enumerate(kept, start=1)}

    def label_names(self, result: Segmentation, options: dict[str, Any]) -> dict[str, int]:
        """Names of the labels present, which 3D Slicer gives to its segments in order."""
        present = {int(v) for v in np.unique(result.labels)} - {0}
        return {name: value for name, value in self.labels.items() if value in present}

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Answer one request.

        Args:
            request: ``image``, a path; the options of ``config`` that the user changed; the viewer's prompts and wishes.

        Returns:
            Path of the mask, on the voxel grid of the image, and the parameters of the answer.

        Raises:
            ZeroSegError: what the user can mend; WeightsError: weights are missing.
        """
        try:
            return self.answer(request)
        except ZeroSegError as error:  # folders of the server are nobody else's business
            raise type(error)(str(error).replace(f"{Path(request['image']).parent}/", "")) from error
        except (MemoryError, OSError, Abandoned, RuntimeError):
            raise
        except Exception as error:  # so that a fault of ours is not taken for a malformed request
            raise InternalError(f"{type(error).__name__}: {error}") from error

    def answer(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """As a call, before a fault is told from a malformed request."""
        started = time.perf_counter()
        check_values(request, "request")
        options = self.options(request)
        wants_confidence = confidence.is_wanted()
        extension, dtype = self.output(request, wants_confidence)
        entry = self.engine.open(request["image"])
        result = self.segment(entry, options)
        if result.absent and options.get("absent") == "error":
            wanted = str(options.get("text") or "").strip() or result.name or "the object"
            raise ZeroSegError(f"absent: {wanted!r} was not found in this image ({result.reason})")
        self.fit_labels(result)
        compress = pick("result_compress", request.get("result_compress", True), True)
        shown = result.confidence if wants_confidence else result.labels
        path = write(entry.image, shown, extension, dtype, compress)
        seconds = {stage: round(spent, 4) for stage, spent in result.seconds.items()}
        backbone = self.describe_backbone()
        return path, {
            "label_names": self.label_names(result, options),
            "centroids": {},
            "select": result.rule,
            "absent": result.absent,
            "absent_because": result.reason,
            "scores": [round(s, 4) for s in result.scores],
            "seconds": {**seconds, "total": round(time.perf_counter() - started, 4)},
            "backbone": {k: v for k, v in backbone.items() if k != "files"},
            "notes": [*entry.image.notes, *result.notes],
            "details": result.details,
            "zeroseg": __version__,
        }

    def options(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request over the defaults of the panel; a value has the kind of its default.

        Raises:
            ZeroSegError: a value is not one of the combo box, or not of the default's kind.
        """
        options = dict(request)
        for name, default in self._config.items():
            value = request.get(name, default)
            options[name] = pick(name, value, default)
        return options

    @staticmethod
    def output(request: dict[str, Any], confidence: bool = False) -> tuple[str, str]:
        """Extension and number type the client asks for.

        By default a picture's mask is a PNG, others are NIfTI, of uint8. A confidence map is float32, and never a PNG.

        Raises:
            ZeroSegError: there is no such extension or type, or it cannot hold a confidence.
        """
        name = str(request["image"]).lower()
        picture = name.endswith((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"))
        usual = ".nrrd" if name.endswith(".nrrd") or (picture and confidence) else ".png" if picture else ".nii.gz"
        extension = request.get("result_extension") or usual
        dtype = request.get("result_dtype") or "uint8"
        if extension not in EXTENSIONS:
            raise ZeroSegError(f"result_extension {extension!r} is not supported: use one of {', '.join(EXTENSIONS)}")
        if dtype not in DTYPES:
            raise ZeroSegError(f"result_dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
        if confidence:
            if extension == ".png":
                raise ZeroSegError("a confidence map holds fractions, a PNG does not: use .nrrd or .nii.gz")
            return extension, "float32"
        return extension, "uint8" if extension == ".png" else dtype


def pick(name: str, value: Any, default: Any) -> Any:
    """One option: of a combo box the entry chosen (the first, when nothing was), else a value of the default's kind.

    Raises:
        ZeroSegError: the value does not fit.
    """
    if isinstance(default, list):
        chosen = value[0] if isinstance(value, list) and value else value
        if chosen not in default:
            raise ZeroSegError(f"{name} must be one of {', '.join(map(str, default))}, not {chosen!r}")
        return chosen
    if isinstance(default, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
        if str(value).lower() not in words:
            raise ZeroSegError(f"{name} must be true or false, not {value!r}")
        return words[str(value).lower()]
    if isinstance(default, (int, float)):
        try:
            number = type(default)(value)
        except (TypeError, ValueError, OverflowError):
            raise ZeroSegError(f"{name} must be a number, not {value!r}") from None
        if not np.isfinite(number):
            raise ZeroSegError(f"{name} must be a finite number, not {value!r}")
        return number
    if not isinstance(value, str):
        raise ZeroSegError(f"{name} must be text, not {value!r}")
    return value


def keep_largest(labels: np.ndarray, count: int) -> tuple[list[int], int]:
    """Clear, in place, all but the ``count`` largest labels and number those 1..count without a gap, in their old order.

    Viewers show the labels a model declares, and 3D Slicer names segments in order.

    Returns:
        The labels kept, by what they were before; and how many were cleared.
    """
    sizes = np.bincount(labels.ravel(), minlength=2)
    sizes[0] = 0
    present = np.flatnonzero(sizes)
    kept = np.sort(present[np.argsort(-sizes[present], kind="stable")[:count]])
    table = np.zeros(len(sizes), labels.dtype)
    table[kept] = np.arange(1, len(kept) + 1)
    labels[...] = table[labels]
    return kept.tolist(), len(present) - len(kept)


def write(image: Image, labels: np.ndarray, extension: str, dtype: str, compress: bool = True) -> str:
    """Write a label map, or a confidence map, on the voxel grid of its image to a temporary file.

    Args:
        image: the image.
        labels: (H, W) or (X, Y, Z).
        extension: .nrrd, .nii, .nii.gz or .png.
        dtype: of the voxels.
        compress: for .nrrd; OHIF asks for False, and fails on a compressed mask of an odd number of voxels.

    Returns:
        The file's path.

    Raises:
        ZeroSegError: a volume was asked for as a PNG.
    """
    if extension == ".png" and image.is_volume:
        raise ZeroSegError("a volume's mask cannot be a PNG: use .nrrd or .nii.gz")
    path = temporary(extension)
    if extension == image.suffix and dtype == "uint8":
        return str(write_mask(image, labels, path))
    affine = image.affine
    if not image.is_volume:  # as viewers load a picture: one slice, columns first, along ITK's own axes
        rows, columns = image.pixel_spacing or (1.0, 1.0)
        labels, affine = labels.T[:, :, None], np.diag([-columns, -rows, 1.0, 1.0])
    if extension == ".nrrd":
        write_nrrd(labels.astype(dtype), affine, path, compress)
    else:
        nib.save(to_nifti(labels.astype(dtype), affine), path)
    return path


def write_nrrd(labels: np.ndarray, affine: np.ndarray, path: str, compress: bool = True) -> None:
    """Write (X, Y, Z) with its affine, voxel index -> RAS mm, as NRRD in the LPS space of ITK.

    Slices of a tilted gantry are stacked straight, as 3D Slicer shows those of the image.
    """
    volume = sitk.GetImageFromArray(labels.T)
    axes = np.diag([-1.0, -1.0, 1.0]) @ without_shear(affine)[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    volume.SetSpacing(spacing.tolist())
    volume.SetDirection((axes / spacing).ravel().tolist())
    volume.SetOrigin((np.diag([-1.0, -1.0, 1.0]) @ affine[:3, 3]).tolist())
    sitk.WriteImage(volume, path, useCompression=compress)


def only_slice(entry: OpenImage, options: dict[str, Any]) -> int | None:
    """The slice an ``extent`` of "slice" means: number ``slice``, or the middle one for -1; None for the whole volume."""
    if options["extent"] == "volume" or not entry.image.is_volume:
        return None
    return options["slice"] if options["slice"] != -1 else entry.image.shape[2] // 2
