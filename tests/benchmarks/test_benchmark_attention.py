import json

import numpy as np
import pytest
import torch

from benchmark_attention import PeakMemory, RandomStableDiffusion, broadcast_merge, main, sample_image, startup
from zeroseg.attention import aggregate_self_attention, merge_attention
from zeroseg.attention.merge import KLDistance, merge_to

SECONDS = (
    *("plain_forward_s", "capture_forward_s", "unet_forward_s", "unet_capture_s", "vae_encode_s", "text_embed_s"),
    *("aggregate_s", "merge_s", "label_map_s", "select_s", "refine_s", "pipeline_s", "second_prompt_s"),
    *("second_prompt_p95_s", "read_s", "write_s"),
)


@pytest.fixture(scope="module")
def tiny() -> RandomStableDiffusion:
    return RandomStableDiffusion(tiny=True, device="cpu")


@pytest.fixture(scope="module")
def attention(tiny) -> torch.Tensor:
    latents = tiny.encode_image(torch.from_numpy(sample_image(128))[None])
    recording = tiny.read(latents, 300, tiny.embed_text([""]))
    return aggregate_self_attention([m[0] for m in recording.self_attention.values()])


def test_random_backbone_has_the_shape_of_stable_diffusion(tiny):
    tiny.load()
    assert (tiny.vae_factor, tiny.size_multiple, tiny.image_size) == (8, 64, 128)
    assert len(tiny.unet.down_blocks) == 4 and len(tiny.unet.down_blocks[0].attentions) == 2
    assert tiny.embed_text(["cells"]).shape == (1, 77, 32)


def test_plain_transcription_of_the_merge_gives_the_same_proposals(attention):
    thresholds = merge_to(KLDistance(attention), 12, 8)[1]
    fast, plain = merge_attention(attention, thresholds, 8), broadcast_merge(attention, thresholds, 8)
    assert 2 < len(fast) < 64
    assert fast.shape == plain.shape
    assert torch.allclose(fast, plain, atol=1e-6)


def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    with PeakMemory(torch.device("cpu")) as empty:
        pass
    with PeakMemory(torch.device("cpu")) as memory:
        block = np.ones(200_000_000, np.uint8)
        del block
    assert 150e6 < memory.peak - empty.peak < 300e6


@pytest.mark.slow
def test_figures_are_complete_and_consistent(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main(["--tiny", "--repeat", "1", "--reference", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert all(figures[name] > 0 for name in SECONDS)
    assert figures["plain_forward_s"] == pytest.approx(figures["vae_encode_s"] + figures["unet_forward_s"])
    assert figures["pipeline_over_forward"] == pytest.approx(figures["pipeline_s"] / figures["plain_forward_s"])
    assert figures["capture_over_forward"] == pytest.approx(figures["capture_forward_s"] / figures["plain_forward_s"])
    assert figures["reference_over_merge"] > 0
    assert abs(figures["capture_peak_mb_added"]) < 300
    assert figures["tokens"] == 256 and figures["segments"] > 1
    assert figures["context"]["random_weights"] is True and figures["context"]["size"] == 128
    printed = capsys.readouterr().out
    assert "weights are random" in printed and "pipeline_over_forward" in printed


@pytest.mark.slow
def test_one_round_by_the_processors_clock(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main(["--tiny", "--once", "--clock", "processor", "--dtype", "bf16", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["process_peak_mb"] > 100 and "unet_forward_peak_mb" not in figures
    assert figures["pipeline_over_forward"] > 0
    assert figures["context"]["clock"] == "processor" and figures["context"]["repeat"] == 1
    assert "processor clock, median of 1" in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_an_existing_pipeline_is_measured(tiny_pipeline, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["--backbone", str(tiny_pipeline), "--select", "auto", "--repeat", "1", "--json", str(path)]
    assert main(arguments) == 0
    assert json.loads(path.read_text())["context"]["random_weights"] is False
    assert "random" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message", [(["--tiny", "--size", "100"], "multiple of 64"), (["--backbone", "no/where"], "no/where")]
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("benchmark.py: ") and message in error


@pytest.mark.slow
def test_a_fresh_process_is_timed_to_its_first_mask():
    seconds = startup("embedded", 64)
    assert 0 < seconds["startup_import_s"] < seconds["startup_first_mask_s"]
