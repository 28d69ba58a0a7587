"""The network that learns from a few labelled images: MONAI's ``BasicUNet``, told at its second level what the frozen model sees."""

from __future__ import annotations

from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from zeroseg.interaction.head import WINDOW

GRID = WINDOW // 2
"""Side of the maps the frozen model's features are brought to: that of the network's second level."""
COMPONENTS = 32
"""Principal components kept of the frozen model's features."""


class FewShotNet(nn.Module):
    """Logits of every label from an image and the frozen model's features.

    The features join by one 1 x 1 convolution that starts at zero: at first the network is the plain U-Net, and takes of the frozen
    model what its labels ask for. Joined at the image's own resolution they made it worse than without.

    Args:
        classes: labels and the background.
        components: channels of the features.
    """

    def __init__(self, classes: int, components: int = COMPONENTS):
        super().__init__()
        self.classes, self.components = classes, components
        self.unet = BasicUNet(2, 3, classes)
        self.features = nn.Conv2d(components, self.unet.down_1.convs.conv_1.conv.out_channels, 1)
        nn.init.zeros_(self.features.weight)
        nn.init.zeros_(self.features.bias)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] and (B, components, S / 2, S / 2) -> logits (B, classes, S, S)."""
        net = self.unet
        levels = [net.conv_0(image)]
        levels.append(net.down_1(levels[-1]) + self.features(features))
        for down in (net.down_2, net.down_3, net.down_4):
            levels.append(down(levels[-1]))
        x: Tensor = levels.pop()
        for up in (net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1):
            x = up(x, levels.pop())
        return net.final_conv(x)
