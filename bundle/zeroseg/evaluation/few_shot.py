"""Learning from a few labels, measured: heads fitted to k images of a set and scored on others of it, beside what needs no frozen model.

Each choice of images is drawn by a seed. All methods that learn have the same images, and the same seconds of processor time, so that
a busy machine favours none.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from skimage.color import rgb2lab
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from tqdm import tqdm

from zeroseg.attention.prepare import prepare
from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.confidence import spearman
from zeroseg.evaluation.pairs import find_pairs
from zeroseg.evaluation.protocols import load_sample
from zeroseg.evaluation.tables import markdown_rows, write_csv, write_text
from zeroseg.hashing import file_sha256
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import atomic_path, versions, write_json
from zeroseg.learning.augmentation import augment
from zeroseg.learning.exemplar import Exemplar
from zeroseg.learning.features import Reading, read_encoded
from zeroseg.learning.fitting import BATCH, fit_shown, loss_and_dice, shares
from zeroseg.learning.head import LearnedHead, expected_dice
from zeroseg.learning.inputs import Shown, squeeze

COLUMNS = ("set", "seed", "shots", "method", "case", "dice", "expected_dice")
NEIGHBOURS, SAMPLED = 15, 4000
"""Neighbours of a colour that vote, and pixels of each image they are chosen from."""
UNET_RATE = 1e-3


@dataclass(frozen=True)
class ReadSample:
    """A labelled image with what all methods need of it.

    Attributes:
        stem: name of the case.
        guide: (3, H, W) in [0, 1].
        truth: (H, W) bool.
        reading: of the frozen model.
        auto: (H, W) bool, the label-free mask.
    """

    stem: str
    guide: Tensor
    truth: np.ndarray
    reading: Reading
    auto: np.ndarray

    @property
    def shown(self) -> Shown:
        """What the network that learns is shown of it."""
        return Shown(self.reading.image, squeeze(torch.from_numpy(self.auto)[None]), self.reading.size)

    @property
    def classes(self) -> Tensor:
        """(2, H, W) shares of background and object."""
        return shares(torch.from_numpy(self.truth).long(), 2)


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two bool masks, of which the second is not empty."""
    return 2 * np.count_nonzero(prediction & truth) / (np.count_nonzero(prediction) + np.count_nonzero(truth))


def read_sample(inferer: AttentionSegmentationInferer, pair: tuple, cache: Path | None) -> ReadSample:
    """Read a pair of files, encode the image, and keep what the frozen model gave.

    Raises:
        ZeroSegError: a file cannot be read, or they do not fit.
    """
    sample = load_sample(*pair)
    guide = prepare(torch.as_tensor(sample.image))
    size = (guide.shape[1], guide.shape[2])
    kept = None
    if cache is not None:
        name = "-".join((file_sha256(pair[0].paths[0])[:16], inferer.backbone.fingerprint[:8], f"{inferer.timestep}"))
        kept = cache / f"{name}.safetensors"
        if kept.is_file():
            found = safetensors.torch.load_file(kept)
            reading = Reading(found["image"], found["features"], tuple(found["blocks"].tolist()), size)
            return ReadSample(sample.stem, guide, sample.truth, reading, found["auto"].bool().numpy())
    encoded = inferer.encode_prepared(guide)
    auto = inferer.predict(encoded, "auto").labels > 0
    reading = read_encoded(inferer, encoded)
    if kept is not None:
        content = {
            "image": reading.image,
            "features": reading.features,
            "blocks": torch.tensor(reading.blocks),
            "auto": torch.from_numpy(auto).to(torch.uint8),
        }
        with atomic_path(kept) as part:
            safetensors.torch.save_file(content, part)
    return ReadSample(sample.stem, guide, sample.truth, reading, auto)


# Methods -------------------------------------------------------------------------------------------------------------


def budget(seconds: float) -> Callable[[], float]:
    """A function that gives the share that is left of some seconds of processor time."""
    began = time.process_time()
    return lambda: 1 - (time.process_time() - began) / seconds


def by_head(inferer, given: Sequence[ReadSample], seconds: float, seed: int) -> LearnedHead:
    """The head that ``learning.fit`` would give for these images."""
    network, facts = fit_shown([s.shown for s in given], [s.classes for s in given], left=budget(seconds), seed=seed)
    return LearnedHead(inferer, network, {"object": 1}, facts)


class ColourNeighbours:
    """Every pixel takes the label that most of the pixels of nearest colour (CIE Lab) have in the given images."""

    def __init__(self, given: Sequence[ReadSample], seed: int):
        rng = np.random.default_rng(seed)
        colours, labels = [], []
        for sample in given:
            lab = self._lab(sample)
            picked = rng.choice(len(lab), min(SAMPLED, len(lab)), replace=False)
            colours.append(lab[picked])
            labels.append(sample.truth.ravel()[picked])
        labels, colours = np.concatenate(labels), np.concatenate(colours)
        self._model = KNeighborsClassifier(min(NEIGHBOURS, len(labels))).fit(colours, labels)

    @staticmethod
    def _lab(sample: ReadSample) -> np.ndarray:
        return rgb2lab(sample.guide.permute(1, 2, 0).numpy()).reshape(-1, 3)

    def __call__(self, sample: ReadSample) -> np.ndarray:
        """(H, W) bool; colours are rounded to whole units, so that each is asked for once."""
        unique, where = np.unique(self._lab(sample).round(), axis=0, return_inverse=True)
        return self._model.predict(unique)[where.ravel()].reshape(sample.truth.shape)


class ScratchUNet:
    """MONAI's ``BasicUNet`` from random weights: the same images, size, changes, loss and processor time as the head."""

    def __init__(self, given: Sequence[ReadSample], seconds: float, seed: int):
        left, generator = budget(seconds), torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = BasicUNet(2, 3, 2)
        images = torch.stack([s.reading.image for s in given])
        truths = torch.stack([squeeze(s.classes) for s in given])
        optimizer = torch.optim.AdamW(self._network.parameters(), UNET_RATE, weight_decay=1e-2)
        self.steps = 0
        while self.steps == 0 or left() > 0:
            for group in optimizer.param_groups:
                group["lr"] = UNET_RATE * (1e-2 + max(0.0, left()))
            batch = torch.randint(len(images), (BATCH,), generator=generator)
            image, truth = augment(images[batch], truths[batch], generator)
            loss, _ = loss_and_dice(self._network(image), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.steps += 1
        self._network.eval()

    @torch.inference_mode()
    def __call__(self, sample: ReadSample) -> np.ndarray:
        """(H, W) bool; the mean over the four mirror images."""
        image = sample.reading.image
        flips: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
        logits = self._network(torch.stack([image.flip(f) for f in flips]))
        mean = torch.stack([share.flip(f) for share, f in zip(logits.softmax(1), flips, strict=True)]).mean(0)
        full = F.interpolate(mean[None], sample.truth.shape, mode="bilinear", align_corners=False)[0]
        return (full[1] > full[0]).numpy()


# Sets ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shots: numbers of labelled images.
        choices: of those images, each by a seed.
        seconds: of processor time for each fit.
        rest: most images a choice is scored on.
        unet: how many times these seconds the UNet trains; none leaves it out.
        unet_shots: for which numbers of images it trains longer than once.
    """

    shots: tuple[int, ...] = (1, 3, 5, 10, 20)
    choices: int = 5
    seconds: float = 60
    rest: int = 40
    unet: tuple[float, ...] = (1, 10)
    unet_shots: tuple[int, ...] = (5,)


def measure_set(
    name: str, samples: Sequence[ReadSample], inferer: AttentionSegmentationInferer, plan: Plan
) -> list[dict]:
    """Rows (see ``COLUMNS``) of one set; shots that leave fewer than two images to score on are left out."""
    rows = []
    for seed in range(plan.choices):
        order = np.random.default_rng(seed).permutation(len(samples))
        for shots in [k for k in plan.shots if k <= len(samples) - 2]:
            given, rest = [samples[i] for i in order[:shots]], [samples[i] for i in order[shots:][-plan.rest :]]

            def add(method: str, sample: ReadSample, mask: np.ndarray, confidence: float | None = None) -> None:
                row = {"set": name, "seed": seed, "shots": shots, "method": method, "case": sample.stem}  # noqa: B023
                rows.append(row | {"dice": dice(mask, sample.truth), "expected_dice": confidence})

            head = by_head(inferer, given, plan.seconds, seed)
            for sample in rest:
                probabilities = head.probabilities(sample.shown)
                add("learned", sample, probabilities.argmax(0) == 1, expected_dice(probabilities))
                add("auto", sample, sample.auto)
            if shots == 1:
                exemplar = Exemplar.of_reading(given[0].reading, given[0].classes, inferer, {"object": 1})
                for sample in rest:
                    probabilities = exemplar.probabilities(sample.reading, sample.guide)
                    add("exemplar", sample, probabilities.argmax(0) == 1, expected_dice(probabilities))
            colour = ColourNeighbours(given, seed)
            for sample in rest:
                add("colour neighbours", sample, colour(sample))
            for times in plan.unet:
                if times > 1 and shots not in plan.unet_shots:
                    continue
                unet = ScratchUNet(given, times * plan.seconds, seed)
                for sample in rest:
                    add("BasicUNet" if times == 1 else f"BasicUNet, {times:g} times as long", sample, unet(sample))
    return rows


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """method -> shots -> mean Dice over choices, its deviation between them, and Spearman of the expected Dice."""
    groups: dict = defaultdict(list)
    for row in rows:
        groups[row["method"], row["shots"]].append(row)
    out: dict = defaultdict(dict)
    for (method, shots), group in groups.items():
        seeds = sorted({row["seed"] for row in group})
        means = [float(np.mean([row["dice"] for row in group if row["seed"] == seed])) for seed in seeds]
        entry: dict[str, float | int | None] = {
            "dice": float(np.mean(means)),
            "std": float(np.std(means)),
            "choices": len(seeds),
        }
        if group[0]["expected_dice"] is not None:
            each = [
                spearman(*zip(*((r["expected_dice"], r["dice"]) for r in group if r["seed"] == seed), strict=True))
                for seed in seeds
            ]
            known = [value for value in each if value is not None]
            entry["spearman"] = float(np.mean(known)) if known else None
        out[method][str(shots)] = entry
    return dict(out)


def tables(summaries: dict[str, dict]) -> str:
    """Dice in Markdown, a row per method and number of images, a column per set, the mean where all sets have it; then Spearman."""
    parts = []
    for title, key in (("Dice", "dice"), ("Spearman of the expected Dice with Dice", "spearman")):
        wanted = [
            (method, shots)
            for summary in summaries.values()
            for method, values in summary.items()
            for shots, value in values.items()
            if key in value
        ]
        lines = [[title, "images", *summaries, "mean"], ["---", *["---:"] * (len(summaries) + 2)]]
        for method, shots in sorted(set(wanted), key=lambda w: (int(w[1]), w[0])):
            values = [summary.get(method, {}).get(shots, {}).get(key) for summary in summaries.values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            known = [value for value in values if value is not None]
            mean = f"{np.mean(known):.3f}" if len(known) == len(values) else "-"
            lines.append([method, shots, *cells, mean])
        parts.append(markdown_rows(lines))
    return "\n".join(parts)


def evaluate_few_shot(
    sets: dict[str, tuple[Path, Path]],
    out: Path,
    inferer: AttentionSegmentationInferer,
    plan: Plan,
    cache: Path | None = None,
    limit: int | None = None,
) -> int:
    """Measure every set and write ``few_shot.csv``, ``summary.json`` and ``table.md``; returns how many cases and sets failed.

    Args:
        sets: name -> folders of images and masks; sets of volumes are left out.
        out: folder to write to; results so far are written after each set.
        inferer: with its weights loaded.
        plan: what is measured.
        cache: folder for what the frozen model gave, so that a further run does not encode again.
        limit: most cases of a set.

    Raises:
        ZeroSegError: no set could be measured.
    """
    rows: list[dict] = []
    summaries: dict[str, dict] = {}
    failed = []
    for name, (images, masks) in sets.items():
        samples = []
        try:
            pairs, _ = find_pairs(images, masks, out, limit=limit)
        except ZeroSegError as error:
            failed.append({"set": name, "error": str(error)})
            continue
        for pair in tqdm(pairs, desc=f"{name}: encoding", unit="image", disable=None):
            try:
                samples.append(read_sample(inferer, pair, cache))
            except ZeroSegError as error:
                failed.append({"set": name, "case": pair[0].stem, "error": str(error)})
                tqdm.write(f"{name}: {pair[0].stem} failed: {error}", file=sys.stderr)
        found = measure_set(name, samples, inferer, plan)
        if not found:
            failed.append({"set": name, "error": "too few images for any of the shots"})
            continue
        rows += found
        summaries[name] = summarise(found)
        write_csv(out / "few_shot.csv", COLUMNS, rows)
        write_json(
            out / "summary.json",
            {
                "few_shot": summaries,
                "settings": {"plan": plan, "inferer": inferer.settings(), "failed": failed, "versions": versions()},
                "backbone": inferer.backbone.describe(),
            },
        )
        write_text(out / "table.md", tables(summaries))
        print(f"{name}: done", flush=True)
    if not summaries:
        raise ZeroSegError(f"no set could be measured, the first: {failed[0]['error'] if failed else 'none was given'}")
    print(tables(summaries))
    return len(failed)
