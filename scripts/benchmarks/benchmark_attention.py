#!/usr/bin/env python
"""Measure what a segmentation costs beyond the frozen backbone's own forward pass: seconds per stage, and memory.

    python scripts/benchmark.py                        Stable Diffusion 1.5's shape with random weights, 512 px
    python scripts/benchmark.py --shape xl             the shape of XL at 1024 px (2.1: 768 px)
    python scripts/benchmark.py --backbone embedded    the weights of the bundle, at their own size
    python scripts/benchmark.py --json figures.json --reference

Nothing is downloaded: without --backbone the networks are built from Stable Diffusion's configuration (1.5: UNet 860 M, VAE
84 M, text encoder 123 M parameters; XL: UNet 2.6 B, 14 GB in float32 with its text encoders). Their time does not depend on the weights; the merging thresholds are found per
image, so that random attention, too, is merged into several segments. Their number is in the table.

Every stage is timed --repeat times after one warm-up round, all stages in turn in every round; medians are reported:
  vae_encode_s       image -> latent
  text_embed_s       words that were not embedded before
  unet_forward_s     plain UNet forward on the latent
  unet_capture_s     the same with all self-attention recorded, as far as its last layer
  plain_forward_s    vae_encode_s + unet_forward_s: the backbone's own work
  capture_forward_s  vae_encode_s + unet_capture_s
  aggregate_s        self-attention of all grids -> one map per token
  merge_s            the maps -> proposals, in three iterations
  label_map_s        proposals -> labels at full size
  select_s, refine_s what the inferer reports for the chosen --select
  second_prompt_s    a click on the encoded image; second_prompt_p95_s over 40 clicks all over it
  pipeline_s         image -> mask through AttentionSegmentationInferer, everything included
  read_s, write_s    a PNG in; mask, confidence and overlay out, as the bundle does it, once
  startup_*_s        with --backbone: a fresh process on the CPU has imported the package, and has its first mask
  pipeline_over_forward = pipeline_s / plain_forward_s
  pipeline_over_unet_forward = (pipeline_s - vae_encode_s) / unet_forward_s
  capture_over_forward = capture_forward_s / plain_forward_s
Memory is the peak of the process's resident set (of the allocator on CUDA) during a stage, in MB of 1e6 bytes:
  capture_peak_mb_added   unet_capture_peak_mb - unet_forward_peak_mb, strict: the autoencoder's own peak hides nothing
  pipeline_peak_mb_added  pipeline_peak_mb - plain_forward_peak_mb, the latter with the autoencoder
  process_peak_mb         with --once: of all that happened, loading included

The pipeline asks the UNet for attention alone, so its pass ends behind the last layer that is read, and it keeps the
embedding of the words; the plain forward pass has the whole UNet and no words. Where other work runs beside, --clock processor
counts the seconds the processor worked on this; use --threads 1 with it, for those of all threads are added. (merge, select and
refine within a prediction are on the wall's clock always.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image as PILImage
from skimage.data import immunohistochemistry
from skimage.transform import resize
from torch import Tensor
from tqdm import tqdm

from zeroseg.attention import AttentionSegmentationInferer, aggregate_self_attention, label_map, merge_attention
from zeroseg.attention.merge import anchor_indices, merge_to
from zeroseg.backbones import StableDiffusionBackbone, pick_device
from zeroseg.backbones.frozen import DTYPES
from zeroseg.cases import CaseDataset, CaseRunner
from zeroseg.errors import ZeroSegError
from zeroseg.io import versions, write_json
from zeroseg.places import MODELS

MB = 1e6


SHAPES = {
    "1.5": {
        "unet": {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "text": [{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}],
    },
    "2.1": {
        "unet": {
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text": [{"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16}],
    },
    "xl": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        "text": [
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
            {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
        ],
    },
}
"""What differs between the published models, of the arguments of their networks."""
TINY = {
    "unet": {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    "text": [{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}],
}
"""What replaces that of 1.5, to test the program."""


class RandomStableDiffusion(StableDiffusionBackbone):
    """A backbone of a published model's shape with random weights, built in memory from its configuration.

    Args:
        tiny: the shape of 1.5 with few channels and a 16 x 16 latent grid, to test the program.
        device: auto, cpu, cuda[:i] or mps.
        dtype: fp32, bf16 or fp16.
        shape: a key of ``SHAPES``.
    """

    def __init__(self, tiny: bool = False, device: str = "auto", dtype: str = "fp32", shape: str = "1.5"):
        super().__init__("random", device=device, dtype=dtype)
        self.tiny, self.shape = tiny, shape

    def _load(self) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.device, self.dtype = pick_device(self._device_name), DTYPES[self._dtype_name]
        shape = SHAPES[self.shape]
        unet = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, **shape["unet"]}
        texts = TINY["text"] if self.tiny else shape["text"]
        unet |= TINY["unet"] if self.tiny else {}

        def placed(network: torch.nn.Module) -> torch.nn.Module:
            return network.to(self.device, self.dtype).eval().requires_grad_(False)

        torch.manual_seed(0)
        common = {"vocab_size": 49408, "max_position_embeddings": 77}
        configs = [CLIPTextConfig(**common, **text, intermediate_size=4 * text["hidden_size"]) for text in texts]
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        # Made in the precision they are used in: XL in float32 first would take twice the memory.
        with default_dtype(self.dtype):
            self.unet = placed(UNet2DConditionModel(**unet))
            self.vae = placed(
                AutoencoderKL(
                    block_out_channels=(16, 16, 32, 32) if self.tiny else (128, 256, 512, 512),
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    layers_per_block=2,
                    latent_channels=4,
                    norm_num_groups=16 if self.tiny else 32,
                    sample_size=8 * unet["sample_size"],
                )
            )
            self.text_encoders = [placed(kind(config)) for kind, config in zip(kinds, configs, strict=False)]
        tokenizer = CLIPTokenizer.from_pretrained(MODELS / "attention" / "tokenizer", model_max_length=77)
        self.tokenizers, self._empty_is_zero = [tokenizer] * len(self.text_encoders), len(self.text_encoders) == 2
        prediction = "v_prediction" if self.shape == "2.1" else "epsilon"
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.schedule = DDPMScheduler(**betas, prediction_type=prediction)
        self.alphas = self.schedule.alphas_cumprod.to(self.device, torch.float32)
        self.name, self.weights, self.fingerprint = "random", {}, "random"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have a dtype inside a ``with`` block."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


class PeakMemory:
    """Peak memory inside a ``with`` block, in bytes: of CUDA's allocator, else the resident set every ms."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc keeps freed blocks; without this a second stage looks free
            ctypes.CDLL(None).malloc_trim(0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._done.wait(0.001):
                return

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)


def process_peak_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def timed(function: Callable, device: torch.device, clock: str = "wall") -> tuple[object, float]:
    """What a call returns, and the seconds it took until the device was idle, by one of ``CLOCKS``."""
    start = CLOCKS[clock]()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, CLOCKS[clock]() - start


def broadcast_merge(attention: Tensor, thresholds: list[float], grid: int) -> Tensor:
    """``merge_attention`` transcribed plainly: one broadcast over all maps for every anchor and every proposal."""

    def divergence(p: Tensor, q: Tensor) -> Tensor:  # (N,), (B, N) -> (B,)
        quotient = p.log() - q.log()
        return (p * quotient).sum(-1) / 2 - (q * quotient).sum(-1) / 2

    attention = attention.clamp_min(torch.finfo(torch.float32).tiny)
    anchors = attention[anchor_indices(round(len(attention) ** 0.5), grid)]
    proposals = torch.stack([attention[divergence(a, attention) < thresholds[0]].mean(0) for a in anchors])
    for threshold in thresholds[1:]:
        absorbed, merged = torch.zeros(len(proposals), dtype=torch.bool), []
        for i, proposal in enumerate(proposals):
            if not absorbed[i]:
                near = divergence(proposal, proposals) < threshold
                absorbed |= near
                merged.append(proposals[near].mean(0))
        proposals = torch.stack(merged)
    return proposals


def sample_image(size: int) -> np.ndarray:
    """A stained tissue section that comes with scikit-image, (3, size, size) float32 in [0, 1]."""
    return resize(immunohistochemistry(), (size, size), anti_aliasing=True).transpose(2, 0, 1).astype(np.float32)


def measure(
    inferer: AttentionSegmentationInferer,
    size: int,
    select: str,
    repeat: int,
    reference: bool,
    clock: str = "wall",
    once: bool = False,
) -> dict:
    """Time every stage and watch the memory.

    Args:
        inferer: whose backbone and settings are measured.
        size: side of the image in pixels; the inferer must work at that resolution.
        select: segments or auto, the rule of the pipeline's mask.
        repeat: timed rounds after the warm-up round.
        reference: also time the broadcasting transcription of the merge, once.
        clock: of ``CLOCKS``.
        once: one round without a warm-up, and the peak of the whole process in place of every stage's.

    Returns:
        figures by name: ``*_s`` in seconds (medians), ``*_mb`` in MB of 1e6 bytes, ``*_over_*`` ratios.

    Raises:
        ZeroSegError: the size does not suit the backbone.
    """
    inferer.check()
    backbone = inferer.backbone
    device = backbone.device
    image = sample_image(size)
    square = torch.from_numpy(image)[None]
    click = [[size // 2, size // 2]]
    seconds = defaultdict(list)
    # Thresholds that suit this attention, whatever the weights: the inferer's own two, the second one twice.
    first, second = merge_to(inferer.encode(image).distance, inferer.max_segments, inferer.grid)[1]
    thresholds = [first, second, second]

    def stage(name: str, function: Callable):
        result, spent = timed(function, device, clock)
        seconds[name].append(spent)
        return result

    rounds = tqdm(range(1 if once else repeat + 1), desc="rounds", unit="round")
    for number in rounds:
        if number == 1:
            seconds.clear()  # the first round warmed up
        stage("text_embed_s", lambda n=number: backbone.embed_text([f"image {n}"]))
        context = backbone.embed_text([""])
        latents = stage("vae_encode_s", lambda: backbone.encode_image(square))
        stage("unet_forward_s", lambda z=latents, c=context: backbone.denoise(z, inferer.timestep, c))
        recording = stage("unet_capture_s", lambda z=latents, c=context: backbone.read(z, inferer.timestep, c))
        maps = [m[0] for m in recording.self_attention.values()]
        attention = stage("aggregate_s", lambda m=maps: aggregate_self_attention(m))
        proposals = stage("merge_s", lambda a=attention: merge_attention(a, thresholds, inferer.grid))
        stage("label_map_s", lambda p=proposals: label_map(p, size))
        del recording, maps
        encoded = stage("encode_s", lambda: inferer.encode(image))
        result = stage("predict_s", lambda e=encoded: inferer.predict(e, select=select))
        seconds["pipeline_s"].append(seconds["encode_s"][-1] + seconds["predict_s"][-1])
        seconds["select_s"].append(result.seconds.get("select", 0.0))
        seconds["refine_s"].append(result.seconds.get("refine", 0.0))
        stage("second_prompt_s", lambda e=encoded: inferer.predict(e, select="points", points=click))
    places = np.linspace(0.1, 0.9, 40)
    clicks = [
        [[round(x * (size - 1)), round(y * (size - 1))]] for x, y in zip(places, np.roll(places, 13), strict=True)
    ]
    again = [
        timed(lambda p=p, e=encoded: inferer.predict(e, select="points", points=p), device, clock)[1] for p in clicks
    ]
    del encoded, result

    figures = {name: statistics.median(values) for name, values in seconds.items()}
    figures["second_prompt_p95_s"] = float(np.quantile(again, 0.95))
    if not once:
        figures |= read_and_write(inferer, image)
    figures["plain_forward_s"] = figures["vae_encode_s"] + figures["unet_forward_s"]
    figures["capture_forward_s"] = figures["vae_encode_s"] + figures["unet_capture_s"]
    figures["capture_over_forward"] = figures["capture_forward_s"] / figures["plain_forward_s"]
    figures["capture_over_unet_forward"] = figures["unet_capture_s"] / figures["unet_forward_s"]
    figures["pipeline_over_forward"] = figures["pipeline_s"] / figures["plain_forward_s"]
    after_vae = figures["pipeline_s"] - figures["vae_encode_s"]
    figures["pipeline_over_unet_forward"] = after_vae / figures["unet_forward_s"]

    if once:
        figures["process_peak_mb"] = process_peak_mb()
    else:
        figures |= peak_memory(inferer, square, image, select)
    figures |= {"tokens": len(attention), "segments": len(proposals)}
    if reference:
        _, figures["reference_merge_s"] = timed(lambda: broadcast_merge(attention, thresholds, inferer.grid), device)
        figures["reference_over_merge"] = figures["reference_merge_s"] / figures["merge_s"]
    return figures


def peak_memory(
    inferer: AttentionSegmentationInferer, square: Tensor, image: np.ndarray, select: str
) -> dict[str, float]:
    """Peak memory of the backbone's own work, and of what is added, in MB; arguments as in ``measure``."""
    backbone = inferer.backbone
    context, latents = backbone.embed_text([""]), backbone.encode_image(square)
    peaks = {}
    for name, function in (
        ("unet_forward", lambda: backbone.denoise(latents, inferer.timestep, context)),
        ("unet_capture", lambda: backbone.read(latents, inferer.timestep, context)),
        ("plain_forward", lambda: backbone.denoise(backbone.encode_image(square), inferer.timestep, context)),
        ("pipeline", lambda: inferer.predict(inferer.encode(image), select=select)),
    ):
        with PeakMemory(backbone.device) as memory:
            function()
        peaks[name] = memory.peak / MB
    figures = {f"{name}_peak_mb": peak for name, peak in peaks.items()}
    figures["capture_peak_mb_added"] = peaks["unet_capture"] - peaks["unet_forward"]
    figures["pipeline_peak_mb_added"] = peaks["pipeline"] - peaks["plain_forward"]
    return figures


def read_and_write(inferer: AttentionSegmentationInferer, image: np.ndarray) -> dict[str, float]:
    """Seconds that files cost in the bundle's own run of one picture."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "sample.png"
        PILImage.fromarray((image.transpose(1, 2, 0) * 255).astype(np.uint8)).save(picture)
        output = Path(folder) / "out"
        output.mkdir()
        runner = CaseRunner(inferer, CaseDataset(picture), output)
        entry = runner.segment_case(runner.dataset.cases[0], {}, output)
    return {f"{name}_s": entry["seconds"][name] for name in ("read", "write")}


def startup(backbone: str, size: int) -> dict[str, float]:
    """Seconds of a fresh process to the imported package, and to its first mask."""
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import numpy\n"
        "from zeroseg.attention import AttentionSegmentationInferer\n"
        "from zeroseg.backbones import StableDiffusionBackbone\n"
        "imported = time.perf_counter(); backbone = StableDiffusionBackbone(sys.argv[1], device='cpu')\n"
        "inferer = AttentionSegmentationInferer(backbone, resolution=int(sys.argv[2]))\n"
        "inferer.segment(numpy.load(sys.argv[3]))\n"
        "print(imported - start, time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "image.npy", sample_image(size))
        command = [sys.executable, "-c", code, backbone, size, Path(folder) / "image.npy"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    first, last = map(float, done.stdout.split()[-2:])
    return {"startup_import_s": first, "startup_first_mask_s": last}


def table(figures: dict[str, float]) -> str:
    """The figures as aligned lines; seconds also as a share of the plain forward pass."""
    width, plain = max(map(len, figures)), figures["plain_forward_s"]
    lines = [f"{'':<{width}}  {'':>10}  x plain forward"]
    for name, value in figures.items():
        share = f"  {value / plain:>10.3f}" if name.endswith("_s") else ""
        lines.append(f"{name:<{width}}  {value:>10.4g}{share}")
    return "\n".join(lines)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options every benchmark has: where it computes, how precisely, and where its figures go."""
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps (default cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")


def machine_context(device: torch.device, dtype: str) -> dict[str, object]:
    """What figures depend on beside the settings, for the record."""
    return {
        "device": str(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="embedded, a folder, or a hub id; default: random weights")
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5", help="without --backbone: whose (default 1.5)")
    parser.add_argument("--tiny", action="store_true", help="the same shape with few channels, to test the program")
    parser.add_argument(
        "--size", type=int, help="side in pixels (default: the backbone's own; 512, 768 and 1024 by shape)"
    )
    parser.add_argument("--select", choices=["segments", "auto"], default="segments", help="the mask's rule")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds after the warm-up (default 3)")
    parser.add_argument("--once", action="store_true", help="one round and no warm-up, for what takes minutes a pass")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what seconds are (default wall)")
    parser.add_argument("--reference", action="store_true", help="also time a broadcasting transcription of the merge")
    add_machine_options(parser)
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.backbone:
            backbone = StableDiffusionBackbone(args.backbone, args.revision, args.device, args.dtype)
        else:
            print(f"random weights in the shape of Stable Diffusion {args.shape}, nothing is downloaded: building")
            backbone = RandomStableDiffusion(args.tiny, args.device, args.dtype, args.shape)
        size = args.size or backbone.image_size
        inferer = AttentionSegmentationInferer(backbone, resolution=size)
        figures = measure(inferer, size, args.select, args.repeat, args.reference, args.clock, args.once)
        if args.backbone:
            figures |= startup(args.backbone, size)
        context = {
            "backbone": args.backbone
            or ("tiny, random weights" if args.tiny else f"SD {args.shape} shape, random weights"),
            "random_weights": args.backbone is None,
            "unet_parameters": sum(p.numel() for p in backbone.unet.parameters()),
            "vae_parameters": sum(p.numel() for p in backbone.vae.parameters()),
            "size": size,
            "select": args.select,
            "repeat": 1 if args.once else args.repeat,
            "clock": args.clock,
            "inferer": inferer.settings(),
            **machine_context(backbone.device, args.dtype),
        }
        if args.json:
            write_json(args.json, {**figures, "context": context})
    except ZeroSegError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    unet, vae = (f"{context[f'{part}_parameters'] / MB:.1f} M" for part in ("unet", "vae"))
    print(f"{context['backbone']} (UNet {unet}, VAE {vae}), {size} px, {args.dtype} on {context['device']}")
    print(f"{context['threads']} threads, {context['clock']} clock, median of {context['repeat']}")
    if context["random_weights"]:
        print("The weights are random: times do not depend on them, masks mean nothing.")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
