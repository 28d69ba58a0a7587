"""The inferer on a tiny random backbone: shapes, prompts, settings, repeatability (how good masks are: evaluate.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from zeroseg.errors import ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.segmentation import Segmentation

PROMPTS = {
    "segments": {},
    "auto": {},
    "points": {"points": [[40, 52], [5, 5]], "labels": [1, 0]},
    "box": {"box": [15, 30, 65, 75]},
    "text": {"text": "white blood cell"},
}


@pytest.fixture(scope="module")
def make(tiny_backbone):
    def make(**settings) -> AttentionSegmentationInferer:
        return AttentionSegmentationInferer(tiny_backbone, **{"resolution": 64, **settings})

    return make


@pytest.fixture
def forwards(tiny_backbone):
    """Number of UNet passes made so far."""
    count = [0]
    # Before a pass, for one that is read for attention alone ends early.
    handle = tiny_backbone.unet.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield lambda: count[0]
    handle.remove()


def check(result, size) -> None:
    """What holds for every result."""
    assert result.labels.shape == result.confidence.shape == tuple(size)
    assert result.labels.dtype == np.uint8 and result.confidence.dtype == np.float32
    assert np.isfinite(result.confidence).all()
    assert result.confidence.min() >= 0 and result.confidence.max() <= 1
    assert len(result.scores) == result.labels.max() and all(0 <= s <= 1 for s in result.scores)
    if result.rule != "segments":
        assert result.labels.max() <= 1
    json.dumps(result.details)
    assert all(s >= 0 for s in result.seconds.values())


@pytest.mark.parametrize("rule", PROMPTS)
@pytest.mark.parametrize("refine", ["guided", "none"])
def test_every_rule(make, disc, rule, refine):
    result = make(refine=refine).segment(disc[0], rule, **PROMPTS[rule])
    check(result, (96, 96))
    assert result.rule == rule
    if rule == "segments":
        assert (result.labels > 0).all(), "every pixel carries its segment"
        assert sorted(np.unique(result.labels)) == list(range(1, len(result.scores) + 1))
    if rule == "points":
        assert result.labels[52, 40] == 1 and result.labels[5, 5] == 0, "the user's word stands"
    if rule == "box":
        assert not result.labels[:30].any() and not result.labels[76:].any()
        assert not result.labels[:, :15].any() and not result.labels[:, 66:].any()


@pytest.mark.parametrize("rule", PROMPTS)
@pytest.mark.parametrize("size", [(1, 1), (37, 90), (120, 8), (1, 50)])
def test_any_size(make, rule, size):
    image = np.random.default_rng(0).random((1, *size))
    prompt = {"points": {"points": [[0, 0]]}, "text": {"text": "cell"}}.get(rule, {})
    if rule == "box":
        prompt = {"box": [0, 0, size[1] - 1, size[0] - 1]}
    check(make().segment(image, rule, **prompt), size)


@pytest.mark.parametrize("rule", ["segments", "auto", "points"])
def test_a_constant_image(make, rule):
    prompt = {"points": [[3, 4]]} if rule == "points" else {}
    result = make().segment(np.full((3, 20, 30), 7.0), rule, **prompt)
    check(result, (20, 30))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_batches_of_any_channel_count(make, channels):
    inferer = make(select="segments")
    images = torch.rand(2, channels, 30, 40, generator=torch.Generator().manual_seed(0))
    labels = inferer(images)
    assert labels.shape == (2, 1, 30, 40) and labels.dtype == torch.uint8
    for item, image in zip(labels, images, strict=True):
        assert np.array_equal(item[0], inferer.segment(image).labels), "each item as if it were alone"


def test_is_a_monai_inferer_and_needs_no_network(make):
    inferer = make()
    assert isinstance(inferer, Inferer)
    image = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inferer(image), inferer(image, torch.nn.Identity()))


def test_prompts_of_a_batch(make):
    inferer = make()
    images = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(0))
    one = {"points": [[3, 4]]}
    labels = inferer(images, prompts=[one, {"box": [2, 3, 20, 20]}])
    assert np.array_equal(labels[0, 0], inferer.segment(images[0], **one).labels)
    assert not labels[1, 0, :, 21:].any()
    assert torch.equal(inferer(images, prompts=one)[:, 0, 4, 3], torch.ones(2, dtype=torch.uint8)), "one for all"
    with pytest.raises(ZeroSegError, match="3 prompts were given for a batch of 2"):
        inferer(images, prompts=[one] * 3)


@pytest.mark.parametrize("shape", [(1, 1, 20, 24), (1, 1, 9, 8, 3)])
def test_affine_and_metadata_of_a_metatensor_are_kept(make, shape):
    affine = torch.tensor([[0.0, -2, 0, 5], [3, 0, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]], dtype=torch.float64)
    data = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    inputs = MetaTensor(data, affine=affine, meta={"filename_or_obj": "x.nii.gz"})
    labels = make()(inputs)
    assert isinstance(labels, MetaTensor) and labels.dtype == torch.uint8 and labels.shape == shape
    assert torch.equal(labels.affine, affine)
    assert labels.meta["filename_or_obj"] == "x.nii.gz"
    assert torch.equal(labels.as_tensor(), make()(data)), "and change nothing else"


def test_encode_once_prompt_often(make, disc, forwards):
    inferer = make()
    encoded = inferer.encode(disc[0])
    for prompt in ({"points": [[40, 52]]}, {"points": [[5, 5]]}, {"box": [15, 30, 65, 75]}, {"select": "segments"}, {}):
        inferer.predict(encoded, **prompt)
    assert forwards() == 1, "prompts do not run the UNet again"


@pytest.mark.slow
def test_an_earlier_prompt_leaves_nothing_behind(make, disc):
    encoded = make().encode(disc[0])
    for rule, prompt in [*PROMPTS.items(), *PROMPTS.items()]:
        again, fresh = make().predict(encoded, rule, **prompt), make().segment(disc[0], rule, **prompt)
        assert np.array_equal(again.labels, fresh.labels)
        assert np.array_equal(again.confidence, fresh.confidence)


@pytest.mark.parametrize("draws", [1, 3])
def test_each_noise_draw_is_a_pass(make, disc, forwards, draws):
    make(noise_draws=draws).encode(disc[0])
    assert forwards() == draws


@pytest.mark.parametrize("settings", [{}, {"noise_draws": 2}, {"affinity": "both"}])
def test_equal_input_gives_equal_masks_bit_for_bit(make, disc, settings):
    for rule, prompt in PROMPTS.items():
        first, second = (make(**settings).segment(disc[0], rule, **prompt) for _ in range(2))
        assert np.array_equal(first.labels, second.labels)
        assert np.array_equal(first.confidence, second.confidence)
        assert (first.scores, first.details) == (second.scores, second.details)


def test_settings_matter(make, disc):
    plain = make().encode(disc[0]).attention
    changes = {"timestep": [10], "noise_draws": [1], "resolution": [128], "affinity": ["features", "both"]}
    for change in ({name: value} for name, values in changes.items() for value in values):
        other = make(**change).encode(disc[0]).attention
        assert not torch.equal(other, plain)
        torch.testing.assert_close(other.sum(-1), torch.ones(len(other)), atol=1e-4, rtol=0)
    seeds = [make(noise_draws=1, seed=s).encode(disc[0]).attention for s in (0, 1)]
    assert not torch.equal(*seeds)
    edges = [make(refine=r).segment(disc[0], "points", points=[[40, 52]]).confidence for r in ("guided", "none")]
    assert not np.array_equal(*edges)


def test_resolution_sets_the_grid_and_the_image_keeps_its_size(make, disc):
    assert make(resolution=None).encode(disc[0]).side == 16, "by default the backbone's own 128 pixels"
    encoded = make(resolution=64).encode(disc[0])
    assert encoded.side == 8 and encoded.attention.shape == (64, 64)
    assert encoded.size == (96, 96)


@pytest.mark.parametrize("rule", PROMPTS)
def test_large_images_are_worked_on_smaller_and_returned_in_full(make, rule):
    image = np.random.default_rng(0).random((1, 150, 90))
    inferer = make(working_size=40)
    encoded = inferer.encode(image)
    assert encoded.image.shape == (3, 40, 24) and encoded.size == (150, 90)
    prompts = {"points": {"points": [[89, 149]]}, "box": {"box": [10, 20, 60, 120]}, "text": {"text": "cell"}}
    prompt = prompts.get(rule, {})
    result = inferer.predict(encoded, rule, **prompt)
    check(result, (150, 90))
    if rule == "points":
        assert result.labels[149, 89] == 1, "clicks stay in pixels of the original"


def test_absent_is_an_empty_mask_of_the_images_size(make, disc):
    result = make(text_certainty=1e9).segment(disc[0][:, :70], text="white blood cell")
    check(result, (70, 96))
    assert result.absent and not result.labels.any() and result.scores == []
    assert result.details["text"] == "white blood cell"


def test_the_rule_follows_from_the_prompt(make, disc):
    encoded, inferer = make().encode(disc[0]), make()
    assert inferer.predict(encoded).rule == "auto"
    assert inferer.predict(encoded, points=[[40, 52]]).rule == "points"
    assert inferer.predict(encoded, box=[15, 30, 65, 75]).rule == "box"
    assert inferer.predict(encoded, text="cell").rule == "text"
    assert inferer.predict(encoded, points=[[40, 52]], box=[15, 30, 65, 75]).rule == "points"
    assert make(select="segments").predict(encoded).rule == "segments"
    assert make(select="segments").predict(encoded, "auto").rule == "auto", "a call overrides the setting"


def test_a_box_bounds_a_clicked_mask(make, disc):
    result = make().segment(disc[0], points=[[40, 52]], box=[30, 40, 50, 60])
    assert result.labels[52, 40] == 1
    outside = np.ones((96, 96), bool)
    outside[40:61, 30:51] = False
    assert not result.labels[outside].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "everything"}, "unknown select 'everything': use one of segments, auto, points, box, text"),
        ({"affinity": "keys"}, "unknown affinity 'keys': use one of attention, features, both"),
        ({"refine": "crf"}, "unknown refine 'crf': use one of guided, none"),
        *(({"thresholds": t}, "thresholds must be") for t in ("abc", [], [0.3, 0], [-1], [float("nan")], 3)),
        *(({"slice_axis": a}, "slice_axis must be") for a in (3, -4, "z")),
        *(({"grid": g}, "grid must be") for g in (0, -3, 2.5, "16")),
        *(({"resolution": r}, "resolution must be a positive multiple of 64") for r in (100, 0, -64, 64.0, "64")),
        *(({"timestep": t}, "timestep .* is outside 0..999") for t in (-1, 1000, "late")),
        *(({"noise_draws": n}, "noise_draws must be") for n in (-1, 1.5, "two")),
    ],
)
def test_wrong_settings_are_one_line(make, disc, settings, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        make(**settings).segment(disc[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"select": "everything"}, "unknown select"),
        ({"select": "points"}, "select points needs a prompt"),
        ({"select": "box"}, "select box needs a prompt"),
        ({"select": "text"}, "select text needs a prompt"),
        ({"points": []}, "points is empty"),
        ({"points": 5}, "points must be a list"),
        ({"points": [["a", 1]]}, "points must be a list"),
        ({"points": [[1, 2, 3]]}, "must have 2 numbers: x, y"),
        ({"points": [[96, 1]]}, r"point \[96.0, 1.0\] lies outside the image: x 0..95, y 0..79"),
        ({"points": [[1, 80]]}, "outside the image"),
        ({"points": [[-1, 1]]}, "outside the image"),
        ({"points": [[float("nan"), 1]]}, "outside the image"),
        ({"points": [[1, 1]], "labels": [1, 1]}, "one 0 or 1 for each of the 1 points"),
        ({"points": [[1, 1]], "labels": [2]}, "one 0 or 1"),
        ({"points": [[1, 1]], "labels": 1}, "one 0 or 1"),
        ({"labels": [1]}, "labels are given without points"),
        ({"box": [1, 1, 9, 9], "labels": [1]}, "labels are given without points"),
        ({"points": [[1, 1]], "labels": [0]}, "at least one click with label 1"),
        ({"box": 5}, "box must be 4 numbers"),
        ({"box": [1, 2, 3]}, "box must be 4 numbers"),
        ({"box": [1, 2, "x", 4]}, "box must be 4 numbers"),
        ({"box": [1, 2, 96, 4]}, "inside the image"),
        ({"box": [9, 2, 5, 4]}, "low corner first"),
        ({"box": [5, 9, 9, 5]}, "low corner first"),
        ({"text": ""}, "must be words"),
        ({"text": 5}, "must be words"),
    ],
)
def test_wrong_prompts_are_one_line(make, disc, prompt, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        make().segment(disc[0][:, :80], **prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5)), "expected"),
        (np.zeros((1, 1, 5, 5, 5)), "expected"),
        (np.zeros((3, 0, 5)), "empty"),
        (np.full((1, 4, 4), np.nan), "16 NaN or infinite"),
    ],
)
def test_wrong_images_are_one_line(make, image, message):
    with pytest.raises(ZeroSegError, match=message):
        make().segment(image)
    with pytest.raises(ZeroSegError, match="inputs must be"):
        make()(torch.zeros(1, 5, 5))


def test_settings_are_fit_for_a_manifest(make):
    settings = make(noise_draws=2).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["noise_draws"] == 2 and settings["resolution"] == 64
    assert "backbone" not in settings


def test_every_volume_of_a_batch_has_its_own_affine(make, monkeypatch):
    seen = []

    def segment(self, image, *, affine=None, **prompt):
        seen.append(affine)
        return Segmentation(np.zeros(image.shape[1:], np.uint8), np.ones(image.shape[1:], np.float32), [], "auto")

    inferer = make()
    monkeypatch.setattr(type(inferer), "segment", segment)
    affines = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0]))])
    inferer(MetaTensor(torch.zeros(2, 1, 4, 4, 4), affine=affines))
    inferer(torch.zeros(2, 1, 4, 4, 4), affine=np.eye(4))
    assert [float(affine[2, 2]) for affine in seen] == [1, 5, 1, 1]
