"""The trainer from end to end in a few steps, and the terms it insists on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_backbone
from phantoms import make_phantom
from train_backbone import SOURCES, Corpus, find_folders, main
from zeroseg.backbones import StableDiffusionBackbone, verify_sums
from zeroseg.interaction.inferer import AttentionSegmentationInferer

TINY = ["--phantoms=12", "--batch=2", "--size=64", "--large-share=0", "--vae-batch=2", "--vae-size=32"]
TINY += ["--fp32", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps per phase; its arguments and the folder it wrote."""
    root = tmp_path_factory.mktemp("train")
    (root / "cells").mkdir()
    for seed in range(6):
        Image.fromarray(make_phantom(seed, 80, "blood_smear").image).save(root / "cells" / f"{seed}.png")
    arguments = [*TINY, "--extra", f"{root / 'cells'}=blood cells", "--work", str(root / "work")]
    arguments += ["--out", str(root / "out")]
    main([*arguments, "--vae-steps", "2", "--unet-steps", "2"])
    return arguments, root / "out"


def test_the_result_loads_and_segments(trained):
    backbone = StableDiffusionBackbone(trained[1], device="cpu")
    assert (backbone.image_size, backbone.vae_factor) == (256, 4)
    verify_sums(trained[1])
    assert set(backbone.weights) == {p.relative_to(trained[1]).as_posix() for p in trained[1].rglob("*.safetensors")}
    image = np.random.default_rng(0).random((3, 40, 50))
    result = AttentionSegmentationInferer(backbone, resolution=64).segment(image, points=[[10, 20]])
    assert result.labels.shape == (40, 50) and result.labels[20, 10] == 1


def test_the_summary_says_how_it_was_made(trained):
    summary = json.loads((trained[1] / "training.json").read_text())
    assert summary["images"] == {"cells": 6, "phantoms": 12}
    assert (summary["vae_steps"], summary["unet_steps"], summary["unet_samples"]) == (2, 2, 4)
    assert summary["command"].startswith("python scripts/training/train_backbone.py --phantoms=12")
    assert summary["parameters"]["unet"] > summary["parameters"]["text"] > 0
    assert "training.json" in (trained[1] / "SHA256SUMS").read_text()
    assert all(p.stat().st_size < 24e6 for p in trained[1].rglob("*.safetensors"))


def test_the_tokenizer_knows_the_training_words(trained):
    backbone = StableDiffusionBackbone(trained[1], device="cpu").load()
    ids = backbone.tokenizer("blood cells").input_ids
    assert len(ids) == 4, "one token a word, between start and end"
    odd = backbone.tokenizer("Ünïcode ✓ 17").input_ids
    assert backbone.tokenizer.decode(odd, skip_special_tokens=True).replace(" ", "") == "ünïcode✓17"


def unet_files(folder) -> dict[str, str]:
    return {name: digest for name, digest in verify_sums(folder).items() if name.startswith("unet")}


@pytest.mark.slow
def test_a_run_goes_on_from_written_weights(trained, tmp_path):
    arguments, out = trained
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    main([*arguments[:-4], *folders, "--start", str(out), "--vae-steps", "2", "--unet-steps", "1", "--lr", "1e-3"])
    before, after = verify_sums(out), verify_sums(tmp_path / "out")
    kept = {name for name in before if before[name] == after[name]}
    assert {name for name in kept if name.endswith(".safetensors")} == {"vae/diffusion_pytorch_model.safetensors"}
    for name in ("tokenizer/tokenizer.json", "vae/config.json"):
        read = [json.loads((folder / name).read_text()) for folder in (out, tmp_path / "out")]
        assert read[0].get("scaling_factor") == read[1].get("scaling_factor")
        assert read[0].get("model") == read[1].get("model")
    command = json.loads((tmp_path / "out" / "training.json").read_text())["command"]
    assert "--start out" in command and "--extra cells=blood cells" in command and str(tmp_path) not in command


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_can_be_exported_again(trained, tmp_path, capsys):
    arguments, out = trained
    elsewhere = [*arguments[:-1], str(tmp_path / "again")]
    main([*elsewhere, "--export-only"])
    first, again = (unet_files(folder) for folder in (out, tmp_path / "again"))
    assert first == again
    capsys.readouterr()
    main([*elsewhere, "--vae-steps", "2", "--unet-steps", "3"])
    assert "resumed at vae step 2, unet step 2" in capsys.readouterr().out
    summary = json.loads((tmp_path / "again" / "training.json").read_text())
    assert (summary["unet_steps"], summary["unet_samples"]) == (3, 6)
    assert unet_files(tmp_path / "again") != first


def test_what_is_not_a_folder_with_a_caption_is_refused(tmp_path):
    for extra in (str(tmp_path / "nowhere") + "=cells", str(tmp_path), str(tmp_path) + "="):
        with pytest.raises(SystemExit, match="give FOLDER=CAPTION with an existing folder"):
            main([*TINY, "--extra", extra, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def arguments(**given):
    return type("Arguments", (), {"images": [], "extra": [], **given})()


def test_folders_of_unknown_terms_are_left_alone(tmp_path):
    for name in ("blood_bccd", "of_unknown_licence", "nuclei_dsb2018"):
        (tmp_path / name).mkdir()
    found = find_folders(arguments(images=[tmp_path]))
    assert [folder.name for folder, _ in found] == ["blood_bccd", "nuclei_dsb2018"]


def test_a_licence_that_does_not_allow_training_is_refused(tmp_path, monkeypatch):
    (tmp_path / "blood_bccd").mkdir()
    source = train_backbone.Source("CC BY-NC 4.0", "nobody", ("cells",))
    monkeypatch.setitem(SOURCES, "blood_bccd", source)
    with pytest.raises(SystemExit, match=r"blood_bccd: licence 'CC BY-NC 4.0' does not allow training"):
        find_folders(arguments(images=[tmp_path]))


def test_chest_xrays_are_chosen_row_by_row(tmp_path):
    folder = tmp_path / "cxr_ieee8023"
    folder.mkdir()
    licences = {"a": "CC BY 4.0", "b": "CC BY-NC-SA 4.0", "c": "", "d": "CC BY 3.0", "e": "CC BY-NC-ND"}
    for stem in (*licences, "f"):  # f has no row
        Image.fromarray(np.full((40, 40), ord(stem), np.uint8)).save(folder / f"{stem}.png")
    rows = "".join(f"{stem},{licence}\n" for stem, licence in licences.items())
    (tmp_path / "cxr_ieee8023_licences.csv").write_text("stem,licence\n" + rows)
    corpus = Corpus([(folder, SOURCES["cxr_ieee8023"])], phantoms=1, seed=0)
    assert corpus.counts == {"cxr_ieee8023": 2}
    assert sorted(image[0, 0, 0] for image, _ in corpus.real[0]) == [ord("a"), ord("d")]


def test_batches(tmp_path):
    corpus = Corpus([], phantoms=3, seed=5)
    images, captions = corpus.batch(np.random.default_rng(0), 4, 32)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.05
    whole = [make_phantom(seed).caption for seed in (5, 6, 7)]
    assert all(
        any(caption in w or set(caption.split(", ")) <= set(w.split(" with ")[-1].split(", ")) for w in whole)
        for caption in captions
    )
    again, _ = corpus.batch(np.random.default_rng(0), 4, 32)
    assert torch.equal(images, again)
