"""Volumes to train on: where they are, what they show, and what must never be among them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from zeroseg.errors import ZeroSegError
from zeroseg.hashing import file_sha256
from zeroseg.io import check_same_grid
from zeroseg.io.decoding import decoding


@dataclass(frozen=True)
class TrainingCase:
    """A volume and what it shows.

    Attributes:
        image: path of the NIfTI volume.
        mask: path of its mask; empty masks are healthy volumes.
        organ: what is asked for when the question fits.
        modality: ct, mr or pet.
        kind: of lesion, where known.
        real: not a phantom.
        weight: how often it is drawn, against other cases of its sort.
    """

    image: Path
    mask: Path
    organ: str
    modality: str
    kind: str | None = None
    real: bool = False
    weight: float = 1.0

    @property
    def stem(self) -> str:
        return self.image.name.split(".")[0]

    def check(self) -> tuple[Any, Any]:
        """Look at the headers of both files; returns both, as nibabel opens them, their values still on the disk.

        Raises:
            ZeroSegError: one of them cannot be read, or the mask does not lie on the volume's grid.
        """
        with decoding(self.image):
            image = nib.load(self.image)
        with decoding(self.mask):
            mask = nib.load(self.mask)
        check_same_grid(f"the mask of {self.stem}", mask.shape, mask.affine, image.shape, image.affine)
        return image, mask

    def identity(self) -> dict[str, Any]:
        """What tells it from other cases, wherever its files lie: their SHA-256, and all that is said of them; JSON-serialisable.

        Raises:
            ZeroSegError: a file cannot be read.
        """
        hashes = {}
        for name, path in (("image", self.image), ("mask", self.mask)):
            with decoding(path):
                hashes[name] = file_sha256(path)
        said = {name: getattr(self, name) for name in ("stem", "organ", "modality", "kind", "real", "weight")}
        return hashes | said

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(1, X, Y, Z) float32 values as stored, (4, 4) affine and (X, Y, Z) mask.

        Raises:
            ZeroSegError: as ``check``, or a file is damaged.
        """
        image, mask = self.check()
        with decoding(self.image):
            values = np.asarray(image.dataobj, dtype=np.float32)[None]
        with decoding(self.mask):
            return values, image.affine, np.asarray(mask.dataobj)

    def load_mask(self) -> np.ndarray:
        """(X, Y, Z) mask, not zero where the lesion is.

        Raises:
            ZeroSegError: the file cannot be read.
        """
        with decoding(self.mask):
            return np.asarray(nib.load(self.mask).dataobj)


def read_cases(
    folder: str | Path, organ: str | None = None, modality: str | None = None, weight: float | None = None
) -> list[TrainingCase]:
    """The cases of a folder with ``images/`` and ``masks/`` of the same names.

    Args:
        folder: with ``cases.json`` (as ``scripts/training/phantoms.py --volumes`` writes it), or of real volumes of one kind.
        organ, modality: of all cases, where there is no ``cases.json``.
        weight: of the whole folder, shared by its cases; None: 1 for each case.

    Raises:
        ZeroSegError: there are no images, a mask is missing, cannot be read or does not lie on its volume's grid, or it is not known
            what the volumes show.
    """
    folder = Path(folder).expanduser()
    images = sorted(p for p in (folder / "images").glob("*") if p.name.endswith((".nii", ".nii.gz")))
    if not images:
        raise ZeroSegError(f"{folder} holds no images/*.nii.gz: give a folder with images and masks")
    index = folder / "cases.json"
    known = json.loads(index.read_text()) if index.is_file() else {}
    share = 1.0 if weight is None else weight / len(images)
    cases = []
    for image in images:
        mask = folder / "masks" / image.name
        facts = known.get(image.name.split(".")[0], {"organ": organ, "modality": modality})
        if not mask.is_file():
            raise ZeroSegError(f"{folder.name}: masks/{image.name} is missing; a healthy volume needs an empty mask")
        if not facts.get("organ") or not facts.get("modality"):
            raise ZeroSegError(f"{folder.name} has no cases.json entry for {image.name}: give organ and modality")
        case = TrainingCase(image, mask, facts["organ"], facts["modality"], facts.get("kind"), not known, share)
        case.check()
        cases.append(case)
    return cases


def refuse_held_out(cases: Sequence[TrainingCase], held_out: Mapping[str, Sequence[str]]) -> None:
    """Make sure that nothing held out is trained on.

    Args:
        cases: of the training.
        held_out: ``kinds`` of lesion, ``modalities`` of real volumes and ``folders`` (names) that stay unseen.

    Raises:
        ZeroSegError: a case belongs to one of them.
    """
    for case in cases:
        if case.kind is not None and case.kind in held_out.get("kinds", ()):
            raise ZeroSegError(
                f"{case.stem} shows a held-out kind of lesion, {case.kind}: take it out of the training folder"
            )
        if case.real and case.modality in held_out.get("modalities", ()):
            raise ZeroSegError(f"{case.stem} is a real {case.modality} volume, which is held out: take that folder out")
        if set(case.image.parts) & set(held_out.get("folders", ())):
            raise ZeroSegError(f"{case.stem} lies in a held-out folder: take that folder out")


@dataclass(frozen=True)
class CaseSets:
    """What one training works with.

    Attributes:
        cases: trained on.
        left_out: real ones that are measured on afterwards.
        fusion: the weights of the residuals are fitted on.
        held_out: what none of them may be, see :func:`refuse_held_out`.
    """

    cases: list[TrainingCase]
    left_out: list[TrainingCase]
    fusion: list[TrainingCase]
    held_out: dict[str, Sequence[str]]


def gather_cases(
    phantoms: str | Path | Sequence[str | Path] | None = None,
    real: Sequence[Mapping[str, Any]] = (),
    held_out: Mapping[str, Sequence[str]] | None = None,
    leave_out: Sequence[int] | None = None,
    fusion_phantoms: str | Path | None = None,
) -> CaseSets:
    """The cases of several folders, sorted by what they are for.

    Args:
        phantoms: folder of ``scripts/training/phantoms.py --volumes``, or several; None: none.
        real: list of {folder, organ, modality} and perhaps weight: real volumes with masks.
        held_out: see :func:`refuse_held_out`.
        leave_out: [fold, folds]: of the real cases every ``folds``-th, from ``fold`` on, is left out of training and fusion
            and measured afterwards.
        fusion_phantoms: folder of phantoms for the fusion, best ones never trained on: what adapters know by heart makes
            them look surer than they are. None: the training's own cases.

    Raises:
        ZeroSegError: a folder cannot be used, a case is held out, or there is none.
    """
    folders = [phantoms] if isinstance(phantoms, (str, Path)) else phantoms or []
    drawn = [case for folder in folders for case in read_cases(folder)]
    found = [case for entry in real for case in read_cases(**entry)]
    fold, folds = leave_out or (0, 0)
    left_out = [case for i, case in enumerate(found) if folds and i % folds == fold]
    kept = [case for case in found if case not in left_out]
    cases = [*drawn, *kept]
    if not cases:
        raise ZeroSegError("there is nothing to train on: give phantoms or real")
    fitted = drawn if fusion_phantoms is None else read_cases(fusion_phantoms)
    fusion = [*fitted, *(case for case in cases if case.real)]
    sets = CaseSets(cases, left_out, fusion, dict(held_out or {}))
    refuse_held_out([*sets.cases, *sets.left_out, *sets.fusion], sets.held_out)
    return sets


def phantoms_and_real(cases: Sequence[TrainingCase]) -> list[list[TrainingCase]]:
    """Drawn ones and others, in this order."""
    return [[case for case in cases if case.real is real] for real in (False, True)]


def counted(cases: Sequence[TrainingCase]) -> dict:
    """What a record says of them."""
    phantoms, real = phantoms_and_real(cases)
    return {"phantoms": len(phantoms), "real": sorted(case.stem for case in real)}
