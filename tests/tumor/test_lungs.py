"""The rule for lungs in CT on drawn chests: what it finds, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.tumor import TumorSegmentationInferer
from zeroseg.tumor.inferer import STAGES
from zeroseg.tumor.lungs import SURE, Nodule, find_nodule, lung_field

SPACING = (3.0, 3.0, 3.0)
SHAPE = (104, 76, 60)
X, Y, Z = (
    (np.arange(n) - (n - 1) / 2).reshape([-1 if a == axis else 1 for a in range(3)]) * 3.0
    for axis, n in enumerate(SHAPE)
)
AFFINE = np.diag([*SPACING, 1.0])


def ball(x: float, y: float, z: float, radius: float) -> np.ndarray:
    return (X - x) ** 2 + (Y - y) ** 2 + (Z - z) ** 2 < radius**2


@pytest.fixture(scope="module")
def tissues():
    """Body, lungs and heart of a chest, (X, Y, Z) bool each; the lungs end on the liver's dome."""
    body = np.broadcast_to((X / 150) ** 2 + (Y / 108) ** 2 < 1, SHAPE)
    cavity = (X / 128) ** 2 + (Y / 86) ** 2 < 1
    heart = (X + 25) ** 2 / 50**2 + (Y - 15) ** 2 / 42**2 + (Z + 20) ** 2 / 45**2 < 1
    below = 45 + ((np.abs(X) - 65) ** 2 + Y**2) / 180
    dome = below + Z < 0
    lungs = cavity & (np.abs(X) > 25) & ~heart & ~dome & (Z < 80)
    return body, lungs, heart


@pytest.fixture(scope="module")
def chest(tissues):
    """(X, Y, Z) float32 HU with vessels from both hila, and no tumour."""
    body, lungs, _ = tissues
    hu = np.where(body, 40.0, -1000.0)
    hu[lungs] = -830
    for side in (-1, 1):
        for y, z in ((-0.5, 0.1), (0.1, 0.5), (0.5, -0.3), (-0.2, -0.6)):
            along = side * X - 25
            vessel = (along > 0) & ((Y - y * along) ** 2 + (Z - z * along) ** 2 < np.clip(6 - along / 18, 1, 6) ** 2)
            hu[vessel & lungs] = 60
    noise = np.random.default_rng(0).standard_normal(SHAPE) * 20
    return (ndimage.gaussian_filter(hu, 0.4) + noise).astype(np.float32)


def with_tumour(chest: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 45, chest).astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_vessels_alone_are_not_sure_enough(chest):
    found = find_nodule(chest, SPACING)
    assert found is None or found.score < SURE


@pytest.mark.parametrize("place", [(80, 0, 20), (-70, -40, 40), (75, 30, -10)])
@pytest.mark.parametrize("radius", [12, 22])
def test_a_tumour_in_a_lung_is_found(chest, tissues, place, radius):
    mask = ball(*place, radius) & tissues[1]
    found = find_nodule(with_tumour(chest, mask), SPACING)
    assert found is not None and found.score >= SURE
    assert dice(found.mask, mask) > 0.85


def test_a_tumour_on_the_chest_wall_belongs_to_the_lung_and_the_heart_does_not(chest, tissues):
    _, lungs, heart = tissues
    mask = ball(122, 0, 20, 20) & lungs
    scan = with_tumour(chest, mask)
    _, field = lung_field(scan, SPACING)
    assert np.count_nonzero(field & mask) > 0.6 * np.count_nonzero(mask)
    assert np.count_nonzero(field & heart) < 0.15 * np.count_nonzero(heart)
    assert not field[52, 38, 2], "the liver under the dome"
    found = find_nodule(scan, SPACING)
    assert found is not None and found.score >= SURE and dice(found.mask, mask) > 0.7


def test_a_scan_of_a_part_of_one_lung_is_enough(chest, tissues):
    mask = ball(80, 0, 20, 14)
    part = (slice(62, 98), slice(24, 54), slice(24, 56))
    found = find_nodule(with_tumour(chest, mask)[part], SPACING)
    assert found is not None and found.score >= SURE and dice(found.mask, mask[part]) > 0.85


def test_where_there_is_no_lung_there_is_nothing(chest, tissues):
    body, _, _ = tissues
    limb = np.where(body, 40.0, -1000.0).astype(np.float32)
    gas = np.where(ball(40, 0, 0, 40), -1000, limb).astype(np.float32)
    lump = np.where(ball(40, 0, 0, 12), 40, gas).astype(np.float32)
    for scan in (limb, gas, lump, np.full(SHAPE, -850, np.float32), np.full(SHAPE, 40, np.float32)):
        assert find_nodule(scan, SPACING) is None


def test_of_the_words_mask_what_touches_the_nodule_stays_and_what_is_larger():
    mask, nodule = np.zeros((2, 20, 20, 20), bool)
    nodule[2:5, 2:5, 2:5] = True
    mask[4:8, 4, 4] = True
    mask[12:18, 12:18, 12:18] = True
    mask[2, 15:18, 2] = True
    logits, joined = Nodule(nodule, 9.0).joined(np.where(mask, 1.0, -9.0), mask)
    mask[2, 15:18, 2] = False
    np.testing.assert_array_equal(joined, mask | nodule)
    assert (logits[nodule] == 2.2).all() and logits[1, 3, 3] == -2.2 and logits[19, 19, 19] == -9


@pytest.fixture
def ask(tiny_tumor_model, tiny_maisi):
    """A question to the tiny model, which knows nothing: what is found, the stage has found."""
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")

    def answer(scan, affine=AFFINE, modality="ct", organ="lung", tumor="lung tumour", **options):
        stages = options.pop("stages", ("aova", "lungs"))
        inferer = TumorSegmentationInferer(
            tiny_maisi, encoder, adapters=tiny_tumor_model, stages=stages, min_volume_ml=1e6, threshold=0.8, **options
        )
        return inferer.segment(scan[None], affine, modality, organ, tumor)

    return answer


def test_the_stage_finds_what_the_words_do_not_in_any_orientation(ask, chest):
    mask = ball(80, 0, 20, 15)
    scan = with_tumour(chest, mask)
    assert ask(scan, stages=("aova",)).absent
    found = ask(scan)
    assert not found.absent and found.details["stages"] == ["aova", "lungs"] and "lungs" in found.seconds
    assert dice(found.labels > 0, mask) > 0.85
    assert any("stands out in the lungs" in note for note in found.notes)
    nodule = found.details["nodule"]
    assert nodule["score_mm"] >= SURE and nodule["millilitres"] == pytest.approx(14.1, abs=2)
    # Axes (S, L, A) in the place of (R, A, S).
    affine = np.array([[0, -3, 0, 3.0 * (SHAPE[0] - 1)], [0, 0, 3, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    turned = ask(scan[::-1].transpose(2, 0, 1), affine)
    np.testing.assert_array_equal(turned.labels, found.labels[::-1].transpose(2, 0, 1))


def test_quarter_hu_and_rescaled_values_are_understood(ask, chest):
    scan = with_tumour(chest, ball(80, 0, 20, 15)).clip(-1000)
    scan[0, 0, 0] = -1000
    plain = ask(scan)
    np.testing.assert_array_equal(ask(scan / 4).labels, plain.labels)
    np.testing.assert_array_equal(ask(scan + 1024, rescale=(1, -1024)).labels, plain.labels)


@pytest.mark.parametrize(
    "asked",
    [{"modality": "mr"}, {"organ": "liver", "tumor": "liver tumour"}, {"tumor": "lung"}, {"tumor": "xyzzy tumour wug"}],
)
def test_the_stage_is_for_tumours_of_the_lungs_in_ct(ask, chest, asked):
    found = ask(with_tumour(chest, ball(80, 0, 20, 15)), **asked)
    assert found.absent and "lungs" not in found.details["stages"]


def test_unknown_words_find_nothing_there_either(ask, chest):
    found = ask(with_tumour(chest, ball(80, 0, 20, 15)), tumor="xyzzy")
    assert found.absent and "knows none of the words" in found.reason


def test_a_picture_of_a_window_and_a_single_slice_have_no_lungs(ask, chest):
    scan = with_tumour(chest, ball(80, 0, 20, 15))
    picture = ask((scan.clip(-160, 240) + 160) / 400 * 255)
    flat = ask(scan[:, :, 36:37])
    for found in (picture, flat):
        assert found.absent and "lungs" not in found.details["stages"]


def test_the_stage_runs_by_default():
    assert "lungs" in STAGES and "lungs" in TumorSegmentationInferer().stages


def test_the_lungs_of_a_volume_are_looked_into_once(tiny_tumor_model, tiny_maisi, chest, monkeypatch):
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")
    inferer = TumorSegmentationInferer(tiny_maisi, encoder, adapters=tiny_tumor_model, stages=("aova", "lungs"))
    looked = []
    monkeypatch.setattr("zeroseg.tumor.inferer.find_nodule", lambda *given: looked.append(given))
    encoded = inferer.encode(chest[None], AFFINE, "ct")
    # The server asks of a copy each time.
    for tumor in ("lung tumour", "lung nodule"):
        inferer.predict(replace(encoded, seconds={}), "lung", tumor)
    inferer.predict(encoded, "lung", "lung tumour")
    assert len(looked) == 1


def test_whole_numbers_are_understood(ask, chest):
    scan = with_tumour(chest, ball(80, 0, 20, 15)).round()
    whole = ask(scan.astype(np.int16))
    assert not whole.absent
    np.testing.assert_array_equal(whole.labels, ask(scan.astype(np.float32)).labels)
