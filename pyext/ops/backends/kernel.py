"""How an op becomes a call of one of our kernels: one record a kernel, and one way to build its arguments."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops.calls import packing, prepared
from kernelpress.ops.layout import DENSE, PIXELS, ROWS, Layout
from kernelpress.ops.registry import Candidates, Implementation, Problem, Run, Tensors

__all__ = [
    "FLOATING",
    "IMAGES",
    "PLANES",
    "ROWS_OF_CHANNELS",
    "Arguments",
    "Kernel",
    "Likes",
    "Target",
    "activation_index",
    "bits",
    "build",
    "float_vector",
    "implementation",
    "index_of",
    "int8_kernel",
    "laid_out",
    "new_outputs",
    "operands_of",
    "outputs_of",
    "spacings",
    "supports_all",
    "tf32_reason",
    "why_not",
    "window",
]

FLOATING: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

Layouts = Mapping[str, Layout]
Words = tuple[int | float, ...]

IMAGES: Layouts = {"x": PIXELS, "residual": PIXELS}
PLANES: Layouts = {"x": DENSE, "residual": DENSE}
ROWS_OF_CHANNELS: Layouts = {"x": ROWS, "residual": ROWS}


@dataclass(frozen=True)
class Likes:
    """Where a kernel is worth trying: rows and columns of blocks, best first, and the largest fraction of blocks that
    are not all zero, above which skipping the others has never paid; `single` is that of blocks of one weight."""

    blocks: tuple[tuple[int, int], ...] = ()
    density: float = 1.0
    single: float = 1.0


def _nothing(*_: Any) -> tuple[Any, ...]:
    return ()


def supports_all(problem: Problem) -> str | None:
    """No reason against any problem."""
    return None


@dataclass(frozen=True)
class Kernel:
    """How an op becomes a call of the kernel `name`.

    A function of `_cpu` or `_cuda` takes words: addresses of operands, of outputs, of a workspace; sizes; what its
    backend puts there (activation, dtype, tile configuration); scalars. One of `kernels/triton/<family>.py` takes
    outputs and operands as tensors, and options by name; `<name>_configurations` are its tile configurations.

    layouts: how tensors must lie, by name; those that it does not name lie anyhow, or are packed.
    operands: `(options, *tensors)` → operands, weights packed; an activation passes through as it came.
    sizes: `(problem, spacing)` → integers; `spacing[name]` is the distance in elements between neighbouring pixels or
        rows of a tensor that lies as it must, 0 of an absent one; that of the output is `spacing["y"]`.
    supports: why it cannot run a problem whose x has one of `dtypes`, else None.
    scalars: `problem` → floats.
    workspace: `(problem, device)` → bytes that it may write while it runs, enough for every configuration.
    specialise: `(kernel, problem, tensors, device)` → the kernel for the values of these parameters.
    options: `problem` → options by name, those of the op where it is not given.
    out: how outputs lie, where not as the op says; it then runs only where it is asked for.
    input_limit: `(options, *tensors)` → magnitude of x from which on intermediate sums may overflow, though the result
        may not; of a kernel that mixes inputs, so that what is not finite spreads to outputs that do not depend on it.
    """

    name: str
    operands: Callable[..., tuple[Tensor | None, ...]]
    sizes: Callable[[Problem, Mapping[str, int]], tuple[int, ...]] = _nothing
    layouts: Layouts = field(default_factory=lambda: IMAGES)
    supports: Callable[[Problem], str | None] = supports_all
    dtypes: tuple[torch.dtype, ...] = FLOATING
    scalars: Callable[[Problem], tuple[float, ...]] = _nothing
    workspace: Callable[[Problem, Any], int] | None = None
    specialise: Callable[[Kernel, Problem, Tensors, Any], Kernel] | None = None
    family: str = ""
    options: Callable[[Problem], dict[str, Any]] = lambda problem: problem.options._asdict()
    likes: Likes = Likes()
    out: Layout | None = None
    input_limit: Callable[..., float] | None = None


@dataclass
class Target:
    """Where a backend's launches go now.

    `device_type` is the type of the tensors it takes. `reason(index)` tells why nothing runs on the device of that
    index (None: on any). `describe(index)` is the device. `launch` runs a kernel, `configurations(name)` names the tile
    configurations of one, as the backend says.
    """

    device_type: str
    reason: Callable[[int | None], str | None]
    describe: Callable[[int], Any]
    launch: Callable[..., None]
    configurations: Callable[[str], Sequence[str]] = _nothing

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Send the launches of all threads elsewhere, as `changes` of the fields say; what was prepared before is
        prepared anew, inside and after."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        prepared.clear()
        try:
            yield
        finally:
            vars(self).update(before)
            prepared.clear()


def index_of(problem: Problem) -> int:
    """The index of the device that a problem is to run on."""
    return torch.device(problem.device).index or 0


def why_not(kernel: Kernel, problem: Problem, target: Target) -> str | None:
    """Why a kernel cannot run a problem on a target, else None."""
    if torch.device(problem.device).type != target.device_type:
        return f"x is on {problem.device}"
    reason = target.reason(index_of(problem))
    if reason is not None:
        return reason
    x = problem.first
    if x.dtype not in kernel.dtypes:
        return f"the kernel takes {' or '.join(map(str, kernel.dtypes))}, got {x.dtype}"
    if kernel.out is not None and problem.layout is not kernel.out:
        return f"it gives {kernel.out.name} memory: it runs where it is asked for"
    return kernel.supports(problem)


def implementation(
    backend: str,
    kernel: Kernel,
    target: Target,
    prepare: Callable[[Kernel, Problem, Tensors], Run],
    candidates: Callable[[Kernel, Problem, Tensors], Candidates] | None = None,
) -> Implementation:
    """The entry of a kernel."""
    return Implementation(
        backend,
        lambda: target.reason(None),
        lambda problem: why_not(kernel, problem, target),
        lambda problem, tensors: prepare(kernel, problem, tensors),
        None if candidates is None else lambda problem, tensors: candidates(kernel, problem, tensors),
        kernel,
    )


def tf32_reason(problem: Problem) -> str | None:
    """Why a kernel that multiplies float32 on tensor cores must not run, else None: TF32 is not allowed."""
    x = problem.first
    if x.dtype != torch.float32 or problem.allow_tf32:
        return None
    return "it multiplies float32 in TF32, which torch.backends.cudnn.allow_tf32 forbids"


def float_vector(t: Tensor | None) -> Tensor | None:
    """A bias or scale as the kernels read it: contiguous float32; converted once while it stays unchanged."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return packing.packed(t, None, "float32", lambda values: values.float().contiguous())


def activation_index(name: str) -> int:
    """The integer that the kernels know an activation by."""
    return ACTIVATIONS.index(name)


def bits(number: float) -> int:
    """A scalar as the words of `_cpu` have it: the bits of a double."""
    word: int = struct.unpack("q", struct.pack("d", number))[0]
    return word


def int8_kernel(name: str) -> Callable[[Kernel, Problem, Tensors, Any], Kernel]:
    """For `Kernel.specialise`: where x is int8, the kernel is the one of this name, with the same words."""

    def specialise(kernel: Kernel, problem: Problem, tensors: Tensors, device: Any) -> Kernel:
        return replace(kernel, name=name) if problem.first.dtype == torch.int8 else kernel

    return specialise


def window(kernel: Sequence[int], options: Any) -> tuple[int, ...]:
    """Kernel, stride, padding and dilation as the kernels' argument structs have them."""
    return (*kernel, *options.stride, *options.padding, *getattr(options, "dilation", (1, 1)))


def spacings(kernel: Kernel, problem: Problem) -> dict[str, int]:
    """`spacing` as `Kernel.sizes` takes it."""
    found = {"y": _spacing(kernel.layouts.get("y", problem.layout), problem.shape, problem.stride)}
    for name, t in zip(problem.operator.tensors, problem.tensors, strict=True):
        layout = kernel.layouts.get(name)
        found[name] = 0 if layout is None or t is None else _spacing(layout, t.shape, t.stride)
    return found


def _spacing(layout: Layout, shape: Sequence[int], stride: Sequence[int]) -> int:
    spacing = layout.spacing(shape, stride)
    if spacing is None:  # it will be copied
        spacing = layout.spacing(shape, layout.stride(shape))
    assert spacing is not None
    return spacing


def operands_of(kernel: Kernel, problem: Problem, tensors: Tensors) -> tuple[int | Tensor | None, ...]:
    """The kernel's operands: parameters packed, in place of an activation its position among the op's tensors."""
    activations = problem.operator.activations
    marked: list[Any] = [at if at in activations and t is not None else t for at, t in enumerate(tensors)]
    return kernel.operands(problem.options, *marked)


def new_outputs(problem: Problem) -> Callable[[], Any]:
    """A function that makes what a call returns, not filled: a tensor, or several in a tuple."""
    device = torch.device(problem.device)
    (shape, stride, dtype), *others = problem.outputs
    if not others:
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return lambda: tuple([torch.empty_strided(s, of, dtype=d, device=device) for s, of, d in problem.outputs])


def outputs_of(made: Any) -> tuple[Tensor, ...]:
    """The tensors that a call returns."""
    return made if isinstance(made, tuple) else (made,)


def laid_out(kernel: Kernel, problem: Problem, run: Run) -> Run:
    """`run` on tensors that may lie otherwise than the kernel reads them: those are copied first."""
    copies = [
        (at, layout.copy)
        for at, (name, t) in enumerate(zip(problem.operator.tensors, problem.tensors, strict=True))
        if (layout := kernel.layouts.get(name)) and t is not None and layout.spacing(t.shape, t.stride) is None
    ]

    def run_on_copies(tensors: Tensors) -> Any:
        given = list(tensors)
        for at, copy in copies:
            t = given[at]
            assert t is not None
            given[at] = copy(t)
        return run(given)

    return run_on_copies if copies else run


class Arguments(NamedTuple):
    """What a kernel of `_cpu` or `_cuda` is called with: `words`, in which 0 stands for the addresses that come with
    a call: of activations (`changing`: word and position among the op's tensors), of outputs from word `outputs` on, of
    the workspace behind them. `held` are the tensors that the other addresses belong to.
    """

    name: str
    words: Words
    changing: tuple[tuple[int, int], ...]
    outputs: int
    held: tuple[Tensor, ...]
    workspace_bytes: int

    def into(self, tensors: Tensors, *outputs: Tensor) -> Words:
        """The words for these tensors, without a workspace."""
        words = list(self.words)
        for word, position in self.changing:
            t = tensors[position]
            assert t is not None
            words[word] = t.data_ptr()
        words[self.outputs : self.outputs + len(outputs)] = [y.data_ptr() for y in outputs]
        return tuple(words)


def build(kernel: Kernel, problem: Problem, tensors: Tensors, tail: Words, device: Any = None) -> Arguments:
    """The arguments of a call; `tail` is what the backend puts between sizes and scalars."""
    if kernel.specialise is not None:
        kernel = kernel.specialise(kernel, problem, tensors, device)
    operands = operands_of(kernel, problem, tensors)
    has_workspace = kernel.workspace is not None
    words = (
        *[operand.data_ptr() if isinstance(operand, Tensor) else 0 for operand in operands],
        *[0] * (len(problem.outputs) + has_workspace),
        *kernel.sizes(problem, spacings(kernel, problem)),
        *tail,
        *kernel.scalars(problem),
    )
    return Arguments(
        kernel.name,
        words,
        tuple((at, operand) for at, operand in enumerate(operands) if isinstance(operand, int)),
        len(operands),
        tuple(operand for operand in operands if isinstance(operand, Tensor)),
        0 if kernel.workspace is None else kernel.workspace(problem, device),
    )
