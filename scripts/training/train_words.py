#!/usr/bin/env python
"""Train the word head: which known things an image shows, and about where. No human mask is read.

    python scripts/training/train_words.py --unlabelled DIR --training DIR --volumes DIR --work runs/words --encode 10240
    python scripts/training/train_words.py --work runs/words --steps 2400 --noise 0.6 --members 3 --offset 2.2 --out bundle/models/words

Phantoms (``phantoms.py``, and slices of ``phantoms3d.py``) teach place and presence, for what was drawn is known; of real images only what
their kind shows is said (``concepts.py``). The first command encodes them once, changed by chance in cut, colour, contrast and sharpness;
it goes on where it ended. The second one fits the head and writes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from tqdm import tqdm

from concepts import CONCEPTS, FOLDERS, KINDS, MIXED, Shows, concept_of, of_file, shows
from encode_scenes import UNLABELLED
from phantoms import FURTHER, make_phantom
from phantoms3d import (
    BLADDER,
    BOWEL,
    CORTEX,
    CSF,
    FAT,
    GREY,
    HEART,
    KIDNEY,
    LIVER,
    LUNG,
    MARROW,
    MUSCLE,
    SPLEEN,
    WHITE,
    make_volume,
)
from train_backbone import licensed
from zeroseg.attention.prepare import prepare
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.backbones.weights import write_sums
from zeroseg.interaction.word_head import RESOLUTION, SIDE, WordHead, read_features
from zeroseg.regions import largest_component

SHARD, BATCH = 64, 8
LEAF_KINDS = tuple(k for k in KINDS if k not in ("ct", "mr", "microscopy"))
LEAVES = [CONCEPTS.index(k) for k in LEAF_KINDS]
"""Kinds of which an image is one."""
COLOURED = [
    CONCEPTS.index(k)
    for k in ("dermoscopy", "blood smear", "histology", "endoscopy", "retinal fundus", "wound photograph")
]
NEW = 0.4
"""Share of the phantoms that are of kinds the backbone has not seen."""
ZOOM = 0.4
"""Share of the phantoms that are seen from near."""
FAT_BLACK = 0.4
"""Share of the slices of CT whose window leaves fat black."""
DOUBT = 0.15
"""Weight of a real image's not showing what no real image shows in training."""
CLOSE_UPS, CLOSE_UP = "blood_bccd", shows(("blood smear", "white blood cell"), ("red blood cells",))
"""Folder of smears that each hold a white cell, and what a part of such an image shows, cut out around the stained nucleus."""
SEEDS = 7_000_000
"""Of the first phantom; those of the backbone's training and those drawn to measure with are others."""
SLABS = {
    "abdomen": ((200, 150, 12), "abdominal"),
    "chest": ((200, 150, 12), "chest"),
    "head": ((100, 120, 12), "brain"),
    "limb": ((130, 130, 12), "limb"),
}
"""Scene of a volume -> half its field of view in mm, and the name of its kind of image."""
TISSUES = {
    "liver": (LIVER,), "spleen": (SPLEEN,), "kidneys": (KIDNEY,), "bowel": (BOWEL,), "bladder": (BLADDER,), "bone": (CORTEX, MARROW),
    "muscle": (MUSCLE,), "fat": (FAT,), "lungs": (LUNG,), "heart": (HEART,), "brain": (GREY, WHITE, CSF),
}  # fmt: skip
GROUND = {"breast ultrasound": "tissue", "dermoscopy": "skin", "wound photograph": "skin", "endoscopy": "mucosa"}
"""Kind of phantom -> what all of it shows that no mask covers."""
TUMOUR_OF = {"limb": "soft tissue tumour", "abdomen": "abdominal tumour"}


@dataclass
class Drawn:
    """An image (H, W, 3) uint8, what it shows, and of a phantom the bool masks of what it shows, by concept."""

    image: np.ndarray
    what: Shows
    masks: dict[str, np.ndarray] | None


def of_phantom(seed: int, kind: str | None = None) -> Drawn:
    phantom = make_phantom(seed, kind=kind)
    masks: dict[str, np.ndarray] = {}
    for name, mask in phantom.masks.items():
        concept = concept_of(name)
        if concept in CONCEPTS:
            masks[concept] = masks.get(concept, False) | mask
    opening = phantom.caption.split(" with ")[0].split(",")[0]
    kind = opening if opening in KINDS else None
    if kind in GROUND:
        masks[GROUND[kind]] = ~np.any([*masks.values(), np.zeros(phantom.image.shape[:2], bool)], axis=0)
    return Drawn(phantom.image, shows([kind] if kind else [], ("hair",)), masks)


def perhaps_without_fat(low: float, high: float, rng: np.random.Generator) -> tuple[float, float]:
    """A window of CT in HU, or, in a share ``FAT_BLACK``, one in which fat is black, as pictures of soft tissue often have it."""
    return (rng.uniform(-60, 30), rng.uniform(150, 400)) if rng.random() < FAT_BLACK else (low, high)


def of_volume(seed: int) -> Drawn:
    """A slice of a volume that is drawn whole across."""
    rng = np.random.default_rng([seed, 5])
    scene = str(rng.choice(list(SLABS)))
    half, name = SLABS[scene]
    volume = make_volume(seed, scene=scene, largest=134, field=half, lesion=bool(rng.random() < 0.5))
    modality = volume.case.modality
    at = int(volume.mask.sum((0, 1)).argmax()) if volume.mask.any() else volume.image.shape[2] // 2
    values, lesion, tissue = volume.image[..., at].T, volume.mask[..., at].T, volume.tissue[..., at].T
    if modality == "ct":
        level, width = (40, 400) if rng.random() < 0.5 else (rng.uniform(0, 80), rng.uniform(80, 600))
        if scene == "chest" and rng.random() < 0.4:
            level, width = -500, 1500
        low, high = perhaps_without_fat(level - width / 2, level + width / 2, rng)
    else:
        low, high = np.percentile(values, (1, rng.uniform(98.5, 99.9)))
    image = (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    if modality == "pet" and rng.random() < 0.5:
        image = 255 - image
    masks = {concept: np.isin(tissue, kinds) & ~lesion for concept, kinds in TISSUES.items()}
    if scene in ("abdomen", "chest"):
        masks["spine"] = masks["bone"] & (np.indices(tissue.shape)[0] > 0.6 * tissue.shape[0])
    if lesion.any():
        organ = volume.case.organ
        masks[TUMOUR_OF.get(organ, f"{organ} tumour")] = lesion
    kind = "pet scan" if modality == "pet" else f"{name} {modality}"
    known = [kind] if kind in KINDS else [modality]
    return Drawn(np.repeat(image[..., None], 3, 2), shows(known), masks)


def real_images(unlabelled: Path, training: Path, volumes: Path) -> list[list[tuple[Path, Shows, str]]]:
    """(file, what it shows, folder) by folder; chest X-rays only where their row's licence allows it."""
    folders = []
    for name in UNLABELLED:
        files = sorted((unlabelled / name).iterdir())
        rows = unlabelled / f"{name}_licences.csv"
        folders.append((name, licensed(files, rows) if rows.is_file() else files))
    for root in (training, volumes):
        folders += [
            (d.name, sorted((d / "images").iterdir())) for d in sorted(root.iterdir()) if (d / "images").is_dir()
        ]
    known = {name: files for name, files in folders if name in MIXED or name in FOLDERS}
    near = [(p, CLOSE_UP, f"{CLOSE_UPS} from near") for p in known[CLOSE_UPS]]
    return [near, *([(p, of_file(name, p.name), name) for p in files] for name, files in known.items())]


def of_file_drawn(path: Path, what: Shows, rng: np.random.Generator) -> Drawn:
    if not path.name.endswith((".nii", ".nii.gz")):
        image = np.asarray(Image.open(path).convert("RGB"))
        if what is CLOSE_UP:
            nucleus = {"nucleus": stained(image)}
            y, x, h, w = next(filter(None, (near_one(nucleus, rng) for _ in range(9))), (0, 0, *image.shape[:2]))
            image = image[y : y + h, x : x + w]
        return Drawn(image, what, None)
    import nibabel as nib

    image = nib.load(path)
    values = np.asarray(image.dataobj, np.float32)
    values = values[..., 0] if values.ndim == 4 else values
    zooms = np.array(image.header.get_zooms()[:3])
    # In plane: across the thickest slices, else axial.
    axis = int(zooms.argmax()) if zooms.max() > 1.5 * zooms.min() else 2
    values, zooms = np.moveaxis(values, axis, 2), np.delete(zooms, axis)
    count = values.shape[2]
    part = np.rot90(values[..., int(rng.integers(count // 4, max(count // 4 + 1, 3 * count // 4)))])
    low, high = np.percentile(part, (1, 99.5))
    if values.min() < -500:
        # CT in HU: as a window of soft tissue.
        level, width = rng.uniform(0, 80), rng.uniform(120, 600)
        low, high = perhaps_without_fat(level - width / 2, level + width / 2, rng)
    grey = np.clip((part - low) / max(high - low, 1e-6), 0, 1)
    step = zooms[::-1] / zooms.min()
    grey = cv2.resize(grey, None, fx=float(step[1]) if axis != 2 else 1.0, fy=float(step[0]) if axis != 2 else 1.0)
    return Drawn(np.repeat((grey * 255).astype(np.uint8)[..., None], 3, 2), what, None)


def stained(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: the largest part of a smear that is stained as nuclei of white cells are, dark and purple; by colour alone."""
    r, g, b = np.moveaxis(image.astype(np.float32), 2, 0)
    purple = cv2.GaussianBlur((r + b) / 2 - g, (0, 0), image.shape[0] / 80)
    dark = purple > 0.6 * purple.max()
    return largest_component(dark) if dark.any() else dark


def near_one(masks: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    """A square around one connected part of a mask, a little or some times as wide: (y, x, h, w), or None where all are wide."""
    parts, count = ndimage.label(masks[str(rng.choice(sorted(masks)))])
    if not count:
        return None
    rows, columns = ndimage.find_objects(parts)[int(rng.integers(count))]
    wide = max(rows.stop - rows.start, columns.stop - columns.start)
    side = int(max(24, wide * rng.uniform(1.2, 4)))
    height, width = parts.shape
    if wide < 8 or side > 0.9 * min(height, width):
        return None
    low = [
        int(np.clip((s.start + s.stop) / 2 + rng.uniform(-0.25, 0.25) * (side - wide) - side / 2, 0, n - side))
        for s, n in ((rows, height), (columns, width))
    ]
    return low[0], low[1], side, side


def changed(drawn: Drawn, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
    """(RESOLUTION, RESOLUTION, 3) in [0, 1] as another device, hand or format would have it, the cells' share of each mask likewise."""
    image, masks = drawn.image.astype(np.float32) / 255, drawn.masks
    height, width = image.shape[:2]
    part = near_one(masks, rng) if masks and rng.random() < ZOOM else None
    if part is not None:
        y, x, h, w = part
    # Much of what a real image shows may lie at its edge: of those less is cut off.
    elif rng.random() < 0.5:
        least = 0.5 if masks is not None else 0.8
        h, w = (int(n * rng.uniform(least, 1)) for n in (height, width))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    else:
        y, x, h, w = 0, 0, height, width
    pad = int(max(h, w) * rng.uniform(0, 0.35)) if rng.random() < 0.25 else 0
    turns, flip = int(rng.integers(4)) if rng.random() < 0.5 else 0, rng.random() < 0.5

    def placed(a: np.ndarray, side: int, fill: float) -> np.ndarray:
        a = a[y : y + h, x : x + w]
        if pad:
            a = cv2.copyMakeBorder(a, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(fill,) * 3)
        a = np.ascontiguousarray(np.rot90(a[:, ::-1] if flip else a, turns))
        return cv2.resize(a, (side, side), interpolation=cv2.INTER_AREA)

    out = placed(image, RESOLUTION, float(rng.choice([0.0, 0.0, 1.0])))
    if rng.random() < 0.6:
        out = np.clip((out - 0.5) * np.exp(rng.normal(0, 0.25)) + 0.5 + rng.normal(0, 0.08), 0, 1)
    if rng.random() < 0.6:
        out = out ** np.exp(rng.normal(0, 0.35))
    if np.ptp(out, axis=2).max() > 0.02:
        if rng.random() < 0.6:
            out = np.clip(out * np.exp(rng.normal(0, 0.1, 3)), 0, 1)
        if rng.random() < 0.1:
            out = np.repeat(out.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.3:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.4, 1.8))
    if rng.random() < 0.3:
        out = np.clip(out + rng.uniform(0.01, 0.06) * rng.standard_normal(out.shape[:2])[..., None], 0, 1)
    cells = None
    if masks is not None:
        cells = {name: placed(mask.astype(np.float32), SIDE * 4, 0.0) for name, mask in masks.items()}
        cells = {name: cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for name, mask in cells.items()}
    return out.astype(np.float32), cells


def labels(drawn: Drawn, cells: dict[str, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """(C,) int8 1 present, 0 absent, -1 not said; and (C, SIDE, SIDE) uint8 shares of the cells in 255ths."""
    there, place = set(drawn.what.shows), np.zeros((len(CONCEPTS), SIDE, SIDE), np.uint8)
    may = set(drawn.what.may)
    if cells is not None:
        for name, share in cells.items():
            # Of a few pixels nobody would say that they are in the image.
            if share.mean() > 0.0008:
                there |= shows([name]).shows
            elif share.max() > 0:
                may |= shows([name]).shows
            for word in shows([name]).shows:
                k = CONCEPTS.index(word)
                place[k] = np.maximum(place[k], (np.clip(share, 0, 1) * 255).astype(np.uint8))
    may -= there
    said = np.array([1 if c in there else -1 if c in may else 0 for c in CONCEPTS], np.int8)
    return said, place


def encode(args: argparse.Namespace) -> None:
    backbone = StableDiffusionBackbone(untrained=args.untrained)
    backbone.load()
    folders = real_images(args.unlabelled, args.training, args.volumes)
    args.work.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(range(args.encode // SHARD), mininterval=20):
        target = args.work / f"shard_{shard:04d}.npz"
        if target.exists():
            continue
        columns: dict[str, list] = {"x": [], "said": [], "place": [], "exact": [], "source": []}
        images = []
        for index in range(shard * SHARD, (shard + 1) * SHARD):
            rng = np.random.default_rng([23, index])
            turn = index % 8
            if turn < 3:
                kind = str(rng.choice(list(FURTHER))) if rng.random() < NEW else None
                drawn, source = of_phantom(SEEDS + index, kind), "phantom"
            elif turn < 5:
                drawn, source = of_volume(SEEDS + index), "volume"
            else:
                folder = folders[rng.integers(len(folders))]
                path, what, source = folder[rng.integers(len(folder))]
                drawn = of_file_drawn(path, what, rng)
            image, cells = changed(drawn, rng)
            said, place = labels(drawn, cells)
            images.append(image)
            columns["said"].append(said)
            columns["place"].append(place)
            columns["exact"].append(cells is not None)
            columns["source"].append(source)
        for start in range(0, SHARD, BATCH):
            square = torch.stack([prepare(torch.from_numpy(i).permute(2, 0, 1)) for i in images[start : start + BATCH]])
            columns["x"].append(read_features(backbone, square).half().numpy())
        stored = {k: np.concatenate(v) if k == "x" else np.array(v) for k, v in columns.items()}
        partial = target.with_suffix(".part.npz")
        np.savez(partial, **stored)
        partial.rename(target)


def read_shards(work: Path, most: int | None = None) -> dict[str, np.ndarray]:
    files = sorted(p for p in work.glob("shard_*.npz") if ".part" not in p.name)[:most]
    if not files:
        raise SystemExit(f"--work {work} holds no encoded images: call with --encode first")
    columns: dict[str, list] = {}
    for file in tqdm(files, desc="reading"):
        with np.load(file) as stored:
            for k in stored:
                columns.setdefault(k, []).append(stored[k])
    return {k: np.concatenate(v) for k, v in columns.items()}


def kind_loss(present: torch.Tensor, said: torch.Tensor, real: torch.Tensor, drawn_only: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of an image's one kind against all others; real images choose among kinds that real images are of, for the most part."""
    logits, one = present[:, LEAVES], (said[:, LEAVES] == 1).float()
    # Of breast ultrasound "ultrasound" is true as well.
    general, breast = LEAF_KINDS.index("ultrasound"), LEAF_KINDS.index("breast ultrasound")
    one[:, general] = one[:, general] * (1 - one[:, breast])
    told = one.sum(1) == 1
    full = torch.logsumexp(logits, 1)
    among = torch.logsumexp(logits.masked_fill(drawn_only[LEAVES], -30.0), 1)
    against = torch.where(real, (1 - DOUBT) * among + DOUBT * full, full)
    return ((against - (logits * one).sum(1)) * told).sum() / told.sum().clamp_min(1)


def losses(
    present: torch.Tensor, place: torch.Tensor, said, share, exact, balance, real, drawn_only
) -> dict[str, torch.Tensor]:
    """Presence where it is said; place cell by cell where it was drawn, elsewhere that an absent thing is in no cell, a present one in some."""
    known = (said >= 0).float()
    there = (said == 1).float()
    weight = known * torch.where(said == 1, balance, torch.ones_like(balance))
    weight = weight * torch.where(real[:, None] & drawn_only, DOUBT, 1.0)
    bce = F.binary_cross_entropy_with_logits(present, there, reduction="none")
    whole = (bce * weight).sum() / weight.sum()
    # A kind of image has no place.
    drawn = exact.float()[:, None] * known * torch.tensor([c not in KINDS for c in CONCEPTS])
    cells = F.binary_cross_entropy_with_logits(place, share, reduction="none")
    # Absent things fill most of the cells: they weigh less.
    cells = cells.mean((2, 3)) * drawn * torch.where(said == 1, 4.0, 0.25)
    most = torch.logsumexp(place.flatten(2), 2) - torch.log(torch.tensor(8.0))
    some = F.binary_cross_entropy_with_logits(most, there, reduction="none") * known * (1 - exact.float()[:, None])
    some = some * torch.where(drawn_only, DOUBT, 1.0)
    return {
        "whole": whole,
        "kind": kind_loss(present, said, real, drawn_only),
        "cells": cells.sum() / drawn.sum().clamp_min(1),
        "some": some.sum() / known.sum(),
    }


def shifts(x: np.ndarray, said: np.ndarray, real: np.ndarray) -> tuple[torch.Tensor, ...]:
    """How the features of real images differ from those of phantoms of the same kind, on the mean of an image.

    Returns:
        (K, F) for each kind of both that is grey, and for each that is coloured.
    """
    means = x.astype(np.float32).mean((2, 3))
    found: tuple[list, list] = [], []
    for k in range(len(KINDS)):
        there = said[:, k] == 1
        if min((there & real).sum(), (there & ~real).sum()) >= 20:
            found[k in COLOURED].append(means[there & real].mean(0) - means[there & ~real].mean(0))
    return tuple(torch.from_numpy(np.stack(f or [np.zeros(means.shape[1], np.float32)])) for f in found)


def fit(
    args: argparse.Namespace, data: dict[str, np.ndarray], seed: int
) -> tuple[WordHead, list[dict], dict[str, int]]:
    """A head of one member, its losses, and how many images of which folder it saw."""
    source = data["source"]
    keep = ~np.isin(source, args.without)
    index = np.flatnonzero(keep)
    x = torch.from_numpy(data["x"])
    said, place, exact = (torch.from_numpy(data[k]) for k in ("said", "place", "exact"))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    head = WordHead(CONCEPTS, LEAF_KINDS, x.shape[1])
    kind_of, not_absent = data["said"][index][:, LEAVES] == 1, data["said"][index] != 0
    seen = not_absent.T.astype(np.float32) @ kind_of.astype(np.float32) > 0
    # What is of no kind in training may be in any.
    head.seen_in.copy_(torch.from_numpy(seen | ~seen.any(1, keepdims=True)))
    some = x[index[:: max(1, len(index) // 500)]].float()
    head.mean.copy_(some.mean((0, 2, 3)))
    head.spread.copy_(some.std((0, 2, 3)).clamp_min(1e-3))
    # Folders count alike by the root of their size, as phantoms do.
    counts = {s: int((source[index] == s).sum()) for s in np.unique(source[index])}
    share = np.array([counts[s] ** -0.4 for s in source[index]])
    share /= share.sum()
    positives = (said[index] == 1).float().mean(0).clamp_min(1e-3)
    balance = ((1 - positives) / positives).sqrt().clamp(1, 8)
    real = ~np.isin(source, ("phantom", "volume"))
    between = shifts(data["x"][index], data["said"][index], real[index])
    coloured = (data["said"][:, COLOURED] == 1).any(1).astype(int)
    # That an image is a real one must not speak against what only phantoms show.
    drawn_only = torch.from_numpy(~((data["said"][index] == 1) & real[index][:, None]).any(0))
    average = torch.optim.swa_utils.AveragedModel(head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.rate, weight_decay=0.05)
    log: list[dict] = []
    kept: dict[str, list[float]] = {}
    for step in range(args.steps):
        rows = rng.choice(index, args.batch, p=share)
        batch = x[rows].float()
        # What single features say must not decide: they are other ones in images of other devices.
        batch = batch + args.noise * head.spread[:, None, None] * torch.randn(len(rows), x.shape[1], 1, 1)
        way = torch.from_numpy(
            np.where(real[rows], -1, 1) * rng.uniform(0, 1.2, len(rows)) * (rng.random(len(rows)) < args.shift)
        ).float()
        moved = torch.stack([between[c][rng.integers(len(between[c]))] for c in coloured[rows]])
        batch = batch + (way[:, None] * moved)[..., None, None]
        batch = batch + 0.1 * head.spread[:, None, None] * torch.randn_like(batch)
        optimizer.param_groups[0]["lr"] = (
            args.rate * min(1, (step + 1) / 100) * max(0.02, min(1, 2 * (1 - step / args.steps)))
        )
        terms = losses(
            *head(batch),
            said[rows],
            place[rows].float() / 255,
            exact[rows],
            balance,
            torch.from_numpy(real[rows]),
            drawn_only,
        )
        loss = terms["whole"] + 0.2 * terms["kind"] + terms["cells"] + 0.1 * terms["some"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(head)
        for name, value in terms.items():
            kept.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % 200 == 0:
            log.append({"step": step + 1, **{k: round(float(np.mean(v)), 4) for k, v in kept.items()}})
            kept = {}
            print(json.dumps(log[-1]), flush=True)
    return average.module.eval(), log, counts


def joined(heads: Sequence[WordHead]) -> WordHead:
    """One head with the members of several, trained on the same images."""
    first = heads[0]
    first.members = torch.nn.ModuleList(member for head in heads for member in head.members)
    return first


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the encoded images")
    parser.add_argument("--encode", type=int, default=0, help="encode so many images, and fit nothing")
    parser.add_argument("--unlabelled", type=Path, help="folder of folders of unlabelled images")
    parser.add_argument(
        "--training", type=Path, help="folder of folders with images/ of further openly licensed images"
    )
    parser.add_argument("--volumes", type=Path, help="folder of folders with images/ of openly licensed volumes")
    parser.add_argument("--untrained", action="store_true", help="with the untrained backbone, for the control")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--noise", type=float, default=0.5, help="spread of what is added to a feature all over an image, in its own"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], help="folders left out, to see what a head does that never saw one"
    )
    parser.add_argument("--offset", type=float, default=0.0, help="added to the log-odds of presence")
    parser.add_argument("--most", type=int, help="shards to read at most")
    parser.add_argument(
        "--shift", type=float, default=0.6, help="share of images moved from what is drawn to what is real, or back"
    )
    parser.add_argument(
        "--members", type=int, default=1, help="networks, each trained alone, that answer by their mean"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first member")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder to write the head to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    if args.encode:
        encode(args)
        return 0
    data = read_shards(args.work, args.most)
    fits = [fit(args, data, args.seed + i) for i in range(args.members)]
    head, counts = joined([head for head, _, _ in fits]), fits[0][2]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in head.state_dict().items()}, str(args.out / "head.safetensors"))
        (args.out / "head.safetensors").chmod(0o644)
        config = {
            "concepts": list(CONCEPTS),
            "kinds": list(LEAF_KINDS),
            "placeless": list(KINDS),
            "channels": head.channels,
            "offset": args.offset,
            "width": head.width,
            "blocks": len(head.members[0].blocks),
            "members": len(head.members),
        }
        (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        about = {
            "steps": args.steps,
            "images": counts,
            "parameters": sum(p.numel() for p in head.parameters()),
            "log": {f"member {i}": log for i, (_, log, _) in enumerate(fits)},
        }
        (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
        write_sums(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
