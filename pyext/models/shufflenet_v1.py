"""ShuffleNet V1: grouped 1×1 convolutions whose channels are shuffled, in units with a depthwise convolution."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear, ShuffleUnit
from kernelpress.models.architecture import Architecture, Published
from kernelpress.models.blocks import check_images, check_positive, conv_norm_act, initialise, scaled

__all__ = ["ARCHITECTURES", "ShuffleNetV1", "shufflenet_v1"]

_STEM_CHANNELS = 24
_STAGE_CHANNELS: Mapping[int, int] = MappingProxyType({1: 144, 2: 200, 3: 240, 4: 272, 8: 384})
"""Groups → channels of the first stage; each further one has twice as many (table 1)."""
_DEPTHS = (4, 8, 4)


class ShuffleNetV1(nn.Module):
    """Zhang et al., ShuffleNet, CVPR 2018, table 1.

    x: [N, in_channels, H, W] → [N, num_classes]. `groups`, 1, 2, 3, 4 or 8, are those of the 1×1 convolutions; only the
    very first of these has one. `width_mult` multiplies every channel count (rounded so that groups divide it). With
    `small_input` the stem has stride 1 and no max-pooling, for images of about 32×32.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        groups: int = 3,
        width_mult: float = 1.0,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
        if isinstance(groups, bool) or groups not in _STAGE_CHANNELS:
            raise ValueError(f"groups: expected one of {', '.join(map(str, _STAGE_CHANNELS))}, got {groups!r}")
        channels = scaled("width_mult", width_mult, _STEM_CHANNELS, groups)
        self.conv1 = conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, nn.ReLU)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        # A bottleneck has a quarter of the channels, in these groups.
        out_channels = scaled("width_mult", width_mult, _STAGE_CHANNELS[groups], 4 * groups)
        stages: list[nn.Module] = []
        for index, depth in enumerate(_DEPTHS):
            units = [
                ShuffleUnit(channels, out_channels, groups, stride=2, compress_groups=1 if index == 0 else groups),
                *(ShuffleUnit(out_channels, out_channels, groups) for _ in range(1, depth)),
            ]
            stages.append(nn.Sequential(*units))
            channels, out_channels = out_channels, 2 * out_channels
        self.stage2, self.stage3, self.stage4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def shufflenet_v1(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    groups: int = 3,
    width_mult: float = 1.0,
    small_input: bool = False,
) -> ShuffleNetV1:
    """ShuffleNet V1: 1.9 M parameters and 138 MMAC at 224×224 in 3 groups."""
    return ShuffleNetV1(
        num_classes=num_classes, in_channels=in_channels, groups=groups, width_mult=width_mult, small_input=small_input
    )


_PAPER = "Zhang et al. 2018, arXiv 1707.01083"
_REPOSITORY = "github.com/megvii-model/ShuffleNet-Series"


def _published(
    source: str, parameters: float | None, multiply_adds: float, accuracy: float, **options: float
) -> Published:
    accuracy_source = _REPOSITORY if "width_mult" in options else f"{_PAPER}, table 2"
    return Published(_PAPER, parameters, multiply_adds, source, accuracy, accuracy_source, options)


ARCHITECTURES = (
    Architecture(
        "shufflenet_v1",
        shufflenet_v1,
        (
            _published(_REPOSITORY, 1.9e6, 138e6, 67.4),
            _published("table 1", None, 143e6, 66.4, groups=1),
            _published("table 1", None, 140e6, 67.3, groups=2),
            _published("table 1", None, 133e6, 67.2, groups=4),
            _published(_REPOSITORY, 2.4e6, 138e6, 67.6, groups=8),
            _published(_REPOSITORY, 0.7e6, 38e6, 57.3, width_mult=0.5),
            _published(_REPOSITORY, 5.4e6, 524e6, 74.1, width_mult=2.0),
        ),
    ),
)
