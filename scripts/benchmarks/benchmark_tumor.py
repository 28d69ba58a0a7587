#!/usr/bin/env python
"""Measure what a tumour segmentation costs: seconds and peak memory per stage and per network pass.

    python scripts/benchmarks/benchmark_tumor.py                              compact shape, 64^3 and 128^3 voxels
    python scripts/benchmarks/benchmark_tumor.py --shape maisi --size 64      MAISI's full size
    python scripts/benchmarks/benchmark_tumor.py --shape maisi --training --dtype bf16
    python scripts/benchmarks/benchmark_tumor.py --json figures.json

Weights are random, nothing is downloaded: time does not depend on them, masks mean nothing. The volume is noise at the
model's own spacing, so that no resampling takes part. Each pass runs once after one pass on a small volume:
  encode, decode         the whole autoencoder, in windows where the volume is larger than the backbone's
  denoise                one UNet pass on the whole latent
  repaint_step           (inpaint at --steps) / --steps: a denoising step with noising and blending
  aova, pixel, feature   adapters and text; what the residuals add. Region: the middle eighth of the volume
With --training, in place of those, what train_tumor.yaml does with volumes of one's own, by its own settings:
  encoder                the frozen encoder's plain pass over a cube of the training's size, to compare with
  reading                one reading of a case: augmented, cut to the training's size, through the frozen encoder, 500 voxels drawn
  voxel_step             a step of the first phase, on voxels of 32 readings
  volume_step            a step of the second phase, off by default: 4 volumes read anew, through the adapters and back
A case is read eight times, then 4000 steps on voxels follow: seconds = 8 x cases x reading + 4000 x voxel_step.
Memory is the peak of the process's resident set (of the allocator on CUDA) in a pass beyond what it held before, in MB
of 1e6 bytes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch
import yaml
from tqdm import tqdm

from benchmark_attention import CLOCKS, MB, PeakMemory, add_machine_options, machine_context, process_peak_mb, timed
from zeroseg.backbones.maisi import COMPACT, MAISI_RFLOW, MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.errors import ZeroSegError
from zeroseg.evaluation.tables import markdown_rows
from zeroseg.io import write_json
from zeroseg.places import MODELS
from zeroseg.tumor import AovaAdapters
from zeroseg.tumor.aova import aova_map, encode_features, healthy_margin_loss
from zeroseg.tumor.inpainting import pseudo_healthy
from zeroseg.tumor.prompts import prompt_set
from zeroseg.tumor.residuals import pixel_residual
from zeroseg.tumor.training import AdapterTrainer, Sampling, Schedule, gather_cases

SHAPES = {"compact": COMPACT, "maisi": MAISI_RFLOW}
TEXT_DIM = 64
VOXEL_STEPS = 5
"""Of the training's first phase, whose mean is reported."""


class RandomMaisi(MaisiBackbone):
    """A backbone of a given configuration with random weights, built in memory.

    Args:
        config: see ``zeroseg.backbones.maisi.COMPACT``.
        device: auto, cpu, cuda[:i] or mps.
        dtype: fp32, bf16 or fp16.
    """

    def __init__(self, config: dict, device: str = "cpu", dtype: str = "fp32"):
        super().__init__("random", device=device, dtype=dtype, untrained=True)
        self._given = config

    def _from_folder(self) -> dict:
        self.name, self.config, self.weights = "random", copy.deepcopy(self._given), {}
        return {}


Figures = dict[str, dict[str, float]]


def measured(figures: Figures, name: str, function: Callable, device: torch.device, clock: str, times: int = 1):
    """What a call returns; ``figures`` gains its seconds, divided by how many ``times`` it does something, and its peak memory."""
    with PeakMemory(device) as memory:
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        result, seconds = timed(function, device, clock)
    figures[name] = {"seconds": seconds / times, "peak_mb_added": max(0, memory.peak - held) / MB}
    return result


def measure_training(backbone: MaisiBackbone, size: int, clock: str = "wall") -> Figures:
    """Time the adapters' training on two volumes of noise with a ball for a lesion; as ``measure``.

    Args:
        backbone: with random weights.
        size: side of the volumes in voxels at the backbone's spacing.
        clock: of ``benchmark_attention.CLOCKS``.

    Raises:
        ZeroSegError: the size is below 8.
    """
    if size < 8:
        raise ZeroSegError(f"--size must be at least 8 for --training, not {size}")
    backbone.load()
    figures: Figures = {}
    settings = yaml.safe_load((MODELS.parent / "configs" / "train_tumor.yaml").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder, rng, affine = Path(name), np.random.default_rng(0), np.diag([*backbone.spacing, 1.0])
        away = np.linalg.norm(np.indices((size,) * 3) - size / 2, axis=0)
        for kind in ("images", "masks"):
            (folder / kind).mkdir()
        for case in ("a.nii", "b.nii"):
            noise = rng.normal(0, 200, (size,) * 3).astype(np.float32)
            nib.save(nib.Nifti1Image(noise, affine), folder / "images" / case)
            nib.save(nib.Nifti1Image((away < size / 8).astype(np.uint8), affine), folder / "masks" / case)
        trainer = AdapterTrainer(
            backbone,
            TextEncoder(device=str(backbone.device)),
            gather_cases(real=[{"folder": folder, "organ": "liver", "modality": "ct"}]),
            out=folder / "out",
            work=folder / "work",
            schedule=Schedule(steps=VOXEL_STEPS, volume_steps=1, volumes=settings["volumes"], batch=settings["batch"]),
            sampling=Sampling(voxels=settings["voxels"], variants=1),
            adapters=settings["adapters"],
            fusion_volumes=0,
        )
        trainer.calibrate()  # warm-up: every volume is read once

        def read() -> None:
            example = trainer.reader.read_job(trainer.reader.jobs(trainer.cases)[0])
            trainer.reader.draw(example, trainer.adapters, np.random.default_rng(0))

        def phase(name: str, steps: int, terms: Callable) -> None:
            trainer._phase(name, steps, trainer.schedule.lr, {name: 0}, terms)

        cube = torch.rand((1, 1, *(trainer.reader.crop,) * 3), device=backbone.device)
        measured(figures, "encoder", lambda: backbone.encode(cube), backbone.device, clock)
        measured(figures, "reading", read, backbone.device, clock)
        samples = trainer.samples()
        rows: list[list[int]] = [[], list(range(len(samples.cases)))]
        draw = partial(trainer._voxel_step, samples, rows)
        measured(figures, "voxel_step", lambda: phase("voxels", VOXEL_STEPS, draw), backbone.device, clock, VOXEL_STEPS)

        def whole(rng: np.random.Generator) -> dict:
            return trainer._terms(trainer.read_step([[], trainer.cases], rng), rng)

        measured(figures, "volume_step", lambda: phase("volumes", 1, whole), backbone.device, clock)
        figures["reading"]["crop_voxels"] = trainer.reader.crop
        figures["voxel_step"]["parameters"] = sum(p.numel() for p in trainer.adapters.parameters())
    return figures


def measure(backbone: MaisiBackbone, size: int, steps: int, clock: str = "wall") -> Figures:
    """Time every pass on a volume of noise and watch the memory.

    Args:
        backbone: its text encoder is replaced by random vectors, whose time does not count.
        size: side of the volume in voxels, a multiple of ``backbone.size_multiple``.
        steps: inpainting steps.
        clock: of ``benchmark_attention.CLOCKS``.

    Returns:
        pass -> ``seconds`` and ``peak_mb_added``.

    Raises:
        ZeroSegError: the size does not suit the backbone.
    """
    backbone.load()
    if size < 1 or size % backbone.size_multiple:
        raise ZeroSegError(f"--size must be a multiple of {backbone.size_multiple}, not {size}")
    torch.manual_seed(0)
    adapters = AovaAdapters(backbone.feature_channels, TEXT_DIM).to(backbone.device).eval().requires_grad_(False)
    asked = prompt_set("liver", None, "ct")
    prompts = torch.nn.functional.normalize(torch.randn(len(asked), TEXT_DIM), dim=1).to(backbone.device)
    roles, spacing = [role for role, _ in asked], backbone.spacing
    volume = torch.rand(1, 1, size, size, size, device=backbone.device)
    middle = slice(size // 4, size - size // 4)
    region = np.zeros((size,) * 3, bool)
    region[middle, middle, middle] = True
    mask = torch.from_numpy(region[:: backbone.factor, :: backbone.factor, :: backbone.factor])
    figures: Figures = {}

    def stage(name: str, function: Callable):
        return measured(figures, name, function, backbone.device, clock)

    corner = slice(backbone.size_multiple)
    backbone.decode(backbone.encode(volume[..., corner, corner, corner]))  # warm-up
    encoded = stage("encode", lambda: encode_features(backbone, adapters, volume))
    latent = encoded.latent
    reconstruction = stage("decode", lambda: backbone.decode(latent))
    stage("aova", lambda: aova_map(backbone, adapters, encoded, prompts, roles))
    stage("denoise", lambda: backbone.predict(latent, 500, spacing, "ct"))
    repaint = stage("inpaint", lambda: pseudo_healthy(backbone, latent, mask, spacing, "ct", steps=steps, strength=1.0))
    figures["repaint_step"] = {
        "seconds": figures["inpaint"]["seconds"] / steps,
        "peak_mb_added": figures["inpaint"]["peak_mb_added"],
    }
    healthy = backbone.decode(repaint)
    stage("pixel", lambda: pixel_residual(reconstruction, healthy))
    change = healthy - reconstruction
    stage("feature", lambda: healthy_margin_loss(backbone, adapters, encoded, change, region, prompts, roles))
    return figures


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="compact", help="of the networks (default compact)")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128], help="sides in voxels (default 64 128)")
    parser.add_argument("--steps", type=int, default=20, help="inpainting steps, all of them walked (default 20)")
    parser.add_argument("--training", action="store_true", help="the adapters' training in place of a segmentation")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what seconds are (default wall)")
    add_machine_options(parser)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        backbone = RandomMaisi(SHAPES[args.shape], args.device, args.dtype).load()
        sizes = {}
        for size in tqdm(args.size, desc="sizes"):
            sizes[str(size)] = (
                measure_training(backbone, size, args.clock)
                if args.training
                else measure(backbone, size, args.steps, args.clock)
            )
        networks = {"autoencoder": backbone.autoencoder, "unet": backbone.unet}
        context = {
            "shape": args.shape,
            "random_weights": True,
            "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()},
            "window": list(backbone.window),
            "steps": args.steps,
            "clock": args.clock,
            "process_peak_mb": process_peak_mb(),
            **machine_context(backbone.device, args.dtype),
        }
        if args.json:
            write_json(args.json, {"sizes": sizes, "context": context})
    except ZeroSegError as error:
        print(f"benchmark_tumor.py: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{name} {count / MB:.1f} M" for name, count in context["parameters"].items())
    print(f"{args.shape} ({counts}), {args.dtype} on {backbone.device}, {context['threads']} threads, random weights")
    print(f"{args.clock} clock; peak of the process {context['process_peak_mb']:.0f} MB, loading included")
    passes = list(next(iter(sizes.values())))
    lines = [["pass", *(f"{size}^3 {unit}" for size in sizes for unit in ("s", "MB added"))]]
    lines.append(["---"] + ["---:"] * (2 * len(sizes)))
    for name in passes:
        cells = [(f"{f[name]['seconds']:.3g}", f"{f[name]['peak_mb_added']:.0f}") for f in sizes.values()]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    print(markdown_rows(lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
