"""Segment images: masks, confidence, overlays, DICOM SEG for DICOM, and one manifest.json.

    zeroseg segment IMAGES --output-dir OUT                            what differs from the frame of each image
    zeroseg segment IMAGES --output-dir OUT --select segments          all segments, most object-like first
    zeroseg segment cell.png --output-dir OUT --points 60,60 20,10 --labels 1 0
    zeroseg segment scan.nii.gz --output-dir OUT --points 40,40,12     clicks in volumes are x,y,z
    zeroseg segment cell.png --output-dir OUT --scribbles strokes.png  pixels 1 on the object, 2 on the background
    zeroseg segment cell.png --output-dir OUT --mask draft.png --points 60,60 --labels 0    a draft, corrected
    zeroseg segment IMAGES --output-dir OUT --text "skin lesion"
    zeroseg segment IMAGES --output-dir OUT --select segments --text "white blood cell, red blood cells, background"
                                                                       all segments, the k-th noun being label k
    zeroseg segment IMAGES --output-dir OUT --prompts prompts.json
    zeroseg segment IMAGES --output-dir OUT --learned HEAD             what zeroseg learn has learned from your masks
    zeroseg segment IMAGES --output-dir OUT --exemplar a.png,a_mask.png    like in this image, without learning

The same as python -m monai.bundle run with the bundle's inference.yaml. IMAGES is a folder or one file: PNG, JPEG, TIFF, BMP,
NIfTI, NRRD, MHA, DICOM files and series. A case that cannot be read is listed in the manifest with its reason, the others
are done, and the exit code is 2.
"""

from __future__ import annotations

import argparse
from typing import Any

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, add_model, add_set, given, numbers, run_cases, words
from zeroseg.errors import ZeroSegError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("input", metavar="IMAGES", help="folder, or one file")
    parser.add_argument("--output-dir", required=True, help="folder for the results")
    prompt = parser.add_argument_group("what to segment")
    prompt.add_argument(
        "--select", choices=["segments", "auto", "points", "box", "text"], help="default: by the prompt"
    )
    prompt.add_argument(
        "--points", nargs="+", metavar="X,Y", help="clicks on the one image, in its pixels (voxels X,Y,Z)"
    )
    prompt.add_argument("--labels", nargs="+", metavar="1|0", help="of each click: 1 object (default), 0 not")
    prompt.add_argument("--box", metavar="X0,Y0,X1,Y1", help="around the object of the one image")
    prompt.add_argument(
        "--scribbles", metavar="FILE", help="label map: 1 on the object, 2 on the background, 0 elsewhere"
    )
    prompt.add_argument("--mask", metavar="FILE", help="a mask of the one image to start from")
    prompt.add_argument(
        "--candidate",
        type=int,
        choices=[1, 2, 3],
        help="which of the nested answers, smallest first (default: the best)",
    )
    prompt.add_argument(
        "--text",
        help="words for what is meant, in every image without a prompt of its own; with --select segments: nouns, with commas between, to name them by",
    )
    prompt.add_argument("--prompts", help="prompts.json: prompts by case")
    prompt.add_argument("--learned", metavar="FOLDER", help="that zeroseg learn wrote: its labels, in every image")
    prompt.add_argument("--exemplar", metavar="IMAGE,MASK", help="one labelled image: its labels, in every image")
    how = parser.add_argument_group("how")
    how.add_argument("--preset", choices=["diffseg"], help="DiffSeg as it was published; options beside it stay")
    how.add_argument("--condition", help="words the model is told while it reads the images")
    how.add_argument("--vocabulary", metavar="FILE", help="own synonyms for what the embedded backbone knows")
    how.add_argument("--affinity", choices=["attention", "features", "both"], help="default attention")
    how.add_argument("--thresholds", help="DiffSeg's KL thresholds, such as 1,1,1 (default auto: found per image)")
    how.add_argument("--max-segments", type=int, help="most segments that auto thresholds leave")
    how.add_argument("--refine", choices=["guided", "none"], help="default guided: by the edges of the image")
    how.add_argument("--resolution", type=int, help="side an image is resized to (default: the backbone's own)")
    how.add_argument(
        "--window", metavar="CENTER,WIDTH", help="of intensities (default: soft tissue for CT, percentiles)"
    )
    how.add_argument("--seed", type=int, help="default 0")
    add_set(how)
    add_model(parser, "embedded (default), a folder of a Stable Diffusion pipeline, or a hub id with --revision")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--variant", help="which copy of the weights is read: fp16 or non_ema")
    add_json(parser, "manifest.json")


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args)
    check_learned(args, prompt)
    settings = given(args, "select", "affinity", "max_segments", "refine", "resolution", "seed")
    settings |= given(args, "backbone", "revision", "variant", "device", "dtype")
    if args.condition is not None:
        settings["condition"] = words(args.condition)
    if args.vocabulary is not None:
        settings["vocabulary"] = words(args.vocabulary)
    if args.thresholds is not None:
        settings["thresholds"] = "auto" if args.thresholds == "auto" else numbers(args.thresholds, "--thresholds")
    window = None if args.window is None else numbers(args.window, "--window", 2)
    from pathlib import Path

    from zeroseg.cases import CaseDataset
    from zeroseg.configs import build_runner, find_config, parse_settings
    from zeroseg.interaction.settings import PRESETS

    settings = parse_settings(args.set) | settings
    if args.preset is not None:
        # What is said beside a preset holds, even what is the default without it.
        settings = PRESETS[args.preset] | settings
    runner = build_runner(find_config("inference.yaml"), settings, Path(args.output_dir))
    # Words become an attribute: in a config, text that begins with $ is a program.
    runner.text, runner.prompts = args.text if args.text is not None else runner.text, args.prompts
    if window is not None:
        runner.window = (window[0], window[1])
    if args.learned is not None or args.exemplar is not None:
        runner.inferer = learned_inferer(args, runner.inferer, runner.window)
    if args.learned is not None:
        runner.window = runner.inferer.labeller.settle_window(runner.window)
    if prompt:
        cases = CaseDataset(args.input, args.output_dir).cases
        if len(cases) > 1:
            raise ZeroSegError(
                f"clicks, boxes and drawings are for one image, here are {len(cases)}: give --prompts prompts.json"
            )
        runner.prompts = {cases[0].stem: prompt}
    return run_cases(runner, args.input, args.json)


def read_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """Clicks, box and drawings as a prompt; empty without.

    Raises:
        ZeroSegError: they are no numbers, or do not go with the other options.
    """
    prompt: dict[str, Any] = {}
    if args.points is not None:
        prompt["points"] = [numbers(point, "--points") for point in args.points]
    if args.labels is not None:
        prompt["labels"] = [numbers(label, "--labels", 1)[0] for label in args.labels]
    if args.box is not None:
        prompt["box"] = numbers(args.box, "--box", 4)
    prompt |= given(args, "scribbles", "mask", "candidate")
    if prompt and (args.text is not None or args.prompts is not None):
        raise ZeroSegError("clicks, boxes and drawings go neither with --text nor with --prompts")
    return prompt


def check_learned(args: argparse.Namespace, prompt: dict[str, Any]) -> None:
    """Refuse other prompts beside what was learned.

    Raises:
        ZeroSegError: there are some.
    """
    given = [name for name in ("learned", "exemplar") if getattr(args, name) is not None]
    others = [name for name in ("select", "text", "prompts") if getattr(args, name) is not None] + sorted(prompt)
    if len(given) == 2 or (given and others):
        raise ZeroSegError(f"--{given[0]} does not go with --{[*given[1:], *others][0]}: give one of them")


def learned_inferer(args: argparse.Namespace, inferer: Any, window: Any) -> Any:
    """What answers in place of the inferer, over its frozen model.

    Raises:
        ZeroSegError: the head or the exemplar cannot be used.
    """
    from pathlib import Path

    from zeroseg.learning import Exemplar, LearnedHead
    from zeroseg.learning.folders import read_folders
    from zeroseg.learning.inferer import LearnedInferer

    if args.learned is not None:
        return LearnedInferer(LearnedHead.load(args.learned, inferer))
    image, separator, mask = args.exemplar.rpartition(",")
    if not separator or not image or not mask:
        raise ZeroSegError(f"--exemplar takes IMAGE,MASK, two files with a comma between, not {args.exemplar!r}")
    labelled = read_folders(Path(image), Path(mask), window=window)
    if len(labelled.cases) > 1:
        raise ZeroSegError("--exemplar takes one image: for several, zeroseg learn --images DIR --labels DIR")
    return LearnedInferer(Exemplar(labelled.cases[0], inferer, labelled.labels), "exemplar")
