"""The MAISI-shaped backbone: loading both kinds of files, stages, latents, conditions."""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock

from tumor_model import fill_zeros, tiny_config
from zeroseg.backbones import maisi
from zeroseg.backbones.maisi import (
    COMPACT,
    MAISI_DDPM,
    MAISI_RFLOW,
    MaisiBackbone,
    build_autoencoder,
    build_unet,
    make_scheduler,
    record_stages,
    spacing_condition,
    stage_blocks,
)
from zeroseg.errors import WeightsError, ZeroSegError

SMALL = {
    "autoencoder": {"num_channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "norm_num_groups": 2},
    "unet": {
        "num_channels": [8, 8, 16],
        "attention_levels": [False, False, True],
        "num_head_channels": [0, 0, 8],
        "norm_num_groups": 4,
        "num_res_blocks": 1,
    },
    "window": [32, 32, 32],
}
"""The published shape with few channels."""


def refuses(message: str, error_type: type = WeightsError, **options) -> None:
    with pytest.raises(error_type, match=message) as error:
        MaisiBackbone(**{"device": "cpu", **options}).load()
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tiny_tumor_model, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_tumor_model, tmp_path / "model")


@pytest.fixture(scope="module", params=["rflow", "ddpm"])
def released(request, tmp_path_factory):
    """Randomly initialised files of a MAISI release, in the published key layout, with few channels."""
    folder = tmp_path_factory.mktemp(f"released-{request.param}")
    published = {"rflow": MAISI_RFLOW, "ddpm": MAISI_DDPM}[request.param]
    config = maisi._merged(published, SMALL)
    torch.manual_seed(1)
    autoencoder, unet = build_autoencoder(config), build_unet(config)
    fill_zeros(unet)
    torch.save(autoencoder.state_dict(), folder / "autoencoder_v1.pt")
    content = {"epoch": 3, "loss": 0.5, "num_train_timesteps": 1000, "scale_factor": torch.tensor(1.25)}
    torch.save({**content, "unet_state_dict": unet.state_dict()}, folder / "diff_unet.pt")
    return request.param, folder, autoencoder, unet


def files(folder) -> dict:
    return {"autoencoder": folder / "autoencoder_v1.pt", "unet": folder / "diff_unet.pt", "overrides": SMALL}


def test_released_files_load_by_the_published_keys(released):
    kind, folder, autoencoder, unet = released
    backbone = MaisiBackbone(**files(folder), kind=kind, device="cpu").load()
    assert backbone.scale_factor == 1.25
    assert backbone.size_multiple == 16 and backbone.factor == 4 and backbone.feature_channels == (4, 8, 8)
    volume = torch.rand(1, 1, 16, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.encode(volume), autoencoder.eval().encode(volume)[0] * 1.25)
        latent = torch.randn(1, 4, 4, 4, 8, generator=torch.Generator().manual_seed(0))
        condition = {"spacing_tensor": torch.tensor([[150.0, 150.0, 200.0]])}
        if kind == "rflow":
            condition["class_labels"] = torch.tensor([1])
        else:
            condition["top_region_index_tensor"] = torch.tensor([[0.0, 100, 0, 0]])
            condition["bottom_region_index_tensor"] = torch.tensor([[0.0, 0, 100, 0]])
        expected = unet.eval()(latent, timesteps=torch.tensor([321.0]), **condition)
        torch.testing.assert_close(backbone.predict(latent, 321, (1.5, 1.5, 2), "ct", (1, 2)), expected)
    described = backbone.describe()
    assert described["source"] == "diff_unet.pt" and described["scheduler"] == kind
    assert set(described["files"]) == {"autoencoder_v1.pt", "diff_unet.pt"}
    json.dumps(described)


def test_an_autoencoder_wrapped_and_parallel(released, tmp_path):
    kind, folder, autoencoder, _ = released
    state = {f"module.{k}": v for k, v in autoencoder.state_dict().items()}
    torch.save({"unet_state_dict": state}, tmp_path / "autoencoder_v1.pt")
    given = {**files(folder), "autoencoder": tmp_path / "autoencoder_v1.pt"}
    backbone = MaisiBackbone(**given, kind=kind, device="cpu").load()
    torch.testing.assert_close(backbone.autoencoder.state_dict(), autoencoder.state_dict())


def test_bad_released_files(released, tmp_path):
    kind, folder, _, unet = released
    given = {**files(folder), "kind": kind}
    refuses("does not exist: give the path", **{**given, "unet": tmp_path / "none.pt"})
    refuses("give both released files", ZeroSegError, autoencoder=given["autoencoder"])
    refuses("kind must be rflow or ddpm", ZeroSegError, **{**given, "kind": "flow"})
    refuses("does not fit its config", **{**given, "overrides": {**SMALL, "unet": {}}})
    torch.save({"unet_state_dict": unet.state_dict()}, tmp_path / "no_scale.pt")
    refuses("lacks scale_factor", **{**given, "unet": tmp_path / "no_scale.pt"})
    torch.save({"unet_state_dict": unet}, tmp_path / "pickle.pt")
    refuses("files that need code to be run are refused", **{**given, "unet": tmp_path / "pickle.pt"})
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    refuses("holds no state dict", **{**given, "autoencoder": tmp_path / "other.pt"})


def test_the_published_shapes_have_the_published_size():
    with torch.device("meta"):
        autoencoder, unet, ddpm = build_autoencoder(MAISI_RFLOW), build_unet(MAISI_RFLOW), build_unet(MAISI_DDPM)
    count = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (autoencoder, unet)]
    assert count == pytest.approx([20.9, 180.5], abs=0.06)
    assert hasattr(ddpm, "top_region_index_layer") and ddpm.num_class_embeds is None
    blocks = stage_blocks(autoencoder.encoder)
    assert [list(autoencoder.encoder.blocks).index(b) for b in blocks] == [2, 5, 8]


@pytest.mark.parametrize("config", [COMPACT, MAISI_RFLOW, MAISI_DDPM], ids=["compact", "rflow", "ddpm"])
def test_schedulers(config):
    scheduler = make_scheduler(config)
    assert scheduler.num_train_timesteps == 1000
    assert config["scheduler"]["kind"] in ("rflow", "ddpm")
    with pytest.raises(ZeroSegError, match="rflow or ddpm"):
        make_scheduler({"scheduler": {"kind": "edm"}})


def test_the_ddpm_schedule_is_the_published_one():
    betas = make_scheduler(MAISI_DDPM).betas
    assert float(betas[0]) == pytest.approx(0.0015) and float(betas[-1]) == pytest.approx(0.0195)


def test_features_are_three_stages_and_the_hooks_go(tiny_maisi):
    features = tiny_maisi.features(torch.rand(1, 1, 16, 32, 24))
    assert [tuple(f.shape) for f in features] == [(1, 4, 16, 32, 24), (1, 8, 8, 16, 12), (1, 8, 4, 8, 6)]
    assert all(f.dtype == torch.float32 and f.std() > 0 for f in features)
    assert not any(block._forward_hooks for block in tiny_maisi.autoencoder.encoder.blocks)


def test_hooks_go_when_the_pass_fails(tiny_maisi):
    encoder = tiny_maisi.autoencoder.encoder
    with pytest.raises(RuntimeError, match="stop"), record_stages(encoder) as features:
        assert sum(len(b._forward_hooks) for b in encoder.blocks) == 3
        assert all(isinstance(b, MaisiResBlock) for b in encoder.blocks if b._forward_hooks)
        raise RuntimeError("stop")
    assert features == [] and not any(b._forward_hooks for b in encoder.blocks)


def test_the_latent_is_the_scaled_mean(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scale_factor": 2.0}))
    doubled, plain = (
        MaisiBackbone(folder, device="cpu"),
        MaisiBackbone(folder, device="cpu", overrides={"scale_factor": 1}),
    )
    volume = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(doubled.encode(volume), 2 * plain.encode(volume))
    torch.testing.assert_close(doubled.encode(volume), doubled.encode(volume), rtol=0, atol=0)
    torch.testing.assert_close(doubled.decode(doubled.encode(volume)), plain.decode(plain.encode(volume)))
    assert doubled.decode(doubled.encode(volume)).shape == volume.shape


def test_windows_cover_large_volumes(tiny_maisi):
    assert tiny_maisi.window == (32, 32, 32)
    volume = torch.rand(1, 1, 48, 32, 40, generator=torch.Generator().manual_seed(0))
    latent = tiny_maisi.encode(volume)
    assert latent.shape == (1, 4, 12, 8, 10)
    decoded = tiny_maisi.decode(latent)
    assert decoded.shape == volume.shape and decoded.isfinite().all()
    whole = tiny_maisi.read(volume).latent
    assert torch.corrcoef(torch.stack([latent.flatten(), whole.flatten()]))[0, 1] > 0.9


def test_conditions_reach_the_unet(tiny_maisi):
    latent = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = tiny_maisi.predict(latent, 500, (3, 3, 3), "ct")
    assert plain.shape == latent.shape and plain.dtype == torch.float32
    for other in (
        tiny_maisi.predict(latent, 100, (3, 3, 3), "ct"),
        tiny_maisi.predict(latent, 500, (1, 1, 5), "ct"),
        tiny_maisi.predict(latent, 500, (3, 3, 3), "mr"),
    ):
        assert not torch.equal(plain, other)
    torch.testing.assert_close(spacing_condition((0.5, 1, 2)), torch.tensor([[50.0, 100.0, 200.0]]))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16, 15), (1, 2, 16, 16, 16), (1, 16, 16, 16), (1, 1, 16, 0, 16)])
def test_volumes_of_another_shape_are_refused(tiny_maisi, shape):
    with pytest.raises(ZeroSegError, match="sides multiple of 8"):
        tiny_maisi.encode(torch.zeros(shape))


def test_bad_folders(folder, tmp_path):
    refuses("holds no readable config.json", source=tmp_path / "none")
    refuses("dtype must be one of", ZeroSegError, source=folder, dtype="int8")
    refuses("fp16 needs a GPU", ZeroSegError, source=folder, dtype="fp16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    refuses("not valid JSON", source=folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "scheduler"}))
    refuses("lacks scheduler", source=folder)
    (folder / "config.json").write_text(json.dumps(config))
    refuses(
        "the scheduler of model cannot be built", source=folder, overrides={"scheduler": {"kind": "rflow", "beta": 1}}
    )
    wide = copy.deepcopy(config)
    wide["unet"]["num_channels"] = [16, 16]
    (folder / "config.json").write_text(json.dumps(wide))
    refuses("the unet of model does not fit its config", source=folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "unet.safetensors").write_bytes(b"no tensors")
    refuses("cannot read unet.safetensors", source=folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  autoencoder.safetensors\n")
    refuses("does not match its SHA-256", source=folder)
    (folder / "SHA256SUMS").unlink()
    (folder / "unet.safetensors").unlink()
    refuses("lacks unet.safetensors", source=folder)


def test_untrained_is_another_model_and_says_so(tiny_tumor_model, tiny_maisi):
    untrained = MaisiBackbone(tiny_tumor_model, device="cpu", untrained=True).load()
    again = MaisiBackbone(tiny_tumor_model, device="cpu", untrained=True).load()
    volume = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(untrained.encode(volume), again.encode(volume))
    assert not torch.allclose(untrained.encode(volume), tiny_maisi.encode(volume))
    assert untrained.describe()["untrained"] and untrained.fingerprint != tiny_maisi.fingerprint


def test_building_leaves_the_random_state_alone(tiny_tumor_model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    MaisiBackbone(tiny_tumor_model, device="cpu").load()
    assert torch.equal(torch.rand(1), expected)


def test_threads_load_once(tiny_tumor_model, monkeypatch):
    loads = []
    original = MaisiBackbone._from_folder
    monkeypatch.setattr(MaisiBackbone, "_from_folder", lambda self: (loads.append(1), original(self))[1])
    backbone = MaisiBackbone(tiny_tumor_model, device="cpu")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: backbone.load(), range(4)))
    assert len(loads) == 1


def test_half_precision_states_and_bf16(folder, tiny_maisi):
    from safetensors.torch import load_file, save_file

    for name in ("autoencoder", "unet"):
        path = folder / f"{name}.safetensors"
        save_file({k: v.half() for k, v in load_file(path).items()}, path)
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    latent = tiny_maisi.encode(volume)
    half = MaisiBackbone(folder, device="cpu").encode(volume)
    torch.testing.assert_close(half, latent, rtol=0.02, atol=0.02)
    bf16 = MaisiBackbone(folder, device="cpu", dtype="bf16").encode(volume)
    assert bf16.dtype == torch.float32 and (bf16 - latent).abs().mean() < 0.1 * latent.std()


def test_the_tiny_config_is_the_compact_one_but_smaller():
    assert set(tiny_config()) == set(COMPACT)
