"""Any channels and any value range become three channels in [0, 1]."""

from __future__ import annotations

import pytest
import torch

from zeroseg.attention.prepare import prepare, stretch, to_three_channels
from zeroseg.errors import ZeroSegError


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("space", [(9, 11), (4, 5, 6)])
def test_shape_type_and_range(channels, space):
    noise = torch.randn(channels, *space, generator=torch.Generator().manual_seed(0)) * 1000 - 400
    result = prepare(noise)
    assert result.shape == (3, *space)
    assert result.dtype == torch.float32
    assert result.min() == 0 and result.max() == 1


def test_one_channel_is_repeated_and_two_get_their_mean():
    one, two = ramp(1, 4, 5), ramp(2, 4, 5)
    assert all(torch.equal(channel, one[0]) for channel in to_three_channels(one))
    assert torch.equal(to_three_channels(two), torch.stack([two[0], two[1], two.mean(0)]))
    three = ramp(3, 4, 5)
    assert torch.equal(to_three_channels(three), three)


def test_many_channels_keep_what_varies_most():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(8, 8, generator=generator)
    image = torch.stack([pattern * w for w in (5.0, 4.0, 3.0, 2.0, 1.0)])
    image = image + 0.01 * torch.randn(image.shape, generator=generator)
    first = to_three_channels(image)[0]
    correlation = torch.corrcoef(torch.stack([first.flatten(), pattern.flatten()]))[0, 1]
    assert correlation > 0.999, "the first component is the common pattern, with its sign"
    assert torch.equal(to_three_channels(image), to_three_channels(image))


def test_stretch_is_linear_between_the_quantiles_and_clips_outliers():
    image = ramp(1, 100, 100)
    image[0, 0, 0] = -1e6
    result = stretch(image)
    middle = result[0, 20:80, 20:80]
    assert result[0, 0, 0] == 0 and result.max() == 1
    assert 0.15 < middle.min() < middle.max() < 0.85
    steps = middle.diff(dim=1)
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=1e-5, rtol=0)


def test_scale_and_offset_do_not_matter():
    image = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prepare(image * 37 + 1000), prepare(image), atol=1e-3, rtol=0)


def test_a_constant_image_becomes_zeros():
    assert torch.equal(prepare(torch.full((1, 5, 6), 7.0)), torch.zeros(3, 5, 6))
    assert torch.equal(prepare(torch.full((5, 5, 6), -2.0)), torch.zeros(3, 5, 6))
    assert prepare(torch.ones(1, 1, 1)).shape == (3, 1, 1)


def test_a_single_bright_pixel_survives():
    image = torch.zeros(1, 50, 50)
    image[0, 3, 4] = 9
    assert prepare(image)[0, 3, 4] == 1, "both quantiles are 0; the extremes take their place"


def test_integers_are_taken():
    assert torch.equal(prepare(torch.arange(256, dtype=torch.uint8).view(1, 16, 16)), prepare(ramp(1, 16, 16)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 0, 5), "empty"),
        (torch.zeros(0, 4, 5), "empty"),
        (torch.tensor([[[1.0, float("nan"), float("inf")]]]), "2 NaN or infinite"),
    ],
)
def test_refuses(image, message):
    with pytest.raises(ZeroSegError, match=message) as error:
        prepare(image)
    assert "\n" not in str(error.value)


def test_the_contrast_of_a_volume_is_not_that_of_one_slice(monkeypatch):
    # Slices lie next to each other in memory: every 16th value of 16 slices is the first slice's.
    monkeypatch.setattr("zeroseg.attention.prepare.SAMPLES", 1600)
    volume = torch.rand(1, 40, 40, 16, generator=torch.Generator().manual_seed(0)) + 1
    volume[..., 0] = torch.linspace(0, 0.1, 1600).view(1, 40, 40)
    stretched = stretch(volume)
    assert (stretched == 1).float().mean() < 0.02 and stretched[..., 1:].std() > 0.1
