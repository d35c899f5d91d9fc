"""SqueezeNet 1.0 and 1.1: fire modules, with torchvision's state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpress.layers import Conv2d, PointwiseConv2d
from kernelpress.models.architecture import Architecture, KeyMap, Published
from kernelpress.models.blocks import check_images, check_positive, initialise

__all__ = ["ARCHITECTURES", "Fire", "SqueezeNet", "squeezenet1_0", "squeezenet1_1"]

_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Channels of each fire module after its squeeze, and after each half of its expansion (table 1)."""


class Fire(nn.Module):
    """A 1×1 convolution to few channels, then a 1×1 and a 3×3 side by side, concatenated; each with ReLU (figure 1)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = PointwiseConv2d(in_channels, squeezed)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = PointwiseConv2d(squeezed, expanded)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        left = self.expand1x1_activation(self.expand1x1(x))
        return torch.cat((left, self.expand3x3_activation(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """Iandola et al., SqueezeNet, arXiv 1602.07360, table 1 (without bypass).

    x: [N, in_channels, H, W] → [N, num_classes]. `pools` are the fire modules, from 0, that come after a max-pooling;
    the stem has `stem_channels` and a window of `stem_size`. With `small_input` the stem is a 3×3 convolution of stride
    1 and not followed by a pooling, for images of about 32×32.
    """

    def __init__(
        self,
        stem_channels: int,
        stem_size: int,
        pools: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        small_input: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        # Every pooling in ceil mode needs two rows; the stem is not padded.
        self.smallest_image = 4 if small_input else 14 + stem_size
        stem = (
            Conv2d(in_channels, stem_channels, 3, padding=1)
            if small_input
            else Conv2d(in_channels, stem_channels, stem_size, stride=2)
        )
        stages: list[nn.Module] = [stem, nn.ReLU(inplace=True)]
        channels = stem_channels
        for index, (squeezed, expanded) in enumerate(_FIRES):
            if index in pools:
                is_dropped = small_input and index == 0
                stages.append(nn.Identity() if is_dropped else nn.MaxPool2d(3, stride=2, ceil_mode=True))
            stages.append(Fire(channels, squeezed, expanded))
            channels = 2 * expanded
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), PointwiseConv2d(channels, num_classes), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest_image)
        return torch.flatten(self.classifier(self.features(x)), 1)


def squeezenet1_0(
    *, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False, dropout: float = 0.5
) -> SqueezeNet:
    """SqueezeNet 1.0: 1.2 M parameters and 819 MMAC at 224×224."""
    return SqueezeNet(
        *(96, 7, (0, 3, 7)),
        num_classes=num_classes,
        in_channels=in_channels,
        small_input=small_input,
        dropout=dropout,
    )


def squeezenet1_1(
    *, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False, dropout: float = 0.5
) -> SqueezeNet:
    """SqueezeNet 1.1: as accurate as 1.0 with 2.4 times fewer multiplications; 1.2 M parameters and 349 MMAC at
    224×224."""
    return SqueezeNet(
        *(64, 3, (0, 2, 4)),
        num_classes=num_classes,
        in_channels=in_channels,
        small_input=small_input,
        dropout=dropout,
    )


_PAPER = "Iandola et al. 2016, arXiv 1602.07360"
_MAPS = (KeyMap("torchvision"),)

ARCHITECTURES = (
    Architecture(
        "squeezenet1_0",
        squeezenet1_0,
        (Published(_PAPER, 1_248_424, 819e6, "torchvision", 57.5, f"{_PAPER}, table 2"),),
        _MAPS,
    ),
    Architecture(
        "squeezenet1_1",
        squeezenet1_1,
        (Published(_PAPER, 1_235_496, 349e6, "torchvision", 58.178, "torchvision, IMAGENET1K_V1"),),
        _MAPS,
    ),
)
