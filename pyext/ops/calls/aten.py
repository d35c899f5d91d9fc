"""ATen operators as steps of a captured plan: what no layer of ours has taken over runs natively too.

Each is described by its name and arguments, as the graph has them, and becomes one call of a kernel of `_cpu` that
writes its result; a concatenation and a padding become several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernelpress.ops.backends.kernel import bits
from kernelpress.ops.calls.elementwise import elementwise, int8_copy
from kernelpress.ops.calls.steps import NativeCall, run_of
from kernelpress.ops.layout import pixel_stride
from kernelpress.runtime import native

__all__ = ["activation_of_call", "arguments_of", "aten_call", "aten_steps", "is_elementwise", "parts_of"]

aten = torch.ops.aten

_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.gelu.default: "gelu",
    aten.hardtanh.default: "relu6",
}


def arguments_of(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operator call by their schema names, defaults included."""
    schema = target._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update({a.name: given for a, given in zip(schema, args, strict=False)})
    bound.update(kwargs)
    return bound


def activation_of_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name of the activation that a call applies to its first argument, or None."""
    name = _ACTIVATIONS.get(target)
    if target is aten.hardtanh.default:
        given = arguments_of(target, args, kwargs)
        return name if (given["min_val"], given["max_val"]) == (0, 6) else None
    if target is aten.gelu.default and arguments_of(target, args, kwargs)["approximate"] != "none":
        return None
    return name


def aten_call(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, activation: str = "identity"
) -> NativeCall | None:
    """A call of a kernel that writes an operator's result, with `activation` applied to it, into `out`, a float32
    tensor of the result's shape, or an int8 one of a copy; None where no kernel computes it.

    Of operators that are made of several calls it is one of `parts_of`.
    """
    make = _CALLS.get(target)
    tensors = (out, *(t for t in args if isinstance(t, Tensor)))
    if native.cpu() is None or make is None or out.numel() == 0 or not all(map(_is_plain, tensors)):
        return None
    if any(t.dtype != out.dtype for t in tensors) or (out.dtype == torch.int8 and make is not _copied):
        return None
    if activation != "identity" and not is_elementwise(target):
        return None
    return make(_Call(target, args, kwargs, out, activation))


def aten_steps(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], copies: int = 1
) -> Callable[[], Tensor] | None:
    """A function that runs a call of an operator as steps of a plan, or of so many side by side, and returns its
    result, in memory of its own that each run writes anew; None where no kernel computes it."""
    if target not in _CALLS:
        return None
    plans, held = [], []
    for _ in range(copies):
        result: Tensor = target(*args, **kwargs)
        calls = [aten_call(target, given, kwargs, out) for given, out in parts_of(target, args, kwargs, result)]
        if not calls or None in calls:
            return None
        plans.append(native.cpu().Plan())
        for call in calls:
            assert call is not None
            getattr(plans[-1], call.name)(*call.arguments)
        held.append((result, calls))
    return run_of(plans, result, held)


def is_elementwise(target: Any) -> bool:
    """Whether an activation behind the operator costs it nothing."""
    return target in _ELEMENTWISE


def parts_of(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Sequence[Any], Tensor]]:
    """The calls that an operator's is made of, as arguments and the part of `result` that they make; none where it
    is not made so."""
    if target is aten.cat.default:
        given = arguments_of(target, args, kwargs)
        tensors, dim = [t for t in given["tensors"] if t.numel()], given["dim"]
        ends = itertools.accumulate(t.shape[dim] for t in tensors)
        parts = zip(tensors, ends, strict=True)
        return [((t,), result.narrow(dim, end - t.shape[dim], t.shape[dim])) for t, end in parts]
    if target in (aten.constant_pad_nd.default, aten.pad.default):
        given, inside = arguments_of(target, args, kwargs), result
        if given.get("mode", "constant") != "constant" or any(size < 0 for size in given["pad"]):
            return []
        for i, before in enumerate(given["pad"][::2]):
            inside = inside.narrow(-1 - i, before, given["self"].shape[-1 - i])
        return [((given["value"] or 0,), result), ((given["self"],), inside)]
    return [(args, result)]


@dataclass(frozen=True)
class _Call:
    """As `aten_call` takes it."""

    target: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Tensor
    activation: str

    @property
    def given(self) -> dict[str, Any]:
        """Arguments by name."""
        return arguments_of(self.target, self.args, self.kwargs)


def _is_plain(t: Tensor) -> bool:
    return (
        t.dtype in (torch.float32, torch.int8)
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not t.is_neg()
    )


def _sum(call: _Call) -> NativeCall | None:
    given = call.given
    x, other, alpha = given["self"], given["other"], float(given["alpha"])
    alpha = alpha if call.target is aten.add.Tensor else -alpha
    if isinstance(other, Tensor):
        return elementwise(call.out, x, c=other, c_scale=alpha, activation=call.activation)
    return elementwise(call.out, x, shift=alpha * other, activation=call.activation)


def _product(call: _Call) -> NativeCall | None:
    x, other = call.args
    if isinstance(other, Tensor):
        return elementwise(call.out, x, other, activation=call.activation)
    return elementwise(call.out, x, scale=float(other), activation=call.activation)


def _quotient(call: _Call) -> NativeCall | None:
    """By numbers whose reciprocal is normal."""
    x, other = call.args
    if isinstance(other, Tensor) or not 1e-30 < abs(other) < 1e30:
        return None
    return elementwise(call.out, x, scale=1 / other, activation=call.activation)


def _normalised(call: _Call) -> NativeCall | None:
    """By running statistics, as `x · scale + shift`."""
    given = call.given
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"] or mean is None or variance is None:
        return None
    scale = torch.rsqrt(variance.double() + given["eps"])
    if given["weight"] is not None:
        scale = scale * given["weight"].double()
    shift = -mean.double() * scale
    if given["bias"] is not None:
        shift = shift + given["bias"].double()
    per_channel = (-1, *(1,) * (call.out.dim() - 2))
    scale, shift = (t.float().reshape(per_channel) for t in (scale, shift))
    return elementwise(call.out, given["input"], scale, shift, activation=call.activation)


def _activated(call: _Call) -> NativeCall | None:
    own = activation_of_call(call.target, call.args, call.kwargs)
    return None if own is None else elementwise(call.out, call.args[0], activation=own)


def _copied(call: _Call) -> NativeCall | None:
    """The elements of the first argument in their order, whatever the shape; a number everywhere."""
    x, y = call.args[0], call.out
    if not isinstance(x, Tensor):
        return elementwise(y, scale=float(x)) if y.dtype == torch.float32 else None
    if y.shape != x.shape and not y.is_contiguous():
        return None
    return elementwise(y.view(x.shape), x) if y.dtype == torch.float32 else int8_copy(y.view(x.shape), x)


def _nearest(call: _Call) -> NativeCall | None:
    sizes = zip(call.args[0].shape[2:], call.out.shape[2:], _steps(call, call.given), strict=True)
    # To twice the size torch looks at no factor.
    steps = [0.5 if after == 2 * before else step for before, after, step in sizes]
    return _resized(call, False, steps, 0.0, 0.0)


def _bilinear(call: _Call) -> NativeCall | None:
    if call.given["align_corners"]:
        sizes = zip(call.args[0].shape[2:], call.out.shape[2:], strict=True)
        return _resized(call, True, [(small - 1) / max(large - 1, 1) for small, large in sizes], 0.0, 0.0)
    return _resized(call, True, _steps(call, call.given), 0.5, -0.5)


def _steps(call: _Call, given: Mapping[str, Any]) -> list[float]:
    """Rows and columns of the input under one of the output. Where the size stays, torch looks at no factor."""
    factors = given["scale_factors"] if "scale_factors" in given else (given["scales_h"], given["scales_w"])
    sizes = zip(call.args[0].shape[2:], call.out.shape[2:], factors or (None, None), strict=True)
    return [1 / factor if factor and after != before else before / after for before, after, factor in sizes]


def _resized(call: _Call, is_bilinear: bool, steps: Sequence[float], shift: float, offset: float) -> NativeCall | None:
    x, y = call.args[0], call.out
    spacing = [pixel_stride(t.shape, t.stride()) for t in (x, y)]
    if None in spacing:
        return None
    batch, channels, *size = x.shape
    words = (batch, *size, channels, *y.shape[2:], *spacing, int(is_bilinear))
    return _native("resize2d", x, y, (*words, *map(bits, (*steps, shift, offset))))


def _global_mean(x: Tensor, y: Tensor) -> NativeCall | None:
    """Over all pixels of each image."""
    spacing = pixel_stride(x.shape, x.stride())
    if spacing is None or not y.is_contiguous() or 0 in x.shape:
        return None
    batch, channels, height, width = x.shape
    return _native("global_avg_pool2d", x, y, (batch, height * width, channels, spacing))


def _mean(call: _Call) -> NativeCall | None:
    x, dims = call.args[0], call.given["dim"]
    if x.dim() != 4 or dims is None or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    return _global_mean(x, call.out)


def _adaptive_mean(call: _Call) -> NativeCall | None:
    """Over windows of one size, where they are."""
    x, y = call.args[0], call.out
    if x.dim() == 4 and y.shape[2] == y.shape[3] == 1:
        return _global_mean(x, y)
    kernel = [large // small for large, small in zip(x.shape[-2:], y.shape[-2:], strict=True)]
    if [k * size for k, size in zip(kernel, y.shape[-2:], strict=True)] != list(x.shape[-2:]):
        return None
    return _pool("avg_pool2d", x, y, (*kernel, *kernel, 0, 0), (0, 0))


def _window_mean(call: _Call) -> NativeCall | None:
    given = call.given
    tail = (int(given["count_include_pad"]), given["divisor_override"] or 0)
    return _pool("avg_pool2d", call.args[0], call.out, _window(given), tail)


def _window_maximum(call: _Call) -> NativeCall | None:
    given = call.given
    if any(d != 1 for d in given["dilation"]):
        return None
    return _pool("max_pool2d", call.args[0], call.out, _window(given))


def _window(given: Mapping[str, Any]) -> tuple[int, ...]:
    """Kernel, stride and padding, as pairs in one."""
    kernel = given["kernel_size"]
    pairs = (kernel, given["stride"] or kernel, given["padding"])
    return tuple(size for sizes in pairs for size in (*sizes, *sizes)[:2])


def _pool(name: str, x: Tensor, y: Tensor, window: Sequence[int], tail: Sequence[int] = ()) -> NativeCall | None:
    if x.dim() != 4:
        return None
    spacing = [pixel_stride(t.shape, t.stride()) for t in (x, y)]
    if None in spacing:
        return None
    batch, channels, *size = x.shape
    return _native(name, x, y, (batch, *size, channels, *y.shape[2:], *spacing, *window, *tail))


def _native(name: str, x: Tensor, y: Tensor, words: Sequence[Any]) -> NativeCall:
    return NativeCall(name, (x.data_ptr(), y.data_ptr(), *words), (x, y))


Maker = Callable[[_Call], NativeCall | None]

_ELEMENTWISE: dict[Any, Maker] = {
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    aten.batch_norm.default: _normalised,
}

_CALLS: dict[Any, Maker] = {
    **_ELEMENTWISE,
    **dict.fromkeys(_ACTIVATIONS, _activated),
    aten.cat.default: _copied,
    aten.constant_pad_nd.default: _copied,
    aten.pad.default: _copied,
    aten.clone.default: _copied,
    aten.contiguous.default: _copied,
    aten.flatten.using_ints: _copied,
    aten.reshape.default: _copied,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive_mean,
    aten.avg_pool2d.default: _window_mean,
    aten.max_pool2d.default: _window_maximum,
    aten.upsample_nearest2d.default: _nearest,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_bilinear2d.default: _bilinear,
    aten.upsample_bilinear2d.vec: _bilinear,
}
