import json

import pytest

from benchmark_tumor import RandomMaisi, main, measure
from tumor_model import tiny_config

PASSES = {"encode", "decode", "aova", "denoise", "inpaint", "repaint_step", "pixel", "feature"}


@pytest.mark.slow
def test_every_pass_is_measured():
    figures = measure(RandomMaisi(tiny_config()), 32, 2)
    assert set(figures) == PASSES
    assert all(f["seconds"] > 0 and f["peak_mb_added"] >= 0 for f in figures.values())
    assert figures["repaint_step"]["seconds"] * 2 == pytest.approx(figures["inpaint"]["seconds"])
    assert figures["inpaint"]["seconds"] > figures["pixel"]["seconds"]


@pytest.mark.slow
def test_the_program_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmark_tumor.SHAPES", {"compact": tiny_config()})
    assert main(["--size", "16", "32", "--steps", "1", "--json", str(tmp_path / "figures.json")]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    assert set(written["sizes"]) == {"16", "32"} and set(written["sizes"]["16"]) == PASSES
    assert written["context"]["random_weights"] and written["context"]["parameters"]["unet"] > 0
    assert "| encode |" in capsys.readouterr().out


def test_the_training_of_adapters_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmark_tumor.SHAPES", {"compact": tiny_config()})
    path = tmp_path / "figures.json"
    assert main(["--training", "--size", "24", "--clock", "processor", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["sizes"]["24"]
    assert set(figures) == {"encoder", "reading", "voxel_step", "volume_step"}
    assert all(f["seconds"] > 0 for f in figures.values())
    assert "| volume_step |" in capsys.readouterr().out
    assert main(["--training", "--size", "4"]) == 2


def test_a_size_that_does_not_fit_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("benchmark_tumor.SHAPES", {"compact": tiny_config()})
    assert main(["--size", "30"]) == 2
    assert "--size must be a multiple of" in capsys.readouterr().err
