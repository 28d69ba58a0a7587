#!/usr/bin/env python
"""Measure segmentations against masks: one folder of images, or a suite of sets.

    python scripts/evaluate.py --images DIR --masks DIR --protocol auto,points --out OUT
    python scripts/evaluate.py --suite DIR --control untrained --half test --out OUT

Protocols that a user could run, because no mask takes part in the choice of the object:
  auto     the label-free rule
  points   ONE positive click: the innermost point of the largest component of the mask
  anywhere one positive click at a random pixel of that component, the same in every run: how much it matters where one clicks
  box      the tight bounding box of that component
  text     the prompt of --text; the answer "absent" is an empty mask and scores Dice 0
Clicks and box ask for one component but are scored against the whole mask; the rows *_component
score the same predictions against that component alone (what counts where a mask holds many objects, such as nuclei).

Upper bounds, because the mask chooses among the segments:
  oracle_union   every segment that lies in the mask with more than half of its pixels
  oracle_single  the one segment of best Dice
  hungarian      segments matched to {background, foreground} by IoU; the one matched to the foreground

Baselines run on the same images: Otsu and 2-means (border rule; *_best_polarity is an oracle over one bit per set),
everything foreground, one-click methods where points is run, and with --control untrained the same pipeline on random
weights.

Dice, IoU and HD95 (95th percentile of the Hausdorff distance, in pixels) come from MONAI. An empty prediction has
HD95 = the image's diagonal. A case's seconds are what a first answer takes: encoding the image plus this one prompt; both
also apart.

Where no mask chose the object (auto, points, box, text) the confidence is judged as well (confidence.py): Spearman's
correlation of the score with Dice, AURC (risk 1 - Dice), and how often pixels are right against how sure they are.

Masks match images by file name without extension; any nonzero pixel is foreground. Written to OUT: cases.csv,
summary.json, table.md (Dice, seconds, confidence), reliability.png, report.html and report.png (best, median and worst
case; prediction yellow, mask blue, click green); for a suite one such folder per set, and table.md, table.json and
report.html over all sets.

With --inferer tumor, volumes are evaluated by scripts/evaluate_volumes.py, which has its own arguments:

    python scripts/evaluate.py --inferer tumor --help
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from PIL import Image as PILImage
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from zeroseg.evaluation.baselines import AUTOMATIC, BRIGHT, CLICKS
from zeroseg.evaluation.confidence import image_score, pixel_bins, reliability_diagram
from zeroseg.evaluation.tables import (
    Parser,
    best_median_worst,
    find_pairs,
    mean_over_sets,
    report_tables,
    run_evaluation,
    summarise_groups,
    write_csv,
    write_text,
)
from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.errors import ZeroSegError
from zeroseg.io import (
    Case,
    contact_html,
    contact_sheet,
    draw_overlay,
    find_cases,
    read_image,
    to_unit_range,
    versions,
    write_json,
)

COLUMNS = ("case", "protocol", "dice", "iou", "hd95", "seconds", "score")
TRUTH_COLOR = (86, 180, 233)  # Okabe and Ito's sky blue: the overlay's second colour


# Choices made from the mask: prompts and oracles.


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a bool mask (H, W); of equal ones, the first in row-major order."""
    parts, _ = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def innermost_point(component: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel furthest from the boundary, the image's edge included; ties: first in row-major order."""
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return int(x), int(y)


def any_point(component: np.ndarray, stem: str) -> tuple[int, int]:
    """(x, y) of a pixel drawn evenly by a hash of the case's name; two pixels or more from the boundary where there are such."""
    depth = ndimage.distance_transform_edt(np.pad(component, 1))[1:-1, 1:-1]
    candidates = np.argwhere(depth >= min(2.0, float(depth.max())))
    y, x = candidates[int(hashlib.sha256(f"click {stem}".encode()).hexdigest(), 16) % len(candidates)]
    return int(x), int(y)


def bounding_box(component: np.ndarray) -> list[int]:
    """[x0, y0, x1, y1] of the outermost pixels, both included; two pixels wide at least, as a box must be."""
    corners = []
    for axis in (0, 1):  # columns give x, rows y
        line = component.any(axis=axis)
        low, high = np.flatnonzero(line)[[0, -1]].tolist()
        if low == high:
            low, high = (low, high + 1) if high + 1 < len(line) else (max(low - 1, 0), high)
        corners.append((low, high))
    (x0, x1), (y0, y1) = corners
    return [x0, y0, x1, y1]


def _overlaps(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels present except 0, their sizes in pixels, and how many of these lie in the mask."""
    sizes, inside = np.bincount(labels.ravel()), np.bincount(labels[truth], minlength=int(labels.max()) + 1)
    present = np.flatnonzero(sizes)
    present = present[present > 0]
    return present, sizes[present], inside[present]


def oracle_union(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Union of the segments of which more than half of the pixels lie in the mask."""
    present, sizes, inside = _overlaps(labels, truth)
    return np.isin(labels, present[2 * inside > sizes])


def oracle_single(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The segment of best Dice."""
    present, sizes, inside = _overlaps(labels, truth)
    return labels == present[np.argmax(2 * inside / (sizes + truth.sum()))]


def hungarian(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The segment that the Hungarian assignment of segments to {background, foreground} by IoU gives the foreground.

    Empty when there is one segment only and it fits the background better.
    """
    present, sizes, inside = _overlaps(labels, truth)
    outside = sizes - inside
    iou = np.stack([outside / (inside + (~truth).sum()), inside / (outside + truth.sum())], axis=1)
    for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
        if column == 1:
            return labels == present[row]
    return np.zeros_like(truth)


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "oracle_union": oracle_union,
    "oracle_single": oracle_single,
    "hungarian": hungarian,
}


# Numbers.


def score(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice, IoU and HD95 (pixels) of a bool mask (H, W) against a non-empty one of the same shape."""
    p, t = (torch.from_numpy(np.ascontiguousarray(m))[None, None].float() for m in (prediction, truth))
    if prediction.any():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "monai.metrics.utils get_mask_edges")  # MONAI's call of itself
            hd95 = compute_hausdorff_distance(p, t, include_background=True, percentile=95).item()
    else:
        hd95 = float(np.hypot(*truth.shape))
    return {"dice": compute_dice(p, t).item(), "iou": compute_iou(p, t).item(), "hd95": hd95}


# Cases.


@dataclass(frozen=True)
class Sample:
    """An image and its mask.

    Attributes:
        stem: name of the case.
        image: (C, H, W) float32 in [0, 1].
        truth: (H, W) bool, never empty.
        component: (H, W) bool, its largest component.
    """

    stem: str
    image: np.ndarray
    truth: np.ndarray
    component: np.ndarray


CLICKED: dict[str, Callable[[Sample], tuple[int, int]]] = {
    "points": lambda sample: innermost_point(sample.component),
    "anywhere": lambda sample: any_point(sample.component, sample.stem),
}
"""Protocol -> its click (x, y)."""
PROTOCOLS = (*ORACLES, "auto", *CLICKED, "box", "text")


def load_sample(image_case: Case, mask_case: Case) -> Sample:
    """Read one pair.

    Raises:
        ZeroSegError: a file cannot be read, the image is a volume, or the mask is empty or of another size.
    """
    image, mask = read_image(image_case), read_image(mask_case)
    if image.is_volume:
        raise ZeroSegError(f"{image_case.paths[0]}: a volume; this evaluation takes 2-D images")
    if mask.shape != image.shape:
        sizes = ("x".join(map(str, shape)) for shape in (mask.shape, image.shape))
        raise ZeroSegError("{}: the mask is {}, its image {} (height x width)".format(mask_case.paths[0], *sizes))
    truth = (mask.array != 0).any(axis=0)
    if not truth.any():
        raise ZeroSegError(f"{mask_case.paths[0]}: the mask is empty, so there is nothing to score against")
    return Sample(image_case.stem, to_unit_range(image), truth, largest_component(truth))


def run_protocols(inferer, sample: Sample, protocols: list[str], text: str | None) -> tuple[list[dict], dict]:
    """Encode the image once and run every protocol on it.

    Returns:
        rows (without the case), and protocol -> predicted mask (H, W) bool.
    """
    start = time.perf_counter()
    encoded = inferer.encode(sample.image)
    encode_seconds = time.perf_counter() - start
    prompts = {name: {"points": [list(click(sample))], "labels": [1]} for name, click in CLICKED.items()}
    prompts |= {"box": {"box": bounding_box(sample.component)}, "text": {"text": text}}
    rows, masks, answers = [], {}, {}
    for protocol in protocols:
        asked = "segments" if protocol in ORACLES else protocol
        if asked not in answers:
            fresh = copy.copy(encoded)  # what one prompt computes and keeps must not make the next look fast
            start = time.perf_counter()
            select = "points" if protocol in CLICKED else asked
            result = inferer.predict(fresh, select=select, **prompts.get(protocol, {}))
            answers[asked] = result, time.perf_counter() - start
        result, prompt_seconds = answers[asked]
        oracle = ORACLES.get(protocol)
        masks[protocol] = mask = oracle(result.labels, sample.truth) if oracle else result.labels > 0
        targets = {protocol: sample.truth}
        if protocol in CLICKED or protocol == "box":
            targets[f"{protocol}_component"] = sample.component
        for name, target in targets.items():
            row = {"protocol": name, "encode_seconds": encode_seconds, "prompt_seconds": prompt_seconds}
            row |= {"seconds": encode_seconds + prompt_seconds, **score(mask, target)}
            if not oracle:
                row |= {"score": image_score(result), "bins": pixel_bins(result, target)}
            if protocol == "text":
                row["absent"] = bool(result.absent)
            rows.append(row)
    return rows, masks


def run_baselines(sample: Sample, protocols: list[str]) -> list[dict]:
    """Rows of every method that needs no model; one-click ones with the click of each such protocol."""
    rows = []
    for name, method in AUTOMATIC.items():
        mask, seconds = _timed(method, sample.image)
        rows.append({"protocol": f"baseline/{name}", "seconds": seconds, **score(mask, sample.truth)})
    for name, method in BRIGHT.items():
        bright, seconds = _timed(method, sample.image)
        for side, mask in (("bright", bright), ("dark", ~bright)):
            rows.append({"protocol": f"polarity/{name}_{side}", "seconds": seconds, **score(mask, sample.truth)})
    for name, method in CLICKS.items():
        for protocol in [p for p in CLICKED if p in protocols]:
            mask, seconds = _timed(method, sample.image, *CLICKED[protocol](sample))
            full = f"baseline/{name}" if protocol == "points" else f"baseline/{name}_{protocol}"
            for suffix, target in (("", sample.truth), ("_component", sample.component)):
                rows.append({"protocol": full + suffix, "seconds": seconds, **score(mask, target)})
    return rows


def _timed(method: Callable, *arguments) -> tuple[np.ndarray, float]:
    """What a method returns, and its seconds."""
    start = time.perf_counter()
    return method(*arguments), time.perf_counter() - start


# Reports.


def overlay(sample: Sample, mask: np.ndarray, protocol: str) -> PILImage.Image:
    """The image with the prediction (yellow), the mask (blue, just outside of it) and the prompt."""
    prompt = {"points": [CLICKED[protocol](sample)]} if protocol in CLICKED else {}
    prompt = {"box": bounding_box(sample.component)} if protocol == "box" else prompt
    picture = draw_overlay(sample.image, mask.astype(np.uint8), **prompt)
    truth = np.asarray(PILImage.fromarray(sample.truth).resize(picture.size, PILImage.Resampling.NEAREST))
    canvas = np.array(picture)
    canvas[ndimage.binary_dilation(truth, iterations=4) & ~ndimage.binary_dilation(truth)] = TRUTH_COLOR
    return PILImage.fromarray(canvas)


# A set, and the command line.


def evaluate_set(name, images, masks, out, inferer, control, args, text) -> tuple[dict, list, int]:
    """Evaluate one folder and write its results to ``out``.

    Returns:
        the summary, (title, picture) of the report, and how many cases failed.

    Raises:
        ZeroSegError: no case could be evaluated.
    """
    protocols = [p for p in args.protocols if p != "text" or text is not None]
    pairs, unmatched = find_pairs(images, masks, out, args.half, args.limit)
    if unmatched:
        print(f"{name}: {len(unmatched)} images without a mask are left out, e.g. {unmatched[0]}", file=sys.stderr)
    shown = next(p for p in ("points", "auto", *protocols) if p in protocols)
    rows, predictions, failed = [], {}, []
    for image_case, mask_case in tqdm(pairs, desc=name, unit="image"):
        try:
            sample = load_sample(image_case, mask_case)
            case_rows, answers = run_protocols(inferer, sample, protocols, text)
            if control is not None:
                controls, _ = run_protocols(control, sample, protocols, text)
                case_rows += [row | {"protocol": f"untrained/{row['protocol']}"} for row in controls]
            case_rows += run_baselines(sample, protocols)
        except ZeroSegError as error:
            failed.append({"case": image_case.stem, "error": str(error)})
            tqdm.write(f"{name}: {image_case.stem} failed: {error}", file=sys.stderr)
            continue
        rows += [{"case": sample.stem} | row for row in case_rows]
        predictions[sample.stem] = answers[shown]
    if not rows:
        raise ZeroSegError(f"{name}: all {len(failed)} cases failed, the first: {failed[0]['error']}")

    run = {
        "settings": {
            "protocols": protocols,
            "text": text if "text" in protocols else None,
            "half": args.half,
            "limit": args.limit,
            "inferer": inferer.settings(),
            "failed": failed,
            "versions": versions(),
        },
        "backbone": inferer.backbone.describe(),
    }
    summary = summarise_groups(rows, run)
    write_csv(out / "cases.csv", COLUMNS, [row for row in rows if not row["protocol"].startswith("polarity/")])
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", report_tables({name: summary}))
    judged = {protocol: values for protocol, values in summary["protocols"].items() if "reliability" in values}
    if judged:
        reliability_diagram(judged, out / "reliability.png", f"{name}: confidence of pixels")
    cases = {image_case.stem: (image_case, mask_case) for image_case, mask_case in pairs}
    entries = []
    for place, row in best_median_worst([row for row in rows if row["protocol"] == shown]):
        title = f"{name}, {shown}, {place}: {row['case']}, Dice {row['dice']:.3f}"
        entries.append((title, overlay(load_sample(*cases[row["case"]]), predictions[row["case"]], shown)))
    contact_html(entries, out / "report.html", title=f"ZeroSeg on {name}: {shown}")
    contact_sheet(entries, out / "report.png")
    return summary, entries, len(failed)


def evaluate_suite(suite: Path, out: Path, inferer, control, args) -> int:
    """Evaluate every 2-D set of a folder; returns how many cases and sets failed."""
    if not suite.is_dir():
        raise ZeroSegError(f"{suite}: no such folder; give the folder that holds the sets as --suite")
    sets = [f for f in sorted(suite.iterdir()) if (f / "images").is_dir() and (f / "masks").is_dir()]
    if not sets:
        raise ZeroSegError(f"{suite}: no set with the folders images/ and masks/ in it")
    summaries, entries, failures = {}, [], 0
    for folder in sets:
        text = args.texts.get(folder.name, args.texts.get(None))
        try:
            first = find_cases(folder / "images")[0]
            if first.kind == "dicom_series" or read_image(first).is_volume:
                print(f"{folder.name}: skipped, it holds volumes")
                continue
            summary, pictures, failed = evaluate_set(
                folder.name, folder / "images", folder / "masks", out / folder.name, inferer, control, args, text
            )
        except ZeroSegError as error:
            print(f"{folder.name} failed: {error}", file=sys.stderr)
            failures += 1
            continue
        summaries[folder.name] = summary
        entries += pictures
        failures += failed
    if not summaries:
        raise ZeroSegError(f"{suite}: no set could be evaluated")
    table = report_tables(summaries)
    write_text(out / "table.md", table)
    write_json(out / "table.json", {"sets": summaries, "mean_dice": mean_over_sets(summaries)})
    contact_html(entries, out / "report.html", title="ZeroSeg: best, median and worst case of every set")
    print(table)
    return failures


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ZeroSegError: an argument is missing, unknown or of a wrong value.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inferer", choices=["attention", "tumor"], default="attention", help="what is evaluated")
    parser.add_argument("--images", type=Path, help="folder of 2-D images")
    parser.add_argument("--masks", type=Path, help="folder of masks with the images' names")
    parser.add_argument("--suite", type=Path, help="folder of sets, each with images/ and masks/, instead of the two")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--protocol",
        default="oracle_union,oracle_single,hungarian,auto,points",
        help=f"comma-separated, of {', '.join(PROTOCOLS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="prompt of the text protocol; for one set of a suite SET=PROMPT"
    )
    parser.add_argument("--backbone", default="embedded", help="embedded, a folder, or a hub id (default: embedded)")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--control", choices=["untrained"], help="run the same pipeline on random weights as well")
    parser.add_argument("--half", choices=["dev", "test", "all"], default="all", help="fixed halves of every set")
    parser.add_argument("--limit", type=int, help="evaluate the first N cases only")
    parser.add_argument(
        "--select-settings",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of AttentionSegmentationInferer, values as JSON, e.g. affinity=features",
    )
    args = parser.parse_args(argv)
    if (args.suite is None) == (args.images is None) or (args.images is None) != (args.masks is None):
        raise ZeroSegError("give either --images with --masks, or --suite")
    args.protocols = list(dict.fromkeys(p.strip() for p in args.protocol.split(",") if p.strip()))
    unknown = [p for p in args.protocols if p not in PROTOCOLS]
    if unknown or not args.protocols:
        raise ZeroSegError(f"unknown protocol {', '.join(unknown)!r}: use {', '.join(PROTOCOLS)}")
    args.texts = _texts(args.text, args.suite)
    if "text" in args.protocols and not args.texts:
        raise ZeroSegError("the protocol text needs a prompt: give --text")
    if args.limit is not None and args.limit < 1:
        raise ZeroSegError("--limit must be at least 1")
    args.settings = _settings(args.select_settings)
    return args


def asked_inferer(argv: list[str] | None) -> str | None:
    """The value of --inferer, before anything else is known of the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--inferer")
    try:
        return first.parse_known_args(argv)[0].inferer
    except argparse.ArgumentError:
        return None  # without a value: the parser proper says so


def _texts(given: list[str], suite: Path | None) -> dict[str | None, str]:
    """Prompt by the name of its set; None: of every other set."""
    texts = {}
    for text in given:
        name, separator, prompt = text.partition("=")
        if suite is not None and separator:
            texts[name] = prompt
        else:
            texts[None] = text
    return texts


def _settings(pairs: list[str]) -> dict:
    """NAME=VALUE arguments -> constructor arguments of the inferer."""
    known = [p for p in inspect.signature(AttentionSegmentationInferer).parameters if p != "backbone"]
    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name not in known:
            raise ZeroSegError(f"--select-settings {pair!r}: give NAME=VALUE with a name of {', '.join(known)}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the set or the suite of a command line; returns how many cases and sets failed."""

    def make(untrained: bool) -> AttentionSegmentationInferer:
        backbone = StableDiffusionBackbone(args.backbone, args.revision, args.device, untrained=untrained)
        inferer = AttentionSegmentationInferer(backbone=backbone, **args.settings)
        inferer.check()
        return inferer

    inferer, control = make(False), make(True) if args.control else None
    if args.suite is not None:
        return evaluate_suite(args.suite, args.out, inferer, control, args)
    name, text = args.images.resolve().name, args.texts.get(None)
    summary, _, failures = evaluate_set(name, args.images, args.masks, args.out, inferer, control, args, text)
    print(report_tables({name: summary}))
    return failures


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0; or 2 when the arguments were refused or some cases failed (the others are evaluated).
    """
    if asked_inferer(argv) == "tumor":
        from zeroseg.evaluation.volumes import main as evaluate_tumours

        return evaluate_tumours(argv)
    return run_evaluation(parse, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
