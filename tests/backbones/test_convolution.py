"""Small 3-D convolutions by oneDNN: the same numbers, whatever the convolution, and training untouched."""

import pytest
import torch
from torch import nn

from zeroseg.backbones.convolution import Conv3d, use_onednn

CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": (1, 3, 3), "padding": (0, 2, 2), "dilation": (1, 2, 2)},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": "same"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_same_numbers_as_torch(options):
    torch.manual_seed(0)
    plain = nn.Conv3d(8, 12, **options)
    fast = use_onednn(nn.Sequential(nn.Conv3d(8, 12, **options)))
    fast[0].load_state_dict(plain.state_dict())
    volume = torch.randn(1, 8, 6, 7, 9)
    with torch.inference_mode():
        torch.testing.assert_close(fast(volume), plain(volume), rtol=1e-4, atol=1e-5)


def test_only_plain_convolutions_change_class_and_weights_stay():
    class Own(nn.Conv3d):
        pass

    model = nn.Sequential(nn.Conv3d(2, 2, 3), Own(2, 2, 3), nn.Conv2d(2, 2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_onednn(model) is model
    assert [type(module) for module in model] == [Conv3d, Own, nn.Conv2d]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_and_half_precision_go_torch_s_way():
    model = use_onednn(nn.Conv3d(4, 4, 3, padding=1))
    volume = torch.randn(1, 4, 5, 5, 5, requires_grad=True)
    model(volume).square().sum().backward()
    assert volume.grad.abs().sum() > 0 and model.weight.grad.abs().sum() > 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(volume.detach()).dtype == torch.bfloat16
