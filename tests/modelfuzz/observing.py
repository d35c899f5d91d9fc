"""What the examiner looks at: results, errors, marks on tensors, states of modules, gradients; and under which
conditions."""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernelpress.runtime import native
from kernelpress.runtime.torch_private import DisableTorchFunction, pytree
from modelfuzz.program import Call

__all__ = [
    "Changed",
    "channels_last",
    "first_line",
    "form_of",
    "gradients_of",
    "is_float",
    "machine",
    "marks_of",
    "no_logging",
    "place",
    "plain_sizes",
    "relative_error",
    "result_of",
    "sharing",
    "signature",
    "slope_of",
    "state_of",
]

STEP = 1e-6
"""Of a slope."""


@contextmanager
def machine(kernels: str, threads: int) -> Iterator[None]:
    """Our kernels in one of their instruction sets, on so many threads."""
    module, threads_before = native.cpu(), torch.get_num_threads()
    before = module.variant() if module else ""
    torch.set_num_threads(threads)
    is_chosen = module is not None and kernels in module.variants()
    if is_chosen:
        module.select(kernels)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if is_chosen:
            module.select(before)


@contextmanager
def no_logging() -> Iterator[None]:
    """torch tells its log what it could not export, at length."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class Changed(TorchFunctionMode):
    """Changes what every operation gives, where that is a float tensor in memory of its own."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_memory_of(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)} | {None}

        def changed(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value if _memory_of(value) in given else self.change(value)

        with DisableTorchFunction():
            return pytree.tree_map(changed, result)


def _memory_of(tensor: Tensor) -> int | None:
    """Where its memory begins; None inside `vmap`, where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return None


def channels_last(value: Any) -> Any:
    """Images in channels_last memory, those of one channel too, which torch takes to be so already; anything else as
    it is."""
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return torch.empty_like(value, memory_format=torch.channels_last).copy_(value) if is_image else value


def result_of(run: Callable[..., Any], positional: Any, named: Any) -> Any:
    """What a call gives, or raises."""
    try:
        return run(*positional, **named)
    except Exception as error:
        return error


def marks_of(values: Any) -> list[Any]:
    """The tensors' values, forms and attributes."""
    return [
        (
            leaf.detach().double().flatten().tolist(),
            form_of(leaf),
            leaf.stride(),
            leaf.requires_grad,
            sorted(leaf.__dict__),
        )
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor)
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a model consists of."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, Any] = {
        name: (
            t.detach().double().nan_to_num().flatten().tolist(),
            form_of(t),
            t.stride(),
            t.requires_grad,
            t.data_ptr(),
        )
        for name, t in tensors.items()
    }
    return state | {f"{name}.training": module.training for name, module in model.named_modules()}


def gradients_of(run: Callable[..., Any], call: Call, dtype: torch.dtype) -> list[Tensor] | None:
    """Of the outputs along one random direction, for each floating-point input; None where there are none."""
    inputs, outputs, directions = _differentiated(run, call, dtype)
    if not outputs or not inputs:
        return None
    try:
        found = torch.autograd.grad(outputs, inputs, directions, allow_unused=True)
    except RuntimeError:
        return None
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def slope_of(run: Callable[..., Any], call: Call, position: int, direction: Tensor) -> float:
    """What `gradients_of` says by calculus, by a small step of one input in float64."""

    def value(step: float) -> float:
        _, outputs, directions = _differentiated(run, call, torch.float64, {position: step * direction})
        return sum(float((o * d).sum()) for o, d in zip(outputs, directions, strict=True))

    return (value(STEP) - value(-STEP)) / (2 * STEP)


def _differentiated(
    run: Callable[..., Any], call: Call, dtype: torch.dtype, moved: Mapping[int, Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Floating-point inputs, some of them `moved`, the outputs that depend on them or on weights, and a direction for
    each: the same one, whichever others depend on weights."""
    inputs: list[Tensor] = []

    def taken(value: Any) -> Any:
        if not is_float(value):
            return value
        step = (moved or {}).get(len(inputs))
        value = value.to(dtype) if step is None else value.to(dtype) + step
        inputs.append(value.requires_grad_())
        return value

    positional, named = pytree.tree_map(taken, call.arguments())
    result = result_of(run, positional, named)
    generator = torch.Generator().manual_seed(call.seed)
    floats = [leaf for leaf in pytree.tree_leaves(result) if is_float(leaf)]
    drawn = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in floats]
    told = [(o, d) for o, d in zip(floats, drawn, strict=True) if o.requires_grad]
    return inputs, [o for o, _ in told], [d for _, d in told]


def sharing(given: Any, first: Any, second: Any) -> set[tuple[int, int]]:
    """Pairs of tensors that lie in the same memory: of the inputs, and the outputs of two calls, counted through."""
    leaves = pytree.tree_leaves((given, first, second))
    inputs = len(pytree.tree_leaves(given))
    places: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.numel():
            places.setdefault(leaf.untyped_storage().data_ptr(), []).append(i)
    return {(i, j) for place in places.values() for i in place for j in place if i < j and j >= inputs}


def is_float(value: Any) -> bool:
    """Whether it is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def plain_sizes(value: Any) -> Any:
    """`value` with `torch.Size`s as the tuples that they are."""

    def is_size(leaf: Any) -> bool:
        return isinstance(leaf, torch.Size)

    return pytree.tree_map(lambda leaf: tuple(leaf) if is_size(leaf) else leaf, value, is_leaf=is_size)


def form_of(tensor: Tensor) -> str:
    """Its dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖; infinite where other places are not finite."""
    a, b = result.detach().double(), truth.detach().double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    a, b = a[finite], b[finite]
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm > 0 else float((a - b).norm())


def first_line(error: Exception) -> str:
    """Of the error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def signature(error: Exception) -> str:
    """The error's type and message without numbers and names that differ from model to model."""
    text = re.sub(r"[0-9]+", "#", re.sub(r"/\S+/", "", first_line(error)))
    return f"{type(error).__name__} {text[:60]}"


def place(error: Exception) -> str:
    """The error's message, and the line of ours that it rose in."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "kernelpress" in frame.filename or "/pyext/" in frame.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{first_line(error)}{where}"
