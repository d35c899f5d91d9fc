"""Helpers of the kernel and layer tests: bounds, inputs of awkward forms, poisoned outputs, the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.files import cache_folder
from kernelpress.kernels import reference
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import native_call
from kernelpress.ops.layout import DENSE, IMAGES_OR_ROWS, PIXELS
from kernelpress.runtime import native
from kernelpress.runtime.torch_private import BatchNorm

RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest ‖out − ref‖ / ‖ref‖, by the dtype computed in."""

BUILT = cache_folder() / "tests"
"""What is slow to build and known again by the content of all that it is made from; read before tests move the rest."""

Maker = Callable[..., Tensor]


def relative_error(out: Tensor, expected: Tensor, terms: Tensor | None = None) -> float:
    """‖out − expected‖ / ‖expected‖, in float64.

    Where the terms of a sum cancel, its rounding error is relative to them: with `terms`, what the absolute values of
    all tensors give, ‖expected‖ counts as at least a tenth of theirs.
    """
    out, expected = out.detach().double(), expected.detach().double()
    least = 1e-30 if terms is None else max(0.1 * float(terms.norm()), 1e-30)
    return float((out - expected).norm() / expected.norm().clamp_min(least))


def assert_close(out: Tensor, expected: Tensor, terms: Tensor | None = None) -> None:
    """Shape equal, and the relative error, with these terms of sums, within the bound of `out`'s dtype."""
    assert tuple(out.shape) == tuple(expected.shape)
    assert not out.isnan().any() or expected.isnan().any(), "NaN where the reference has none"
    error = relative_error(out, expected, terms)
    assert error <= RELATIVE_ERROR[out.dtype], f"relative error {error:.2e}"


def exact(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In float64; integers stay what they are."""
    return [t.detach().double() if t is not None and t.is_floating_point() else t for t in tensors]


def absolute(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The absolute values of what a sum is made of."""
    return [None if t is None else t.abs() for t in tensors]


def expected_output(op: str, tensors: Sequence[Tensor | None], **options: Any) -> Tensor:
    """The reference in float64."""
    return getattr(reference, op)(*exact(tensors), **options)


def assert_matches(op: str, tensors: Sequence[Tensor | None], options: dict[str, Any], *outputs: Tensor) -> None:
    """All outputs close to the reference in float64, cancellation accounted for."""
    expected = expected_output(op, tensors, **options)
    linear = {name: "identity" if name.endswith("activation") else value for name, value in options.items()}
    terms = expected_output(op, absolute(tensors), **linear)
    for out in outputs:
        assert_close(out, expected, terms)


def contiguous(*shape: int) -> Tensor:
    """Random, in PyTorch's own layout."""
    return torch.randn(*shape)


def channels_last(*shape: int) -> Tensor:
    """Random `[N, C, H, W]` in channels_last memory."""
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def channel_slice(n: int, c: int, h: int, w: int) -> Tensor:
    """Random channels 3 … c + 2 of a wider channels_last tensor whose other channels are NaN."""
    wide = torch.full((n, c + 5, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
    narrow = wide[:, 3 : 3 + c]
    narrow.copy_(torch.randn(n, c, h, w))
    return narrow


def cropped(n: int, c: int, h: int, w: int) -> Tensor:
    """Random crop of a larger channels_last image whose border is NaN: its rows are not evenly spaced."""
    large = torch.full((n, c, h + 2, w + 3), torch.nan).contiguous(memory_format=torch.channels_last)
    crop = large[:, :, 1 : 1 + h, 1 : 1 + w]
    crop.copy_(torch.randn(n, c, h, w))
    return crop


def every_other(n: int, c: int, h: int, w: int) -> Tensor:
    """Random, strided in every dimension."""
    return torch.randn(2 * n, 2 * c, 2 * h, 2 * w)[::2, ::2, ::2, ::2]


def int8(*shape: int) -> Tensor:
    """Random over the whole range."""
    return torch.randint(-128, 128, shape).to(torch.int8)


def int8_image(*shape: int) -> Tensor:
    """Random over the whole range, channels_last."""
    return int8(*shape).contiguous(memory_format=torch.channels_last)


def slice_of_wider(t: Tensor, channels: int) -> Tensor:
    """The same values as channels of a wider integer tensor, whose other channels are no zeros."""
    dim = 1 if t.dim() == 4 else t.dim() - 1
    shape = [size + channels if axis == dim else size for axis, size in enumerate(t.shape)]
    wide = torch.full(shape, 77, dtype=t.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else wide
    return wide.narrow(dim, channels // 2, t.shape[dim]).copy_(t)


def residual_for(op: str, tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """Random, of the shape and dtype of an op's output."""
    plain = registry.allocate(op, tensors, options)
    return plain.copy_(int8(*plain.shape) if plain.dtype == torch.int8 else torch.randn(plain.shape) * 50)


EXACT_ACTIVATIONS = (None, "identity", "relu", "relu6")


def assert_same(
    op: str,
    tensors: Sequence[Tensor | None],
    options: dict[str, Any],
    out: Tensor,
    exact: Sequence[str | None] = EXACT_ACTIVATIONS,
) -> None:
    """Every bit: the reference says where each number is rounded. Curved activations may differ in the last place."""
    expected = getattr(reference, op)(*tensors, **options)
    assert out.dtype == expected.dtype
    if options.get("activation") in exact:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    elif out.dtype == torch.int8:
        difference = (out.int() - expected.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 0.01
    else:
        torch.testing.assert_close(out, expected, rtol=1e-2 if out.dtype == torch.bfloat16 else 2e-3, atol=1e-3)


def tf32(t: Tensor) -> Tensor:
    """Rounded to what TF32 holds: products of such values are exact, and float32 keeps its own bound."""
    return t.bfloat16().float()


MAKERS: tuple[Maker, ...] = (channels_last, contiguous, channel_slice, cropped, every_other)


def run_native(op: str, tensors: Sequence[Tensor | None], **options: Any) -> Tensor:
    """The native kernel by `native_call`, into channels of a wider poisoned tensor, or images of more of them where it
    gives contiguous ones; checks that it writes no other."""
    plain = registry.allocate(op, tensors, options)
    layout = registry.layout_on(registry.operator(op), options.get("backend", "auto"))
    if layout is DENSE:
        more = _poisoned((plain.shape[0] + 2, *plain.shape[1:]), plain.dtype)
        out, around = more[1:-1], (more[0], more[-1])
    elif layout in (PIXELS, IMAGES_OR_ROWS) and plain.dim() == 4:
        n, c, h, w = plain.shape
        wide = _poisoned((n, c + 7, h, w), plain.dtype).contiguous(memory_format=torch.channels_last)
        out, around = wide[:, 3 : 3 + c], (wide[:, :3], wide[:, 3 + c :])
    else:
        out, around = plain.copy_(_poisoned(tuple(plain.shape), plain.dtype)), ()
    call = native_call(op, tensors, options, out)
    getattr(native.cpu(), call.name)(*call.arguments)
    for rest in around:
        poison = _poisoned(tuple(rest.shape), rest.dtype)
        same = torch.equal(rest.isnan(), poison.isnan()) and torch.equal(rest.nan_to_num(), poison.nan_to_num())
        assert same, "written outside the output"
    return out


def native_plan(
    x: Tensor, calls: Sequence[tuple[str, Sequence[Tensor], dict[str, Any]]], residual: bool
) -> tuple[Any, Tensor, list[Any]]:
    """A native plan of these calls (op, parameters, options), each on what the one before makes, the last with a random
    residual where asked for; its output; and the tensors to keep. x and the output are its external buffers."""
    plan, held, made = native.cpu().Plan(), [], x
    plan.external(x.data_ptr(), x.nbytes)
    for i, (op, parameters, options) in enumerate(calls):
        arguments, is_last = [made, *parameters], i == len(calls) - 1
        if residual and is_last:
            options = {**options, "residual": residual_for(op, arguments, options)}
        made = registry.allocate(op, arguments, options)
        if is_last:
            plan.external(made.data_ptr(), made.nbytes)
        call = native_call(op, arguments, options, made)
        getattr(plan, call.name)(*call.arguments)
        held.append(call.tensors)
    return plan, made, held


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else 113, dtype=dtype)


def with_random_norms(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, its BatchNorms with statistics and weights as training leaves them."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return module.eval()


def called_functions(graph: torch.fx.Graph) -> list[str]:
    """The functions that a graph calls, by name."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def run_compiled(module: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """The output of the module compiled without graph breaks, and the functions that its graph calls."""
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(called_functions(graph.graph))
        return graph

    torch.compiler.reset()
    return torch.compile(module, backend=backend, fullgraph=True)(x), called
