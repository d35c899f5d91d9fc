"""Grouped convolutions with channel shuffles, and ghost convolutions: layers of ShuffleNet, ResNeXt and GhostNet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.contest import Contest, Workload
from gpu.place import Place
from kernelpress.bench import networks
from kernelpress.bench.layers import channel_shuffle, ghost_conv2d, grouped_conv2d, shuffle_concat

__all__ = ["ghost", "grouped"]


def grouped(place: Place, batch: int) -> list[Workload]:
    """Grouped 1×1 convolutions with a shuffle, grouped 3×3 ones, shuffles alone, and concat + shuffle."""
    layers = []
    for size, channels, bottleneck in networks.SHUFFLENET_V1:
        layers.append(_convolution(place, batch, "ShuffleNet V1", size, (channels, bottleneck), 1, 3, 3))
        layers.append(_convolution(place, batch, "ShuffleNet V1", size, (bottleneck, channels), 1, 3, 1))
    for size, channels in networks.RESNEXT50:
        layers.append(_convolution(place, batch, "ResNeXt-50", size, (channels, channels), 3, 32, 1))
    layers += [_shuffle(place, batch, size, channels) for size, channels, _ in networks.SHUFFLENET_V1]
    layers += [_concat(place, batch, size, channels) for size, channels in networks.SHUFFLENET_V2]
    return layers


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The shuffle as networks write it; a copy."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _convolution(
    place: Place, batch: int, network: str, size: int, channels: tuple[int, int], kernel: int, groups: int, shuffle: int
) -> Workload:
    groups, (c_in, c_out) = place.groups(groups), map(place.channels, channels)
    layer = grouped_conv2d(network, place.batch(batch), place.size(size), c_in, c_out, kernel, groups, shuffle)

    def make() -> Contest:
        (x, weight, bias), options = place.make(layer)

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.relu(F.conv2d(x, weight, bias, 1, kernel // 2, 1, groups), inplace=True)
            return shuffled(y, shuffle) if shuffle > 1 else y

        x_nchw, weight_nchw = x.contiguous(), weight.contiguous()
        return Contest(
            **place.own(layer.op, [x, weight, bias], options),
            peers={
                "cuDNN channels_last + shuffle": lambda: plain(x, weight, bias),
                "cuDNN contiguous + shuffle": lambda: plain(x_nchw, weight_nchw, bias),
            },
            expected=lambda: plain(x.float(), weight.float(), bias.float()),
            eager=lambda: plain(x, weight, bias),
        )

    return Workload.of(layer, make)


def _shuffle(place: Place, batch: int, size: int, channels: int) -> Workload:
    layer = channel_shuffle("ShuffleNet V1", place.batch(batch), place.size(size), place.channels(channels), 3)

    def make() -> Contest:
        (x,), options = place.make(layer)
        x_nchw = x.contiguous()
        return Contest(
            **place.own(layer.op, [x], options),
            peers={
                "torch channels_last": lambda: shuffled(x, 3),
                "torch contiguous": lambda: shuffled(x_nchw, 3),
            },
            expected=lambda: shuffled(x.float(), 3),
            eager=lambda: shuffled(x, 3),
        )

    return Workload.of(layer, make)


def _concat(place: Place, batch: int, size: int, channels: int) -> Workload:
    layer = shuffle_concat("ShuffleNet V2", place.batch(batch), place.size(size), place.channels(channels) // 2)

    def make() -> Contest:
        (a, b), options = place.make(layer)
        a_nchw, b_nchw = a.contiguous(), b.contiguous()

        def plain(a: Tensor, b: Tensor) -> Tensor:
            return shuffled(torch.cat([a, b], 1), 2)

        return Contest(
            **place.own(layer.op, [a, b], options),
            peers={
                "cat + shuffle, channels_last": lambda: plain(a, b),
                "cat + shuffle, contiguous": lambda: plain(a_nchw, b_nchw),
            },
            expected=lambda: plain(a.float(), b.float()),
            eager=lambda: plain(a, b),
        )

    return Workload.of(layer, make)


def ghost(place: Place, batch: int) -> list[Workload]:
    """Ghost modules: a pointwise convolution, a depthwise 3×3 one on its result, both concatenated."""
    return [_ghost(place, batch, *sizes) for sizes in networks.GHOSTNET]


def _ghost(place: Place, batch: int, size: int, c_in: int, c_out: int, is_active: bool) -> Workload:
    c_in, c_out = place.channels(c_in), place.channels(c_out)
    activation = "relu" if is_active else "identity"
    layer = ghost_conv2d("GhostNet", place.batch(batch), place.size(size), c_in, c_out, activation)

    def make() -> Contest:
        tensors, options = place.make(layer)

        def plain(x: Tensor, weight: Tensor, bias: Tensor, cheap: Tensor, cheap_bias: Tensor) -> Tensor:
            p = F.conv2d(x, weight, bias)
            p = F.relu(p, inplace=True) if is_active else p
            q = F.conv2d(p, cheap, cheap_bias, padding=1, groups=len(weight))
            q = F.relu(q, inplace=True) if is_active else q
            return torch.cat([p, q], 1)

        contiguous = [t.contiguous() for t in tensors]
        return Contest(
            **place.own(layer.op, tensors, options),
            peers={
                "conv + conv + cat, channels_last": lambda: plain(*tensors),
                "conv + conv + cat, contiguous": lambda: plain(*contiguous),
            },
            expected=lambda: plain(*[t.float() for t in tensors]),
            eager=lambda: plain(*tensors),
        )

    return Workload.of(layer, make)
