"""The head that was trained on the labels of a datastore: where it is kept, how it comes to be served, what is known of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import Any

import psutil

from lib.engine import Engine
from zeroseg.errors import ZeroSegError
from zeroseg.io import atomic_path
from zeroseg.learning import LearnedHead

logger = logging.getLogger(__name__)

FOLDER = ".learned"
"""Folder beside the labels that holds heads, the state of a training, and scores."""


class Heads:
    """Trained heads of one datastore, shared by the server and its training process through files alone.

    Every head has a folder of its own; ``current.json`` names the one that is served, and takes its place whole. A training that
    is killed leaves the old one.

    Args:
        folder: where they are kept; made on first writing.
        engine: its inferer encodes what a head is asked about.
    """

    def __init__(self, folder: Path, engine: Engine):
        self.folder, self.engine = folder, engine
        self._loaded: tuple[str, LearnedHead] | None = None
        self._loading = threading.Lock()

    def record(self) -> dict[str, Any] | None:
        """What is known of the head that is served; None when there is none, or it belongs to another backbone.

        ``name``; ``labels``, name -> value; ``images``, id -> time of submission, of what it learned from; ``best_metric``,
        ``total_epochs``, ``total_time``; ``source`` and ``fingerprint`` of the backbone it belongs to.
        """
        record = _read(self.folder / "current.json")
        if record is None or record.get("source") != self._source():
            return None
        # Known once its weights are loaded.
        known = getattr(self.engine.inferer.backbone, "fingerprint", None)
        return record if known in (None, record.get("fingerprint")) else None

    def _source(self) -> str:
        """What tells one backbone from another before its weights are loaded, and names no folder."""
        backbone = self.engine.inferer.backbone
        described = backbone.source, backbone.revision, backbone.variant, self.engine.inferer.encoding_key
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def head(self) -> LearnedHead:
        """The head that is served, loaded on first use.

        Raises:
            ZeroSegError: there is none, or its weights do not belong to the server's backbone.
        """
        record = self.record()
        if record is None:
            raise ZeroSegError(
                "nothing has been learned yet: submit labels, then train (Update Model, or POST /train/learned)"
            )
        with self._loading:
            if self._loaded is None or self._loaded[0] != record["name"]:
                head = LearnedHead.load(self.folder / record["name"], self.engine.inferer)
                self._loaded = record["name"], head
            return self._loaded[1]

    def publish(self, head: LearnedHead, record: dict[str, Any]) -> None:
        """Serve a head from now on; the others are removed, but for the one before, which an answer may still be loading.

        Args:
            head: trained.
            record: what is known of it, see ``record``.

        Raises:
            ZeroSegError: the folder cannot be written to.
        """
        before = _read(self.folder / "current.json") or {}
        belongs = {"source": self._source(), "fingerprint": self.engine.inferer.backbone.describe()["sha256"]}
        name = f"head-{secrets.token_hex(6)}"
        head.save(self.folder / name)
        _write(self.folder / "current.json", {**record, "name": name, **belongs})
        for other in self.folder.glob("head-*"):
            if other.name not in (name, before.get("name")):
                shutil.rmtree(other, ignore_errors=True)

    def report(self, **state: Any) -> None:
        """Say how far the training of this process is."""
        _write(self.folder / "training.json", {**state, "pid": os.getpid(), "started": _started(os.getpid())})

    def stats(self) -> dict[str, Any]:
        """``epoch``, ``total_epochs``, ``best_metric`` of the training that runs, with ``total_time`` those of the last one that ended.

        Cheap: two small files are read. Empty where nothing was ever trained.
        """
        running = _read(self.folder / "training.json")
        if running and _started(running.get("pid")) == running.get("started"):
            return {key: running[key] for key in ("epoch", "total_epochs", "best_metric") if key in running}
        record = self.record() or {}
        return {key: record[key] for key in ("epoch", "total_epochs", "best_metric", "total_time") if key in record}

    def finish(self) -> None:
        """Nothing is trained in this process any more."""
        (self.folder / "training.json").unlink(missing_ok=True)

    def scores(self) -> dict[str, Any]:
        """Scores of the heads so far; empty before the first."""
        return _read(self.folder / "scores.json") or {}

    def add_progress(self, entry: dict[str, Any]) -> None:
        """Keep what a head made of labels it had not seen, before the next one takes its place."""
        scores = self.scores()
        self.write_scores({**scores, "progress": [*scores.get("progress", []), entry]})

    def write_scores(self, scores: dict[str, Any]) -> None:
        """Keep scores.

        Raises:
            ZeroSegError: the folder cannot be written to.
        """
        _write(self.folder / "scores.json", scores)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is left out: %s", path.name, error)
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1))


def _started(pid: Any) -> float | None:
    """When a process began; None when there is none. Tells it from a later one of the same number."""
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, TypeError, ValueError):
        return None
