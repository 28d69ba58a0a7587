#!/usr/bin/env python
"""Train the embedded 3-D backbone of DiffuGTS: a compact latent diffusion model of the MAISI shape, and its text encoder.

Three networks, one after another; no mask is read here:
an autoencoder (``AutoencoderKlMaisi``, factor 4) on crops of phantoms and of the volumes below ``--real``; a two-layer BERT that
brings different wordings of one meaning of the prompt grammar together; a diffusion UNet (``DiffusionModelUNetMaisi``, rectified
flow) on the latents of mostly healthy material, so that what it inpaints is healthy. The adapters, which do read masks,
are trained on the result by ``configs/train_tumor.yaml``.

    python scripts/training/train_tumor_backbone.py [--real mr=FOLDER] --work runs/tumor --out bundle/models/tumor

``FOLDER`` holds NIfTI volumes whose terms allow training; who gives it has read them. The run resumes from ``--work`` when it is
called again, and ``--export-only`` writes what there is.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from phantoms3d import SPACING, make_volume
from phases import Phases, Schedule, averaged, require_checkpoint
from zeroseg.backbones.maisi import COMPACT, build_autoencoder, build_unet, make_scheduler, spacing_condition
from zeroseg.backbones.weights import write_sums
from zeroseg.tumor.aova import ENTRIES
from zeroseg.tumor.prepare import prepare
from zeroseg.tumor.prompts import MODALITIES, ORGANS, TEMPLATES, grammar

UNKNOWN = "unknown"
TEXT_DIM = 64


@dataclass
class Material:
    """One training volume: (X, Y, Z) float16 in [0, 1] on the working grid."""

    volume: torch.Tensor
    modality: str
    healthy: bool
    real: bool = False

    def crop(self, rng: np.random.Generator, side: int) -> torch.Tensor:
        """(1, side, side, side) float32 at a random place, randomly flipped; smaller volumes are repeated at their borders."""
        short = [max(0, side - n) for n in self.volume.shape]
        volume = F.pad(self.volume[None, None].float(), [v for s in reversed(short) for v in (s // 2, s - s // 2)], mode="replicate")[0]  # fmt: skip
        at = [int(rng.integers(0, n - side + 1)) for n in volume.shape[1:]]
        piece = volume[(slice(None), *(slice(a, a + side) for a in at))]
        return piece.flip([axis for axis in (1, 2, 3) if rng.random() < 0.5])


def _unit(volume: np.ndarray, affine: np.ndarray, modality: str, config: dict) -> torch.Tensor:
    return prepare(volume[None], affine, modality, config["spacing"], 16, config["ct_window"]).volume[0, 0].half()


def draw_phantoms(count: int, first_seed: int, lesions: float, config: dict) -> list[Material]:
    """Phantoms of seeds ``first_seed`` onwards, that share of them with a lesion (never of a held-out kind)."""
    rng = np.random.default_rng(first_seed)
    drawn = []
    for seed in tqdm(range(first_seed, first_seed + count), desc="phantoms", mininterval=10):
        phantom = make_volume(seed, lesion=bool(rng.random() < lesions))
        affine, case = np.diag([SPACING] * 3 + [1.0]), phantom.case
        drawn.append(Material(_unit(phantom.image, affine, case.modality, config), case.modality, case.kind is None))
    return drawn


def read_real(folders: list[str], config: dict) -> list[Material]:
    """The volumes of ``MODALITY=FOLDER`` entries; images only."""
    found = []
    for entry in folders:
        modality, _, folder = entry.partition("=")
        files = sorted(p for p in Path(folder).glob("*") if p.name.endswith((".nii", ".nii.gz")))
        if modality not in MODALITIES or not files:
            raise SystemExit(f"--real {entry!r}: give ct=, mr= or pet= and a folder that holds NIfTI volumes")
        for file in files:
            image = nib.load(file)
            volume = np.asarray(image.dataobj, dtype=np.float32)
            found.append(Material(_unit(volume, image.affine, modality, config), modality, False, real=True))
    return found


def build_text_encoder(seed: int):
    """Tokenizer of whole words and a small BERT with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = {w for organ, tumor, _, _ in grammar() for w in f"{organ} {tumor}".split()}
    blanks = {"organ": "", "tumor": "", "modality": ""}
    words |= {w for wordings in TEMPLATES.values() for t in wordings for w in t.format(**blanks).split()}
    words |= {name.lower() for name in MODALITIES.values()}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, do_lower_case=True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * TEXT_DIM,
        max_position_embeddings=32,
    )
    return tokenizer, BertModel(config, add_pooling_layer=False)


def sentences(rng: np.random.Generator, count: int) -> tuple[list[str], list[tuple]]:
    """Random sentences of the prompt grammar with their meanings.

    A meaning is (role, organ, modality). Which words name a tumour makes none: they are paraphrases. A tumour in unknown words is
    no tumour: such a sentence means what the null prompt does.
    """
    organs, modalities = [*ORGANS, UNKNOWN], list(MODALITIES)
    tumours: dict[str, list[str]] = {organ: [] for organ in organs}
    for organ, tumour, _, _ in grammar():
        tumours[organ].append(tumour)
    tumours[UNKNOWN] = sorted({t for names in tumours.values() for t in names})
    texts, meanings = [], []
    for _ in range(count):
        organ, modality = str(rng.choice(organs)), str(rng.choice(modalities))
        role = str(rng.choice(list(TEMPLATES)))
        tumour, meant = str(rng.choice(tumours[organ])), role
        if role == "abnormal" and rng.random() < 0.2:
            tumour, meant = " ".join(["[UNK]"] * int(rng.integers(1, 4))), "null"
        words = "[UNK]" if organ == UNKNOWN else organ
        text = str(rng.choice(TEMPLATES[role])).format(organ=words, tumor=tumour, modality=MODALITIES[modality])
        texts.append(text)
        meanings.append((meant, organ, modality) if text else ("nothing",))
    return texts, meanings


class Trainer:
    """Four phases, each resumable; see ``phases``."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.config = copy.deepcopy(COMPACT)
        torch.manual_seed(args.seed)
        self.autoencoder = build_autoencoder(self.config).to(self.device)
        self.unet = build_unet(self.config).to(self.device)
        self.tokenizer, self.text = build_text_encoder(args.seed)
        self.text.to(self.device)
        self.average = averaged(self.unet, 0.998)
        self.phases = Phases(
            {"autoencoder": self.autoencoder, "unet": self.unet, "text": self.text, "average": self.average},
            Path(args.work),
            Schedule(warm_up=50, decay=1 / 3, floor=0.03),
            seed=args.seed,
            save_every=args.save_every,
            log_every=50,
            smoothing=0.98,
            device=self.device,
        )
        self.state = self.phases.state

    def _phase(self, name: str, steps: int, network: torch.nn.Module, lr: float, loss_of) -> None:
        """Run one phase to ``steps``; what was asked for is remembered."""
        if self.phases.steps(name) < steps:
            self.state.setdefault("commands", []).append(self.args.shown)
        averages = [(self.average, self.unet)] if name == "unet" else []
        bf16 = not self.args.fp32 and name != "text"
        self.phases.run(name, steps, network.parameters(), lr, loss_of, averages, bf16)

    def train_vae(self, material: list[Material]) -> None:
        """Reconstruction (L1 and L1 of the edges) with a small KL term, on cubes of ``vae_side`` voxels."""
        args = self.args
        real = [m for m in material if m.real]

        def loss_of(rng):
            chosen = [
                real[rng.integers(len(real))] if real and rng.random() < 0.2 else material[rng.integers(len(material))]
                for _ in range(args.vae_batch)
            ]
            x = torch.stack([m.crop(rng, args.vae_side) for m in chosen]).to(self.device)
            mu, sigma = self.autoencoder.encode(x)
            decoded = self.autoencoder.decode(mu + sigma * torch.randn_like(sigma)).float()
            mu, variance = mu.float(), sigma.float().square().clamp_min(1e-12)
            kl = 0.5 * (mu.square() + variance - variance.log() - 1).mean()
            edges = sum((decoded.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3, 4))
            return (decoded - x).abs().mean() + 0.3 * edges + args.kl_weight * kl

        self._phase("vae", args.vae_steps, self.autoencoder, 1e-3, loss_of)
        self.autoencoder.requires_grad_(False).eval()

    def train_decoder(self, material: list[Material]) -> None:
        """The decoder alone, on larger cubes: its group norms see the statistics of crops, and have to serve whole volumes.

        The encoder keeps still, so latents, UNet and adapters stay as they are.
        """
        args = self.args
        decoder = torch.nn.ModuleList([self.autoencoder.post_quant_conv, self.autoencoder.decoder])
        real = [m for m in material if m.real]

        def loss_of(rng):
            pool = real if real and rng.random() < 0.25 else material
            side = int(rng.choice([32, args.decoder_side]))
            x = pool[rng.integers(len(pool))].crop(rng, side)[None].to(self.device)
            with torch.no_grad():
                mu = self.autoencoder.encode(x)[0]
            decoded = self.autoencoder.decode(mu).float()
            edges = sum((decoded.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3, 4))
            return (decoded - x).abs().mean() + 0.3 * edges

        decoder.requires_grad_(True)
        self._phase("decoder", args.decoder_steps, decoder, 1e-3, loss_of)
        decoder.requires_grad_(False)

    def train_text(self) -> None:
        """Supervised contrast (Khosla et al. 2020): wordings of one meaning attract, all others repel."""

        def loss_of(rng):
            texts, meanings = sentences(rng, 256)
            numbers = {m: i for i, m in enumerate(dict.fromkeys(meanings))}
            labels = torch.tensor([numbers[m] for m in meanings])
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            e = F.normalize(self.text(**tokens).last_hidden_state[:, 0], dim=-1)
            same = ((labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)).float().to(self.device)
            logits = (e @ e.T / 0.1).masked_fill(torch.eye(len(labels), dtype=torch.bool, device=self.device), -1e4)
            has = same.sum(1) > 0
            return -((logits.log_softmax(1) * same).sum(1)[has] / same.sum(1)[has]).mean()

        self._phase("text", self.args.text_steps, self.text, 1e-3, loss_of)
        self.text.requires_grad_(False).eval()

    @torch.inference_mode()
    def latents(self, material: list[Material]) -> list[tuple[torch.Tensor, int]]:
        """Posterior mean and class label of every volume, measured scale applied."""
        found = []
        for m in tqdm(material, desc="latents", mininterval=10):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.args.fp32):
                mu = self.autoencoder.encode(m.volume[None, None].float().to(self.device))[0]
            found.append((mu[0].float().cpu(), self.config["modalities"][m.modality]))
        if "latent_std" not in self.state:
            self.state["latent_std"] = float(torch.cat([z.flatten() for z, _ in found]).std())
        return [((z / self.state["latent_std"]).clone(), label) for z, label in found]

    def train_unet(self, material: list[Material]) -> None:
        """Rectified flow: v = x_0 - noise is regressed at uniform times, on crops of the latents."""
        args, total = self.args, self.config["scheduler"]["num_train_timesteps"]
        if self.phases.steps("unet") >= args.unet_steps:
            return
        scheduler = make_scheduler(self.config)
        latents = self.latents(material)
        sides = [s for s in (16, 12, 8) if sum(min(z.shape[1:]) >= s for z, _ in latents) >= 8] or [4]
        pools = {s: [pair for pair in latents if min(pair[0].shape[1:]) >= s] for s in sides}

        def loss_of(rng):
            side = int(rng.choice(sides))
            count = max(1, round(args.unet_batch * (16 / side) ** 2))
            chosen = [pools[side][rng.integers(len(pools[side]))] for _ in range(count)]
            clean = []
            for z, _ in chosen:
                at = [int(rng.integers(0, n - side + 1)) for n in z.shape[1:]]
                clean.append(z[(slice(None), *(slice(a, a + side) for a in at))])
            clean = torch.stack(clean).to(self.device)
            times = torch.from_numpy(rng.uniform(0, total, count).astype(np.float32)).to(self.device)
            noise = torch.randn_like(clean)
            noisy = scheduler.add_noise(clean, noise, times)
            labels = torch.tensor([label for _, label in chosen], device=self.device)
            spacing = spacing_condition(self.config["spacing"], self.device).expand(count, 3)
            out = self.unet(noisy, timesteps=times, class_labels=labels, spacing_tensor=spacing)
            return F.mse_loss(out.float(), clean - noise)

        self._phase("unet", args.unet_steps, self.unet, args.lr, loss_of)

    def export(self, out: Path, counts: dict[str, int]) -> None:
        """Write the folder ``MaisiBackbone`` reads; adapters that are there stay (they fit only an unchanged autoencoder)."""
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        before = json.loads((out / "config.json").read_text()) if (out / "config.json").is_file() else {}
        kept = {k: before[k] for k in ("adapters", *ENTRIES) if k in before}
        config = {**self.config, "scale_factor": 1 / self.state.get("latent_std", 1.0), **kept}
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.autoencoder.state_dict().items()}, out / "autoencoder.safetensors")  # fmt: skip
        unet = self.average.module.state_dict()
        save_file({k: v.half().contiguous() for k, v in unet.items()}, out / "unet.safetensors")
        shutil.rmtree(out / "text", ignore_errors=True)
        self.text.save_pretrained(out / "text")
        self.tokenizer.save_pretrained(out / "text")
        summary = json.loads((out / "training.json").read_text()) if (out / "training.json").is_file() else {}
        log = self.state["log"]
        summary["backbone"] = {
            "commands": list(dict.fromkeys(self.state.get("commands", []))),
            "date": datetime.date.today().isoformat(),
            "hardware": f"{self.device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
            "volumes": counts,
            "parameters": {n: sum(p.numel() for p in getattr(self, n).parameters()) for n in ("autoencoder", "text", "unet")},
            "steps": {n: self.phases.steps(n) for n in ("vae", "text", "unet", "decoder")},
            "hours": round(self.state["seconds"] / 3600, 2),
            "loss": log[:: max(1, len(log) // 60)],
        }  # fmt: skip
        (out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        write_sums(out)
        print(f"wrote {out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--real", action="append", default=[], metavar="MODALITY=FOLDER", help="real volumes, images only"
    )
    parser.add_argument("--phantoms", type=int, default=400, help="phantoms to draw (default 400)")
    parser.add_argument("--lesions", type=float, default=0.2, help="share of the phantoms with a lesion (default 0.2)")
    parser.add_argument("--first-seed", type=int, default=100_000, help="of the phantoms")
    parser.add_argument("--work", default="runs/tumor", help="checkpoints; the run resumes from here")
    parser.add_argument("--out", default="bundle/models/tumor", help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--vae-batch", type=int, default=1)
    parser.add_argument("--vae-side", type=int, default=32)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--unet-steps", type=int, default=1500)
    parser.add_argument(
        "--unet-batch", type=int, default=2, help="latents of 16^3 in a batch; more of the smaller ones"
    )
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--decoder-side", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-4, help="of the UNet")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint and stop")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    args = parser.parse_args(argv)
    if args.export_only:
        require_checkpoint(Path(args.work))
    given = sys.argv[1:] if argv is None else argv
    args.shown = "python scripts/training/train_tumor_backbone.py " + " ".join(
        w.split("=")[0] + "=FOLDER" if w in args.real else w for w in given
    )
    trainer = Trainer(args)
    real = read_real(args.real, trainer.config)
    counts = {"phantoms": args.phantoms, "real": len(real)}
    if not args.export_only:
        material = [*draw_phantoms(args.phantoms, args.first_seed, args.lesions, trainer.config), *real]
        trainer.train_vae(material)
        trainer.train_text()
        trainer.train_unet(material)
        trainer.train_decoder(material)
    trainer.export(Path(args.out), counts)


if __name__ == "__main__":
    main()
