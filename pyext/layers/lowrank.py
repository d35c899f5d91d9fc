"""Layers of low rank, chains of smaller ones under one name: `LowRankConv2d`, `LowRankLinear`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress import ops
from kernelpress.kernels.reference import activate
from kernelpress.layers.chain import load_in_order
from kernelpress.layers.common import check_type, checked_activation, computes_plainly, copy_parameters, is_pointwise
from kernelpress.layers.folding import is_hooked, kept
from kernelpress.ops.signature import IntOrPair

__all__ = ["LowRankConv2d", "LowRankLinear"]

_Pair = tuple[int, int]
_PLACES = {"tucker2": 2, "cp": 1}
"""Where channels are few, by method."""


class _Chain(nn.Module):
    """Layers one after the other, of which the last alone may have a bias; then residual and activation.

    A state dict of other names, such as that of the `torch.nn.Sequential` it replaces, loads if it has the same tensors
    in this order.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = checked_activation(activation)

    def _is_one_op(self, x: Tensor, residual: Tensor | None) -> bool:
        if is_hooked(*self.children()):
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return False
        return not computes_plainly(x, residual)

    def _one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return activate(x if residual is None else x + residual, self.activation)

    def _take(self, chain: nn.Sequential) -> None:
        """Weights, whether they are trained, and training flags."""
        for ours, theirs in zip(self.children(), chain, strict=True):
            copy_parameters(theirs, ours)
        self.training = chain.training

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        load_in_order(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class LowRankConv2d(_Chain):
    """A convolution in factors: `activation(last(core(first(x))) + residual)`.

    x: `[N, C_in, H, W]` → `[N, C_out, H_out, W_out]`; residual: of the output's shape.

    Args:
        rank: channels between: of Tucker-2 after `first` and after `core`, one integer for both or two; of CP one.
        stride, padding, dilation: as of the convolution that it stands for.
        method: `"tucker2"`: 1×1, k×k, 1×1 (Kim et al. 2016, arXiv:1511.06530, eq. 5), children `first`, `core`,
            `last`; `"cp"`: 1×1, depthwise k×1, depthwise 1×k, 1×1 (Lebedev et al. 2015, arXiv:1412.6553, eq. 3 to 6),
            children `first`, `rows`, `columns`, `last`. Only `last` has a bias.

    Raises: `ValueError` for an unknown method, and for a rank below 1 or above the one at which factors are exact.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        rank: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: str = "tucker2",
        activation: str = "identity",
    ) -> None:
        super().__init__(activation)
        if method not in _PLACES:
            raise ValueError(f"method: expected one of {', '.join(map(repr, _PLACES))}, got {method!r}")
        self.method = method
        kernel = _pair(kernel_size)
        inner, outer = _ranks(method, rank, in_channels, out_channels, kernel)
        window = (kernel, _pair(stride), _pair(padding), _pair(dilation))
        form: Any = {"bias": False, "device": device, "dtype": dtype}
        self.first = nn.Conv2d(in_channels, inner, 1, **form)
        if method == "tucker2":
            self.core = nn.Conv2d(inner, outer, **_named(window), **form)
        else:
            rows = tuple((size, idle) for (size, _), idle in zip(window, _IDLE, strict=True))
            columns = tuple((idle, size) for (_, size), idle in zip(window, _IDLE, strict=True))
            self.rows = nn.Conv2d(inner, inner, **_named(rows), groups=inner, **form)
            self.columns = nn.Conv2d(inner, inner, **_named(columns), groups=inner, **form)
        self.last = nn.Conv2d(outer, out_channels, 1, **form | {"bias": bias})

    @classmethod
    def from_dense(cls, chain: nn.Sequential, *, activation: str = "identity") -> LowRankConv2d:
        """The layer that computes `activation(chain(x))`, with a copy of its weights on their device.

        `chain`: what `compress.decompose` puts in a convolution's place by `"tucker2"` or `"cp"`. Raises: `TypeError`
        or `ValueError` for other modules.
        """
        parts = _parts(chain, nn.Conv2d, (3, 4))
        first, *core, last = parts
        if not (is_pointwise(first) and is_pointwise(last)):
            raise ValueError(f"chain: expected 1×1 convolutions at both ends, got {first} and {last}")
        depth, (kernel, stride, padding, dilation) = len(core) > 1, _windows(core)
        layer = cls(
            first.in_channels,
            last.out_channels,
            kernel,
            first.out_channels if depth else (first.out_channels, last.in_channels),
            stride,
            padding,
            dilation,
            last.bias is not None,
            last.weight.device,
            last.weight.dtype,
            method="cp" if depth else "tucker2",
            activation=activation,
        )
        for ours, theirs in zip(layer.children(), parts, strict=True):
            if _geometry(ours) != _geometry(theirs):
                raise ValueError(f"chain: expected a layer like {ours}, got {theirs}")
        layer._take(chain)
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_one_op(x, residual):
            return self._one_by_one(x, residual)
        window: Any = {**_named(_windows(list(self.children())[1:-1])), "activation": self.activation}
        del window["kernel_size"]
        bias = self.last.bias
        if self.method == "tucker2":
            weights = (self.first.weight, self.core.weight, self.last.weight)
            return ops.lowrank_conv2d(x, *weights, bias, residual, **window)
        factors = self.rows.weight, self.columns.weight
        core = kept(self, factors, lambda: factors[0] * factors[1])
        return ops.inverted_residual(x, self.first.weight, None, core, None, self.last.weight, bias, residual, **window)


class LowRankLinear(_Chain):
    """A linear layer in two factors: `activation(last(first(x)) + residual)`, of which `last` alone has a bias.

    x: `[..., C_in]` → `[..., C_out]`; residual: of the output's shape. Children `first` and `last`. Raises `ValueError`
    for a rank below 1 or above the smaller of `in_features` and `out_features`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
    ) -> None:
        super().__init__(activation)
        _check_rank(rank, rank, min(in_features, out_features))
        self.first = nn.Linear(in_features, rank, False, device, dtype)
        self.last = nn.Linear(rank, out_features, bias, device, dtype)

    @classmethod
    def from_dense(cls, chain: nn.Sequential, *, activation: str = "identity") -> LowRankLinear:
        """The layer that computes `activation(chain(x))`, with a copy of its weights on their device.

        `chain`: two `torch.nn.Linear`, as `compress.decompose` puts them in the place of one. Raises: `TypeError` or
        `ValueError` for other modules.
        """
        first, last = _parts(chain, nn.Linear, (2,))
        bias, weight = last.bias is not None, last.weight
        sizes = (first.in_features, last.out_features, first.out_features)
        layer = cls(*sizes, bias, weight.device, weight.dtype, activation=activation)
        layer._take(chain)
        return layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_one_op(x, residual):
            return self._one_by_one(x, residual)
        weights = self.first.weight, self.last.weight, self.last.bias
        return ops.lowrank_linear(x, *weights, residual, activation=self.activation)


_WINDOW = ("kernel_size", "stride", "padding", "dilation")
_IDLE = (1, 1, 0, 1)
"""Of a dimension over which nothing moves."""


def _pair(sizes: IntOrPair) -> _Pair:
    height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
    return height, width


def _named(window: Sequence[_Pair]) -> dict[str, Any]:
    return dict(zip(_WINDOW, window, strict=True))


def _windows(core: Sequence[Any]) -> tuple[_Pair, ...]:
    """Kernel, stride, padding and dilation of a core, of both its parts where it has two."""
    found = [[getattr(part, name) for part in core] for name in _WINDOW]
    return tuple((sizes[0][0], sizes[-1][1]) for sizes in found)


def _geometry(part: Any) -> tuple[Any, ...]:
    window = (part.stride, part.padding, part.dilation, part.groups, part.padding_mode)
    return tuple(part.weight.shape), part.bias is None, window


def _parts(chain: nn.Module, kind: type[nn.Module], counts: tuple[int, ...]) -> list[Any]:
    """The layers of a chain, all of one type, of which the last alone has a bias. Raises `TypeError`, `ValueError`."""
    check_type(chain, nn.Sequential)
    parts: list[Any] = list(chain.children())
    if len(parts) not in counts or any(type(part) is not kind for part in parts):
        wanted = " or ".join(map(str, counts))
        raise ValueError(f"chain: expected {wanted} layers torch.nn.{kind.__name__}, got {chain}")
    if any(part.bias is not None for part in parts[:-1]):
        raise ValueError(f"chain: expected a bias in the last layer alone, got {chain}")
    for before, after in itertools.pairwise(parts):
        given, taken = (part.weight.shape[at] for part, at in ((before, 0), (after, 1)))
        if given != taken * getattr(after, "groups", 1):
            raise ValueError(f"chain: expected {given} channels of {before} to go into the next layer, got {after}")
    return parts


def _check_rank(rank: object, given: object, most: int) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(f"rank: expected an integer from 1 to {most}, got {given}")


def _ranks(method: str, rank: IntOrPair, inputs: int, outputs: int, kernel: _Pair) -> _Pair:
    """The channels before and behind the core. Raises `ValueError`."""
    given = tuple(rank) if isinstance(rank, Sequence) else (rank,) * _PLACES[method]
    if len(given) != _PLACES[method]:
        raise ValueError(f"rank: expected {_PLACES[method]} of them for {method!r}, got {rank}")
    taps = kernel[0] * kernel[1]
    most = (min(inputs, outputs * taps), min(outputs, inputs * taps))
    if method == "cp":
        sizes = (inputs, outputs, *kernel)
        most = (inputs * outputs * taps // max(sizes),) * 2
    for one, largest in zip(given, most, strict=False):
        _check_rank(one, rank, largest)
    return given[0], given[-1]
