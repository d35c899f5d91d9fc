"""An int8 layer as others run it inside PyTorch: the oneDNN primitives that Inductor calls, and FBGEMM.

Both take unsigned activations, so bytes and zero points of x are moved up by 128, and their results are moved back
before they are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernelpress.bench.calls import Call
from kernelpress.ops import registry
from kernelpress.ops.registry import Tensors

__all__ = ["SATURATING", "int8_peers", "signed"]

SATURATING = "FBGEMM, saturating"
"""Its depthwise kernels add products of whole bytes in 16 bits, so that their results are not compared."""

_OFFSET = 128
_INPUT_SCALE = 1.0
"""The scales of x and of a weight are one in our ops."""


def signed(result: Tensor) -> Tensor:
    """A peer's bytes as ours mean them; anything else as it is."""
    values = result.int_repr() if result.is_quantized else result
    return (values.to(torch.int16) - _OFFSET).to(torch.int8) if values.dtype == torch.uint8 else values


def int8_peers(op: str, tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Call]:
    """Every peer of an int8 product or convolution by name, weights packed beforehand."""
    entry = registry.operator(op)
    bound, given, _ = entry.signature.bind(tensors, options)
    named = dict(zip(entry.tensors, bound, strict=True))
    made: dict[str, Callable[[Mapping[str, Any], Any], Call]] = {}
    if torch.backends.mkldnn.is_available():
        made["oneDNN int8"] = _onednn_product if op == "int8_matmul" else _onednn_convolution
    # FBGEMM's ops have no floating result.
    if "fbgemm" in torch.backends.quantized.supported_engines and given.output_scale is not None:
        made[SATURATING if op == "int8_depthwise_conv2d" else "FBGEMM"] = _fbgemm
    return {name: make(named, given) for name, make in made.items()}


def _bytes(x: Tensor) -> Tensor:
    """Values from 0 to 255, in the memory format of x."""
    return (x.to(torch.int16) + _OFFSET).to(torch.uint8)


def _end(given: Any) -> tuple[Any, ...]:
    """Scale, zero point and dtype of the result, and the activation, as oneDNN's ops take them."""
    name: str = given.activation if given.activation != "identity" else "none"
    no_scalars: list[float] = []
    activation = (name, no_scalars, "")
    if given.output_scale is None:
        return (1.0, 0, torch.float32, *activation)
    return (given.output_scale, given.output_zero_point + _OFFSET, torch.uint8, *activation)


def _geometry(x: Tensor, weight: Tensor, given: Any) -> tuple[Any, ...]:
    dilation = getattr(given, "dilation", (1, 1))
    return (list(given.stride), list(given.padding), list(dilation), x.shape[1] // weight.shape[1])


def _onednn_convolution(named: Mapping[str, Any], given: Any) -> Call:
    x, weight, scale = _bytes(named["x"]), named["weight"], named["weight_scale"]
    zero_point, geometry = given.input_zero_point + _OFFSET, _geometry(x, weight, given)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, _INPUT_SCALE, zero_point, *geometry, list(x.shape))
    weight_zeros = torch.zeros(len(scale), dtype=torch.int32)
    inputs = (x, _INPUT_SCALE, zero_point, packed, scale, weight_zeros, named["bias"])
    return lambda: torch.ops.onednn.qconv_pointwise(*inputs, *geometry, *_end(given))


def _onednn_product(named: Mapping[str, Any], given: Any) -> Call:
    x, scale = _bytes(named["x"]), named["weight_scale"]
    packed = torch.ops.onednn.qlinear_prepack(named["weight"], list(x.shape))
    weight_zeros = torch.zeros(len(scale), dtype=torch.int32)
    zero_point = given.input_zero_point + _OFFSET
    inputs = (x, _INPUT_SCALE, zero_point, packed, scale, weight_zeros, named["bias"])
    return lambda: torch.ops.onednn.qlinear_pointwise(*inputs, *_end(given))


def _fbgemm(named: Mapping[str, Any], given: Any) -> Call:
    """torch's own quantized operators, of the quantization in eager mode."""
    quantized = torch.ops.quantized
    scale, zero_point = named["weight_scale"].double(), given.input_zero_point
    floating = named["weight"] * scale.view(-1, *[1] * (named["weight"].dim() - 1))
    weight_zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these tensors are deprecated; a torch without them has no such peer
        weight = torch.quantize_per_channel(floating.float(), scale, weight_zeros, axis=0, dtype=torch.qint8)
        x = torch.quantize_per_tensor(
            named["x"].float() - zero_point, _INPUT_SCALE, zero_point + _OFFSET, dtype=torch.quint8
        )
    kind = "linear" if weight.dim() == 2 else "conv2d"
    geometry = () if kind == "linear" else _geometry(named["x"], weight, given)
    with _engine("fbgemm"):
        packed = getattr(quantized, f"{kind}_prepack")(weight, named["bias"], *geometry)
    run = getattr(quantized, kind if given.activation == "identity" else f"{kind}_{given.activation}")
    output = (given.output_scale, given.output_zero_point + _OFFSET)
    return lambda: run(x, packed, *output)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
