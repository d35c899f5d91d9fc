"""MobileNet V3: inverted residuals with squeeze-and-excitation and hard-swish, found by search; Small and Large."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernelpress.layers import Linear, SqueezeExcite
from kernelpress.models.architecture import Architecture, KeyMap, Published, numbered
from kernelpress.models.blocks import (
    check_images,
    check_positive,
    conv_norm_act,
    depthwise_norm_act,
    initialise,
    make_divisible,
    pointwise_norm_act,
    scaled,
)

__all__ = ["ARCHITECTURES", "MobileNetV3", "SearchedBottleneck", "mobilenet_v3_large", "mobilenet_v3_small"]


class _Row(NamedTuple):
    """A line of tables 1 and 2: window, channels inside and after, squeeze-and-excitation, activation, stride."""

    kernel_size: int
    hidden: int
    channels: int
    excites: bool
    activation: type[nn.Module]
    stride: int


_RE, _HS = nn.ReLU, nn.Hardswish
_STEM_CHANNELS = 16

_LARGE = (
    _Row(3, 16, 16, False, _RE, 1),
    _Row(3, 64, 24, False, _RE, 2),
    _Row(3, 72, 24, False, _RE, 1),
    _Row(5, 72, 40, True, _RE, 2),
    _Row(5, 120, 40, True, _RE, 1),
    _Row(5, 120, 40, True, _RE, 1),
    _Row(3, 240, 80, False, _HS, 2),
    _Row(3, 200, 80, False, _HS, 1),
    _Row(3, 184, 80, False, _HS, 1),
    _Row(3, 184, 80, False, _HS, 1),
    _Row(3, 480, 112, True, _HS, 1),
    _Row(3, 672, 112, True, _HS, 1),
    _Row(5, 672, 160, True, _HS, 2),
    _Row(5, 960, 160, True, _HS, 1),
    _Row(5, 960, 160, True, _HS, 1),
)
_SMALL = (
    _Row(3, 16, 16, True, _RE, 2),
    _Row(3, 72, 24, False, _RE, 2),
    _Row(3, 88, 24, False, _RE, 1),
    _Row(5, 96, 40, True, _HS, 2),
    _Row(5, 240, 40, True, _HS, 1),
    _Row(5, 240, 40, True, _HS, 1),
    _Row(5, 120, 48, True, _HS, 1),
    _Row(5, 144, 48, True, _HS, 1),
    _Row(5, 288, 96, True, _HS, 2),
    _Row(5, 576, 96, True, _HS, 1),
    _Row(5, 576, 96, True, _HS, 1),
)


class SearchedBottleneck(nn.Module):
    """Expand (1×1), depthwise, squeeze-and-excitation to a quarter, project (1×1, linear), plus the input where shapes
    allow (Howard et al. 2019, figure 4)."""

    def __init__(self, in_channels: int, row: _Row, norm_layer: Any) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        if row.hidden != in_channels:
            stages.append(pointwise_norm_act(in_channels, row.hidden, row.activation, norm_layer))
        stages.append(depthwise_norm_act(row.hidden, row.kernel_size, row.stride, row.activation, norm_layer))
        if row.excites:
            stages.append(SqueezeExcite(row.hidden, make_divisible(row.hidden // 4)))
        stages.append(pointwise_norm_act(row.hidden, row.channels, None, norm_layer))
        self.block = nn.Sequential(*stages)
        self.has_residual = row.stride == 1 and in_channels == row.channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return x + out if self.has_residual else out


class MobileNetV3(nn.Module):
    """Howard et al., Searching for MobileNetV3, ICCV 2019, tables 1 (Large) and 2 (Small).

    x: [N, in_channels, H, W] → [N, num_classes]. `width_mult` multiplies every channel count but that of the layer
    before the classes, which never shrinks. `norm_eps` is the BatchNorms' (the authors' and torchvision's; timm's is
    1e-5). With `small_input` the stem and the next layer of stride 2 have stride 1, for images of about 32×32.
    """

    def __init__(
        self,
        rows: tuple[_Row, ...],
        last_channels: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mult: float = 1.0,
        norm_eps: float = 1e-3,
        small_input: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width_mult=width_mult, norm_eps=norm_eps)
        norm_layer = partial(nn.BatchNorm2d, eps=norm_eps, momentum=0.01)
        channels = scaled("width_mult", width_mult, _STEM_CHANNELS)
        stages: list[nn.Module] = [conv_norm_act(in_channels, channels, 3, 1 if small_input else 2, _HS, norm_layer)]
        first_strided = next(index for index, row in enumerate(rows) if row.stride == 2)
        for index, row in enumerate(rows):
            row = row._replace(
                hidden=scaled("width_mult", width_mult, row.hidden),
                channels=scaled("width_mult", width_mult, row.channels),
                stride=1 if small_input and index == first_strided else row.stride,
            )
            stages.append(SearchedBottleneck(channels, row, norm_layer))
            channels = row.channels
        stages.append(pointwise_norm_act(channels, 6 * channels, _HS, norm_layer))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        wide = scaled("width_mult", max(1.0, width_mult), last_channels)
        self.classifier = nn.Sequential(
            Linear(6 * channels, wide), nn.Hardswish(inplace=True), nn.Dropout(dropout), Linear(wide, num_classes)
        )
        initialise(self)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenet_v3_large(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    norm_eps: float = 1e-3,
    small_input: bool = False,
    dropout: float = 0.2,
) -> MobileNetV3:
    """MobileNet V3-Large: 5.5 M parameters and 217 MMAC at 224×224."""
    return MobileNetV3(
        _LARGE,
        1280,
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        norm_eps=norm_eps,
        small_input=small_input,
        dropout=dropout,
    )


def mobilenet_v3_small(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    width_mult: float = 1.0,
    norm_eps: float = 1e-3,
    small_input: bool = False,
    dropout: float = 0.2,
) -> MobileNetV3:
    """MobileNet V3-Small: 2.5 M parameters and 57 MMAC at 224×224."""
    return MobileNetV3(
        _SMALL,
        1024,
        num_classes=num_classes,
        in_channels=in_channels,
        width_mult=width_mult,
        norm_eps=norm_eps,
        small_input=small_input,
        dropout=dropout,
    )


_PAPER = "Howard et al. 2019, arXiv 1905.02244"
_EXCITATION = ((r"\.fc1\.", ".conv_reduce."), (r"\.fc2\.", ".conv_expand."))


def _timm_map(rows: tuple[_Row, ...], depths: tuple[int, ...]) -> KeyMap:
    """timm names the parts of a block by what they are, torchvision numbers those that there are."""
    rules = [
        (r"^conv_stem\.", "features.0.0."),
        (r"^bn1\.", "features.0.1."),
        (rf"^blocks\.{len(depths)}\.0\.conv\.", f"features.{len(rows) + 1}.0."),
        (rf"^blocks\.{len(depths)}\.0\.bn1\.", f"features.{len(rows) + 1}.1."),
        (r"^conv_head\.", "classifier.0."),
        (r"^classifier\.(weight|bias)$", r"classifier.3.\1"),
        *numbered(depths, "features.{}.", first=1),
    ]
    channels = _STEM_CHANNELS
    for number, row in enumerate(rows, 1):
        is_expanded = row.hidden != channels
        parts = [["conv_pw", "bn1"], ["conv_dw", "bn2"]] if is_expanded else [["conv_dw", "bn1"]]
        parts += [["se"]] if row.excites else []
        parts += [["conv_pwl", "bn3"] if is_expanded else ["conv_pw", "bn2"]]
        for part, (convolution, *norms) in enumerate(parts):
            prefix, place = rf"^features\.{number}\.", f"features.{number}.block.{part}."
            rules.append((rf"{prefix}{convolution}\.", place if convolution == "se" else f"{place}0."))
            rules += [(rf"{prefix}{norm}\.", f"{place}1.") for norm in norms]
        channels = row.channels
    return KeyMap("timm", tuple(rules), {"norm_eps": 1e-5})


ARCHITECTURES = (
    Architecture(
        "mobilenet_v3_large",
        mobilenet_v3_large,
        (Published(_PAPER, 5_483_032, 217e6, "torchvision", 75.2, f"{_PAPER}, table 3"),),
        (KeyMap("kernelpress"), KeyMap("torchvision", _EXCITATION), _timm_map(_LARGE, (1, 2, 3, 4, 2, 3))),
    ),
    Architecture(
        "mobilenet_v3_small",
        mobilenet_v3_small,
        (Published(_PAPER, 2_542_856, 57e6, "torchvision", 67.4, f"{_PAPER}, table 3"),),
        (KeyMap("kernelpress"), KeyMap("torchvision", _EXCITATION), _timm_map(_SMALL, (1, 2, 3, 2, 3))),
    ),
)
