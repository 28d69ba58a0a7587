"""Loading a Stable-Diffusion-shaped folder, refusing others, and the frozen model's arithmetic."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from zeroseg.backbones import StableDiffusionBackbone, pick_device
from zeroseg.backbones.diffusion import KEPT_TEXTS
from zeroseg.backbones.weights import write_sums
from zeroseg.errors import WeightsError, ZeroSegError


@pytest.fixture
def pipeline(tiny_pipeline, tmp_path):
    """A copy of the tiny pipeline to damage."""
    return shutil.copytree(tiny_pipeline, tmp_path / "pipeline")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuses(folder, message: str, kind: type = WeightsError, **options) -> None:
    with pytest.raises(kind, match=message) as error:
        StableDiffusionBackbone(folder, **{"device": "cpu", **options}).load()
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path):
    refuses(tmp_path / "nowhere", "neither an existing folder nor a hub id")


def test_a_folder_that_is_no_pipeline(tmp_path):
    refuses(tmp_path, "no readable model_index.json")
    (tmp_path / "model_index.json").write_text("[]")
    refuses(tmp_path, "no readable model_index.json")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part(pipeline, part):
    shutil.rmtree(pipeline / part)
    refuses(pipeline, f"lacks the folder {part}/")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(pipeline, part):
    for file in (pipeline / part).glob("*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    refuses(pipeline, f"{part} holds no .safetensors file: pickle weights are refused")


def test_damaged_weights(pipeline):
    file = next((pipeline / "unet").glob("*.safetensors"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    write_sums(pipeline)
    assert StableDiffusionBackbone(pipeline, device="cpu").load().weights[f"unet/{file.name}"] == digest
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refuses(pipeline, "does not match its SHA-256")
    (pipeline / "SHA256SUMS").unlink()
    file.write_bytes(data[:100])
    refuses(pipeline, "cannot read unet/.* in pipeline")


def test_a_hub_id_needs_a_revision():
    refuses("owner/name", "name a revision")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu0"}, "unknown device 'gpu0': use auto, cpu"),
        ({"device": "meta"}, "not available on this machine"),
        ({"dtype": "fp64"}, "unknown dtype 'fp64': use one of fp32, bf16, fp16"),
        ({"dtype": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_device_and_dtype_are_checked(tiny_pipeline, options, message):
    refuses(tiny_pipeline, message, ZeroSegError, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ZeroSegError, match="'cuda' is not available"):
        pick_device("cuda")
    assert pick_device("auto").type in ("cpu", "mps")


def test_nothing_is_read_before_it_is_needed():
    backbone = StableDiffusionBackbone("nowhere")
    assert not hasattr(backbone, "unet")
    with pytest.raises(WeightsError):
        backbone.embed_text(["cells"])


def test_threads_that_ask_together_load_once(tiny_pipeline):
    class Counting(StableDiffusionBackbone):
        loads = 0

        def _load(self):
            self.loads += 1
            super()._load()

    backbone = Counting(tiny_pipeline, device="cpu")
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda _: backbone.image_size, range(4)))
    assert sizes == [128] * 4 and backbone.loads == 1


def test_threads_do_not_read_each_others_attention(tiny_backbone, latents):
    context = tiny_backbone.embed_text([""])
    images = [latents + i for i in range(4)]

    def read(x):
        return tiny_backbone.read(x, 300, context).self_attention[64]

    alone = [read(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(read, images))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.isclose(alone[0], alone[1]).all()


def test_shapes_and_sizes(tiny_backbone):
    assert (tiny_backbone.image_size, tiny_backbone.vae_factor, tiny_backbone.size_multiple) == (128, 8, 64)
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    codes = tiny_backbone.encode_image(images)
    assert codes.shape == (2, 4, 8, 16)
    assert torch.equal(codes, tiny_backbone.encode_image(images)), "the posterior's mean, not a sample"
    context = tiny_backbone.embed_text(["chest x-ray", "", "word " * 200])
    assert context.shape == (3, 32, 16)
    assert not (codes.requires_grad or context.requires_grad)


def test_words_are_embedded_once(tiny_pipeline):
    backbone = StableDiffusionBackbone(tiny_pipeline, device="cpu").load()
    runs = []
    backbone.text_encoders[0].register_forward_hook(lambda *_: runs.append(1))
    first = backbone.embed_text(["cells"])
    expected = first.clone()
    with torch.inference_mode():
        first.zero_()
    assert torch.equal(backbone.embed_text(["cells"]), expected), "what a caller does to it is the caller's"
    assert len(runs) == 1
    assert not torch.equal(backbone.embed_text(["lungs"]), expected)
    for number in range(KEPT_TEXTS - 1):
        backbone.embed_text([f"image {number}"])
    assert len(runs) == KEPT_TEXTS + 1
    backbone.embed_text(["lungs"])
    assert len(runs) == KEPT_TEXTS + 1
    backbone.embed_text(["cells"])
    assert len(runs) == KEPT_TEXTS + 2, "only the last ones are kept"


def test_tokens_are_counted_while_nobody_embeds(tiny_pipeline):
    backbone = StableDiffusionBackbone(tiny_pipeline, device="cpu").load()
    assert backbone.count_tokens("") == 2
    assert backbone.count_tokens("word " * 200) == backbone.tokenizer.model_max_length
    with ThreadPoolExecutor(1) as pool:
        with backbone._lock:
            counted = pool.submit(backbone.count_tokens, "")
            with pytest.raises(TimeoutError):
                counted.result(timeout=0.05)
        assert counted.result() == 2


def test_timesteps_outside_the_schedule(tiny_backbone, latents):
    context = tiny_backbone.embed_text([""])
    for step in (-1, 1000):
        with pytest.raises(ZeroSegError, match=r"timestep -?\d+ is outside 0..999"):
            tiny_backbone.denoise(latents, step, context)
        with pytest.raises(ZeroSegError, match=r"timestep -?\d+ is outside 0..999"):
            tiny_backbone.read(latents, step, context, noise_draws=1)


def test_noise_draws(tiny_backbone, latents):
    context = tiny_backbone.embed_text([""])

    def read(draws: int, seed: int = 0) -> torch.Tensor:
        return tiny_backbone.read(latents, 300, context, noise_draws=draws, seed=seed).self_attention[64]

    assert torch.equal(read(2), read(2)), "the same seed draws the same noise"
    for other in (read(2, seed=1), read(1), read(0)):
        assert not torch.equal(read(2), other)
    assert torch.equal(read(0, seed=0), read(0, seed=1)), "the clean latent needs no noise"
    torch.testing.assert_close(read(2).sum(-1), torch.ones(1, 64))
    with pytest.raises(ZeroSegError, match="noise_draws"):
        read(-1)


def test_forward_process_is_that_of_the_scheduler(tiny_backbone, latents):
    noise = torch.ones_like(latents)
    expected = tiny_backbone.schedule.add_noise(latents, noise, torch.tensor([700]))
    torch.testing.assert_close(tiny_backbone.add_noise(latents, 700, noise), expected)


class Oracle(torch.nn.Module):
    """A UNet that knows the answer."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, latents, timestep, encoder_hidden_states):
        return SimpleNamespace(sample=self.answer)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("step", [0, 300, 999])
def test_noise_is_recovered_whatever_the_model_predicts(pipeline, latents, prediction, step):
    edit_json(pipeline / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    backbone = StableDiffusionBackbone(pipeline, device="cpu").load()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    velocity = backbone.schedule.get_velocity(latents, noise, torch.tensor([step]))
    backbone.unet = Oracle(noise if prediction == "epsilon" else velocity)
    predicted = backbone.predict_noise(backbone.add_noise(latents, step, noise), step, backbone.embed_text([""]))
    torch.testing.assert_close(predicted, noise, atol=1e-5, rtol=1e-4)


def test_untrained_control(tiny_pipeline, tiny_backbone, latents):
    state = torch.random.get_rng_state()
    first, second = (StableDiffusionBackbone(tiny_pipeline, device="cpu", untrained=True).load() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are untouched"
    context = tiny_backbone.embed_text(["cells"])
    one, two, stored = (b.denoise(latents, 300, context) for b in (first, second, tiny_backbone))
    assert torch.equal(one, two), "the control is the same every time"
    assert not torch.allclose(one, stored)
    assert not torch.allclose(first.embed_text(["cells"]), context)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.encode_image(image), tiny_backbone.encode_image(image)), "the autoencoder stays"
    assert first.fingerprint == tiny_backbone.fingerprint + "-untrained"
    assert first.describe()["untrained"] and not tiny_backbone.describe()["untrained"]


def test_bfloat16(tiny_pipeline, latents):
    backbone = StableDiffusionBackbone(tiny_pipeline, device="cpu", dtype="bf16").load()
    attention = backbone.read(latents, 300, backbone.embed_text([""])).self_attention[64]
    assert backbone.unet.dtype == torch.bfloat16
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 64), atol=1e-2, rtol=0)


def test_description_is_fit_for_a_manifest(tiny_backbone):
    described = json.loads(json.dumps(tiny_backbone.describe()))
    assert described["source"] == "pipeline", "the folder's name, not where it lies"
    assert len(described["sha256"]) == 64
    assert set(described["files"]) >= {"unet/diffusion_pytorch_model.safetensors"}
