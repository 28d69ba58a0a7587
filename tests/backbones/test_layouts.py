"""Real files in all their layouts: each gives exactly what it holds, or is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from published import KINDS, as_hub_repository, change_tensors, save_stable_diffusion
from zeroseg.backbones import StableDiffusionBackbone, record
from zeroseg.errors import WeightsError
from zeroseg.interaction.inferer import AttentionSegmentationInferer

UNET = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def tokenizer(tiny_pipeline):
    return CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request, tokenizer, tmp_path_factory):
    """(kind, folder) of each shape."""
    return request.param, save_stable_diffusion(tmp_path_factory.mktemp("sd") / request.param, request.param, tokenizer)


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    """A copy of the tiny 1.x pipeline to change."""
    return shutil.copytree(tiny_pipeline, tmp_path / "pipeline")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuses(folder: Path, message: str, **options) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        StableDiffusionBackbone(folder, device="cpu", **options).load()
    assert "\n" not in str(error.value)


def states(backbone) -> dict[str, torch.Tensor]:
    networks = {"unet": backbone.unet, "vae": backbone.vae}
    networks |= {f"text{n}": encoder for n, encoder in enumerate(backbone.text_encoders)}
    return {f"{part}.{k}": v for part, network in networks.items() for k, v in network.state_dict().items()}


# Layouts that hold the same ------------------------------------------------------------------------------------------


def _sharded(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    (folder / "unet" / f"{UNET}.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1


def _sharded_variant(folder: Path) -> None:
    _sharded(folder)
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(UNET, f"{UNET}.fp16")))


def _rename(folder: Path, file: str, rename) -> None:
    change_tensors(folder / file, lambda tensors: {rename(k): v for k, v in tensors.items()})


def _transformers_4(folder: Path) -> None:
    _rename(folder, "text_encoder/model.safetensors", lambda k: "text_model." + k.removeprefix("text_model."))


def _transformers_5(folder: Path) -> None:
    _rename(folder, "text_encoder/model.safetensors", lambda k: k.removeprefix("text_model."))


def _position_ids(folder: Path) -> None:
    _transformers_4(folder)
    ids = torch.arange(32)[None]
    change_tensors(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: {**tensors, "text_model.embeddings.position_ids": ids},
    )


def _old_attention_names(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        return key

    _rename(folder, f"vae/{UNET}.safetensors", rename)


SAME = {
    "as it is saved": lambda folder: None,
    "in shards": _sharded,
    "in shards of the only copy": _sharded_variant,
    "as a repository of the hub": as_hub_repository,
    "by transformers 4": _transformers_4,
    "by transformers 5": _transformers_5,
    "with position ids": _position_ids,
    "with an autoencoder from before diffusers 0.13": _old_attention_names,
}


@pytest.mark.parametrize("layout", SAME)
def test_every_layout_gives_the_same_model(folder, tiny_backbone, layout):
    SAME[layout](folder)
    backbone = StableDiffusionBackbone(folder, device="cpu").load()
    expected = states(tiny_backbone)
    found = states(backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert {name.split("/")[0] for name in backbone.weights} == {"unet", "vae", "text_encoder"}
    if layout == "as a repository of the hub":
        assert backbone.fingerprint == tiny_backbone.fingerprint, "the rest is neither read nor hashed"


def test_a_variant_is_what_is_asked_for(folder, tiny_backbone):
    as_hub_repository(folder)
    half = StableDiffusionBackbone(folder, device="cpu", variant="fp16").load()
    assert set(half.weights) == {f"{p}/{UNET}.fp16.safetensors" for p in ("unet", "vae")} | {
        "text_encoder/model.fp16.safetensors"
    }
    weight = tiny_backbone.unet.conv_in.weight
    assert half.unet.dtype == torch.float32 and torch.equal(half.unet.conv_in.weight, weight.half().float())
    assert half.describe()["variant"] == "fp16"
    refuses(folder, "vae holds no non_ema copy of its weights .there is: fp16, the plain one", variant="non_ema")
    (folder / "vae" / f"{UNET}.safetensors").rename(folder / "vae" / f"{UNET}.bf16.safetensors")
    refuses(folder, "vae holds no plain copy of its weights .there is: bf16, fp16")


@pytest.mark.slow
def test_files_may_change_once_they_are_read(folder, tiny_backbone):
    backbone = StableDiffusionBackbone(folder, device="cpu").load()
    for file in folder.rglob("*.safetensors"):
        with open(file, "r+b") as stream:
            stream.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(v, states(tiny_backbone)[k]) for k, v in states(backbone).items())


# What is refused -------------------------------------------------------------------------------------------------------


def without(*patterns: str):
    return lambda tensors: {k: v for k, v in tensors.items() if not any(p in k for p in patterns)}


WRONG = {
    "a vae without its encoder": (f"vae/{UNET}.safetensors", without("encoder."), "the vae of .* lacks .* encoder."),
    "text of another model": (
        "text_encoder/model.safetensors",
        lambda tensors: {f"other.{k}": v for k, v in tensors.items()},
        "the text_encoder of .* lacks .* of the weights it needs",
    ),
    "a unet that lacks a weight": (
        f"unet/{UNET}.safetensors",
        without("mid_block.resnets.0.conv1.bias"),
        "the unet of .* lacks 1 ",
    ),
    "a unet with a weight more": (
        f"unet/{UNET}.safetensors",
        lambda tensors: {**tensors, "controlnet.weight": torch.zeros(1)},
        "the unet of .* holds 1 weights of something else .controlnet.weight",
    ),
    "a unet of another width": (
        f"unet/{UNET}.safetensors",
        lambda tensors: {**tensors, "conv_in.bias": torch.zeros(17)},
        "the unet of .* holds 1 weights of another shape .conv_in.bias",
    ),
    "a safetensors file with no tensor": (f"unet/{UNET}.safetensors", lambda tensors: {}, "the unet of .* lacks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_keys_that_do_not_fit_are_refused(folder, what):
    file, change, message = WRONG[what]
    change_tensors(folder / file, change)
    refuses(folder, message)


def test_a_tokenizer_of_another_size_is_refused(folder):
    edit_json(folder / "text_encoder" / "config.json", vocab_size=99)
    table = "embeddings.token_embedding.weight"
    change_tensors(
        folder / "text_encoder" / "model.safetensors",
        lambda tensors: {k: v[:1].repeat(99, 1) if k.endswith(table) else v for k, v in tensors.items()},
    )
    refuses(folder, "a tokenizer of pipeline knows [0-9]+ tokens, its text encoder 99: copy the folders tokenizer")


def test_a_pipeline_without_its_vocabulary_is_refused(folder):
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    refuses(folder, "a tokenizer of pipeline knows 2 tokens")


def test_a_missing_shard(folder):
    _sharded(folder)
    next((folder / "unet").glob("*-00002-of-*.safetensors")).unlink()
    refuses(folder, "unet lacks a shard of its weights")


SETTINGS = {
    "a word for a number": ("text_encoder/config.json", {"hidden_size": "16"}, "cannot load the backbone in pipeline"),
    "a unet of no size": ("unet/config.json", {"sample_size": None}, "the sample_size of the unet of .* not None"),
    "a vae of no scale": ("vae/config.json", {"scaling_factor": None}, "the scaling_factor of the vae of .* not None"),
    "a list for a unet": ("unet/config.json", None, "the config of the unet of pipeline is no JSON object"),
    "a list for a schedule": (
        "scheduler/scheduler_config.json",
        None,
        "the config of the scheduler of pipeline is no JSON object",
    ),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_wrong_settings_are_one_line(folder, what):
    file, changes, message = SETTINGS[what]
    if changes is None:
        (folder / file).write_text("[]")
    else:
        edit_json(folder / file, **changes)
    refuses(folder, message)


PIPELINES = {
    "a refiner of XL": (
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
        "without text_encoder",
    ),
    "Stable Diffusion 3": (
        {"_class_name": "StableDiffusion3Pipeline", "unet": [None, None]},
        "StableDiffusion3Pipeline without unet",
    ),
    "another autoencoder": ({"vae": ["diffusers", "AutoencoderTiny"]}, "the vae of pipeline is a AutoencoderTiny"),
    "another text encoder": (
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        "is a T5EncoderModel, and only CLIP",
    ),
    "half of XL": (
        {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        "one of text_encoder_2 and tokenizer_2",
    ),
}


@pytest.mark.parametrize("what", PIPELINES)
def test_other_pipelines_are_refused(folder, what):
    changes, message = PIPELINES[what]
    edit_json(folder / "model_index.json", **changes)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("1.5", {"in_channels": 9}, "reads 9 channels, its vae gives 4: a model for inpainting"),
        ("1.5", {"cross_attention_dim": 24}, "reads text of 24 numbers, its text encoders give 16"),
        ("1.5", {"class_embed_type": "timestep"}, "asks for conditions"),
        ("xl", {"addition_embed_type": None}, "asks for conditions"),
    ],
)
def test_networks_that_ask_for_more_are_refused(tokenizer, tmp_path, kind, options, message):
    refuses(save_stable_diffusion(tmp_path / "other", kind, tokenizer, **options), message)


# The whole path, against diffusers' own ---------------------------------------------------------------------------------


def diffusers_attention(pipe, latents, timestep, dtype) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Output of a pipeline's UNet for an image and the empty prompt, and the head mean of the scores its own processors work
    with, per number of tokens, averaged over layers."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    found: dict[int, list[torch.Tensor]] = {}
    original = Attention.get_attention_scores

    def look(attn, query, key, mask=None):
        scores = original(attn, query, key, mask)
        if scores.shape[-1] == scores.shape[-2]:
            found.setdefault(scores.shape[-1], []).append(scores.float().mean(0))
        return scores

    pipe.unet.set_attn_processor(AttnProcessor())
    Attention.get_attention_scores = look
    try:
        with torch.inference_mode():
            if hasattr(pipe, "text_encoder_2"):
                context, _, pooled, _ = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
                if pipe.config.force_zeros_for_empty_prompt:
                    context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
                size = latents.shape[-1] * 8
                times = pipe._get_add_time_ids((size, size), (0, 0), (size, size), dtype, 24)
                more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
            else:
                context = pipe.encode_prompt("", "cpu", 1, False)[0]
                more = {}
            output = pipe.unet(latents, timestep, encoder_hidden_states=context.to(dtype), **more).sample
    finally:
        Attention.get_attention_scores = original
    return output, {tokens: torch.stack(maps).mean(0) for tokens, maps in found.items()}


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 4e-3)])
def test_recorded_attention_is_that_of_diffusers(pipeline, dtype, bound):
    """On the same weights and image: fp32 within 1e-6 of a probability, bf16 within 4e-3 (its own step near 1)."""
    from diffusers import DiffusionPipeline

    kind, folder = pipeline
    backbone = StableDiffusionBackbone(folder, device="cpu", dtype=dtype).load()
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=backbone.dtype, low_cpu_mem_usage=False)
    side = backbone.image_size
    latents = backbone.encode_image(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    context = backbone.embed_text([""])
    recorded = backbone.read(latents, 300, context).self_attention
    output, expected = diffusers_attention(pipe, latents, 300, backbone.dtype)
    # XL has no attention at full size: its finest is half of the latent's grid, 64 a side at 1024 pixels.
    sides = {"1.5": [2, 4, 8, 16], "2.1": [3, 6, 12, 24], "xl": [4, 8]}[kind]
    assert sorted(recorded) == sorted(expected) == [side**2 for side in sides]
    for tokens, attention in recorded.items():
        assert (attention[0] - expected[tokens]).abs().max() <= bound, tokens
    plain = backbone.denoise(latents, 300, context)
    torch.testing.assert_close(plain.float(), output.float(), atol=10 * bound, rtol=10 * bound)


def test_attention_slicing_changes_nothing(pipeline):
    _, folder = pipeline
    backbone = StableDiffusionBackbone(folder, device="cpu").load()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    read = partial(backbone.read, latents, 300, backbone.embed_text(["cell"]))
    whole = read().self_attention
    backbone.unet.set_attention_slice(1)
    with record(backbone.unet):
        pass
    for tokens, attention in read().self_attention.items():
        torch.testing.assert_close(attention, whole[tokens])


def test_the_whole_pipeline_runs_on_every_shape(pipeline):
    kind, folder = pipeline
    backbone = StableDiffusionBackbone(folder, device="cpu")
    inferer = AttentionSegmentationInferer(backbone, max_segments=5)
    image = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))
    encoded = inferer.encode(image)
    tokens = backbone.image_size // backbone.vae_factor // backbone.attention_factor
    assert encoded.attention.shape == (tokens**2,) * 2
    assert backbone.attention_factor == (2 if kind == "xl" else 1)
    for prompt in ({"select": "segments"}, {"points": [[20, 20]]}, {"text": "chest x-ray"}):
        assert inferer.predict(encoded, **prompt).labels.shape == (70, 90)


@pytest.mark.slow
def test_xl_text_is_that_of_its_own_pipeline(tokenizer, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder = save_stable_diffusion(tmp_path / "xl", "xl", tokenizer)
    backbone = StableDiffusionBackbone(folder, device="cpu").load()
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    words = ["lungs", "blood smear with white blood cell"]
    context = backbone.embed_text([*words, ""])
    with torch.inference_mode():
        expected, _, pooled, _ = pipe.encode_prompt(words, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(context[:2, :-1], expected)
    torch.testing.assert_close(context[:2, -1, :24], pooled)
    assert not context[2].any(), "force_zeros_for_empty_prompt, as the pipeline takes an empty prompt"
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert StableDiffusionBackbone(folder, device="cpu").embed_text([""]).any()


def test_2_1_predicts_velocity(tokenizer, tmp_path):
    backbone = StableDiffusionBackbone(save_stable_diffusion(tmp_path / "2.1", "2.1", tokenizer), device="cpu").load()
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    context, alpha = backbone.embed_text([""]), backbone.alphas[400]
    velocity = backbone.denoise(latents, 400, context)
    expected = alpha.sqrt() * velocity + (1 - alpha).sqrt() * latents
    torch.testing.assert_close(backbone.predict_noise(latents, 400, context), expected)


# The hub ---------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as its client asks for: a repository's description, and its files with ranges."""

    folder: Path
    asked: list[str]
    cut: str | None = None

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/name"):
            files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
            names = {p.relative_to(self.folder).as_posix(): p.stat().st_size for p in files}
            if "/tree/" in path:
                reply = [{"type": "file", "path": n, "size": s, "oid": f"{n}-{s}"} for n, s in names.items()]
            else:
                siblings = [{"rfilename": n, "size": s} for n, s in names.items()]
                card = {"license": "creativeml-openrail-m"}
                reply = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "cardData": card}
            return self.answer(200, json.dumps(reply).encode(), {"Content-Type": "application/json"}, body)
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        file = self.folder / name
        if name == path or not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        content, wanted = file.read_bytes(), self.headers.get("Range")
        headers = {"ETag": f'"{abs(hash(name))}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and wanted != "bytes=0-0" else 0
        if body:
            self.asked.append(f"{name} from {first}")
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.answer(206 if first else 200, content[first:], headers, body, short=name == self.cut)
        return None

    def answer(self, status: int, content: bytes, headers: dict, body: bool, short: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if short else content)
        if short:
            self.close_connection = True


@pytest.fixture
def hub(folder):
    """A hub on this machine that holds one repository; (url, handler)."""
    handler = type("OneRepository", (Hub,), {"folder": as_hub_repository(folder), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def fetch(url: str, home: Path, **options) -> subprocess.CompletedProcess:
    code = (
        "import sys\nfrom zeroseg.backbones import StableDiffusionBackbone\nfrom zeroseg.errors import ZeroSegError\n"
        f"backbone = StableDiffusionBackbone('owner/name', revision='main', device='cpu', **{options!r})\n"
        "try:\n    print(sorted(backbone.load().weights), backbone.name)\n"
        "except ZeroSegError as error:\n    sys.exit(str(error))"
    )
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings})


@pytest.mark.slow
def test_only_what_is_needed_is_fetched_and_its_size_is_said(hub, tmp_path):
    url, handler = hub
    done = fetch(url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    fetched = {line.split(" from ")[0] for line in handler.asked}
    weights = {n for n in fetched if n.endswith(".safetensors")}
    assert weights == {f"unet/{UNET}.safetensors", f"vae/{UNET}.safetensors", "text_encoder/model.safetensors"}
    assert not any("safety_checker" in n or n.endswith((".bin", ".ckpt")) for n in fetched)
    assert "fetching owner/name: 0.00 GB in" in done.stderr and "creativeml-openrail-m" in done.stderr
    assert "it/s]" in done.stderr or "B/s]" in done.stderr, "a progress bar"
    assert "owner/name" in done.stdout, "a manifest names the repository"
    count = len(handler.asked)
    again = fetch(url, tmp_path / "home")
    assert again.returncode == 0 and "fetching" not in again.stderr
    assert not [line for line in handler.asked[count:] if ".safetensors" in line], "nothing twice"


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on(hub, tmp_path):
    url, handler = hub
    handler.cut = f"unet/{UNET}.fp16.safetensors"
    broken = fetch(url, tmp_path / "home", variant="fp16")
    assert broken.returncode == 1 and "start again, it goes on from there" in broken.stderr.splitlines()[-1]
    whole = {p.name for p in (tmp_path / "home").rglob("*") if p.is_symlink() and p.suffix == ".safetensors"}
    handler.cut, handler.asked[:] = None, []
    done = fetch(url, tmp_path / "home", variant="fp16")
    assert done.returncode == 0, done.stderr
    assert all(".fp16." in n for n in done.stdout.split("]")[0].split("'")[1::2])
    # Within a file the hub's client goes on from its last whole chunk of 10 MB; this file is smaller than one.
    assert len([line for line in handler.asked if f"unet/{UNET}.fp16" in line]) == 1
    again = [line for line in handler.asked if any(f"/{name}" in line for name in whole)]
    assert not [line for line in again if "unet/" not in line and ".safetensors" in line], (
        "what was whole is not fetched again"
    )
