"""Grouped convolutions with channel shuffles, and ghost convolutions: layers of ShuffleNet, ResNeXt and GhostNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.contest import Contest, Workload
from gpu.place import Place

__all__ = ["ghost", "grouped"]

BYTES = 2

# ShuffleNet V1, three groups (Zhang et al. 2018, table 1): map size, channels of a unit, of its bottleneck.
_SHUFFLENET_V1 = ((28, 240, 60), (14, 480, 120), (7, 960, 240))

# ShuffleNet V2 1× (Ma et al. 2018, table 5): map size, channels of both branches together.
_SHUFFLENET_V2 = ((28, 116), (14, 232), (7, 464))

# ResNeXt-50 32×4d (Xie et al. 2017, table 1): map size, channels of the grouped 3×3 convolution.
_RESNEXT = ((56, 128), (28, 256), (14, 512), (7, 1024))

# GhostNet 1.0 (Han et al. 2020, table 1): map size, channels in and out of its ghost modules, with relu or without.
_GHOSTNET = (
    (112, 16, 16, True),
    (112, 16, 48, True),
    (56, 48, 24, False),
    (56, 24, 72, True),
    (56, 72, 24, False),
    (28, 72, 40, False),
    (28, 40, 120, True),
    (28, 120, 40, False),
    (14, 240, 80, False),
    (14, 80, 184, True),
    (14, 80, 480, True),
    (14, 480, 112, False),
    (14, 112, 672, True),
    (7, 672, 160, False),
    (7, 160, 960, True),
    (7, 960, 160, False),
)


def grouped(place: Place, batch: int) -> list[Workload]:
    """Grouped 1×1 convolutions with a shuffle, grouped 3×3 ones, shuffles alone, and concat + shuffle."""
    layers = []
    for size, channels, bottleneck in _SHUFFLENET_V1:
        layers.append(_convolution(place, batch, "ShuffleNet V1", size, (channels, bottleneck), 1, 3, 3))
        layers.append(_convolution(place, batch, "ShuffleNet V1", size, (bottleneck, channels), 1, 3, 1))
    for size, channels in _RESNEXT:
        layers.append(_convolution(place, batch, "ResNeXt-50", size, (channels, channels), 3, 32, 1))
    layers += [_shuffle(place, batch, size, channels) for size, channels, _ in _SHUFFLENET_V1]
    layers += [_concat(place, batch, size, channels) for size, channels in _SHUFFLENET_V2]
    return layers


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The shuffle as networks write it; a copy."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _convolution(
    place: Place, batch: int, network: str, size: int, channels: tuple[int, int], kernel: int, groups: int, shuffle: int
) -> Workload:
    size, (c_in, c_out), groups = place.size(size), map(place.channels, channels), place.groups(groups)
    batch = place.batch(batch)
    options: dict[str, Any] = {"padding": [kernel // 2] * 2, "groups": groups, "shuffle": shuffle, "activation": "relu"}
    elements = batch * size * size

    def make() -> Contest:
        x = place.random(batch, c_in, size, size)
        weight, bias = place.weight(c_out, c_in // groups, kernel, kernel), place.random(c_out)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.relu(F.conv2d(x, weight, bias, 1, kernel // 2, 1, groups), inplace=True)
            return shuffled(y, shuffle) if shuffle > 1 else y

        x_nchw, weight_nchw = x.contiguous(), weight.contiguous()
        return Contest(
            **place.own("grouped_conv2d", [x, weight, bias], options),
            peers={
                "cuDNN channels_last + shuffle": lambda: plain(x, weight, bias),
                "cuDNN contiguous + shuffle": lambda: plain(x_nchw, weight_nchw, bias),
            },
            expected=lambda: plain(x.float(), weight.float(), bias.float()),
            eager=lambda: plain(x, weight, bias),
        )

    label = f"{size}×{size} {c_in}→{c_out} {kernel}×{kernel} in {groups} groups" + (", shuffled" if shuffle > 1 else "")
    return Workload(
        *("grouped", "grouped_conv2d", network, label, batch, "bf16"),
        flops=2 * elements * c_out * (c_in // groups) * kernel**2,
        traffic_bytes=BYTES * (elements * (c_in + c_out) + c_out * (c_in // groups) * kernel**2),
        make=make,
    )


def _shuffle(place: Place, batch: int, size: int, channels: int) -> Workload:
    size, channels, batch = place.size(size), place.channels(channels), place.batch(batch)

    def make() -> Contest:
        x = place.random(batch, channels, size, size)
        x_nchw = x.contiguous()
        return Contest(
            **place.own("channel_shuffle", [x], {"groups": 3}),
            peers={
                "torch channels_last": lambda: shuffled(x, 3),
                "torch contiguous": lambda: shuffled(x_nchw, 3),
            },
            expected=lambda: shuffled(x.float(), 3),
            eager=lambda: shuffled(x, 3),
        )

    moved = BYTES * 2 * batch * channels * size * size
    return Workload(
        *("grouped", "channel_shuffle", "ShuffleNet V1", f"{size}×{size} {channels}", batch, "bf16", 0, moved), make
    )


def _concat(place: Place, batch: int, size: int, channels: int) -> Workload:
    size, half, batch = place.size(size), place.channels(channels) // 2, place.batch(batch)

    def make() -> Contest:
        a, b = place.random(batch, half, size, size), place.random(batch, half, size, size)
        a_nchw, b_nchw = a.contiguous(), b.contiguous()

        def plain(a: Tensor, b: Tensor) -> Tensor:
            return shuffled(torch.cat([a, b], 1), 2)

        return Contest(
            **place.own("shuffle_concat", [a, b], {"groups": 2}),
            peers={
                "cat + shuffle, channels_last": lambda: plain(a, b),
                "cat + shuffle, contiguous": lambda: plain(a_nchw, b_nchw),
            },
            expected=lambda: plain(a.float(), b.float()),
            eager=lambda: plain(a, b),
        )

    moved = BYTES * 4 * batch * half * size * size
    label = f"{size}×{size} {half} and {half}"
    return Workload(*("grouped", "shuffle_concat", "ShuffleNet V2", label, batch, "bf16", 0, moved), make)


def ghost(place: Place, batch: int) -> list[Workload]:
    """Ghost modules: a pointwise convolution, a depthwise 3×3 one on its result, both concatenated."""
    return [_ghost(place, batch, *layer) for layer in _GHOSTNET]


def _ghost(place: Place, batch: int, size: int, c_in: int, c_out: int, is_active: bool) -> Workload:
    size, c_in, primary = place.size(size), place.channels(c_in), place.channels(c_out) // 2
    batch = place.batch(batch)
    activation = "relu" if is_active else "identity"
    options: dict[str, Any] = {"activation": activation, "cheap_activation": activation}

    def make() -> Contest:
        x = place.random(batch, c_in, size, size)
        tensors = [
            *(place.weight(primary, c_in, 1, 1), place.random(primary)),
            *(place.weight(primary, 1, 3, 3), place.random(primary)),
        ]

        def plain(x: Tensor, weight: Tensor, bias: Tensor, cheap: Tensor, cheap_bias: Tensor) -> Tensor:
            p = F.conv2d(x, weight, bias)
            p = F.relu(p, inplace=True) if is_active else p
            q = F.conv2d(p, cheap, cheap_bias, padding=1, groups=primary)
            q = F.relu(q, inplace=True) if is_active else q
            return torch.cat([p, q], 1)

        contiguous = [t.contiguous() for t in (x, *tensors)]
        return Contest(
            **place.own("ghost_conv2d", [x, *tensors], options),
            peers={
                "conv + conv + cat, channels_last": lambda: plain(x, *tensors),
                "conv + conv + cat, contiguous": lambda: plain(*contiguous),
            },
            expected=lambda: plain(x.float(), *[t.float() for t in tensors]),
            eager=lambda: plain(x, *tensors),
        )

    pixels = batch * size * size
    return Workload(
        *("ghost", "ghost_conv2d", "GhostNet", f"{size}×{size} {c_in}→{2 * primary} {activation}", batch, "bf16"),
        flops=2 * pixels * primary * (c_in + 9),
        traffic_bytes=BYTES * (pixels * (c_in + 2 * primary) + primary * (c_in + 9)),
        make=make,
    )
