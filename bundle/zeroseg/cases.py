"""From a folder of images to masks on disk: what ``python -m monai.bundle run`` does."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from zeroseg import __version__
from zeroseg.errors import ZeroSegError, is_out_of_memory
from zeroseg.interaction.prompts import DRAWN, PROMPT_KEYS, check_values
from zeroseg.io import (
    Case,
    Image,
    atomic_path,
    check_same_grid,
    draw_overlay,
    file_sha256,
    find_cases,
    one_line,
    overlay_slices,
    read_image,
    sole_writer,
    staged,
    to_unit_range,
    versions,
    write_confidence,
    write_dicom_seg,
    write_json,
    write_mask,
)
from zeroseg.segmentation import Segmentation
from zeroseg.signals import Terminated, sigterm_like_ctrl_c, undisturbed

logger = logging.getLogger(__name__)

MAX_PROMPTS = 64 << 20
"""Bytes a prompts file may have: some hundred thousand cases."""


class CaseDataset(Dataset):
    """The cases of a folder or file, listed on first use; item i is the ``Image`` of case i.

    Args:
        dataset_dir: a folder, or one file; see ``zeroseg.io.find_cases``.
        exclude: folder below it to leave out (the output folder, when it lies inside).
    """

    def __init__(self, dataset_dir: str | os.PathLike | None, exclude: str | os.PathLike | None = None):
        self.dataset_dir, self.exclude = dataset_dir, exclude
        self._cases: list[Case] | None = None

    @property
    def cases(self) -> list[Case]:
        """All cases, ordered by path.

        Raises:
            ZeroSegError: nothing was given, or nothing readable is there.
        """
        if self._cases is None:
            if not self.dataset_dir:
                raise ZeroSegError("no input: give --dataset_dir, a folder of images or one file")
            self._cases = find_cases(str(self.dataset_dir), exclude=self.exclude)
        return self._cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Image:
        return read_image(self.cases[index])


def load_prompts(
    path: str | os.PathLike | Mapping[str, dict[str, Any]] | None, keys: tuple[str, ...] = PROMPT_KEYS
) -> dict[str, dict[str, Any]]:
    """Read ``prompts.json``: case stem -> keyword arguments of ``predict``.

    Scribbles and masks are given as names of image files, from the folder that ``prompts.json`` is in; they come back as whole paths.

    Args:
        path: of the file, None, or what such a file holds.
        keys: the arguments that may be given.

    Raises:
        ZeroSegError: the file is missing or not of that form.
    """
    if path is None:
        return {}
    if isinstance(path, Mapping):
        return dict(path)
    path = Path(str(path))
    try:
        if path.exists() and not path.is_file():
            raise ZeroSegError(f"cannot read prompts {path.name}: it is no file")
        if path.stat().st_size > MAX_PROMPTS:
            raise ZeroSegError(f"prompts {path.name} is larger than {MAX_PROMPTS >> 20} MB: split it by cases")
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ZeroSegError(f"cannot read prompts {path.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ZeroSegError):
            raise
        raise ZeroSegError(f"prompts {path.name} is not valid JSON: {error}") from error
    if not isinstance(prompts, dict) or not all(isinstance(v, dict) for v in prompts.values()):
        raise ZeroSegError(f'prompts {path.name} must map case names to prompts: {{"case": {{"{keys[-1]}": ...}}}}')
    for stem, entry in prompts.items():
        unknown = sorted(set(entry) - set(keys))
        if unknown:
            raise ZeroSegError(f"prompts {path.name}, {stem}: unknown key {unknown[0]!r}; use {', '.join(keys)}")
        for key in set(DRAWN) & set(entry):
            if not isinstance(entry[key], str):
                raise ZeroSegError(f"prompts {path.name}, {stem}: {key} must be the name of an image file")
            entry[key] = str(path.parent.resolve() / entry[key])
    return prompts


def read_drawn(file: str | os.PathLike, name: str, image: Image) -> np.ndarray:
    """What was drawn on an image, from a file of its own: a label map in the geometry of the image.

    Args:
        file: picture, NIfTI, NRRD or MetaImage.
        name: ``scribbles`` or ``mask``.
        image: what it was drawn on.

    Returns:
        Array of the image's shape: the values of scribbles (1 object, 2 background, 0 neither), or bool for a mask.

    Raises:
        ZeroSegError: there is no such file, it cannot be read, or it has another geometry.
    """
    path = Path(file)
    if not path.is_file():
        raise ZeroSegError(f"{name} {path.name}: no such file")
    drawn = read_image(find_cases(path)[0])
    check_same_grid(f"{name} {path.name}", drawn.shape, drawn.affine, image.shape, image.affine)
    if name == "mask":
        return (drawn.array != 0).any(0)
    values = drawn.array[0]
    if not (drawn.array == values).all() or not np.isin(values, (0, 1, 2)).all():
        raise ZeroSegError(f"scribbles {path.name} must hold 1 (object), 2 (background) and 0 (neither) only")
    return values.astype(np.uint8)


class CaseRunner:
    """Segment every case of a dataset and write the results; the bundle's evaluator. ``manifest`` is that of the last run.

    One bad case never stops the others: it is listed in the manifest as failed, with its reason. The files of a case
    appear together and whole or not at all. Per case: ``<stem>_seg``, ``<stem>_confidence``, ``<stem>_overlay.png``, for DICOM input a DICOM SEG
    ``<stem>_seg.dcm``; per run: ``manifest.json``.

    Args:
        inferer: has ``check()``, ``segment(array, affine=, **prompt) -> Segmentation``, ``settings()`` and ``backbone``.
        dataset: the cases.
        output_dir: where results go; created when missing.
        prompts: path of ``prompts.json``, None, or what such a file holds.
        text: a text prompt for every case that has none of its own.
        window: (center, width) for intensities, see ``to_unit_range``.
        dicom_seg: write DICOM SEG for DICOM input.
    """

    prompt_keys: tuple[str, ...] = PROMPT_KEYS
    options: tuple[str, ...] = ("text", "window", "dicom_seg")
    """Arguments that shape results, beside the inferer's."""
    parts: tuple[str, ...] = ("seg", "confidence", "overlay")
    """What a case's files show, as their names say."""

    def __init__(
        self,
        inferer: Any,
        dataset: CaseDataset,
        output_dir: str | os.PathLike | None,
        prompts: str | os.PathLike | Mapping[str, dict[str, Any]] | None = None,
        text: str | None = None,
        window: tuple[float, float] | None = None,
        dicom_seg: bool = True,
    ):
        self.inferer, self.dataset, self.output_dir = inferer, dataset, output_dir
        self.prompts, self.text, self.window, self.dicom_seg = prompts, text, window, dicom_seg
        self.manifest: dict[str, Any] | None = None

    def run(self) -> None:
        """Run and leave the process with exit code 2 when anything the user can mend went wrong.

        Raises:
            SystemExit: 2 after a wrong setting or failed cases, 130 after an interrupt, 143 after SIGTERM.
        """
        logging.getLogger("pydicom").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="pydicom")
        try:
            with sigterm_like_ctrl_c():
                failed = self.process()
        except KeyboardInterrupt as interrupt:
            print("zeroseg: interrupted; finished cases are complete and listed in manifest.json", file=sys.stderr)
            raise SystemExit(143 if isinstance(interrupt, Terminated) else 130) from None
        except Exception as error:
            if not isinstance(error, ZeroSegError) and not is_out_of_memory(error):
                raise
            reason = error if isinstance(error, ZeroSegError) else "not enough memory for the model: use a smaller one"
            print(f"zeroseg: {one_line(reason)}", file=sys.stderr)
            raise SystemExit(2) from None
        if failed:
            raise SystemExit(2)

    def process(self) -> int:
        """Segment all cases and return how many failed.

        Raises:
            ZeroSegError: a setting, the weights, the prompts file, the input or the output folder is wrong; nothing was
                segmented.
        """
        if not self.output_dir:
            raise ZeroSegError("no output: give --output_dir, the folder for the results")
        output = Path(str(self.output_dir))
        if self.dataset.dataset_dir and Path(str(self.dataset.dataset_dir)).resolve() == output.resolve():
            raise ZeroSegError(
                "output_dir is the input folder: give another one, or the next run would segment the results"
            )
        self.dataset.exclude = output
        prompts = load_prompts(self.prompts, self.prompt_keys)
        self.inferer.check()
        cases = self.dataset.cases
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZeroSegError(f"cannot create the output folder {output}: {error.strerror or error}") from error
        with sole_writer(output):
            return self._process(cases, prompts, output)

    def _process(self, cases: list[Case], prompts: dict[str, dict[str, Any]], output: Path) -> int:
        unused = sorted(set(prompts) - {c.stem for c in cases})
        if unused:
            logger.warning("prompts for %s match no case", ", ".join(unused))
        self.manifest = manifest = {**self.header(), "unused_prompts": unused, "cases": []}
        failed = 0
        try:
            for case in tqdm(cases, desc="cases", disable=None):
                entry = self.segment_case(case, prompts.get(case.stem, {}), output)
                manifest["cases"].append(entry)
                if entry["status"] == "failed":
                    failed += 1
                    tqdm.write(one_line(f"zeroseg: {case.stem}: {entry['reason']}"), file=sys.stderr)
        finally:
            with undisturbed():
                write_json(output / "manifest.json", manifest)
        print(
            f"{len(cases) - failed} of {len(cases)} cases segmented; masks, overlays and manifest.json are in {output}"
        )
        return failed

    def header(self) -> dict[str, Any]:
        """What a manifest says of all its cases: the weights, settings and versions that make their results.

        Raises:
            WeightsError: the weights cannot be loaded.
        """
        return {
            "zeroseg": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "inferer": type(self.inferer).__name__,
            "backbone": self.inferer.backbone.describe(),
            "settings": {**self.inferer.settings(), **{name: getattr(self, name) for name in self.options}},
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def segment_case(self, case: Case, prompt: dict[str, Any], output: Path) -> dict[str, Any]:
        """Segment one case and write its files.

        Args:
            case: the image.
            prompt: keyword arguments of the inferer's ``segment``; what holds for all cases is added.
            output: an existing folder.

        Returns:
            The case's entry in the manifest. What the user can mend becomes an entry with ``status`` failed and a
            ``reason``, not an exception.
        """
        started = time.perf_counter()
        entry: dict[str, Any] = {"case": case.stem, "status": "failed"}
        try:
            # Names without folders: a manifest travels, the folders of this machine are nobody else's business.
            entry["inputs"] = [{"file": p.name, "sha256": file_sha256(p)} for p in case.paths]
            image = read_image(case)
            unit = to_unit_range(image, self.window)
            read = time.perf_counter()
            prompt = self._prompt(image, prompt)
            check_values(prompt)
            drawn = {key: prompt[key] for key in DRAWN if key in prompt}
            entry["prompt"] = prompt | {key: Path(file).name for key, file in drawn.items()}
            arrays = {key: read_drawn(file, key, image) for key, file in drawn.items()}
            result = self._segment(image, unit, prompt | arrays)
            segmented = time.perf_counter()
            for doubt in result.notes:
                tqdm.write(one_line(f"zeroseg: {case.stem}: warning: {doubt}"), file=sys.stderr)
            with staged(output) as stage:
                files, notes = self._write(case, image, unit, result, prompt, stage)
            entry["files"] = files
            self._remove_others(case, files, output)
            written = time.perf_counter()
            entry.update(
                status="done",
                modality=image.modality,
                shape=list(image.shape),
                spacing_mm=image.spacing,
                notes=[*image.notes, *notes, *result.notes],
                select=result.rule,
                absent=result.absent,
                name=result.name,
                absent_because=result.reason,
                scores=[round(s, 4) for s in result.scores],
                details=result.details,
                mask_sha256=_mask_sha256(result.labels),
                seconds={
                    "read": round(read - started, 4),
                    **{k: round(v, 4) for k, v in result.seconds.items()},
                    "write": round(written - segmented, 4),
                    "total": round(time.perf_counter() - started, 4),
                },
            )
        except ZeroSegError as error:
            entry["reason"] = str(error)
        except OSError as error:
            entry["reason"] = f"cannot read or write: {error.strerror or error}"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            entry["reason"] = "not enough memory for this case: use a smaller resolution, or --device cpu"
        return entry

    def _remove_others(self, case: Case, files: Sequence[str], output: Path) -> None:
        """Of an earlier answer to the case nothing stays beside the new one, such as the DICOM SEG of what is absent now."""
        for part, suffix in itertools.product(self.parts, (".png", ".tif", ".nii.gz", ".dcm")):
            name = f"{case.stem}_{part}{suffix}"
            if name not in files:
                (output / name).unlink(missing_ok=True)

    def _prompt(self, image: Image, prompt: dict[str, Any]) -> dict[str, Any]:
        """The prompt of a case, completed by what holds for all cases."""
        if self.text is not None and not {"points", "box", "text", *DRAWN} & set(prompt):
            return {**prompt, "text": self.text}
        return prompt

    def _segment(self, image: Image, unit: np.ndarray, prompt: dict[str, Any]) -> Segmentation:
        """The result for a case; ``unit`` is the image in [0, 1]."""
        return self.inferer.segment(unit, affine=image.affine, **prompt)

    def _write(
        self, case: Case, image: Image, unit: np.ndarray, result: Segmentation, prompt: dict, output: Path
    ) -> tuple[list[str], list[str]]:
        """Write every file of a case; returns their names and notes on what could not be written."""
        mask = write_mask(image, result.labels, output / f"{case.stem}_seg{image.suffix}")
        confidence = write_confidence(image, result.confidence, output / f"{case.stem}_confidence{image.suffix}")
        title = f"absent: {result.name or ''}" if result.absent else None
        named = {value: name for name, value in result.details.get("labels", {}).items()}
        if image.is_volume:
            picture = overlay_slices(
                unit,
                result.labels,
                axis=getattr(self.inferer, "slice_axis", -1) % 3,
                affine=image.affine,
                title=title,
                legend=named,
            )
        else:
            kinds = prompt.get("labels")
            picture = draw_overlay(
                unit,
                result.labels,
                prompt.get("points"),
                prompt.get("box"),
                title=title,
                point_labels=kinds,
                legend=named,
            )
        overlay = output / f"{case.stem}_overlay.png"
        with atomic_path(overlay) as part:
            picture.save(part, format="PNG")
        files, notes = [mask.name, confidence.name, overlay.name], []
        if self.dicom_seg and case.kind.startswith("dicom"):
            usual = None if result.rule == "segments" else {1: result.name or "object"}
            # DICOM allows a name 64 characters.
            names = {value: name[:64] for value, name in named.items()} or usual
            try:
                written = write_dicom_seg(
                    image,
                    result.labels,
                    output / f"{case.stem}_seg.dcm",
                    label_names=names,
                    algorithm_type="SEMIAUTOMATIC" if prompt else "AUTOMATIC",
                )
                files += [written.name] if written else []
            except ZeroSegError as error:
                notes.append(f"no DICOM SEG: {error}")
        return files, notes


def _mask_sha256(labels: np.ndarray) -> str:
    """SHA-256 of a mask's values, uint8 in C order, by which a later run tells whether it found the same."""
    return hashlib.sha256(np.ascontiguousarray(labels, np.uint8).data).hexdigest()
