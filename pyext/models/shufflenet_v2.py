"""ShuffleNet V2: half of the channels pass, the others are convolved, then both are shuffled together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear, ShuffleUnitV2
from kernelpress.models.architecture import Architecture, KeyMap, Published
from kernelpress.models.blocks import (
    check_images,
    check_positive,
    conv_norm_act,
    initialise,
    pointwise_norm_act,
    scaled,
)

__all__ = ["ARCHITECTURES", "ShuffleNetV2", "shufflenet_v2"]

_STEM_CHANNELS = 24
_DEPTHS = (4, 8, 4)
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Width → channels of the three stages and of the last convolution (table 5); they are not the multiples of one."""


class ShuffleNetV2(nn.Module):
    """Ma et al., ShuffleNet V2, ECCV 2018, table 5.

    x: [N, in_channels, H, W] → [N, num_classes]. `width_mult` is one of the paper's, 0.5, 1, 1.5 or 2, or another
    multiple of the channels of 1. With `small_input` the stem has stride 1 and no max-pooling, for images of about
    32×32.
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small_input: bool = False
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
        *widths, last_channels = _CHANNELS.get(width_mult) or (
            *(scaled("width_mult", width_mult, base, 2) for base in _CHANNELS[1.0][:-1]),
            scaled("width_mult", max(1.0, width_mult), _CHANNELS[1.0][-1]),
        )
        channels = _STEM_CHANNELS
        self.conv1 = conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, nn.ReLU)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        for depth, out_channels in zip(_DEPTHS, widths, strict=True):
            units = [ShuffleUnitV2(channels, out_channels, stride=2)]
            units += [ShuffleUnitV2(out_channels, out_channels) for _ in range(1, depth)]
            stages.append(nn.Sequential(*units))
            channels = out_channels
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = pointwise_norm_act(channels, last_channels, nn.ReLU)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(last_channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.conv5(self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x))))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def shufflenet_v2(
    *, num_classes: int = 1000, in_channels: int = 3, width_mult: float = 1.0, small_input: bool = False
) -> ShuffleNetV2:
    """ShuffleNet V2: 2.3 M parameters and 145 MMAC at 224×224."""
    return ShuffleNetV2(
        num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, small_input=small_input
    )


_PAPER = "Ma et al. 2018, arXiv 1807.11164"


def _published(parameters: int, multiply_adds: float, accuracy: float, **options: Any) -> Published:
    return Published(_PAPER, parameters, multiply_adds, "torchvision", accuracy, f"{_PAPER}, table 8", options)


_PARTS = {
    "branch1": ("depthwise", "depthwise_norm", "pointwise", "pointwise_norm"),
    "branch2": ("expand", "expand_norm", None, "depthwise", "depthwise_norm", "project", "project_norm"),
}
_TORCHVISION = KeyMap(
    "torchvision",
    tuple(
        (rf"\.{branch}\.{index}\.", f".{branch}.{part}.")
        for branch, parts in _PARTS.items()
        for index, part in enumerate(parts)
        if part is not None
    ),
)

ARCHITECTURES = (
    Architecture(
        "shufflenet_v2",
        shufflenet_v2,
        (
            _published(2_278_604, 145e6, 69.4),
            _published(1_366_792, 40e6, 60.3, width_mult=0.5),
            _published(3_503_624, 296e6, 72.6, width_mult=1.5),
            _published(7_393_996, 583e6, 74.9, width_mult=2.0),
        ),
        (KeyMap("kernelpress"), _TORCHVISION),
    ),
)
