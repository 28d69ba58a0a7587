"""3-D convolutions of small volumes by oneDNN, which PyTorch leaves to a kernel that takes five to ten times as long."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` whose inference on a CPU is oneDNN's whatever the size.

    PyTorch asks oneDNN only where there are several volumes, or where batch, channels and the first two sides multiply to more than
    20480 (``use_mkldnn`` in ATen's ``Convolution.cpp``). That is made for images: 32 channels of 24^3 voxels fall below it.
    Results differ by rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not plain or torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        if not torch.backends.mkldnn.is_available() or input.ndim != 5 or torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)


def use_onednn(model: nn.Module) -> nn.Module:
    """Let every plain ``nn.Conv3d`` of a model be a :class:`Conv3d`; its weights stay where they are. Returns the model."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = Conv3d
    return model
