"""Measure segmentations against masks: one folder of images, or a suite of sets.

    zeroseg evaluate --images DIR --masks DIR --protocol auto,points --out OUT
    zeroseg evaluate --suite DIR --control untrained --half test --out OUT

Protocols that a user could run, because no mask takes part in the choice of the object:
  auto     the label-free rule
  points   ONE positive click: the innermost point of the largest component of the mask
  anywhere one positive click at a random pixel of that component, the same in every run: how much it matters where one clicks
  box      the tight bounding box of that component
  text     the prompt of --text; the answer "absent" is an empty mask and scores Dice 0
Clicks and box ask for one component but are scored against the whole mask; the rows *_component
score the same predictions against that component alone (what counts where a mask holds many objects, such as nuclei).

Interactive protocols: a simulated annotator corrects the answer of each method again and again (20 times, or --clicks); the
largest component of the mask is the object. Dice and IoU after 1, 2, 3, 5, 10, 20 clicks, number of clicks to an IoU of .80, .85, .90,
share of further clicks that lose more than .02 Dice, seconds a click; GrabCut and the random walker are driven alike. Written to
summary.json under "interaction", interaction.md, and a picture of the curves.
  clicks          the first click innermost, each further one at the deepest pixel of the larger error (RITM's rule)
  clicks_random   every click at a random pixel of that error
  box+clicks      the tight box first, then clicks
  scribbles       one stroke on the object and one beside it, drawn by program in three ways

In volumes, by themselves (rule of the CVPR 2025 challenge on interactive 3-D segmentation): Dice and NSD (2 mm) after each of five clicks
(or --clicks), the area under the Dice, lossy clicks, seconds; region growing and a 3-D random walker are driven alike.
  clicks3d        each click at the centre of the largest 26-connected component of what is wrong
  box+clicks3d    the tight box first, then the clicks

Learning from a few labels (zeroseg learn), by itself: --protocol few-shot --shots 1,3,5,10,20. Heads are fitted to so many images of each
set, --choices times, and scored on up to 40 others of it; beside them auto, 15 nearest neighbours in Lab colour, an exemplar (one image),
and MONAI's BasicUNet from random weights with the same images and seconds of processor time (--unet-times 1,10: and ten
times as long). Volumes are learned from as a whole; beside that Otsu, neighbours in value, and the UNet in 3-D. Written to few_shot.csv,
summary.json and table.md, after each set.

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

Where no mask chose the object (auto, points, box, text) the confidence is judged as well (zeroseg/evaluation/confidence.py): Spearman's
correlation of the score with Dice, AURC (risk 1 - Dice), and how often pixels are right against how sure they are.

Masks match images by file name without extension; any nonzero pixel is foreground. Written to OUT: cases.csv,
summary.json, table.md (Dice, seconds, confidence), reliability.png, report.html and report.png (best, median and worst
case; prediction yellow, mask blue, click green); for a suite one such folder per set, and table.md, table.json and
report.html over all sets.

With --inferer tumor, volumes are evaluated, with arguments of their own:

    zeroseg evaluate --inferer tumor --help
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, measured, numbers
from zeroseg.errors import ZeroSegError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--inferer", choices=["attention", "tumor"], default="attention", help="what is evaluated")
    parser.add_argument("--images", type=Path, help="folder of 2-D images")
    parser.add_argument("--masks", type=Path, help="folder of masks with the images' names")
    parser.add_argument("--suite", type=Path, help="folder of sets, each with images/ and masks/, instead of the two")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--protocol",
        default="oracle_union,oracle_single,hungarian,auto,points",
        help="comma-separated, of those above (default: %(default)s)",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="prompt of the text protocol; for one set of a suite SET=PROMPT"
    )
    parser.add_argument("--backbone", default="embedded", help="embedded, a folder, or a hub id (default: embedded)")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--clicks", type=int, help="clicks of the interactive protocols (default: 20; in volumes 5)")
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
    few = parser.add_argument_group("few-shot")
    few.add_argument(
        "--shots", default="1,3,5,10,20", help="numbers of labelled images or volumes (default: %(default)s)"
    )
    few.add_argument("--choices", type=int, default=5, help="of those images, each by a seed (default: %(default)s)")
    few.add_argument("--seconds", type=float, default=60, help="of processor time for each fit (default: %(default)g)")
    few.add_argument("--rest", type=int, default=40, help="most images a choice is scored on (default: %(default)s)")
    few.add_argument(
        "--unet-times", default="1", help="how many times those seconds the UNet has (default: 1; 0: no UNet)"
    )
    few.add_argument(
        "--unet-shots", default="5", help="for which shots it has more than once them (default: %(default)s)"
    )
    few.add_argument("--cache", type=Path, help="folder for encodings, so that a further run does not encode again")
    add_json(parser, "summary.json (of a suite: table.json)")


def run(args: argparse.Namespace) -> int:
    from zeroseg.evaluation.clicks3d import VOLUME_PROTOCOLS
    from zeroseg.evaluation.interactive import INTERACTIVE
    from zeroseg.evaluation.protocols import PROTOCOLS

    if (args.suite is None) == (args.images is None) or (args.images is None) != (args.masks is None):
        raise ZeroSegError("give either --images with --masks, or --suite")
    args.protocols = list(dict.fromkeys(p.strip() for p in args.protocol.split(",") if p.strip()))
    if "few-shot" in args.protocols:
        return run_few_shot(args)
    known = (*PROTOCOLS, *INTERACTIVE, *VOLUME_PROTOCOLS, "few-shot")
    unknown = [p for p in args.protocols if p not in known]
    if unknown or not args.protocols:
        raise ZeroSegError(f"unknown protocol {', '.join(unknown)!r}: use {', '.join(known)}")
    in_volumes = [p for p in args.protocols if p in VOLUME_PROTOCOLS]
    if in_volumes and len(in_volumes) < len(args.protocols):
        raise ZeroSegError(f"{in_volumes[0]} is for volumes: leave the protocols for images to another run")
    args.texts = _texts(args.text, args.suite)
    if "text" in args.protocols and not args.texts:
        raise ZeroSegError("the protocol text needs a prompt: give --text")
    if args.limit is not None and args.limit < 1:
        raise ZeroSegError("--limit must be at least 1")
    if args.clicks is None:
        args.clicks = 5 if in_volumes else 20
    if not 1 <= args.clicks <= 100:
        raise ZeroSegError("--clicks must be from 1 to 100")
    args.settings = _settings(args.select_settings)
    return measured(args, lambda: evaluate(args))


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the set or the suite of a command line; returns how many cases and sets failed."""
    from zeroseg.backbones import StableDiffusionBackbone
    from zeroseg.evaluation.clicks3d import (
        VOLUME_PROTOCOLS,
        clicks3d_table,
        evaluate_clicks3d,
        evaluate_clicks3d_suite,
    )
    from zeroseg.evaluation.images import evaluate_set, evaluate_suite
    from zeroseg.evaluation.tables import report_tables
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

    def make(untrained: bool) -> AttentionSegmentationInferer:
        backbone = StableDiffusionBackbone(args.backbone, args.revision, args.device, untrained=untrained)
        inferer = AttentionSegmentationInferer(backbone=backbone, **args.settings)
        inferer.check()
        return inferer

    inferer = make(False)
    if args.protocols[0] in VOLUME_PROTOCOLS:
        if args.control:
            raise ZeroSegError("--control is for images: leave it out with clicks in volumes")
        given = args.protocols, args.half, args.limit, args.clicks
        if args.suite is not None:
            return evaluate_clicks3d_suite(args.suite, args.out, inferer, *given)
        summary, failures = evaluate_clicks3d(
            args.images.resolve().name, args.images, args.masks, args.out, inferer, *given
        )
        print(clicks3d_table(summary["interaction"]))
        return failures
    further = {
        "control": make(True) if args.control else None,
        "half": args.half,
        "limit": args.limit,
        "clicks": args.clicks,
    }
    if args.suite is not None:
        return evaluate_suite(args.suite, args.out, inferer, args.protocols, args.texts, **further)
    name = args.images.resolve().name
    summary, _, failures = evaluate_set(
        name, args.images, args.masks, args.out, inferer, args.protocols, args.texts.get(None), **further
    )
    print(report_tables({name: summary}))
    return failures


def run_few_shot(args: argparse.Namespace) -> int:
    """Measure learning from a few labels; returns the exit code."""
    from zeroseg.backbones import StableDiffusionBackbone
    from zeroseg.evaluation.few_shot import Plan, evaluate_few_shot
    from zeroseg.evaluation.pairs import holds_volumes, sets_of
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

    if args.protocols != ["few-shot"]:
        raise ZeroSegError("few-shot is measured by itself: leave the other protocols out")
    if args.half != "all" or args.control is not None:
        raise ZeroSegError(
            "few-shot learns from and is scored on a whole set, and has no control: leave --half and --control out"
        )
    shots, times, longer = (
        numbers(getattr(args, name), f"--{name.replace('_', '-')}") for name in ("shots", "unet_times", "unet_shots")
    )
    if not all(isinstance(k, int) and k >= 1 for k in [*shots, *longer, args.choices, args.rest]) or args.seconds <= 0:
        raise ZeroSegError("--shots, --unet-shots, --choices, --rest and --seconds must be whole and positive")
    plan = Plan(
        shots=tuple(map(int, shots)),
        choices=args.choices,
        seconds=args.seconds,
        rest=args.rest,
        unet=tuple(t for t in times if t > 0),
        unet_shots=tuple(map(int, longer)),
    )
    if args.suite is None:
        sets = {args.images.resolve().name: (args.images, args.masks, holds_volumes(args.images))}
    else:
        sets = {f.name: (f / "images", f / "masks", volumes) for f, volumes in sets_of(args.suite)}

    def measure() -> int:
        backbone = StableDiffusionBackbone(args.backbone, args.revision, args.device)
        inferer = AttentionSegmentationInferer(backbone=backbone, **_settings(args.select_settings))
        inferer.check()
        return evaluate_few_shot(sets, args.out, inferer, plan, args.cache, args.limit)

    # Its results are always in summary.json.
    args.suite = None
    return measured(args, measure)


def asked_inferer(argv: Sequence[str]) -> str | None:
    """The value of --inferer, before anything else is known of the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--inferer")
    try:
        return first.parse_known_args(argv)[0].inferer
    except argparse.ArgumentError:  # without a value: the parser proper says so
        return None


def _texts(given: list[str], suite: Path | None) -> dict[str | None, str]:
    """Prompt by the name of its set; None: of every other set."""
    texts: dict[str | None, str] = {}
    for text in given:
        name, separator, prompt = text.partition("=")
        if suite is not None and separator:
            texts[name] = prompt
        else:
            texts[None] = text
    return texts


def _settings(pairs: list[str]) -> dict:
    """NAME=VALUE arguments -> constructor arguments of the inferer."""
    from zeroseg.interaction.inferer import AttentionSegmentationInferer

    known = sorted(AttentionSegmentationInferer().settings())
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
