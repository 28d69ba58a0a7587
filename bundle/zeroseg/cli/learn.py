"""Learn from a few images and their masks: in about a minute, on a CPU, a head that labels other images the same way.

    zeroseg learn --images IMAGES --labels MASKS --output-dir HEAD
    zeroseg segment OTHERS --learned HEAD --output-dir OUT

    zeroseg learn --images IMAGES --labels MASKS --output-dir HEAD --label liver=1 --label lesion=2
    zeroseg learn --images MORE --labels MASKS --output-dir HEAD --resume       goes on from the head that is there

One to about twenty images or volumes. Volumes alone are learned from as a whole, and others are labelled in a fraction of a second; of
volumes beside images, of flat ones (fewer than eight slices), and of those labelled in a slice or two, up to 24 slices in all are learned
from. Masks have their image's name (the extension may differ) and its size: 0 is background. Without --label, masks of one value hold one
label, object; else every value is a label. The frozen model does not change; a head of images belongs to it and is refused with another
one. Written to HEAD: config.json, the weights it names (safetensors, SHA-256), and manifest.json. Ctrl-C leaves a head that was there
before as it was.

Tumours by words in volumes are learned differently, by adapters (hours; see configs/train_tumor.yaml for every setting):

    zeroseg learn --adapters --images VOLUMES --labels MASKS --organ liver --modality ct --output-dir ADAPTERS
    zeroseg tumor CASES --adapters ADAPTERS --organ liver --output-dir OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, add_model, add_set, given, numbers, print_json, spoken_to_stderr, words
from zeroseg.errors import ZeroSegError

SECONDS = 60.0
"""A head is learned in."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--images", required=True, type=Path, help="folder of images or volumes, or one file")
    parser.add_argument("--labels", required=True, type=Path, help="folder of their masks, or one file")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder for what is learned")
    how = parser.add_argument_group("how")
    how.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help="of the masks; may be repeated")
    how.add_argument(
        "--seconds",
        type=float,
        help=f"to learn for at most (default: {SECONDS:g}; adapters: until their steps are done)",
    )
    how.add_argument("--resume", action="store_true", help="go on from the head in the output folder")
    how.add_argument("--resolution", type=int, help="side an image is resized to (default: the backbone's own)")
    how.add_argument("--window", metavar="CENTER,WIDTH", help="of intensities, as for segment")
    how.add_argument("--seed", type=int, default=0, help="default %(default)s")
    tumour = parser.add_argument_group("adapters")
    tumour.add_argument("--adapters", action="store_true", help="learn the adapters of zeroseg tumor from volumes")
    tumour.add_argument("--organ", help="what the volumes show")
    tumour.add_argument("--modality", choices=["ct", "mr", "pet"], help="of the volumes")
    add_set(tumour, "any setting of train_tumor.yaml, such as steps=500; may be repeated")
    add_model(parser, "embedded (default), a folder of a Stable Diffusion pipeline, or a hub id with --revision")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--variant", help="which copy of the weights is read: fp16 or non_ema")
    add_json(parser, "manifest.json, of adapters the record of the training,")


def run(args: argparse.Namespace) -> int:
    if args.seconds is not None and not 1 <= args.seconds <= 86400:
        raise ZeroSegError(f"--seconds must be from 1 to 86400, not {args.seconds:g}")
    if args.adapters:
        return learn_adapters(args)
    for name in ("organ", "modality"):
        if getattr(args, name) is not None:
            raise ZeroSegError(f"--{name} is for --adapters; a head learns what the masks show")
    window = None if args.window is None else numbers(args.window, "--window", 2)
    with spoken_to_stderr(args.json):
        manifest = learn(args, None if window is None else (window[0], window[1]))
    if args.json:
        print_json(manifest)
    return 0


def learn(args: argparse.Namespace, window: tuple[float, float] | None) -> dict[str, Any]:
    """Learn a head and write it; returns the manifest."""
    import json
    import time

    from tqdm import tqdm

    from zeroseg import __version__
    from zeroseg.configs import build_runner, find_config, parse_settings
    from zeroseg.io import file_sha256, sole_writer, versions, write_json
    from zeroseg.learning import LearnedHead, fit
    from zeroseg.learning.folders import parse_labels, read_folders
    from zeroseg.signals import sigterm_like_ctrl_c

    seconds = SECONDS if args.seconds is None else args.seconds
    settings = given(args, "backbone", "revision", "variant", "device", "dtype", "resolution")
    inferer = build_runner(find_config("inference.yaml"), parse_settings(args.set) | settings, args.output_dir).inferer
    inferer.check()
    start = LearnedHead.load(args.output_dir, inferer) if args.resume else None
    window = window if start is None else start.settle_window(window)
    labelled = read_folders(args.images, args.labels, parse_labels(args.label), window)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZeroSegError(f"cannot create the output folder {args.output_dir}: {error.strerror or error}") from error
    with sole_writer(args.output_dir), sigterm_like_ctrl_c():
        print(f"learning {', '.join(labelled.labels)} from {len(labelled.cases)} images")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with tqdm(desc="learning", unit="step", disable=None) as bar:

            def progress(epoch: int, total: int, metric: float) -> None:
                bar.total = total
                bar.set_postfix({"Dice on these": f"{metric:.3f}"}, refresh=False)
                bar.update(epoch - bar.n)

            head = fit(
                labelled.cases,
                inferer,
                labels=labelled.labels,
                seconds=seconds,
                progress=progress,
                seed=args.seed,
                start=start,
            )
        # Whoever segments with it need not know it again.
        head.facts["window"] = window
        head.save(args.output_dir)
        manifest = {
            "zeroseg": __version__,
            "started": started,
            "backbone": inferer.backbone.describe(),
            "settings": {**inferer.settings(), "window": window, "seconds": seconds, "resumed": args.resume},
            "head": head.describe(),
            "cases": [
                {
                    "case": image.stem,
                    **{kind: _hashes(file.paths, file_sha256) for kind, file in (("image", image), ("mask", mask))},
                }
                for image, mask in labelled.files
            ],
            "versions": versions(),
        }
        write_json(args.output_dir / "manifest.json", manifest)
    facts = head.facts
    print(f"learned in {facts['seconds']} s ({facts['steps']} steps, Dice on these images {facts['train_dice']:.3f}):")
    print(f"  zeroseg segment OTHERS --learned {args.output_dir} --output-dir OUT")
    return json.loads((args.output_dir / "manifest.json").read_text(encoding="utf-8"))


def _hashes(paths: Any, sha256: Any) -> list[dict[str, str]]:
    return [{"file": path.name, "sha256": sha256(path)} for path in paths]


def learn_adapters(args: argparse.Namespace) -> int:
    """Train the adapters of the tumour model on a folder of volumes and masks; returns the exit code."""
    import shutil
    import tempfile

    import nibabel as nib
    import numpy as np

    from zeroseg.configs import build, find_config, parse_settings
    from zeroseg.io import find_cases, read_image

    if not args.organ or not args.modality:
        raise ZeroSegError("--adapters needs --organ and --modality: what the volumes show, such as liver and ct")
    for name in ("label", "resume", "resolution", "window", "revision", "variant"):
        if getattr(args, name):
            raise ZeroSegError(f"--{name} does not go with --adapters")
    settings = parse_settings(args.set) | given(args, "backbone", "device", "dtype")
    settings |= {"organ": words(args.organ), "modality": args.modality, "seed": args.seed}
    if args.seconds is not None:
        settings["minutes"] = args.seconds / 60
    for path, option in ((args.images, "--images"), (args.labels, "--labels")):
        if not path.is_dir():
            raise ZeroSegError(f"{path}: no such folder; give an existing one as {option}")
    masks = {case.stem: case for case in find_cases(args.labels)}
    pairs = [(case, masks.get(case.stem)) for case in find_cases(args.images)]
    with tempfile.TemporaryDirectory() as scratch, spoken_to_stderr(args.json):
        # The training takes images/ and masks/ of equal names; what it keeps of them is named by their folder.
        folder = Path(scratch) / "volumes"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        for image, mask in pairs:
            path = image.paths[0]
            if image.kind != "nifti" or not path.name.endswith((".nii", ".nii.gz")) or mask is None:
                reason = "has no mask" if mask is None else "is no NIfTI volume"
                raise ZeroSegError(
                    f"{path.name} {reason}: adapters learn from NIfTI volumes with masks of the same name"
                )
            drawn = read_image(mask)
            if drawn.affine is None:
                raise ZeroSegError(f"{mask.paths[0].name} is no volume: the mask of {path.name} must be one")
            # Not by the file's own name, which may come again in another folder.
            name = image.stem + (".nii.gz" if path.name.endswith(".gz") else ".nii")
            shutil.copyfile(path, folder / "images" / name)
            values = (drawn.array != 0).any(0).astype(np.uint8)
            nib.save(nib.Nifti1Image(values, drawn.affine), folder / "masks" / name)
        out = args.output_dir
        trainer = build(
            find_config("train_tumor.yaml"),
            settings,
            "trainer",
            folder=str(folder),
            out=str(out),
            work=str(out / "work"),
        )
        record = trainer.run()
    if args.json:
        print_json(record)
        return 0
    print(f"adapters: {args.output_dir}")
    print(f"  zeroseg tumor CASES --adapters {args.output_dir} --organ {args.organ} --output-dir OUT")
    return 0
