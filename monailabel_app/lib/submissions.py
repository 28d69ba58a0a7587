"""Labels that people submitted, as the learner and the scores take them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.engine import Engine
from lib.mends.dicom_seg import on_grid
from lib.mends.errors import NotFound
from lib.prompts import STROKES
from lib.sources import OpenImage
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases, read_image

logger = logging.getLogger(__name__)

FINAL = DefaultLabelTag.FINAL.value


@dataclass
class Submission:
    """One image and the label submitted for it.

    Attributes:
        image: id in the datastore.
        entry: the image.
        labels: uint8 of the image's shape, values as the client gave them, but for those that share a name.
        names: name -> value of the labels present.
        time: seconds since 1970 of the submission.
    """

    image: str
    entry: OpenImage
    labels: np.ndarray
    names: dict[str, int]
    time: int

    def in_values(self, values: dict[str, int]) -> np.ndarray:
        """The labels under other values; names that are not among them become background."""
        table = np.zeros(256, np.uint8)
        for name, value in self.names.items():
            table[value] = values.get(name, 0)
        return table[self.labels]


def submitted(datastore) -> dict[str, int]:
    """Image -> time of submission of the labels that were submitted to this server, the oldest first.

    Labels that other programs put on a DICOM server are not among them: nobody knows who drew those.
    """
    entries = datastore.json()["objects"]
    times = {
        image: int(entry["labels"][FINAL]["info"].get("ts", 0))
        for image, entry in entries.items()
        if FINAL in entry["labels"]
    }
    return dict(sorted(times.items(), key=lambda item: (item[1], item[0])))


def read(datastore, engine: Engine, image: str) -> Submission:
    """One submission.

    Raises:
        NotFound: the image is gone from the DICOM server.
        ZeroSegError: the image or its label cannot be read, or one does not fit the other.
    """
    entry = engine.open(datastore.get_image_uri(image))
    path = label_path(datastore, image)
    labels = on_grid(read_image(find_cases(path)[0]), entry.image)
    info = datastore.get_label_info(image, FINAL)
    labels, names = named(labels, info.get("label_info"))
    return Submission(image, entry, labels, names, int(info.get("ts", 0)))


def read_all(datastore, engine: Engine) -> list[Submission]:
    """Every submission that can be read; the log names the others."""
    found = []
    for image in submitted(datastore):
        try:
            found.append(read(datastore, engine, image))
        except (ZeroSegError, NotFound) as error:
            logger.warning("the label of %s is left out: %s", image, error)
    return found


def label_path(datastore, image: str) -> Path:
    """The label's file. On a DICOM server the one that was submitted, not the DICOM SEG made of it."""
    extension = datastore.json()["objects"][image]["labels"][FINAL]["ext"]
    return Path(datastore._datastore.label_path(FINAL)) / f"{image}{extension}"


def named(labels: np.ndarray, label_info: Any) -> tuple[np.ndarray, dict[str, int]]:
    """Labels, of which those of one name are one, and the names of those present.

    A viewer lets a user call two segments "lesion". Names are as the client gave them, else ``label 1`` and so on; strokes are no
    labels.

    Args:
        labels: uint8.
        label_info: as saved with the label: ``[{"name": "liver", "idx": 1}]``.
    """
    given = {}
    for entry in label_info if isinstance(label_info, list) else ():
        if isinstance(entry, dict) and str(entry.get("idx", entry.get("id", ""))).isdigit():
            given[int(entry.get("idx", entry.get("id")))] = str(entry.get("name") or "").strip()
    table, names = np.arange(256, dtype=np.uint8), {}
    for value in (int(v) for v in np.unique(labels) if v):
        name = given.get(value) or f"label {value}"
        table[value] = names.setdefault(name, value)
    return table[labels], {name: value for name, value in names.items() if name not in (*STROKES, "background")}


def values_of_all(submissions: list[Submission], before: Mapping[str, int] | None = None) -> dict[str, int]:
    """Name -> value of every label of all submissions, ordered by value.

    Args:
        submissions: in whose order names first appear.
        before: name -> value of those that have one already. They keep it and nobody else gets it while there are others, so that
            viewers that were told so stay right.
    """
    names, before = dict.fromkeys(name for one in submissions for name in one.names), before or {}
    kept = {name: value for name, value in before.items() if name in names}
    top = max(before.values(), default=0)
    free = iter([*range(top + 1, 256), *(value for value in range(1, top + 1) if value not in kept.values())])
    new = dict(zip((name for name in names if name not in kept), free, strict=False))
    return dict(sorted({**kept, **new}.items(), key=lambda item: item[1]))
