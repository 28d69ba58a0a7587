import numpy as np
import pytest

from zeroseg.evaluation.baselines import (
    AUTOMATIC,
    CLICKS,
    all_foreground,
    border_rule,
    colour_click,
    grabcut_click,
    grabcut_colour_click,
    kmeans2,
    kmeans2_bright,
    otsu,
    otsu_bright,
)


@pytest.fixture(scope="module")
def disc() -> np.ndarray:
    y, x = np.mgrid[:64, :80]
    return (x - 30) ** 2 + (y - 28) ** 2 < 15**2


def paint(mask: np.ndarray, inside: tuple, outside: tuple, noise: float = 0.02) -> np.ndarray:
    """A noisy image (C, H, W) with one value per channel in the mask and one outside of it."""
    clean = np.where(mask, np.reshape(inside, (-1, 1, 1)), np.reshape(outside, (-1, 1, 1)))
    return np.clip(clean + np.random.default_rng(0).normal(0, noise, clean.shape), 0, 1).astype(np.float32)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("inside, outside", [((0.8,), (0.3,)), ((0.3,), (0.8,))])
@pytest.mark.parametrize("method", [otsu, kmeans2])
def test_two_classes_are_found_whatever_the_polarity(disc, method, inside, outside):
    assert iou(method(paint(disc, inside, outside)), disc) > 0.99


def test_bright_variants_keep_the_bright_class(disc):
    dark_object = paint(disc, (0.2,), (0.7,))
    for method in (otsu_bright, kmeans2_bright):
        assert iou(method(dark_object), ~disc) > 0.99


def test_kmeans_separates_colours_of_equal_luminance(disc):
    image = paint(disc, (0.9, 0.3, 0.3), (0.2, 0.5, 0.5), noise=0.0)
    assert np.array_equal(kmeans2(image), disc)


def test_border_rule_takes_the_class_that_covers_less_of_the_border():
    mask = np.zeros((10, 10), bool)
    mask[:, :4] = True  # 4 + 4 + 8 of 36 border pixels
    assert np.array_equal(border_rule(mask), mask)
    assert np.array_equal(border_rule(~mask), mask)


def test_all_foreground_is_everything():
    assert all_foreground(np.zeros((1, 3, 4), np.float32)).tolist() == [[True] * 4] * 3


@pytest.mark.parametrize("method", CLICKS.values())
def test_click_selects_the_object_it_points_at(disc, method):
    two = disc.copy()
    two[10:50, 60:74] = True  # a second object of the same colour
    image = paint(two, (0.9, 0.2, 0.3), (0.3, 0.4, 0.6))
    assert iou(method(image, 30, 28), disc) > 0.9
    assert iou(method(image, 66, 30), two & ~disc) > 0.9


def test_colour_click_follows_the_colour_and_stops_where_it_is_not_connected():
    image = np.zeros((1, 20, 20), np.float32)
    image[0, 2:8, 2:8] = image[0, 12:18, 12:18] = 1
    expected = np.zeros((20, 20), bool)
    expected[2:8, 2:8] = True
    assert np.array_equal(colour_click(image, 5, 4), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("name", [*AUTOMATIC, *CLICKS])
def test_any_channel_count_and_a_click_in_the_corner(disc, channels, name):
    image = paint(disc, (0.9,) * channels, (0.2,) * channels)
    mask = AUTOMATIC[name](image) if name in AUTOMATIC else CLICKS[name](image, 79, 63)
    assert mask.shape == disc.shape and mask.dtype == bool
    if name in CLICKS:
        assert mask[63, 79]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 9)])
def test_constant_images_have_an_answer(shape):
    image = np.full(shape, 0.4, np.float32)
    for method in AUTOMATIC.values():
        assert method(image).shape == shape[1:]
    for method in CLICKS.values():
        assert method(image, 0, 0)[0, 0]


def test_same_image_same_masks(disc):
    image = paint(disc, (0.7, 0.2, 0.3), (0.4, 0.4, 0.6), noise=0.2)
    assert np.array_equal(kmeans2(image), kmeans2(image))
    for method in (grabcut_click, grabcut_colour_click):
        assert np.array_equal(method(image, 30, 28), method(image, 30, 28))


def test_grabcut_smooths_what_noise_breaks_up(disc):
    image = paint(disc, (0.7,), (0.4,), noise=0.1)
    assert iou(grabcut_colour_click(image, 30, 28), disc) > 0.95 > iou(colour_click(image, 30, 28), disc)
