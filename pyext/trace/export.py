"""`torch.export` of a module, the contract that the exported program holds under, and the proof on the model itself."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from kernelpress.preserve import own_tensors, run_apart
from kernelpress.runtime.torch_private import FakeTensor, pytree
from kernelpress.trace.contract import (
    LARGEST_SIZE,
    Contract,
    PlainInput,
    SymbolRange,
    TensorInput,
    argument_names,
    input_names,
)
from kernelpress.trace.guards import Expression, UnknownExpressionError, evaluate, from_sympy, symbols_in

__all__ = ["Exported", "TraceError", "exports", "proven", "symbolic_batch", "with_batch_of_two"]

_ADVICE = (
    (("GuardOnDataDependent", "data-dependent", "Could not guard", "aten._local_scalar_dense"),
     "a branch or shape depends on tensor values: write it with torch.where or torch.cond, or move it out of forward"),
    (("numpy", "fake tensor to NumPy"), "stay in torch operations: NumPy cannot be exported"),
    (("symbolically trace", "control flow"), "replace the Python control flow on tensors by torch.where or torch.cond"),
    (("pickle", "ScriptModule", "ScriptFunction"), "pass the original nn.Module, not its scripted or compiled form"),
)  # fmt: skip

SAME = 1e-3
"""Largest relative difference, ‖a − b‖ / ‖b‖, of a graph's outputs to the model's: both run the same operations."""

SAME_ROUNDINGS = 800
"""Likewise in roundings of the outputs' dtype, where the graph was exported at another batch: a norm hides most of what
is done wrongly before it."""


class TraceError(ValueError):
    """The model cannot be exported; the message names the place in the model and what to do about it."""


@dataclass(frozen=True)
class Exported:
    """A program, and the calls that it answers as the model does."""

    program: torch.export.ExportedProgram
    contract: Contract


def exports(model: nn.Module, inputs: tuple[Any, ...], *, dynamic_batch: bool) -> Iterator[Exported]:
    """Programs of `model` in eval mode, the most general first, none of them proven on the model; the last one is for
    the sizes of `inputs` alone.

    The batch is dimension 0 of the input with the most dimensions (the first of these), and of every other input that
    has the same size there. Where that is 1, and may be no batch for some, it is tried as the batch of all first, then
    of that one input alone.

    Raises `TraceError` if there is no program at all.
    """
    reason = ""
    for carriers in _batch_carriers(inputs) if dynamic_batch else ():
        try:
            program = _export(model, with_batch_of_two(inputs, carriers), carriers)
            contract = _contract_of(program, model, inputs)
        except (TraceError, UnknownExpressionError) as error:
            reason = _first_line(error)
            continue
        if not contract.dynamic_batch:
            reason = "the model reads its size"
            continue
        yield Exported(program, contract)
        reason = "the model treats the example's size apart, or looks at strides"
    program = _export(model, inputs, frozenset())
    yield Exported(program, replace(_contract_of(program, model, inputs), fixed_because=reason))


def proven(graph: nn.Module, model: nn.Module, inputs: tuple[Any, ...], contract: Contract) -> Contract | None:
    """The contract with the sizes below two that `graph` was found right at, or None if it is wrong at `inputs`.

    A model that looks at strides while it runs answers for the example's alone: its sizes are fixed as well.
    """
    if _is_abstract(model, inputs):
        return contract
    with _MemoryReads() as reads:
        outputs = _outputs_of_both(graph, model, inputs)
    if not _agree(outputs, is_exact=contract.dynamic_batch):
        return None
    if reads.happened:
        if contract.dynamic_batch:
            return None
        contract = replace(contract, inputs=tuple(map(_pinned, contract.inputs, pytree.tree_leaves(inputs))))
    small = [n for n in (0, 1) if contract.dynamic_batch and _holds_at(n, graph, model, inputs, contract)]
    contract = replace(contract, small=frozenset(small))
    if (reordered := _rotated(inputs)) is not None:
        contract = replace(contract, any_key_order=_agree(_outputs_of_both(graph, model, inputs, reordered)))
    try:
        contract.require(inputs)
    except ValueError:
        return None
    return contract


class _MemoryReads(TorchFunctionMode):
    """Notices whether Python code asks how tensors lie in memory."""

    READS = frozenset({
        Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.data_ptr, Tensor.untyped_storage,
        Tensor.as_strided, torch.as_strided, Tensor.dim_order,
    })  # fmt: skip

    happened = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling():  # torch.cond compiles its branches, modes included
            self.happened |= func in self.READS
        return func(*args, **(kwargs or {}))


class _CopiesIntoOrder(TorchFunctionMode):
    """Shows `contiguous` to an export also where nothing is copied, which torch decides before anybody sees the call:
    the next call's tensors may lie otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous and not torch.compiler.is_dynamo_compiling():
            func = torch.ops.aten.contiguous.default
        return func(*args, **(kwargs or {}))


def _pinned(given: TensorInput | PlainInput, example: Any) -> TensorInput | PlainInput:
    return replace(given, stride=example.stride()) if isinstance(given, TensorInput) else given


def _holds_at(size: int, graph: nn.Module, model: nn.Module, inputs: tuple[Any, ...], contract: Contract) -> bool:
    """Whether the graph is right with all batches of that size."""
    resized = _with_batch(inputs, contract, size)
    try:
        replace(contract, small=frozenset({size})).require(resized)
    except ValueError:
        return False
    return _agree(_outputs_of_both(graph, model, resized))


def _batch_carriers(inputs: tuple[Any, ...]) -> list[frozenset[int]]:
    """Positions, among the flat inputs, of those whose dimension 0 may be the batch; the likeliest set first."""
    flat = pytree.tree_leaves(inputs)
    sized = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.dim() > 0]
    if not sized:
        return []
    leader = max(sized, key=lambda i: flat[i].dim())
    together = frozenset(i for i in sized if flat[i].shape[0] == flat[leader].shape[0])
    return list(dict.fromkeys([together, frozenset({leader})]))


def with_batch_of_two(inputs: tuple[Any, ...], carriers: frozenset[int]) -> tuple[Any, ...]:
    """Examples that torch.export takes for a batch: sizes of 0 and 1 are constants to it."""
    flat, spec = pytree.tree_flatten(inputs)
    flat = [_resized(x, 2) if i in carriers and x.shape[0] < 2 else x for i, x in enumerate(flat)]
    return pytree.tree_unflatten(flat, spec)


def symbolic_batch(inputs: tuple[Any, ...], carriers: frozenset[int]) -> tuple[Any, ...] | None:
    """What `torch.export` is told of the dimensions: those of the batch are symbolic."""
    import torch.export

    flat, spec = pytree.tree_flatten(inputs)
    dims = [{0: torch.export.Dim.AUTO} if i in carriers else None for i in range(len(flat))]
    return pytree.tree_unflatten(dims, spec) if carriers else None


def _with_batch(inputs: tuple[Any, ...], contract: Contract, size: int) -> tuple[Any, ...]:
    """The inputs with every symbol of the contract at one size."""
    sizes = {symbol.name: size for symbol in contract.symbols}
    flat, spec = pytree.tree_flatten(inputs)
    for i, (x, given) in enumerate(zip(flat, contract.inputs, strict=True)):
        if isinstance(given, TensorInput) and given.carries_batch:
            flat[i] = _resized(x, evaluate(given.shape[0], sizes))
    return pytree.tree_unflatten(flat, spec)


def _resized(x: Tensor, size: int) -> Tensor:
    """`x` with as many of its rows, one after the other and over again."""
    if x.shape[0] == 0:
        return x.new_zeros((size, *x.shape[1:]))
    return x[:size] if size <= x.shape[0] else x[torch.arange(size, device=x.device) % x.shape[0]]


def _rotated(inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs with the first key of each dict put last: none is where it was. None if that changes nothing."""

    def rotate(value: Any) -> Any:
        if type(value) is dict:
            keys = list(value)
            return {key: rotate(value[key]) for key in keys[1:] + keys[:1]}
        return type(value)(map(rotate, value)) if type(value) in (list, tuple) else value

    reordered: tuple[Any, ...] = rotate(inputs)
    return reordered if pytree.tree_structure(reordered) != pytree.tree_structure(inputs) else None


def _outputs_of_both(
    graph: nn.Module, model: nn.Module, inputs: tuple[Any, ...], of_model: tuple[Any, ...] | None = None
) -> tuple[Any, Any] | None:
    """What graph and model give for `inputs`, or for those of the model if they are others; None where either fails."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fx prints the code of what fails
            expected = run_apart(model, inputs if of_model is None else of_model)
            return run_apart(graph, inputs), expected
    except Exception:
        return None


def _agree(outputs: tuple[Any, Any] | None, *, is_exact: bool = True) -> bool:
    """Whether both came and are the same, within few roundings and apart in memory where they are to be if it
    `is_exact`."""
    if outputs is None:
        return False
    (got, got_spec), (expected, spec) = (pytree.tree_flatten(_plain(output)) for output in outputs)
    if got_spec != spec or (is_exact and not _shared(got) <= _shared(expected)):
        return False
    return all(_is_same(a, b, is_exact) for a, b in zip(got, expected, strict=True))


def _shared(outputs: Sequence[Any]) -> set[tuple[int, int]]:
    """Pairs of outputs that lie in the same memory: a branch may differ in nothing else."""
    strided = [isinstance(t, Tensor) and t.layout == torch.strided and t.numel() > 0 for t in outputs]
    places = [t.untyped_storage().data_ptr() if told else None for t, told in zip(outputs, strided, strict=True)]
    pairs = itertools.combinations(range(len(outputs)), 2)
    return {(i, j) for i, j in pairs if places[i] is not None and places[i] == places[j]}


def _plain(outputs: Any) -> Any:
    """The outputs with each `torch.Size` as the tuple that an exported graph gives for it."""

    def is_size(leaf: Any) -> bool:
        return isinstance(leaf, torch.Size)

    return pytree.tree_map(lambda leaf: tuple(leaf) if is_size(leaf) else leaf, outputs, is_leaf=is_size)


def _is_same(a: Any, b: Any, is_exact: bool) -> bool:
    if not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b or a != a)
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not b.dtype.is_floating_point and not b.dtype.is_complex:
        return False
    wide = torch.complex128 if b.dtype.is_complex else torch.float64
    bound = min(SAME, SAME_ROUNDINGS * torch.finfo(b.dtype).eps) if is_exact else SAME
    a, b = a.to(wide).nan_to_num(), b.to(wide).nan_to_num()
    return bool((a - b).norm() <= bound * b.norm())


def _is_abstract(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether there are no values to compute with."""
    tensors = [*model.parameters(), *model.buffers(), *(x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))]
    return any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def _export(model: nn.Module, inputs: tuple[Any, ...], carriers: frozenset[int]) -> torch.export.ExportedProgram:
    import torch.export

    shapes = symbolic_batch(inputs, carriers)
    if shapes is not None:
        shapes = _by_parameter(model, shapes)

    def export() -> torch.export.ExportedProgram:
        with _CopiesIntoOrder():
            return torch.export.export(model, own_tensors(inputs), dynamic_shapes=shapes, strict=False)

    try:
        program = export()
        if _turns_gradients_on(program.graph):
            with torch.enable_grad():
                program = export()
        return program
    except Exception as error:
        raise TraceError(_explain(model, inputs, error)) from error


def _turns_gradients_on(graph: Graph) -> bool:
    """Whether there is a region that does: torch cannot put it in line where gradients are off around it."""
    regions = graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled)
    return any(region.args[0] for region in regions)


def _by_parameter(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry a parameter of `forward`: those of `*rest` in a tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:first], shapes[first:])


def _contract_of(program: torch.export.ExportedProgram, model: nn.Module, inputs: tuple[Any, ...]) -> Contract:
    """Raises `UnknownExpressionError` for conditions that a contract cannot state."""
    flat, structure = pytree.tree_flatten((inputs, {}))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][-len(flat) :]
    arguments = argument_names(model.forward, len(inputs))
    specs = tuple(map(_input_of, input_names(arguments, inputs), placeholders, flat))
    names = frozenset().union(*(symbols_in(size) for x in specs if isinstance(x, TensorInput) for size in x.shape))
    if not names:
        return Contract(specs, arguments, structure)
    sizes = [size for node in placeholders if isinstance(node.meta["val"], Tensor) for size in node.meta["val"].shape]
    symbolic: Any = next(size for size in sizes if isinstance(size, torch.SymInt))
    environment = symbolic.node.shape_env
    guards = dict.fromkeys(from_sympy(environment.replace(guard.expr)) for guard in environment.guards)
    conditions = tuple(guard for guard in guards if guard is not True)
    read = {size for x in specs if isinstance(x, TensorInput) for size in x.shape if isinstance(size, str)}
    unread = names.union(*map(symbols_in, conditions)) - read
    if unread:
        raise UnknownExpressionError(f"the sizes {sorted(unread)} are no sizes of an input")
    ranges = {str(symbol): bounds for symbol, bounds in environment.var_to_range.items()}
    symbols = tuple(_range_of(name, ranges.get(name)) for name in sorted(names))
    return Contract(specs, arguments, structure, symbols, conditions)


def _input_of(name: str, node: Node, given: Any) -> TensorInput | PlainInput:
    if not isinstance(given, Tensor):
        return PlainInput(name, given)
    shape = tuple(_size_of(size) for size in node.meta["val"].shape)
    return TensorInput(name, shape, given.dtype, given.device.type, given.layout)


def _size_of(size: Any) -> Expression:
    return from_sympy(size.node.expr) if isinstance(size, torch.SymInt) else int(size)


def _range_of(name: str, bounds: Any) -> SymbolRange:
    """Bounds beyond what a size can be are none."""
    if bounds is None:
        return SymbolRange(name)
    least, most = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    return SymbolRange(name, max(2, least or 2), LARGEST_SIZE if most is None else min(most, LARGEST_SIZE))


def _explain(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> str:
    """The place in the user's model where `error` rose, the first line of what it says, and what to do."""
    name = type(model).__name__
    try:
        run_apart(model, inputs)
    except Exception as eager:
        return f"{name}: forward fails on example_inputs{_place(model, eager)}: {_first_line(eager)}"
    text = f"{type(error).__name__} {error}"
    advice = next((advice for marks, advice in _ADVICE if any(mark in text for mark in marks)), None)
    advice = (
        advice or "rewrite that operation with exportable torch operations (torch.export.export must accept the model)"
    )
    return f"{name} cannot be exported{_place(model, error)}: {_first_line(error)}. What to do: {advice}"


def _place(model: nn.Module, error: Exception) -> str:
    names = {id(module): path for path, module in model.named_modules()}
    library = os.path.dirname(os.path.abspath(torch.__file__))
    module, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            path = names[id(owner)]
            module = f" in {path} ({type(owner).__name__})" if path else ""
        file = frame.f_code.co_filename
        if not file.startswith((library, "<")) and file != __file__:
            source = traceback.linecache.getline(file, number).strip()  # type: ignore[attr-defined]
            line = f" at {os.path.basename(file)}:{number}, `{source}`"
    return module + line


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
