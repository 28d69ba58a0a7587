#!/usr/bin/env python
"""Train the embedded 2-D backbone: a small latent diffusion model in the layout of a Stable Diffusion pipeline.

Three networks learn from unlabelled images and captioned phantoms; no mask is ever read:
an AutoencoderKL (factor 4), a text encoder (CLIP text architecture), and a UNet with self-attention at four grids
(64, 32, 16, 8 tokens a side at 256 px) and cross-attention to the text. The result is a diffusers folder that
``StableDiffusionPipeline.from_pretrained`` and ``zeroseg.backbones`` load alike.

Only images whose terms allow it are used: a folder named in ``SOURCES`` must carry an allowed licence (chest X-rays row by
row); any other folder has to be passed as ``--extra FOLDER=CAPTION`` by someone who has read its licence.

    python scripts/training/train_backbone.py --images UNLABELLED_DIR --work runs/attention --out bundle/models/attention

The run resumes from ``--work`` when it is called again. ``--start FOLDER`` goes on from weights written before, with their
autoencoder and tokenizer as they are; new words are then spelled with the old pieces.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from phantoms import SCENES, make_phantom
from phases import Phases, Schedule, averaged, require_checkpoint
from zeroseg.backbones.weights import write_sums

ALLOWED_LICENCES = ("CC0", "CC BY 3.0", "CC BY 4.0", "CC BY-SA 3.0", "CC BY-SA 4.0", "MIT")


def licensed(files: list[Path], rows: Path) -> list[Path]:
    """Those of a folder's files whose row (columns ``stem`` and ``licence``) states an allowed licence."""
    with open(rows, newline="") as f:
        allowed = {row["stem"] for row in csv.DictReader(f) if row["licence"] in ALLOWED_LICENCES}
    return [p for p in files if p.stem in allowed]


@dataclass(frozen=True)
class Source:
    """Terms and captions of a known folder of unlabelled images."""

    licence: str  # "rows": one licence per image in <folder>_licences.csv
    citation: str
    captions: tuple[str, ...]


SOURCES = {
    "blood_bccd": Source(
        "MIT",
        "BCCD dataset, Shenggan and contributors, github.com/Shenggan/BCCD_Dataset",
        ("blood smear with white blood cell, red blood cells", "blood smear with red blood cells, white blood cell"),
    ),
    "nuclei_dsb2018": Source(
        "CC0",
        "Caicedo et al. 2019, Nature Methods 16:1247-1253 (BBBC038, 2018 Data Science Bowl)",
        ("microscopy with cell nuclei", "cell nuclei"),
    ),
    "cxr_ieee8023": Source(
        "rows",
        "Cohen et al. 2020, arXiv:2003.11597; rows under CC BY or CC BY-SA only",
        ("chest x-ray with lungs, heart", "chest x-ray with heart, lungs", "chest x-ray with lungs"),
    ),
}


def draw_phantoms(count: int, seed: int, cache: Path | None) -> tuple[np.ndarray, list[str]]:
    """(count, H, W, 3) uint8 images and their captions, on all cores; kept in ``cache`` for a resumed run."""
    if cache is not None and cache.is_file():
        stored = np.load(cache)
        if len(stored["images"]) == count and stored["seed"] == seed:
            return stored["images"], stored["captions"].tolist()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        drawn = pool.map(make_phantom, range(seed, seed + count), chunksize=16)
        drawn = list(tqdm(drawn, total=count, desc="phantoms", mininterval=5))
    images, captions = np.stack([p.image for p in drawn]), [p.caption for p in drawn]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, images=images, captions=np.array(captions), seed=seed)
    return images, captions


def shorten(caption: str, rng: np.random.Generator) -> str:
    """Now and then only what is present, or one thing of it: people prompt with "liver", not with whole captions."""
    _, found, things = caption.partition(" with ")
    present = [t for t in things.split(", ") if not t.startswith("no ")]
    draw = rng.random()
    if not found or draw > 0.4:
        return caption
    return ", ".join(present) if draw < 0.15 else str(present[rng.integers(len(present))])


class Corpus:
    """Every training image in memory as uint8, with its captions; draws augmented batches.

    Images are (H, W, 3). ``real_share`` is the probability that a sample is a real image rather than a phantom; real
    folders are drawn from alike, whatever their size.
    """

    def __init__(
        self,
        folders: list[tuple[Path, Source]],
        phantoms: int,
        seed: int,
        cache: Path | None = None,
        real_share: float = 0.4,
    ):
        self.real: list[list[tuple[np.ndarray, tuple[str, ...]]]] = []  # one list a folder
        self.counts: dict[str, int] = {}
        for folder, source in folders:
            names = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".bmp"))
            if source.licence == "rows":
                names = licensed(names, folder.parent / f"{folder.name}_licences.csv")
            self.counts[folder.parent.name if folder.name == "images" else folder.name] = len(names)
            self.real.append([(np.asarray(Image.open(p).convert("RGB")), source.captions) for p in names])
        self.phantoms = [
            (image, (caption,)) for image, caption in zip(*draw_phantoms(phantoms, seed, cache), strict=True)
        ]
        self.real_share = real_share if self.real else 0.0

    def captions(self) -> list[str]:
        return [c for pool in (*self.real, self.phantoms) for _, captions in pool for c in captions]

    def sample(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, str]:
        """One augmented (size, size, 3) image in [0, 1] and a caption: whole or cropped, turned, mirrored, re-toned."""
        pool = self.real[rng.integers(len(self.real))] if rng.random() < self.real_share else self.phantoms
        image, captions = pool[rng.integers(len(pool))]
        h, w = image.shape[:2]
        side = int(min(h, w) * (1 if rng.random() < 0.4 else rng.uniform(0.5, 1)))
        y, x = rng.integers(h - side + 1), rng.integers(w - side + 1)
        crop = Image.fromarray(image[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
        out = np.asarray(crop, np.float32) / 255
        out = np.rot90(out, rng.integers(4)) if rng.random() < 0.5 else out
        out = out[:, ::-1] if rng.random() < 0.5 else out
        if rng.random() < 0.4:  # the stretch that images get before they are segmented
            low, high = np.percentile(out, (0.5, 99.5))
            out = np.clip((out - low) / max(high - low, 1e-3), 0, 1)
        if rng.random() < 0.5:
            out = np.clip(out, 1e-4, 1) ** rng.uniform(0.7, 1.4) * rng.uniform(0.85, 1.1, 3)
        return np.clip(out, 0, 1), shorten(str(captions[rng.integers(len(captions))]), rng)

    def batch(self, rng: np.random.Generator, count: int, size: int) -> tuple[torch.Tensor, list[str]]:
        """(count, 3, size, size) float32 in [-1, 1] and the captions."""
        images, captions = zip(*(self.sample(rng, size) for _ in range(count)), strict=True)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() * 2 - 1, list(captions)


def build_tokenizer(captions: list[str], folder: Path):
    """A CLIP tokenizer whose byte-pair vocabulary comes from the training captions; written to ``folder``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(letters) + 512,
        initial_alphabet=sorted(letters),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for letter in sorted(letters):  # any byte may end a word, so that no prompt meets an unknown token
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_networks(vocab_size: int, seed: int):
    """AutoencoderKL, CLIP text model, UNet and scheduler of the embedded backbone, randomly initialised."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(48, 96, 144, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=(2, 2, 4, 4),  # diffusers' historical name: the number of heads
        cross_attention_dim=128,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return vae, text_encoder, unet, scheduler


def portable(word: str) -> str:
    """A word of the command line, a folder in it without what lies above on this machine."""
    path, equals, caption = word.partition("=")
    return Path(path).name + equals + caption if Path(path).is_absolute() else word


class Trainer:
    """Two phases (autoencoder, then diffusion), each resumable; see ``phases``."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus):
        self.args, self.corpus = args, corpus
        self.device = torch.device(args.device)
        self.work = Path(args.work)
        self.tokenizer = self._tokenizer()
        self.vae, self.text, self.unet, self.scheduler = build_networks(len(self.tokenizer), args.seed)
        if args.start is not None:
            self._start_from(Path(args.start))
        for net in (self.vae, self.text, self.unet):
            net.to(self.device, memory_format=torch.channels_last if net is not self.text else torch.preserve_format)
        self.averages = {name: averaged(getattr(self, name), 0.999) for name in ("unet", "text")}
        networks = {"vae": self.vae, "text": self.text, "unet": self.unet}
        networks |= {f"average_{name}": average for name, average in self.averages.items()}
        self.phases = Phases(
            networks,
            self.work,
            Schedule(warm_up=200, decay=0.2, floor=0.05),
            seed=args.seed,
            save_every=args.save_every,
            log_every=100,
            smoothing=0.99,
            device=self.device,
        )
        self.state = self.phases.state
        if args.start is not None:
            self.state.setdefault("latent_std", 1 / self.vae.config.scaling_factor)
            self.state.setdefault("vae_step", args.vae_steps)

    def _start_from(self, folder: Path) -> None:
        for name, network in (("vae", self.vae), ("text_encoder", self.text), ("unet", self.unet)):
            written = type(network).from_pretrained(folder / name, use_safetensors=True)
            network.load_state_dict(written.float().state_dict())
            if name == "vae":
                self.vae.register_to_config(scaling_factor=written.config.scaling_factor)

    def _tokenizer(self):
        from transformers import CLIPTokenizer

        if self.args.start is not None:
            return CLIPTokenizer.from_pretrained(Path(self.args.start) / "tokenizer")
        folder = self.work / "tokenizer"
        if (folder / "tokenizer_config.json").is_file():  # a resumed run keeps the words it was begun with
            return CLIPTokenizer.from_pretrained(folder)
        return build_tokenizer(self.corpus.captions(), folder)

    def train_vae(self) -> None:
        args = self.args

        def loss_of(rng):
            images, _ = self.corpus.batch(rng, args.vae_batch, args.vae_size)
            images = images.to(self.device, memory_format=torch.channels_last)
            posterior = self.vae.encode(images).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample.float()
            edges = sum((decoded.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3))
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            return (decoded - images).abs().mean() + 0.5 * edges + args.kl_weight * kl

        self.phases.run("vae", args.vae_steps, self.vae.parameters(), 1e-3, loss_of, bf16=not args.fp32)
        self.scale_latents()
        self.vae.requires_grad_(False).eval()

    def scale_latents(self) -> None:
        """Measure the latents' spread once and store its inverse, so that the UNet sees latents of spread 1."""
        if "latent_std" not in self.state:
            rng = np.random.default_rng(self.args.seed)
            with torch.no_grad():
                means = [
                    self.vae.encode(self.corpus.batch(rng, 16, 128)[0].to(self.device)).latent_dist.mean
                    for _ in range(8)
                ]
            self.state["latent_std"] = float(torch.cat(means).std())
        self.vae.register_to_config(scaling_factor=1 / self.state["latent_std"])

    def train_unet(self) -> None:
        args = self.args
        alphas = self.scheduler.alphas_cumprod.to(self.device)

        def loss_of(rng):
            large = rng.random() < args.large_share  # some batches at the size that is read later
            size, count = (2 * args.size, max(1, args.batch // 4)) if large else (args.size, args.batch)
            images, captions = self.corpus.batch(rng, count, size)
            captions = ["" if rng.random() < 0.1 else c for c in captions]
            self.state["samples"] = self.state.get("samples", 0) + count
            with torch.no_grad():
                images = images.to(self.device, memory_format=torch.channels_last)
                latents = self.vae.encode(images).latent_dist.mean.float() * self.vae.config.scaling_factor
            tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            context = self.text(tokens.to(self.device)).last_hidden_state
            noise = torch.randn_like(latents)
            t = torch.from_numpy(rng.integers(0, len(alphas), count)).to(self.device)
            noisy = self.scheduler.add_noise(latents, noise, t)
            predicted = self.unet(noisy.contiguous(memory_format=torch.channels_last), t, context).sample.float()
            target = self.scheduler.get_velocity(latents, noise, t)
            snr = alphas[t] / (1 - alphas[t])
            weight = snr.clamp(max=5) / (snr + 1)  # min-SNR weighting, Hang et al. 2023, for v-prediction
            return (weight * F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))).mean() / weight.mean()

        self.phases.run(
            "unet",
            args.unet_steps,
            [*self.unet.parameters(), *self.text.parameters()],
            args.lr,
            loss_of,
            averages=[(average, getattr(self, name)) for name, average in self.averages.items()],
            bf16=not args.fp32,
        )

    def export(self, out: Path) -> None:
        """Write the EMA weights as a Stable Diffusion folder: float16 safetensors under 20 MB each, sums, summary."""
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.averages["text"].module,
            tokenizer=self.tokenizer,
            unet=self.averages["unet"].module,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(torch.device("cpu"), torch.float16).save_pretrained(
            out, safe_serialization=True, max_shard_size="20MB"
        )
        summary = {
            "command": "python scripts/training/train_backbone.py "
            + " ".join("UNLABELLED_DIR" if word in self.args.images else portable(word) for word in self.args.command),
            "date": datetime.date.today().isoformat(),
            "hardware": f"{self.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "images": {**self.corpus.counts, "phantoms": len(self.corpus.phantoms)},
            "phantom_kinds": list(SCENES),
            "parameters": {n: sum(p.numel() for p in getattr(self, n).parameters()) for n in ("vae", "text", "unet")},
            "vae_steps": self.phases.steps("vae"),
            "unet_steps": self.phases.steps("unet"),
            "unet_samples": self.state.get("samples", 0),
            "hours": round(self.state["seconds"] / 3600, 2),
            "loss": self.state["log"][:: max(1, len(self.state["log"]) // 60)],
        }
        (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_sums(out)
        print(f"wrote {out}")


def find_folders(args: argparse.Namespace) -> list[tuple[Path, Source]]:
    """Known folders below ``--images`` plus every ``--extra FOLDER=CAPTION``; refuses terms that do not allow training."""
    folders = []
    for root in map(Path, args.images):
        for name, source in SOURCES.items():
            if (root / name).is_dir():
                if source.licence not in (*ALLOWED_LICENCES, "rows"):
                    raise SystemExit(f"{name}: licence {source.licence!r} does not allow training")
                folders.append((root / name, source))
    for extra in args.extra:
        folder, _, caption = extra.partition("=")
        if not Path(folder).is_dir() or not caption:
            raise SystemExit(f"--extra {extra!r}: give FOLDER=CAPTION with an existing folder")
        folders.append((Path(folder), Source("as checked by the caller", folder, (caption,))))
    return folders


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", action="append", default=[], help="folder holding the known sets (see SOURCES)")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="FOLDER=CAPTION", help="a further folder of images"
    )
    parser.add_argument("--real-share", type=float, default=0.4, help="share of samples that are real images")
    parser.add_argument("--start", metavar="FOLDER", help="diffusers folder to go on from, instead of random weights")
    parser.add_argument("--phantoms", type=int, default=4000, help="phantoms to draw (default 4000)")
    parser.add_argument("--work", default="runs/attention", help="checkpoints; the run resumes from here")
    parser.add_argument("--out", default="bundle/models/attention", help="diffusers folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="training side in px; batches of twice that are mixed in")
    parser.add_argument(
        "--large-share", type=float, default=0.2, help="share of batches at twice the size, a quarter the count"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-size", type=int, default=64)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint and stop")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args(argv)
    if args.export_only:
        require_checkpoint(Path(args.work))
    args.command = sys.argv[1:] if argv is None else argv
    corpus = Corpus(find_folders(args), args.phantoms, args.seed, Path(args.work) / "phantoms.npz", args.real_share)
    print(f"images: {corpus.counts}, phantoms: {len(corpus.phantoms)}")
    trainer = Trainer(args, corpus)
    if args.export_only:
        trainer.scale_latents()
    else:
        trainer.train_vae()
        trainer.train_unet()
    trainer.export(Path(args.out))


if __name__ == "__main__":
    main()
