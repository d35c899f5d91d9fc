"""Blocks of networks, and chains of low rank, emitted and captured, in turn with the same of PyTorch's own layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernelpress.bench import networks
from kernelpress.bench.calls import Call, random_tensor
from kernelpress.bench.contest import OURS, OURS_DENSE, TOLERANCE, Row, hold, judged, refuse_any
from kernelpress.bench.peers import frozen
from kernelpress.bench.plain import to_plain
from kernelpress.bench.roofline import Roofline
from kernelpress.emit import capture, emit
from kernelpress.layers import GhostBottleneck, LowRankConv2d, LowRankLinear, ShuffleUnit, ShuffleUnitV2, SqueezeExcite
from kernelpress.measure import count_flops, count_parameters
from kernelpress.runtime.clock import threads_set_to, time_alternately

__all__ = ["BLOCKS", "LOW_RANK", "Block", "blocks", "low_rank", "measure_block"]

BLOCKS, LOW_RANK = "blocks", "low_rank"
"""What stands in a row for the family."""


@dataclass(frozen=True)
class Block:
    """A block of a network, made by `make`, on images of that shape; `dense` makes the layer whose place it took."""

    network: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    label: str
    family: str = BLOCKS
    dense: Callable[[], nn.Module] | None = None


def blocks(batch: int = 1) -> tuple[Block, ...]:
    """Those of our layers that no op is by itself, as networks have them."""

    def block(network: str, make: Callable[..., nn.Module], size: int, label: str, channels: int, *more: Any) -> Block:
        x = (batch, channels, size, size)
        return Block(network, functools.partial(make, channels, *more), x, f"{size}×{size} {label}")

    return (
        *(
            block("ShuffleNet V1", ShuffleUnit, size, f"{c} in 3 groups", c, c, 3)
            for size, c, _ in networks.SHUFFLENET_V1
        ),
        *(block("ShuffleNet V2", ShuffleUnitV2, size, f"{c}", c, c) for size, c in networks.SHUFFLENET_V2),
        *(
            block("GhostNet", GhostBottleneck, size, f"{c}→{hidden}→{out}", c, hidden, out, *more)
            for size, c, hidden, out, *more in networks.GHOSTNET_BOTTLENECKS
        ),
        *(block("MobileNet V3", SqueezeExcite, size, f"{c}", c, more) for size, c, more in networks.MOBILENET_V3_GATES),
    )


def low_rank(batch: int = 1) -> tuple[Block, ...]:
    """Chains that a decomposition puts in the place of layers of ResNets and AlexNet, beside those layers."""

    def convolution(network: str, size: int, c: int, rank: int, method: str = "tucker2", kernel: int = 3) -> Block:
        window: dict[str, Any] = {"padding": kernel // 2}
        make = functools.partial(LowRankConv2d, c, c, kernel, rank, method=method, **window)
        label = f"{size}×{size} {c} {kernel}×{kernel}, {method} {rank}"
        dense = functools.partial(nn.Conv2d, c, c, kernel, **window)
        return Block(network, make, (batch, c, size, size), label, LOW_RANK, dense)

    def product(network: str, inputs: int, outputs: int, rank: int) -> Block:
        make = functools.partial(LowRankLinear, inputs, outputs, rank)
        label, dense = f"{inputs}→{outputs}, svd {rank}", functools.partial(nn.Linear, inputs, outputs)
        return Block(network, make, (batch, inputs), label, LOW_RANK, dense)

    return (
        *(convolution("ResNet-18", *shape) for shape in networks.LOW_RANK_TUCKER),
        *(convolution("ResNet-18", *shape, "cp") for shape in networks.LOW_RANK_CP),
        *(product("AlexNet", *shape, 512) for shape in networks.ALEXNET_CLASSIFIER),
    )


def measure_block(
    block: Block,
    roofline: Roofline,
    *,
    with_inductor: bool = False,
    rounds: int = 5,
    budget_seconds: float = 0.3,
) -> Row:
    """Benchmarks one block beside stock layers eager in either memory format and, `with_inductor`, compiled.

    Raises `RuntimeError` where one of them disagrees with float64.
    """
    module, x = block.make().eval(), random_tensor(torch.device("cpu"), torch.float32, *block.x)
    plain = to_plain(copy.deepcopy(module))
    dense = None if block.dense is None else block.dense().eval()
    with threads_set_to(roofline.threads), torch.no_grad():
        plans = {OURS: _captured(module, x)} | ({} if dense is None else {OURS_DENSE: _captured(dense, x)})
        expected = copy.deepcopy(plain).double()(x.double())
        contestants, errors = hold(
            {**plans, **_peers(plain, x, with_inductor)},
            expected,
            TOLERANCE[torch.float32],
            lambda able: time_alternately(able, budget_seconds=budget_seconds, rounds=rounds),
            unjudged=frozenset({OURS_DENSE}),
        )
        row = Row(
            *(block.family, type(module).__name__, block.network, block.label, block.x[0], "fp32", roofline.threads),
            backend="emitted",
            flops=count_flops(plain, x),
            traffic_bytes=x.element_size() * (x.numel() + expected.numel() + count_parameters(plain)),
            relative_error=errors.get(OURS),
            contestants=contestants,
            dense_flops=None if dense is None else count_flops(dense, x),
        )
    refuse_any(contestants, f"{row.op} {row.layer}")
    return judged(row, roofline)


def _captured(module: nn.Module, x: torch.Tensor) -> Call:
    plan = capture(emit(module, x, dynamic_batch=False, cache=False, progress=False), x)
    return functools.partial(plan, x)


def _peers(plain: nn.Module, x: torch.Tensor, with_inductor: bool) -> Mapping[str, Call]:
    channels_last = copy.deepcopy(plain)
    if x.dim() == 4:
        channels_last = channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls: dict[str, Call] = {
        "eager": functools.partial(plain, x.contiguous()),
        "eager channels_last": functools.partial(channels_last, x),
    }
    if with_inductor:
        calls["Inductor"] = functools.partial(frozen(channels_last), x)
    return calls
