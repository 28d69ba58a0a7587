"""The MAISI-shaped backbone: loading both kinds of files, stages, latents, conditions."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiResBlock
from monai.data import MetaTensor

from published import save_release
from tumor_model import tiny_config
from zeroseg.backbones import maisi
from zeroseg.backbones.maisi import (
    CHECKPOINT_GLOBALS,
    COMPACT,
    MAISI_DDPM,
    MAISI_RFLOW,
    RELEASES,
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


@pytest.fixture(scope="module", params=list(RELEASES))
def released(request, tmp_path_factory):
    """Files of a MAISI release as NVIDIA's trainers write them, with random weights and few channels."""
    release = save_release(tmp_path_factory.mktemp(request.param), request.param, SMALL)
    return request.param, release


def files(release) -> dict:
    return {"autoencoder": release.autoencoder_file, "unet": release.unet_file, "overrides": SMALL}


def test_released_files_load_by_the_published_keys(released):
    kind, release = released
    backbone = MaisiBackbone(**files(release), device="cpu").load()
    assert backbone.release == kind and backbone.scale_factor == pytest.approx(release.scale_factor)
    assert backbone.size_multiple == 16 and backbone.factor == 4 and backbone.feature_channels == (4, 8, 8)
    volume = torch.rand(1, 1, 16, 16, 32, generator=torch.Generator().manual_seed(0))
    modality = "ct" if kind.endswith("ct") else "mr_t1"
    with torch.inference_mode():
        encoded = release.autoencoder.encode(volume)[0] * release.scale_factor
        # The backbone's convolutions are oneDNN's, the published network's are torch's choice: equal but for rounding, which guidance enlarges.
        torch.testing.assert_close(backbone.encode(volume), encoded, rtol=1e-3, atol=1e-4)
        latent = torch.randn(1, 4, 4, 4, 8, generator=torch.Generator().manual_seed(0))
        condition = {"spacing_tensor": torch.tensor([[150.0, 150.0, 200.0]])}
        if kind.startswith("rflow"):
            condition["class_labels"] = torch.tensor([1 if modality == "ct" else 9])
        else:
            condition["top_region_index_tensor"] = torch.tensor([[0.0, 100, 0, 0]])
            condition["bottom_region_index_tensor"] = torch.tensor([[0.0, 0, 100, 0]])
        expected = release.unet(latent, timesteps=torch.tensor([321.0]), **condition)
        if kind.startswith("rflow-mr"):  # the recipe of NVIDIA's inference script, with its shipped guidance
            unknown = release.unet(
                latent, timesteps=torch.tensor([321.0]), **{**condition, "class_labels": torch.tensor([0])}
            )
            expected = unknown + {"rflow-mr": 15.0, "rflow-mr-brain": 2.0}[kind] * (expected - unknown)
        found = backbone.predict(latent, 321, (1.5, 1.5, 2), modality, (1, 2))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    described = backbone.describe()
    assert described["source"] == release.unet_file.name and described["release"] == kind
    assert set(described["files"]) == {release.autoencoder_file.name, release.unet_file.name}
    json.dumps(described)


def test_the_scale_factor_is_a_metatensor_as_the_trainer_leaves_it(released):
    _, release = released
    with pytest.raises(pickle.UnpicklingError, match="TraceKeys"):
        torch.load(release.unet_file, weights_only=True)
    factor = maisi.read_checkpoint(release.unet_file)["scale_factor"]
    assert isinstance(factor, MetaTensor) and factor.meta
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(release.unet_file)
    assert set(asked) <= {f"{c.__module__}.{c.__qualname__}" for c in CHECKPOINT_GLOBALS}
    before = set(torch.serialization.get_safe_globals())
    maisi.read_checkpoint(release.unet_file)
    assert set(torch.serialization.get_safe_globals()) == before, (
        "the scope ends with the file, and takes nothing with it"
    )


def test_steps_and_conditions_are_those_of_the_release(released):
    kind, release = released
    backbone = MaisiBackbone(**files(release), device="cpu").load()
    usual = 1000 if kind == "ddpm-ct" else 30
    extent = (400, 400, 300)
    assert backbone.steps == usual and backbone.whole_latent and not backbone.mr_clip
    own = "ct" if kind.endswith("ct") else "mr"
    assert backbone.doubts(own, usual, extent) == []
    (few,) = backbone.doubts(own, 10, extent)
    assert f"{usual} steps, and 10 were asked for" in few and ("needs" in few) is (kind == "ddpm-ct")
    (foreign,) = backbone.doubts("pet", usual, extent)
    assert "was not trained on pet" in foreign and ("class 0" in foreign) is (kind != "ddpm-ct")
    (small,) = backbone.doubts(own, usual, (400, 400, 60))
    assert "the field of view is 400 x 400 x 60 mm" in small
    if kind.endswith("ct"):
        assert "was not trained on mr" in backbone.doubts("mr", usual, extent)[0], (
            "class 8 of a CT release is untrained"
        )


def test_guidance_is_a_second_pass(released):
    kind, release = released
    backbone = MaisiBackbone(**files(release), device="cpu").load()
    latent = torch.randn(1, 4, 4, 4, 8, generator=torch.Generator().manual_seed(0))

    def out(modality: str, guidance: float) -> torch.Tensor:
        return backbone.predict(latent, 321, (1.5, 1.5, 2), modality, guidance=guidance)

    own = "ct" if kind.endswith("ct") else "mr"
    torch.testing.assert_close(out(own, 1.0), out(own, 0.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out("pet", 5.0), out("pet", 0.0)), "nothing to guide to"
    assert torch.allclose(out(own, 3.0), out(own, 0.0)) is (kind == "ddpm-ct")


def test_an_autoencoder_wrapped_and_parallel(released, tmp_path):
    _, release = released
    state = {f"module.{k}": v for k, v in release.autoencoder.state_dict().items()}
    torch.save({"unet_state_dict": state}, tmp_path / "autoencoder_v1.pt")
    given = {**files(release), "autoencoder": tmp_path / "autoencoder_v1.pt"}
    backbone = MaisiBackbone(**given, device="cpu").load()
    torch.testing.assert_close(backbone.autoencoder.state_dict(), release.autoencoder.state_dict())


@pytest.mark.slow
def test_bad_released_files(released, tmp_path):
    _, release = released
    given, unet = files(release), release.unet
    refuses("does not exist: give the path", **{**given, "unet": tmp_path / "none.pt"})
    refuses("give both released files", ZeroSegError, autoencoder=given["autoencoder"])
    refuses(
        "kind must be one of ddpm-ct, rflow-ct, rflow-mr, rflow-mr-brain", ZeroSegError, **{**given, "kind": "rflow"}
    )
    refuses("the unet of .* they do not fit its config", **{**given, "overrides": {**SMALL, "unet": {}}})

    def variation(message: str, part: str = "unet", name: str = release.unet_file.name, **content) -> None:
        torch.save(content, tmp_path / name)
        refuses(message, **{**given, part: tmp_path / name})

    state = unet.state_dict()
    first = next(iter(state))
    variation("lacks scale_factor", unet_state_dict=state)
    variation("scale_factor of .* is no positive number", unet_state_dict=state, scale_factor=torch.tensor([1.0, 2.0]))
    variation("scale_factor of .* is no positive number", unet_state_dict=state, scale_factor=0.0)
    variation("holds no state dict", "autoencoder", "autoencoder_v1.pt", epoch=3)
    lacking = {k: v for k, v in state.items() if k != first}
    variation(f"lacks 1 of the weights it needs .{first}", unet_state_dict=lacking, scale_factor=1.0)
    variation(
        "holds 1 weights of something else .extra", unet_state_dict={**state, "extra": state[first]}, scale_factor=1.0
    )
    variation("layers of no MAISI release", unet_state_dict={"a": torch.zeros(1)}, scale_factor=1.0)


def test_what_kind_of_release_a_file_is(tmp_path):
    flow, ddpm = (save_release(tmp_path / k, k, SMALL) for k in ("rflow-mr", "ddpm-ct"))
    nameless = shutil.copy(flow.unet_file, tmp_path / "mine.pt")
    refuses("its name does not say of what: set kind to one of rflow-ct, rflow-mr", **{**files(flow), "unet": nameless})
    backbone = MaisiBackbone(**{**files(flow), "unet": nameless}, kind="rflow-mr", device="cpu").load()
    assert backbone.release == "rflow-mr"
    refuses("has the layers of a rflow release, and kind says ddpm-ct", **files(flow), kind="ddpm-ct")
    refuses("has the layers of a ddpm release, and kind says rflow-ct", **files(ddpm), kind="rflow-ct")


def test_the_22_projections_that_ddpm_never_applied_are_dropped_and_nothing_else(tmp_path):
    config = maisi._merged(MAISI_DDPM, {"unet": {**SMALL["unet"], "num_channels": [8, 8, 8, 16], "num_res_blocks": 2}})
    config["unet"].update(attention_levels=[False, False, True, True], num_head_channels=[0, 0, 8, 8])
    overrides = {**SMALL, "unet": config["unet"]}
    release = save_release(tmp_path, "ddpm-ct", overrides)
    content = maisi.read_checkpoint(release.unet_file)
    state = dict(content["unet_state_dict"])
    unused = [k for k in state if ".attn.out_proj." in k]
    assert len(unused) == 22, "11 attention blocks, as in the released file"
    given = {**files(release), "overrides": overrides}
    backbone = MaisiBackbone(**given, device="cpu").load()
    assert not any("out_proj" in k for k in backbone.unet.state_dict())
    applied = MaisiBackbone(
        **{**given, "overrides": maisi._merged(overrides, {"unet": {"include_fc": True}})}, device="cpu"
    ).load()
    assert torch.equal(applied.unet.state_dict()[unused[0]], state[unused[0]]), "a network that has them gets them"

    def saved(changed: dict):
        torch.save({**content, "unet_state_dict": changed}, tmp_path / "diff_unet_3d_ddpm-ct.pt")
        return {**given, "unet": tmp_path / "diff_unet_3d_ddpm-ct.pt"}

    refuses("holds 21 of 22 attn.out_proj", **saved({k: v for k, v in state.items() if k != unused[3]}))
    refuses(
        "something else .middle_block.attention.attn.out_proj2",
        **saved({**state, "middle_block.attention.attn.out_proj2.weight": state[unused[0]]}),
    )
    refuses("something else .conv_in.out_proj", **saved({**state, "conv_in.out_proj.weight": state[unused[0]]}))
    assert MaisiBackbone(**saved({k: v for k, v in state.items() if k not in unused}), device="cpu").load()


class Attack:
    """Unpickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "a shell command": lambda mark: Attack(os.system, f"touch {mark}"),
    "code to evaluate": lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"),
    "code in a partial": lambda mark: functools.partial(open, str(mark), "w"),
    "a module": lambda mark: torch.nn.Linear(1, 1),
    "numpy's loader": lambda mark: np.zeros(2),
    "monai's loader": lambda mark: Attack(monai.utils.module.optional_import, "os"),
    "monai's configs": lambda mark: Attack(monai.bundle.ConfigParser, {"a": "$open('x', 'w')"}),
    "another enum of monai": lambda mark: monai.utils.enums.CommonKeys.IMAGE,
    "a method of an allowed class": lambda mark: Attack(getattr, MetaTensor, "ensure_torch_and_prune_meta"),
    "a class of torch": lambda mark: torch.utils.data.TensorDataset(torch.zeros(1)),
    "a path": lambda mark: Path("/tmp"),
    "a function of an allowed module": lambda mark: monai.data.meta_tensor.MetaTensor.as_dict,
}


@pytest.mark.parametrize("place", ["scale_factor", "unet_state_dict", "epoch"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_else_a_checkpoint_asks_for_is_refused(tmp_path, attack, place):
    mark, path = tmp_path / "was_run", tmp_path / "diff_unet_3d_rflow-ct.pt"
    content = {"epoch": 1, "scale_factor": torch.tensor(1.0), "unet_state_dict": {"a": torch.zeros(1)}}
    evil = ATTACKS[attack](mark)
    content[place] = {"a": evil} if place == "unet_state_dict" else evil
    torch.save(content, path)
    with pytest.raises(WeightsError, match="files that need code to be run are refused") as error:
        maisi.read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_an_attack_hidden_in_a_metatensor_is_refused(tmp_path):
    mark = tmp_path / "was_run"
    factor = MetaTensor(torch.tensor(1.0), meta={"space": Attack(os.system, f"touch {mark}")})
    torch.save({"scale_factor": factor, "unet_state_dict": {"a": torch.zeros(1)}}, tmp_path / "unet.pt")
    with pytest.raises(WeightsError, match="are refused"):
        maisi.read_checkpoint(tmp_path / "unet.pt")
    (tmp_path / "unet.pt").write_bytes(pickle.dumps(Attack(os.system, f"touch {mark}")))
    with pytest.raises(WeightsError, match="are refused"):
        maisi.read_checkpoint(tmp_path / "unet.pt")
    assert not mark.exists()


def test_the_allow_list_is_three_enums_and_a_tensor():
    assert {c.__name__ for c in CHECKPOINT_GLOBALS} == {"MetaTensor", "MetaKeys", "SpaceKeys", "TraceKeys"}


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


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("scale_factor", None),
        ("scale_factor", 0),
        ("spacing", 2.0),
        ("spacing", [0, 3, 3]),
        ("spacing", [3, 3]),
        ("modalities", ["ct"]),
        ("modalities", {"ct": "one"}),
        ("ct_window", 3),
        ("ct_window", [100, -100]),
        ("window", 64),
        ("window", [64, 64, "64"]),
        ("steps", "x"),
        ("steps", 0),
    ],
)
def test_entries_of_a_wrong_kind_are_refused_by_name(tiny_tumor_model, entry, value):
    refuses(f"{entry} in the config of model must be ", ZeroSegError, source=tiny_tumor_model, overrides={entry: value})


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
    (folder / "config.json").write_text("5")
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
    refuses("the unet of model holds 2 weights of something else", source=folder)
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
