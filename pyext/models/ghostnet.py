"""GhostNet and GhostNet V2: bottlenecks of ghost modules, in V2 with attention along rows and columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.layers import Conv2d, DepthwiseConv2d, GhostBottleneck, GhostModule, Linear, PointwiseConv2d
from kernelpress.models.architecture import Architecture, KeyMap, Published
from kernelpress.models.blocks import check_images, check_positive, initialise, scaled

__all__ = ["ARCHITECTURES", "AttentiveGhostBottleneck", "AttentiveGhostModule", "GhostNet", "ghostnet", "ghostnet_v2"]


class _Row(NamedTuple):
    """A line of table 1: window, channels inside and after, ratio of squeeze-and-excitation, stride."""

    kernel_size: int
    hidden: int
    channels: int
    se_ratio: float
    stride: int


_STEM_CHANNELS = 16
_HEAD_CHANNELS = 1280
_STAGES = (
    (_Row(3, 16, 16, 0, 1),),
    (_Row(3, 48, 24, 0, 2),),
    (_Row(3, 72, 24, 0, 1),),
    (_Row(5, 72, 40, 0.25, 2),),
    (_Row(5, 120, 40, 0.25, 1),),
    (_Row(3, 240, 80, 0, 2),),
    (
        _Row(3, 200, 80, 0, 1),
        _Row(3, 184, 80, 0, 1),
        _Row(3, 184, 80, 0, 1),
        _Row(3, 480, 112, 0.25, 1),
        _Row(3, 672, 112, 0.25, 1),
    ),
    (_Row(5, 672, 160, 0.25, 2),),
    (
        _Row(5, 960, 160, 0, 1),
        _Row(5, 960, 160, 0.25, 1),
        _Row(5, 960, 160, 0, 1),
        _Row(5, 960, 160, 0.25, 1),
    ),
)
"""In the stages that the authors' state dict counts."""
_PLAIN_STAGES = 2
"""Of GhostNet V2, that have no attention."""


class AttentiveGhostModule(GhostModule):
    """A ghost module whose channels are weighed by DFC attention (Tang et al. 2022, fig. 4).

    `short_conv`, at half of the resolution: 1×1, 1×5 and 5×1 convolutions with a norm each, the latter two depthwise.
    Their sigmoid, enlarged to the nearest, multiplies what the ghost module gives.

    x: `[N, C_in, H, W]` of at least 2×2 → `[N, C_out, H, W]`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.short_conv = nn.Sequential(
            PointwiseConv2d(in_channels, out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
            DepthwiseConv2d(out_channels, (1, 5), padding=(0, 2), bias=False),
            nn.BatchNorm2d(out_channels),
            DepthwiseConv2d(out_channels, (5, 1), padding=(2, 0), bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate = self.short_conv(F.avg_pool2d(x, 2, 2)).sigmoid()
        y = super().forward(x) * F.interpolate(gate, x.shape[-2:], mode="nearest")
        return y if residual is None else y + residual


class AttentiveGhostBottleneck(GhostBottleneck):
    """A ghost bottleneck whose first ghost module has attention (Tang et al. 2022, fig. 5)."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, *further: Any) -> None:
        super().__init__(in_channels, hidden, out_channels, *further)
        self.ghost1 = AttentiveGhostModule(in_channels, hidden)


class GhostNet(nn.Module):
    """Han et al., GhostNet, CVPR 2020, table 1; with `attention` Tang et al., GhostNetV2, NeurIPS 2022.

    x: [N, in_channels, H, W] → [N, num_classes]. `width_mult` multiplies every channel count (rounded to multiples of
    4) but that of the layer before the classes. With `small_input` the stem and the next layer of stride 2 have stride
    1, for images of about 32×32.
    """

    def __init__(
        self,
        attention: bool,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mult: float = 1.0,
        small_input: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult)
        # The maps that reach the last attention are a 32nd of the image, an 8th with `small_input`.
        self.smallest_image = (9 if small_input else 33) if attention else 1
        channels = scaled("width_mult", width_mult, _STEM_CHANNELS, 4)
        self.conv_stem = Conv2d(in_channels, channels, 3, stride=1 if small_input else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        hidden = channels
        for number, rows in enumerate(_STAGES):
            block = AttentiveGhostBottleneck if attention and number >= _PLAIN_STAGES else GhostBottleneck
            blocks: list[nn.Module] = []
            for row in rows:
                hidden = scaled("width_mult", width_mult, row.hidden, 4)
                out_channels = scaled("width_mult", width_mult, row.channels, 4)
                stride = 1 if small_input and number == 1 else row.stride
                blocks.append(block(channels, hidden, out_channels, row.kernel_size, stride, row.se_ratio))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        last = nn.Sequential()
        last.conv = PointwiseConv2d(channels, hidden, bias=False)
        last.bn1 = nn.BatchNorm2d(hidden)
        last.act1 = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*stages, nn.Sequential(last))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = PointwiseConv2d(hidden, _HEAD_CHANNELS)
        self.act2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(_HEAD_CHANNELS, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest_image)
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.act2(self.conv_head(self.global_pool(x)))
        logits: Tensor = self.classifier(self.dropout(torch.flatten(x, 1)))
        return logits


def ghostnet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    small_input: bool = False,
    dropout: float = 0.2,
) -> GhostNet:
    """GhostNet: 5.2 M parameters and 141 MMAC at 224×224."""
    return GhostNet(
        False,
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        small_input=small_input,
        dropout=dropout,
    )


def ghostnet_v2(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    small_input: bool = False,
    dropout: float = 0.2,
) -> GhostNet:
    """GhostNet V2: 6.1 M parameters and 167 MMAC at 224×224."""
    return GhostNet(
        True,
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        small_input=small_input,
        dropout=dropout,
    )


_FIRST, _SECOND = "Han et al. 2020, arXiv 1911.11907", "Tang et al. 2022, arXiv 2211.12905"


def _published(
    paper: str, table: str, parameters: float, multiply_adds: float, accuracy: float, **options: float
) -> Published:
    return Published(paper, parameters, multiply_adds, table, accuracy, f"{paper}, {table}", options)


ARCHITECTURES = (
    Architecture(
        "ghostnet",
        ghostnet,
        (
            _published(_FIRST, "table 7", 5.2e6, 141e6, 73.9),
            _published(_FIRST, "table 7", 2.6e6, 42e6, 66.2, width_mult=0.5),
            _published(_FIRST, "table 7", 7.3e6, 226e6, 75.7, width_mult=1.3),
        ),
        (KeyMap("timm"),),
    ),
    Architecture(
        "ghostnet_v2",
        ghostnet_v2,
        (
            _published(_SECOND, "table 2", 6.1e6, 167e6, 75.3),
            _published(_SECOND, "table 2", 8.9e6, 269e6, 76.9, width_mult=1.3),
            _published(_SECOND, "table 2", 12.3e6, 399e6, 77.8, width_mult=1.6),
        ),
        (KeyMap("timm"),),
    ),
)
