"""Fitting a head to a few labelled images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeroseg.errors import ZeroSegError
from zeroseg.learning.augmentation import augment
from zeroseg.learning.cases import Case, as_volumes, check_labels, labelled_slices, labelled_volumes
from zeroseg.learning.head import LearnedHead
from zeroseg.learning.inputs import Shown, show_encoded, squeeze
from zeroseg.learning.network import FewShotNet, class_shares, foreground_dice
from zeroseg.learning.volumes import VolumeNet, change

if TYPE_CHECKING:
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

STEPS, BATCH = 400, 2
"""Steps at most of each network, and images in each; of volumes two changed copies of one."""
RATE, VOLUME_RATE, LEAST, DECAY = 1e-3, 2e-3, 1e-2, 1e-2
"""Learning rates, of images and of volumes, which fall on a line, the share of them that is left in the end, and weight decay."""

Network = TypeVar("Network", FewShotNet, VolumeNet)
Look = Callable[[], tuple[Tensor, Tensor]]
"""What a network looks at in a step: gives its logits of what was drawn, and the truth."""


class Stopped(ZeroSegError):
    """Learning was stopped from outside; nothing was kept."""


def fit(
    cases: Sequence[Case],
    inferer: AttentionSegmentationInferer,
    *,
    labels: Mapping[str, int],
    seconds: float = 60,
    progress: Callable[[int, int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    seed: int = 0,
    start: LearnedHead | None = None,
    steps: int = STEPS,
) -> LearnedHead:
    """Learn to label images like a few given ones.

    Args:
        cases: images and volumes with their labels, one or more. Volumes alone are learned from as a whole; beside images, and where
            they are flat, some of their slices are.
        inferer: its frozen model reads the images.
        labels: name -> value in the labels, 1 to 255.
        seconds: after which learning ends at the latest; reading the images counts for half of it at most.
        progress: called as ``progress(epoch, total_epochs, best_metric)``; the metric is the Dice so far on the given images,
            changed at random, of all networks the worst. The total counts the steps of all networks and may not be reached where
            the time is up.
        cancelled: asked between steps; as ``progress`` from several threads, one at a time.
        seed: of every random number. Equal input, settings and number of steps give equal heads.
        start: a head to go on from; of the same labels and backbone.
        steps: of each network, after which it learns no further.

    Raises:
        Stopped: ``cancelled`` said so.
        ZeroSegError: a label does not fit its image, holds unknown values, or all are empty; ``start`` has other labels.
        WeightsError: the backbone cannot be loaded.
    """
    began = time.perf_counter()
    names = check_labels(labels)
    if not seconds > 0:
        raise ZeroSegError(f"seconds must be positive, not {seconds!r}")
    if start is not None and start.labels != names:
        raise ZeroSegError("the head to go on from has other labels: learn from the start")
    how: dict[str, Any] = {"progress": progress, "cancelled": cancelled, "seed": seed, "start": start, "steps": steps}
    if cases and as_volumes(cases):
        seen = list(labelled_volumes(cases, names))
        network, facts = fit_volumes(seen, left=_left(seconds, began), **how)
    else:
        slices = labelled_slices(cases, names, inferer.slice_axis)
        shown = []
        for part in slices:
            _stop_if(cancelled)
            shown.append(show_encoded(inferer, inferer.encode_prepared(part.image)))
        classes = [shares(part.classes, len(names) + 1) for part in slices]
        network, facts = fit_shown(shown, classes, left=_left(seconds, began), **how)
        facts = {"slices": len(slices), **facts}
    facts = {"shots": len(cases), **facts, "seconds": round(time.perf_counter() - began, 1)}
    return LearnedHead(inferer, network, names, facts)


def _left(seconds: float, began: float) -> Callable[[], float]:
    """The share that is left of the rest of the seconds since ``began``; what passed of them counts for half at most."""
    begin = time.perf_counter()
    rest = max(seconds - (begin - began), seconds / 2)
    return lambda: 1 - (time.perf_counter() - begin) / rest


def shares(classes: Tensor, count: int) -> Tensor:
    """(H, W) class of every pixel -> (count, H, W) float32 in {0, 1}."""
    return F.one_hot(classes, count).permute(2, 0, 1).float()


def fit_shown(
    shown: Sequence[Shown],
    classes: Sequence[Tensor],
    *,
    left: Callable[[], float],
    progress: Callable[[int, int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    seed: int = 0,
    start: LearnedHead | None = None,
    steps: int = STEPS,
) -> tuple[FewShotNet, dict]:
    """``fit`` of images that are read already.

    Args:
        shown: of the images.
        classes: per image (L + 1, H, W) shares.
        left: the share of the time that is left; learning ends at 0, after one step at least.
        other arguments: as ``fit``.

    Returns:
        the network, and ``steps`` (of all its networks), ``train_dice``, ``found`` (Dice of the foreground with what is labelled), ``seed``.
    """
    images = torch.stack([s.image for s in shown])
    truths = torch.stack([squeeze(c) for c in classes])
    foreground = torch.stack([s.foreground for s in shown])
    maps = torch.cat([truths, foreground], 1)
    # A head that is gone on with keeps the networks it has.
    found = foreground_dice(foreground, truths) if start is None else start.found
    network = _begin(lambda: FewShotNet(class_shares(foreground, truths), found), seed, start)

    def looks(answer: Callable[[Tensor, Tensor], Tensor], seed: int) -> Look:
        generator = torch.Generator().manual_seed(seed)

        def look() -> tuple[Tensor, Tensor]:
            batch = _draw(len(images), BATCH, generator)
            image, changed = augment(images[batch], maps[batch], generator)
            return answer(image, changed[:, -1:]), changed[:, :-1]

        return look

    parts: list[tuple[nn.Module, Look]] = [(network.plain, looks(lambda image, _: network.plain(image), seed + 1))]
    if network.guided is not None:
        parts.append((network.guided, looks(network, seed)))
    return network, _learn(parts, RATE, left, progress, cancelled, steps) | {"found": round(found, 4), "seed": seed}


def fit_volumes(
    seen: Sequence[tuple[Tensor, Tensor]],
    *,
    left: Callable[[], float],
    progress: Callable[[int, int, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    seed: int = 0,
    start: LearnedHead | None = None,
    steps: int = STEPS,
) -> tuple[VolumeNet, dict]:
    """``fit`` of whole volumes, which no frozen model reads.

    Args:
        seen: of ``labelled_volumes``.
        other arguments: as ``fit_shown``.

    Returns:
        the network, and ``volumes``, ``steps``, ``train_dice`` and ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    met = torch.stack([truth.mean((1, 2, 3)) for _, truth in seen]).mean(0)
    network = _begin(lambda: VolumeNet(met), seed, start)
    order: list[int] = []

    def look() -> tuple[Tensor, Tensor]:
        if not order:
            order.extend(torch.randperm(len(seen), generator=generator).tolist())
        scan, truth = (values.expand(BATCH, *values.shape) for values in seen[order.pop()])
        scans, truths = change(scan, truth, generator)
        return network(scans), truths

    facts = _learn([(network, look)], VOLUME_RATE, left, progress, cancelled, steps)
    return network, {"volumes": len(seen), **facts, "seed": seed}


def _learn(
    parts: Sequence[tuple[nn.Module, Look]],
    rate: float,
    left: Callable[[], float],
    progress: Callable[[int, int, float], None] | None,
    cancelled: Callable[[], bool] | None,
    steps: int,
) -> dict:
    """Networks that learn side by side, each with what it looks at. Returns ``steps`` of all, and ``train_dice`` of the worst."""
    reports = _Reports(len(parts), steps, progress, cancelled)
    if len(parts) == 1:
        _learn_one(0, *parts[0], rate, left, reports)
    else:
        # Small convolutions hardly share work: a core each, the plain network makes a third more steps and the guided one three times
        # as many as on all cores one after the other.
        with _one_thread_each(), ThreadPoolExecutor(len(parts)) as pool:
            running = [pool.submit(_learn_one, i, *part, rate, left, reports) for i, part in enumerate(parts)]
            try:
                for one in as_completed(running):
                    one.result()
            except BaseException:
                # Ctrl-C among them: what still learns is not waited for.
                reports.stop()
                raise
    return {"steps": sum(reports.done), "train_dice": round(min(reports.dice), 4)}


def _learn_one(
    index: int, network: nn.Module, look: Look, rate: float, left: Callable[[], float], reports: _Reports
) -> None:
    """Step after step of one network."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=DECAY)
    for done in range(reports.steps):
        _stop_if(reports.asked_to_stop)
        spent = max(done / reports.steps, 1 - left())
        if spent >= 1 and done:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * (LEAST + 1 - min(1.0, spent))
        with torch.enable_grad():
            loss, dice = loss_and_dice(*look())
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        reports.step(index, dice)


class _Reports:
    """How far networks are that learn side by side, and whether they are to stop.

    Attributes:
        done: steps of each.
        dice: the running mean of each.
    """

    def __init__(
        self,
        count: int,
        steps: int,
        progress: Callable[[int, int, float], None] | None,
        cancelled: Callable[[], bool] | None,
    ):
        self.steps, self.done, self.dice = steps, [0] * count, [0.0] * count
        self._progress, self._cancelled = progress, cancelled
        self._best, self._stopped, self._lock = 0.0, False, threading.Lock()

    def step(self, index: int, dice: float) -> None:
        """A network has made a step."""
        with self._lock:
            self.done[index] += 1
            self.dice[index] = dice if self.done[index] == 1 else 0.9 * self.dice[index] + 0.1 * dice
            self._best = max(self._best, min(self.dice))
            made, total = sum(self.done), self.steps * len(self.done)
            if self._progress is not None and (made % 10 == 0 or made == total):
                self._progress(made, total, self._best)

    def stop(self) -> None:
        """Let every network stop before its next step."""
        self._stopped = True

    def asked_to_stop(self) -> bool:
        """Whether one was to stop; from then on all are."""
        with self._lock:
            self._stopped = self._stopped or (self._cancelled is not None and self._cancelled())
            return self._stopped


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Threads that begin within have one core each for torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(make: Callable[[], Network], seed: int, start: LearnedHead | None) -> Network:
    """A network in training, from random weights or from those of a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
    if start is not None:
        if type(start.network) is not type(network):
            raise ZeroSegError("the head to go on from was learned from volumes, or these are: learn from the start")
        network.load_state_dict(start.network.state_dict())
    return network.requires_grad_(True).train()


def _draw(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Images of a step: each once before any comes twice."""
    rounds = -(-batch // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:batch]


def loss_and_dice(logits: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy plus 1 - Dice, over all pixels or voxels of a batch; and the Dice itself, its mean over the labels."""
    shares, wanted = (values[:, 1:].transpose(0, 1).flatten(1) for values in (logits.softmax(1), truth))
    both = (shares * wanted).sum(1)
    dice = ((2 * both + 1) / (shares.sum(1) + wanted.sum(1) + 1)).mean()
    return F.cross_entropy(logits, truth) + 1 - dice, float(dice.detach())


def _stop_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Stopped("learning was stopped: nothing was saved, an earlier head stays as it is")
