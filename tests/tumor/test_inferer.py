"""The whole method on tiny random nets: stages, evidence, absence, grids, bad input."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from scipy import ndimage

from zeroseg.attention.prepare import prepare
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.interaction.volume_session import VolumeEvent, VolumeSession, load_volume_head, spacing_of
from zeroseg.regions import innermost, largest_component
from zeroseg.tumor import AovaAdapters, TumorSegmentationInferer
from zeroseg.tumor.aova import load_adapters
from zeroseg.tumor.inferer import STAGES

AFFINE = np.diag([2.0, 2, 4, 1])


@pytest.fixture
def make(tiny_tumor_model, tiny_maisi):
    """An inferer of the tiny model; random nets never look like anything, so that rule is off unless asked for."""
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")

    def build(**options) -> TumorSegmentationInferer:
        given = {"organ": "liver", "presence": 0, "steps": 3, "adapters": tiny_tumor_model, **options}
        return TumorSegmentationInferer(tiny_maisi, encoder, **given)

    return build


def noise_volume(shape=(30, 26, 14)) -> np.ndarray:
    """Smooth noise of CT-like values, (1, X, Y, Z)."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 2)
    return (values / values.std() * 150)[None].astype(np.float32)


@pytest.fixture(scope="module")
def volume():
    return noise_volume()


def test_everything_comes_back_on_the_inputs_grid(make, volume):
    result = make().segment(volume, affine=AFFINE, modality="ct")
    shape = volume.shape[1:]
    assert result.labels.shape == result.confidence.shape == shape
    assert result.labels.dtype == np.uint8 and set(np.unique(result.labels)) == {0, 1}
    assert result.confidence.dtype == np.float32 and 0 <= result.confidence.min() <= result.confidence.max() <= 1
    assert result.rule == "tumor" and not result.absent and len(result.scores) == 1 and 0.5 < result.scores[0] <= 1
    assert set(result.evidence) == {"aova", "healthy", "pixel_residual", "feature_residual"}
    for values in result.evidence.values():
        assert values.shape == shape and values.dtype == np.float32 and np.isfinite(values).all()
    assert result.evidence["aova"].min() >= 0 and result.evidence["aova"].max() <= 1
    assert result.evidence["pixel_residual"].min() >= 0 and result.evidence["healthy"].min() >= -250
    assert {"prepare", "encode", "aova", "inpaint", "pixel", "feature", "fuse"} <= set(result.seconds)
    json.dumps(result.details)
    assert result.details["organ"] == "liver" and result.details["tumor"] == "liver tumour"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_stage_can_be_switched_off(make, volume, count):
    stages = STAGES[:count]
    result = make(stages=stages).segment(volume, affine=AFFINE, modality="ct")
    names = {"aova": "aova", "inpaint": "healthy", "pixel": "pixel_residual", "feature": "feature_residual"}
    assert set(result.evidence) == {names[s] for s in stages}
    assert {s for s in STAGES if s in result.seconds} == set(stages)


def test_aova_alone_is_the_thresholded_map(make, volume):
    result = make(stages=("aova",), min_volume_ml=0).segment(volume, affine=np.diag([3.0, 3, 3, 1]), modality="ct")
    np.testing.assert_array_equal(result.labels > 0, result.evidence["aova"] > 0.5)


def test_the_mask_stays_within_the_dilated_aova_map(make, volume):
    inferer = make(dilation_mm=3, min_volume_ml=0)
    result = inferer.segment(volume, affine=np.diag([3.0, 3, 3, 1]), modality="ct")
    near = ndimage.binary_dilation(result.evidence["aova"] > inferer.suspicion, np.ones((3, 3, 3)))
    assert not (result.labels.astype(bool) & ~near).any()


def test_a_mask_that_is_not_sure_enough_is_absent_where_the_adapters_judge_by_it(make, volume, tiny_tumor_model):
    adapters = load_adapters(tiny_tumor_model)
    adapters.presence_of = {"ct": "mask"}
    options = {"adapters": adapters, "stages": ("aova",), "presence": 0.5, "min_volume_ml": 0}

    def ask(even_odds: float):
        adapters.presence = {"ct": even_odds}
        return make(**options).segment(volume, affine=np.diag([3.0, 3, 3, 1]), modality="ct")

    found = ask(0.0)
    probability = found.evidence["aova"][found.labels > 0]
    sure = found.details["presence_log_odds"]
    assert sure == pytest.approx(np.quantile(np.log(probability / (1 - probability)), 0.9), abs=1e-3) and sure > 0
    assert not ask(sure - 0.01).absent
    unsure = ask(sure + 0.01)
    assert unsure.absent and not unsure.labels.any() and "does not look like it" in unsure.reason
    nothing = make(**{**options, "min_volume_ml": 1e6}).segment(volume, affine=AFFINE, modality="ct")
    assert nothing.details["presence_log_odds"] is None and "no part is large" in nothing.reason
    json.dumps(nothing.details, allow_nan=False)


def test_adapters_may_cut_at_a_share_of_the_surest_voxels(make, volume, tiny_tumor_model):
    adapters = load_adapters(tiny_tumor_model)
    inferer = make(adapters=adapters, stages=("aova",), presence=0.0, min_volume_ml=0)
    encoded = inferer.encode(volume, np.diag([3.0, 3, 3, 1]), "ct")
    plain = inferer.predict(encoded)
    adapters.cut = {"ct": 0.5}
    found = inferer.predict(encoded)
    odds = np.log(plain.evidence["aova"] / (1 - plain.evidence["aova"]))
    highest = np.sort(odds, axis=None)[-math.ceil(adapters.top_ml / 0.027) :].mean()
    assert found.details["cut_log_odds"] == pytest.approx(highest / 2, abs=1e-3) and highest > 0
    assert 0 < np.count_nonzero(found.labels) < np.count_nonzero(plain.labels)
    np.testing.assert_array_equal(found.labels > 0, odds > found.details["cut_log_odds"])
    adapters.cut = {"mr": 0.5}
    assert "cut_log_odds" not in inferer.predict(encoded).details


def test_the_promptable_head_is_clicked_where_the_words_point(make, volume, tiny_tumor_model):
    def ask(weight: float, modality: str = "ct", least: float = 0, **prompt):
        adapters = load_adapters(tiny_tumor_model)
        adapters.head = {"ct": weight}
        inferer = make(adapters=adapters, min_volume_ml=least)
        encoded = inferer.encode(volume, AFFINE, modality)
        return inferer.predict(encoded, **prompt), encoded

    words = make(stages=STAGES[:4], min_volume_ml=0).segment(volume, AFFINE, "ct").labels > 0
    said, _ = ask(1e9)
    assert said.details["stages"] == [s for s in STAGES if s != "lungs"] and "head" in said.seconds
    np.testing.assert_array_equal(said.labels > 0, words)
    # Almost without the words: the candidates that the head has for the click, each by its estimate and its agreement.
    found, encoded = ask(1e-9)
    click = tuple(found.details["click"])
    assert click == innermost(largest_component(words))
    session = VolumeSession(load_volume_head(), prepare(encoded.scan)[0], spacing_of(AFFINE))
    answer = session.answer([VolumeEvent(((*click, 1),))])
    main, votes, total = largest_component(words), np.zeros(words.shape), 0.0
    for k, estimate in enumerate(answer.estimates):
        candidate = replace(answer, shown=k).whole(words.shape)
        weight = estimate * np.count_nonzero(candidate & main) / np.count_nonzero(candidate | main)
        votes, total = votes + weight * candidate, total + weight
    np.testing.assert_array_equal(found.labels > 0, votes / total > 0.5)
    assert not np.array_equal(found.labels > 0, words) and found.labels[click] == 1
    # What is too small is dropped of its answer, too.
    parts, count = ndimage.label(ask(1e-9, least=1.0)[0].labels, np.ones((3, 3, 3)))
    assert count and np.bincount(parts.ravel())[1:].min() * np.linalg.det(AFFINE) / 1000 >= 0.98
    # It is asked in the modalities it helps in, and not where the user clicks.
    for result, _ in (ask(0.4, "pet"), ask(0.4, points=[[4, 4, 4]])):
        assert "head" not in result.details["stages"] and "head" not in result.seconds


def test_other_settings_share_the_models(make):
    inferer = make()
    other = inferer.replace(threshold=0.3, organ="lung")
    assert (other.threshold, other.organ, inferer.threshold, inferer.organ) == (0.3, "lung", 0.5, "liver")
    assert other.backbone is inferer.backbone
    with pytest.raises(TypeError, match="no setting 'treshold'"):
        inferer.replace(treshold=0.3)


def test_other_adapters_are_loaded_and_named(make, tiny_tumor_model, tmp_path):
    inferer = make().load()
    other = inferer.replace(adapters=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match="nowhere"):
        other.check()
    assert inferer.replace(steps=3)._adapters is inferer._adapters


def test_every_volume_of_a_batch_has_its_own_affine(make, volume):
    inferer = make(stages=("aova",), modality="ct")
    affines = torch.stack([torch.diag(torch.tensor([3.0, 3, z, 1])) for z in (3.0, 6.0)])
    batch = torch.as_tensor(np.stack([volume, volume]))
    masks = inferer(MetaTensor(batch, affine=affines))
    for mask, affine in zip(masks, affines, strict=True):
        np.testing.assert_array_equal(mask[0].numpy(), inferer.segment(volume, affine.numpy(), "ct").labels)


def test_encode_once_prompt_often(make, volume, monkeypatch):
    inferer = make()
    encoded = inferer.encode(volume, AFFINE, "ct")
    whole = inferer.segment(volume, affine=AFFINE, modality="ct")
    again = inferer.predict(encoded)
    np.testing.assert_array_equal(whole.labels, again.labels)
    np.testing.assert_array_equal(inferer.predict(encoded).labels, again.labels)
    other = inferer.predict(encoded, organ="kidney")
    assert other.details["tumor"] == "kidney tumour"
    assert not np.array_equal(other.evidence["aova"], again.evidence["aova"])
    passes = []
    monkeypatch.setattr(MaisiBackbone, "read", lambda *a: passes.append(1))
    inferer.stages = ("aova",)
    inferer.predict(encoded, tumor="liver cyst")
    assert not passes


def test_equal_seeds_equal_masks(make, volume):
    a, b = (make(seed=1).segment(volume, affine=AFFINE, modality="ct") for _ in range(2))
    c = make(seed=2).segment(volume, affine=AFFINE, modality="ct")
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.evidence["healthy"], b.evidence["healthy"])
    assert not np.array_equal(a.evidence["healthy"], c.evidence["healthy"])


def test_words_the_encoder_does_not_know_find_nothing(make, volume):
    result = make().segment(volume, affine=AFFINE, modality="ct", tumor="purple bicycle")
    assert result.absent and not result.labels.any() and result.scores == []
    assert "knows none of the words" in result.reason
    assert result.details["unknown_words"] == ["purple", "bicycle"]
    half = make().segment(volume, affine=AFFINE, modality="ct", tumor="liver bicycle")
    assert half.notes == ["the text encoder does not know: bicycle"]


def test_a_word_the_embedded_encoder_lacks_is_taken_for_one_it_has(make):
    inferer = TumorSegmentationInferer(text_encoder=TextEncoder(device="cpu"))

    def meant(words, organ="liver"):
        return inferer._meaning(words, organ).text

    assert meant("hepatoma") == "liver tumour" and meant("metastases") == "tumour"
    for words in ("liver cyst", "purple bicycle", "pneumonia", "zqxv tumour"):
        assert meant(words) == words, "known, nowhere known, or known to the 2-D model only"
    assert meant("breast cancer", "soft tissue") == "tumour" and meant("breast sarcoma", "soft tissue") == "sarcoma"
    assert meant("breast cancer") == "breast cancer", "a liver has none"
    assert make()._meaning("hepatoma", "liver").text == "hepatoma", "another encoder gets the words as typed"


def test_other_reasons_for_absent(make, volume):
    def reason(**options):
        result = make(**options).segment(volume, affine=AFFINE, modality="ct")
        assert result.absent == (not result.labels.any())
        return result.reason

    assert reason() is None
    assert "does not look like it" in reason(presence=1)
    assert "no part is large" in reason(min_volume_ml=1000)


def test_the_null_prompts_veto(make, volume, tiny_tumor_model):
    from zeroseg.tumor.aova import load_adapters

    adapters = load_adapters(tiny_tumor_model)
    for stage in adapters.stages:  # a text tower that hears no words: every prompt is the null prompt
        torch.nn.init.zeros_(stage.text[-1].weight)
    adapters.bias.fill_(5.0)
    result = make(adapters=adapters).segment(volume, affine=AFFINE, modality="ct")
    assert result.absent and "no voxel better than no prompt" in result.reason


def test_components_and_threshold(make, volume):
    def count(**options):
        inferer = make(stages=("aova",), min_volume_ml=0, **options)
        labels = inferer.segment(volume, affine=np.diag([3.0, 3, 3, 1]), modality="ct").labels
        return ndimage.label(labels, np.ones((3, 3, 3)))[1], labels.sum()

    many, total = count()
    one, largest = count(max_components=1)
    assert many > 1 == one and 0 < largest < total
    assert count(threshold=0.8)[1] < total


def test_learned_fusion_is_used_where_it_is_known(make, volume, tiny_tumor_model):
    from zeroseg.tumor.aova import load_adapters

    adapters = load_adapters(tiny_tumor_model)
    assert "otsu" in make(adapters=adapters).segment(volume, affine=AFFINE, modality="ct").details["fusion"]
    weights = {"bias": -9.0, "aova": 0.1, "feature": 0.0, "pixel": 0.0}
    adapters.fusion = {"ct": {"aova+feature+pixel": weights}}
    result = make(adapters=adapters).segment(volume, affine=AFFINE, modality="ct")
    assert result.details["fusion"]["bias"] == -9 and result.absent
    assert (
        "otsu" in make(adapters=adapters, fusion="otsu").segment(volume, affine=AFFINE, modality="ct").details["fusion"]
    )


def test_monais_way_in(make, volume):
    inferer = make()
    assert isinstance(inferer, Inferer)
    batch = torch.from_numpy(np.stack([volume, volume[:, ::-1].copy()]))
    masks = inferer(batch, None, affine=AFFINE, modality="ct")
    assert masks.shape == batch.shape and masks.dtype == torch.uint8
    np.testing.assert_array_equal(masks[0, 0].numpy(), inferer.segment(volume, affine=AFFINE, modality="ct").labels)
    meta = MetaTensor(batch[:1], affine=torch.from_numpy(AFFINE))
    assert torch.equal(inferer(meta, modality="ct"), masks[:1])
    with pytest.raises(ZeroSegError, match=r"must be \(B, 1, X, Y, Z\)"):
        inferer(batch[0, 0], modality="ct")


def test_a_picture_is_a_volume_of_one_slice(make, volume):
    inferer = make()
    image = torch.from_numpy(volume[None, :, :, :, 5])
    masks = inferer(image, modality="ct")
    assert masks.shape == image.shape
    single = inferer.segment(volume[..., 5:6], modality="ct")
    np.testing.assert_array_equal(masks[0, 0].numpy(), single.labels[..., 0])


def test_flipping_the_file_flips_the_mask(make, volume):
    inferer = make(stages=("aova",))
    plain = inferer.segment(volume, affine=AFFINE, modality="ct").labels
    flipped = inferer.segment(volume[:, ::-1].copy(), affine=AFFINE @ np.diag([-1.0, 1, 1, 1]), modality="ct").labels
    assert (plain == flipped[::-1]).mean() > 0.999


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((3, 2, 2), (1, 1, 1)), ((5, 60, 4), (3, 3, 3)), ((90, 90, 3), (0.5, 0.5, 8)), ((40, 40, 1), (1, 1, 1))],
)
def test_odd_shapes(make, shape, sizes):
    result = make().segment(noise_volume(shape), affine=np.diag([*sizes, 1.0]), modality="ct")
    assert result.labels.shape == shape and all(v.shape == shape for v in result.evidence.values())


def test_volumes_larger_than_a_window(make):
    result = make().segment(noise_volume((48, 20, 20)), affine=np.diag([3.0, 3, 3, 1]), modality="ct")
    assert result.details["working_shape"][0] > 32 and result.labels.shape == (48, 20, 20)


def test_mr_given_as_ct_is_doubted_with_the_reason(make, volume):
    notes = " ".join(make().segment(np.abs(volume) * 10, affine=AFFINE, modality="ct").notes)
    assert "given as CT" in notes and "is it MR?" in notes
    assert make().segment(np.abs(volume) * 10, affine=AFFINE, modality="mr").notes == []


def test_hu_out_of_range_and_unknown_organs_are_noted(make, volume):
    wild = volume.copy()
    wild[0, :3] = 1e5
    result = make().segment(wild, affine=AFFINE, modality="ct", organ="lver")
    assert any("lie outside HU" in note for note in result.notes)
    assert any("did you mean 'liver'" in note for note in result.notes)
    assert result.details["tumor"] == "lver tumour"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((7, 8, 8, 8), np.float32), "time series"),
        (np.zeros((8, 8, 8), np.float32), "must be"),
        (np.full((1, 8, 8, 8), np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_bad_volumes(make, array, message):
    with pytest.raises(ZeroSegError, match=message):
        make().segment(array, modality="ct")


def test_a_constant_volume_is_absent_not_an_error(make):
    result = make(presence=1.0).segment(np.zeros((1, 20, 20, 20), np.float32), affine=AFFINE, modality="mr")
    assert result.absent and any("constant" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("aova", "magic")}, "unknown stage 'magic'"),
        ({"stages": "inpaint"}, "must contain aova"),
        ({"stages": ("aova", "pixel")}, "need inpaint"),
        ({"steps": 0}, "steps must be"),
        ({"resample": 1.5}, "resample must be"),
        ({"strength": 0}, "strength must"),
        ({"strength": 1.1}, "strength must"),
        ({"threshold": 1}, "threshold must"),
        ({"suspicion": 0}, "suspicion must"),
        ({"presence": -0.1}, "presence must"),
        ({"dilation_mm": -1}, "dilation_mm must be a number of millimetres"),
        ({"guidance": -1}, "guidance must"),
        ({"contrast": "t1"}, "unknown contrast 't1': this backbone knows none, leave it out"),
        ({"seed": "a"}, "seed must"),
        ({"min_volume_ml": float("nan")}, "min_volume_ml must"),
        ({"max_components": 0}, "max_components must"),
        ({"fusion": "sum"}, "fusion must be one of"),
        ({"rescale": [1]}, "rescale must be"),
        ({"rescale": [0, 5]}, "rescale must be"),
        ({"organ": ""}, "organ must be words"),
        ({"tumor": 5}, "tumor must be words"),
        ({"modality": "ultrasound"}, "modality must be"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make, options, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        make(**options).check()
    assert "\n" not in str(error.value)


def test_parts_that_do_not_belong_together(make, tiny_tumor_model):
    with pytest.raises(WeightsError, match="adapters read features of"):
        make(adapters=AovaAdapters((16, 32, 64), 16)).check()


def test_settings_are_plain_and_name_no_folder(make, tiny_tumor_model):
    inferer = make()
    inferer.check()
    settings = inferer.settings()
    text = json.dumps(settings)
    assert str(tiny_tumor_model.parent) not in text
    assert settings["stages"] == list(STAGES) and len(settings["adapters"]["sha256"]) == 64


def test_the_maps_serve_the_fitting_of_the_fusion(make, volume):
    inferer = make()
    encoded = inferer.encode(volume, AFFINE, "ct")
    maps = inferer.maps(encoded)
    assert set(maps.fusion_inputs) == {"aova", "pixel", "feature"}
    shape = tuple(encoded.prepared.volume.shape[2:])
    assert all(v.shape == shape for v in maps.fusion_inputs.values()) and maps.region.shape == shape
    assert not (maps.region & ~encoded.prepared.inside.numpy()).any(), "never in the padding"


def test_nothing_is_printed_or_logged(make, volume, capfd, caplog):
    with caplog.at_level(logging.INFO):
        make().segment(volume, affine=AFFINE, modality="ct")
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_words_say_what_and_a_click_says_where(make, volume):
    inferer = make(stages=("aova",))
    encoded = inferer.encode(volume, AFFINE, "ct")
    worded = inferer.predict(encoded)
    inside, outside = np.argwhere(worded.labels)[0].tolist(), np.argwhere(worded.labels == 0)[0].tolist()
    clicked = inferer.predict(encoded, points=[inside])
    assert clicked.labels[tuple(inside)] == 1 and not clicked.absent and clicked.details["words_agree"]
    corrected = inferer.predict(encoded, points=[inside, outside], labels=[1, 0])
    assert corrected.labels[tuple(inside)] == 1 and corrected.labels[tuple(outside)] == 0
    boxed = inferer.predict(encoded, box=[4, 4, 3, 20, 20, 9])
    beyond = np.ones(worded.labels.shape, bool)
    beyond[4:21, 4:21, 3:10] = False
    assert boxed.labels.shape == worded.labels.shape and not (boxed.labels[beyond] & ~worded.labels[beyond]).any()
    with pytest.raises(ZeroSegError, match="outside the image"):
        inferer.predict(encoded, points=[[99, 0, 0]])
    with pytest.raises(ZeroSegError, match="labels are given without points"):
        inferer.predict(encoded, labels=[1])


def test_a_click_is_answered_where_the_words_are_absent(make, volume):
    result = make(stages=("aova",), presence=1).segment(volume, AFFINE, "ct", points=[[10, 10, 6]])
    assert result.labels[10, 10, 6] == 1 and not result.absent and result.reason is None
    assert any("the words find nothing" in note for note in result.notes)


def test_a_volume_is_decoded_once_for_all_prompts(make, volume):
    inferer = make()
    encoded = inferer.encode(volume, AFFINE, "ct")
    for words in ("liver tumour", "kidney tumour"):
        inferer.maps(encoded, "liver", words)
    kept = encoded._lasting["reconstruction"]
    assert kept is not None
    inferer.maps(encoded, "liver", "tumour")
    assert encoded._lasting["reconstruction"] is kept


class TestOwnAdapters:
    """Brain and head, and limbs, are answered by embedded adapters of their own."""

    @pytest.fixture(scope="class")
    def inferer(self):
        return TumorSegmentationInferer(MaisiBackbone(device="cpu"), TextEncoder(device="cpu"), stages=("aova",))

    @pytest.fixture(scope="class")
    def slice_of_mr(self):
        return np.abs(noise_volume((48, 48, 1)))

    def test_are_asked_for_its_organs_only(self, inferer, slice_of_mr):
        encoded = inferer.encode(slice_of_mr, AFFINE, "mr", "brain")
        assert len(encoded.readers) == 1
        assert inferer.predict(encoded, "brain").details["adapters"] == "embedded:head"
        assert "encode" in inferer.predict(encoded, "brain").seconds and len(encoded.readers) == 1
        liver = inferer.predict(encoded, "liver")
        assert "adapters" not in liver.details and len(encoded.readers) == 2
        again = inferer.segment(slice_of_mr, AFFINE, "mr", "liver")
        np.testing.assert_array_equal(again.confidence, liver.confidence)

    def test_those_of_the_limbs_answer_together_with_the_general_ones(self, inferer):
        volume = noise_volume()
        encoded = inferer.encode(volume, AFFINE, "ct", "thigh")
        found = inferer.predict(encoded, "thigh")
        assert found.details["adapters"] == "embedded:limb" and len(encoded.readers) == 2
        assert found.labels.shape == volume.shape[1:]
        assert inferer.predict(encoded, "limb", "zqxv plomf").absent and len(encoded.readers) == 2
        own, general = inferer._of("limb", "ct"), inferer.replace()
        own._beside = None
        general._of = lambda organ, modality: general
        asked = {"organ": "limb", "tumor": "sarcoma"}
        parts = [one.maps(encoded, **asked).aova for one in (own, general)]
        together = inferer.maps(encoded, **asked).aova
        torch.testing.assert_close(together.margin, parts[0].margin + parts[1].margin)
        # In PET the general ones weigh half as much.
        encoded = inferer.encode(volume, AFFINE, "pet", "thigh")
        own, general = inferer._of("limb", "pet"), inferer.replace()
        own._beside = None
        general._of = lambda organ, modality: general
        pet = [one.maps(encoded, **asked).aova.margin for one in (own, general)]
        torch.testing.assert_close(inferer.maps(encoded, **asked).aova.margin, pet[0] + pet[1] / 2)
        # Whether there is one at all is said by the limbs' own.
        assert together.image_logit == pytest.approx(parts[0].image_logit)
        assert "adapters" not in inferer.segment(volume, AFFINE, "mr", "limb").details

    def test_a_place_without_prompts_is_asked_for_as_one_that_has_them(self, inferer):
        volume = noise_volume()
        encoded = inferer.encode(volume, AFFINE, "ct", "body", "breast cancer")
        read = set(encoded.readers)
        breast, whole = inferer.predict(encoded, "left breast"), inferer.predict(encoded, "body", "breast cancer")
        for found, organ, said in ((breast, "left breast", "left breast tumour"), (whole, "body", "breast cancer")):
            assert (found.details["organ"], found.details["place"]) == (organ, "soft tissue")
            assert found.details["adapters"] == "embedded:limb" and found.name == said
            assert f"{organ!r} is asked for as: soft tissue" in found.notes
        np.testing.assert_array_equal(whole.confidence, inferer.predict(encoded, "soft tissue", "tumour").confidence)
        np.testing.assert_array_equal(breast.confidence, whole.confidence)
        assert set(encoded.readers) == read, "the words told the encoding which adapters read first"
        tissue = inferer.predict(encoded, "soft tissue")
        assert "place" not in tissue.details and not any("asked for as" in note for note in tissue.notes)

    def test_adapters_that_were_given_get_the_organ_as_it_was_said(self, make, volume):
        result = make(stages=("aova",)).segment(volume, AFFINE, "ct", "breast")
        assert "place" not in result.details and any("'breast' has no prompts" in note for note in result.notes)

    def test_nonsense_is_absent(self, inferer, slice_of_mr):
        result = inferer.segment(slice_of_mr, AFFINE, "mr", "brain", "zqxv plomf")
        assert result.absent and "knows none of the words" in result.reason

    def test_adapters_that_were_given_answer_for_all_organs(self, make):
        result = make(stages=("aova",)).segment(noise_volume(), AFFINE, "ct", "brain")
        assert "adapters" not in result.details

    def test_without_them_the_general_ones_answer(self, inferer, slice_of_mr, monkeypatch, tmp_path):
        from zeroseg.tumor import inferer as module

        monkeypatch.setitem(module.EMBEDDED_SETS, module.EMBEDDED_HEAD, tmp_path / "nothing")
        assert "adapters" not in inferer.segment(slice_of_mr, AFFINE, "mr", "brain").details
