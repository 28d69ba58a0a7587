"""The head of the task ``learned``, trained on all labels submitted."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any

import torch
from monailabel.interfaces.tasks.train import TrainTask

from lib.engine import Engine
from lib.heads import Heads
from lib.infers.base import pick
from lib.mends.errors import Refused
from lib.mends.responsive import stop_if_abandoned
from lib.scoring.learned import unseen_scores
from lib.submissions import read_all, submitted, values_of_all
from zeroseg.errors import ZeroSegError
from zeroseg.learning import Case, LearnedHead, as_volumes, fit
from zeroseg.learning.fitting import STEPS

logger = logging.getLogger(__name__)

NICENESS = 5
"""The training gives way to the server, which answers meanwhile."""
CONFIG = {"seconds": 60.0, "steps": STEPS, "from_scratch": False, "seed": 0}


class LearnedTrainer(TrainTask):
    """Few-shot training on the frozen model's features, in MONAI Label's training process.

    Args:
        engine: encodes the images.
        heads: where the head goes. It takes the place of the one that is served when it is whole, and not before: a training
            that fails or is killed changes nothing.
    """

    def __init__(self, engine: Engine, heads: Heads):
        super().__init__("Learns the submitted labels; the task learned then finds them in other images")
        self.engine, self.heads = engine, heads

    def config(self) -> dict[str, Any]:
        """``seconds`` and ``steps`` at most; ``from_scratch``: do not go on from the head before; ``seed``."""
        return dict(CONFIG)

    def stats(self) -> dict[str, Any]:
        """See ``Heads.stats``."""
        return self.heads.stats()

    def check(self, request: dict[str, Any], datastore) -> dict[str, Any]:
        """The options of a request.

        Raises:
            Refused: there is nothing to learn from.
            ZeroSegError: an option is of the wrong kind.
        """
        options = {name: pick(name, request.get(name, default), default) for name, default in CONFIG.items()}
        if not 1 <= options["seconds"] <= 3600:
            raise ZeroSegError(f"seconds must be 1 to 3600, not {options['seconds']:g}")
        if not 1 <= options["steps"] <= 10_000:
            raise ZeroSegError(f"steps must be 1 to 10000, not {options['steps']}")
        if not submitted(datastore):
            raise Refused("no label was submitted yet: submit at least one, then train")
        return options

    def __call__(self, request: dict[str, Any], datastore) -> dict[str, Any]:
        """Train, and serve what was learned.

        Args:
            request: options of ``config``.
            datastore: of the app.

        Returns:
            what is known of the head, see ``Heads.record``.

        Raises:
            Refused, ZeroSegError: as ``check``, no label can be read, or the training was stopped.
        """
        options = self.check(request, datastore)
        started, server = time.time(), os.getppid()
        self.heads.report(epoch=0, total_epochs=1, best_metric=0.0)
        try:
            submissions = read_all(datastore, self.engine)
            values = values_of_all(submissions, (self.heads.record() or {}).get("labels", {}))
            if not values:
                raise ZeroSegError(
                    "the submitted labels are empty, or none can be read: submit one that shows something"
                )
            scored = unseen_scores(self.heads, self.engine, submissions)
            state: dict[str, Any] = {"epoch": 0, "total_epochs": 1, "best_metric": 0.0}

            def progress(epoch: int, total_epochs: int, best_metric: float) -> None:
                state.update(epoch=epoch, total_epochs=total_epochs, best_metric=round(float(best_metric), 4))
                self.heads.report(**state)

            def cancelled() -> bool:
                stop_if_abandoned()
                # A training whose server has gone serves nobody.
                return os.getppid() != server

            cases = [Case(one.entry.unprepared, one.in_values(values)) for one in submissions]
            head = fit(
                cases,
                self.engine.inferer,
                labels=values,
                seconds=options["seconds"],
                progress=progress,
                cancelled=cancelled,
                seed=options["seed"],
                start=None if options["from_scratch"] else self._start(values, cases),
                steps=options["steps"],
            )
            done = head.describe()
            record = {
                "epoch": done["steps"],
                "total_epochs": done["steps"],
                "best_metric": max(state["best_metric"], done["train_dice"]),
                "labels": values,
                "images": {one.image: one.time for one in submissions},
                "total_time": str(timedelta(seconds=round(time.time() - started))),
            }
            self.heads.publish(head, record)
            if scored:
                self.heads.add_progress(scored)
            return record
        finally:
            self.heads.finish()

    def _start(self, values: dict[str, int], cases: list[Case]) -> LearnedHead | None:
        """The head before, where it knows the same labels and is of the same kind, of images or of volumes."""
        record = self.heads.record()
        if record is None or record["labels"] != values:
            return None
        try:
            head = self.heads.head()
            return head if head.of_volumes == as_volumes(cases) else None
        except ZeroSegError as error:
            logger.warning("training starts anew: %s", error)
            return None


def give_way() -> None:
    """Let the server's process go first; called in the process of a background task."""
    os.nice(NICENESS)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
