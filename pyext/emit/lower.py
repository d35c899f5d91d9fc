"""Lowers an emitted graph, at fixed shapes, to steps over buffers: what the plan runs.

The graph is interpreted once. A result that shares memory with an argument becomes another view of that argument's
buffer and costs nothing; a kernelpress layer on a native backend and an ATen operator that a kernel of ours computes
become native steps; everything else is a call of torch. Calls of ATen operators read constants in memory of the
program's own; layers pack theirs.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kernelpress.emit.graph import only_user, operator_of
from kernelpress.ops import registry
from kernelpress.ops.calls.aten import activation_of_call, aten_call, is_elementwise, parts_of
from kernelpress.ops.calls.steps import native_reason
from kernelpress.runtime.torch_private import OpOverload, pytree
from kernelpress.trace.regions import is_written, writes

__all__ = ["Buffer", "NativeStep", "Place", "Program", "Step", "TorchStep", "View", "lower"]

aten = torch.ops.aten

_BY_VALUES = frozenset({aten.where.default, aten.nonzero_numpy.default, aten.is_nonzero.default})
"""Operations whose sizes follow from values, though their tags do not say so."""


class Place(enum.Enum):
    """Where a buffer's memory comes from."""

    ARENA = "arena"
    INPUT = "input"
    OUTPUT = "output"
    """Allocated anew at each run, because it is returned."""
    CONSTANT = "constant"
    TORCH = "torch"
    """Allocated by the torch call that computes it."""


@dataclass
class Buffer:
    """A piece of memory of `nbytes`; `base` is the view that covers what was stored there first.

    `constant` is the graph's own tensor where layers alone read it, to pack it; else a copy.
    """

    place: Place
    nbytes: int
    base: View
    constant: Tensor | None = None


@dataclass(frozen=True)
class View:
    """A tensor in buffer `buffer`: shape and strides in elements, `offset` in elements from the buffer's base view."""

    buffer: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class NativeStep:
    """A kernelpress op that a native kernel computes into `out`; views stand for tensors among the arguments.

    With a `target` it is a part of that ATen operator, as `aten_call` takes it, with `activation` applied to it.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: View
    target: Any = None
    activation: str = "identity"
    further: tuple[View, ...] = ()
    """What it writes besides `out`, of an op with several outputs."""

    @property
    def results(self) -> tuple[View, ...]:
        """What the step writes."""
        return (self.out, *self.further)


@dataclass(frozen=True)
class TorchStep:
    """A call of torch: `into_out` if it writes to its one result (an `out=` argument), else it allocates its results.

    `positions` are those of `results` among the leaves of what the call returns.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[View, ...]
    positions: tuple[int, ...] = (0,)
    into_out: bool = False


Step = NativeStep | TorchStep


@dataclass
class Program:
    """Steps in execution order over `buffers`; `inputs` are views or plain values, `output` is a nest of either."""

    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    output: Any = None


def views_of(nest: Any) -> list[View]:
    """The views in a nest of arguments."""
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, View)]


def lower(graph_module: GraphModule, inputs: Sequence[Any]) -> Program:
    """The program of `graph_module` for flat inputs of these shapes and strides.

    Raises `ValueError` for a graph that writes in place to anything but its buffers, holds sparse tensors, or computes
    on another device than the CPU.
    """
    lowering = _Lowering(graph_module)
    with torch.no_grad():
        lowering.run(*inputs, enable_io_processing=False)
    program = lowering.program
    for view in views_of(program.output):
        buffer = program.buffers[view.buffer]
        if buffer.place is Place.ARENA:
            buffer.place = Place.OUTPUT
    _own_constants(program)
    return program


def _own_constants(program: Program) -> None:
    """Copies the constants that are read where they lie, or that are handed out."""
    calls = [(s.args, s.kwargs) for s in program.steps if isinstance(s, TorchStep) or s.target is not None]
    copies: dict[int, Tensor] = {}
    for index in {view.buffer for view in views_of((calls, program.output))}:
        buffer = program.buffers[index]
        if buffer.constant is not None:
            buffer.constant = copies.setdefault(id(buffer.constant), _same_layout_copy(buffer.constant))


def _same_layout_copy(t: Tensor) -> Tensor:
    """A copy of whatever lies from the first element to the last, with the same strides, none excepted."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = t.detach().as_strided((span,), (1,), t.storage_offset()).clone()
    return memory.as_strided(t.shape, t.stride(), 0)


class _Lowering(Interpreter):
    """Runs the graph and writes down what happens to memory."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.program = Program()
        self._views: dict[Node, Any] = {}
        self._made_by: dict[Node, int] = {}

    def run_node(self, node: Node) -> Any:
        if node.op == "call_function":
            _check_functional(node)
            _check_static(node, self.fetch_args_kwargs_from_env(node)[0])
        result = self.env[node.args[0]] if writes(node) else super().run_node(node)  # type: ignore[index]
        _check_tensors(node, result)
        if node.op == "placeholder":
            self._views[node] = self._new_view(result, Place.INPUT) if isinstance(result, Tensor) else result
            self.program.inputs.append(self._views[node])
        elif node.op == "get_attr":
            own = result.clone() if is_written(node) else result
            self._views[node] = self._constant(own) if isinstance(result, Tensor) else result
        elif node.op == "output":
            self.program.output = pytree.tree_map(self._returned, self._arguments(node.args[0]))
        else:
            self._views[node] = self._call(node, result)
        return result

    def _arguments(self, nest: Any) -> Any:
        return torch.fx.map_arg(nest, self._views.__getitem__)

    def _call(self, node: Node, result: Any) -> Any:
        args, kwargs = self._arguments(node.args), self._arguments(node.kwargs)
        target: Any = node.target
        if writes(node):
            self.program.steps.append(TorchStep(str(target), target, args, kwargs, (), ()))
            return args[0]
        leaves, spec = pytree.tree_flatten(result)
        owners = self._owners(node)
        views = [self._alias(leaf, owners) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        fresh = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and views[i] is None)
        if fresh or result is None:
            native = self._native_step(node, args, kwargs, result)
            if native is not None:
                self.program.steps.append(native)
                return pytree.tree_unflatten(native.results, spec)
            whole = self._aten_steps(node, result, owners) if isinstance(result, Tensor) else None
            if whole is not None:
                return whole
            out_variant = _out_variant(node.target) if fresh and spec.is_leaf() else None
            place = Place.TORCH if out_variant is None else Place.ARENA
            target = out_variant or target
            if any(_share_memory(leaves[i], owner) for i in fresh for owner, _ in owners):
                target = functools.partial(_copied, target)
            results: list[View] = []
            for i in fresh:
                views[i] = view = self._alias(leaves[i], owners) or self._new_view(leaves[i], place)
                owners.append((leaves[i], view))
                results.append(view)
            into_out = out_variant is not None
            layer = self._prepared_layer(node, args, kwargs)
            if layer is not None:
                target, args, kwargs = *layer, {}
            self.program.steps.append(
                TorchStep(str(node.target), target, args, kwargs, tuple(results), fresh, into_out)
            )
        return pytree.tree_unflatten(views, spec)

    def _aten_steps(self, node: Node, result: Tensor, owners: Sequence[tuple[Tensor, View]]) -> View | None:
        """What native steps make of a call of an ATen operator, None where no kernel computes it.

        An activation goes into the step before where that can apply it.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        name, source = activation_of_call(node.target, args, kwargs), next(iter(node.all_input_nodes), None)
        if name is not None and source in self._made_by and only_user(source) is node:
            made_by = self._made_by[source]
            step = self.program.steps[made_by]
            assert isinstance(step, NativeStep)
            self.program.steps[made_by] = replace(step, op=f"{step.op} + {name}", activation=name)
            return step.out
        parameters = owners[1:] if node.target is aten.batch_norm.default else []
        if any(self.program.buffers[view.buffer].place is not Place.CONSTANT for _, view in parameters):
            return None
        calls = parts_of(node.target, args, kwargs, result)
        if not calls or any(aten_call(node.target, given, kwargs, out) is None for given, out in calls):
            return None
        views = {id(t): view for t, view in owners}
        whole = self._new_view(result, Place.ARENA)
        if is_elementwise(node.target):
            self._made_by[node] = len(self.program.steps)
        for given, out in calls:
            part = self._alias(out, [(result, whole)])
            assert part is not None
            arguments = tuple(views.get(id(argument), argument) for argument in given)
            self.program.steps.append(NativeStep(str(node.target), arguments, kwargs, part, node.target))
        return whole

    def _owners(self, node: Node) -> list[tuple[Tensor, View]]:
        """The tensors that `node` reads, with their views."""
        owners: list[tuple[Tensor, View]] = []
        for source in node.all_input_nodes:
            tensors, views = pytree.tree_leaves(self.env[source]), pytree.tree_leaves(self._views[source])
            owners += [(t, v) for t, v in zip(tensors, views, strict=True) if isinstance(t, Tensor)]
        return owners

    def _alias(self, tensor: Tensor, owners: Sequence[tuple[Tensor, View]]) -> View | None:
        """`tensor` as a view of the buffer of the tensor it shares memory with, if there is one."""
        form = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
        for owner, view in owners:
            if _share_memory(tensor, owner) and (owner.dtype, owner.is_conj(), owner.is_neg()) == form:
                offset = view.offset + int(tensor.storage_offset()) - int(owner.storage_offset())
                return View(view.buffer, tuple(tensor.shape), tuple(tensor.stride()), offset, tensor.dtype)
        return None

    def _new_view(self, tensor: Tensor, place: Place, constant: Tensor | None = None) -> View:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = span * tensor.element_size() if tensor.numel() else 0
        view = View(len(self.program.buffers), tuple(tensor.shape), tuple(tensor.stride()), 0, tensor.dtype)
        self.program.buffers.append(Buffer(place, nbytes, view, constant))
        return view

    def _returned(self, leaf: Any) -> Any:
        """A view of a constant as a copy of it: plans do not give their own memory away."""
        if not isinstance(leaf, View) or self.program.buffers[leaf.buffer].place is not Place.CONSTANT:
            return leaf
        return self._copy("copy of a constant", leaf, torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype))

    def _copy(self, name: str, source: View, like: Tensor) -> View:
        """A copy of a tensor that lies like another one of its shape."""
        copy = self._new_view(like, Place.ARENA)
        if aten_call(aten.clone.default, (like,), {}, like) is None:
            step: Step = TorchStep(name, aten_copy, (source,), {}, (copy,), into_out=True)
        else:
            step = NativeStep(name, (source,), {}, copy, aten.clone.default)
        self.program.steps.append(step)
        return copy

    def _constant(self, tensor: Tensor) -> View:
        return self._new_view(tensor, Place.CONSTANT, tensor)

    def _prepared_layer(
        self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[PreparedLayer, tuple[Any, ...]] | None:
        """What runs a kernelpress op on oneDNN, on weights packed once, and its arguments; None for anything else."""
        operator = operator_of(node)
        if operator is None or operator.on("onednn") is None:
            return None
        tensors, options, backend = operator.signature.bind(*self.fetch_args_kwargs_from_env(node))
        given = operator.signature.bind(args, kwargs)[0]
        requested = registry.requested_backend(backend)
        chosen = registry.implementation(
            problem := registry.problem_of(operator, tensors, options, requested), requested
        )
        if chosen.backend != "onednn" or not self._has_constant_weights(operator, given):
            return None
        positions = tuple(i for i in operator.activations if tensors[i] is not None)
        layer = PreparedLayer(chosen.prepare(problem, tensors), positions, len(tensors))
        return layer, tuple(given[i] for i in positions)

    def _has_constant_weights(self, operator: registry.Operator, given: Sequence[Any]) -> bool:
        """Whether no parameter among the tensors of an op is computed by the graph."""
        weights = [view for i, view in enumerate(given) if view is not None and i not in operator.activations]
        return all(self.program.buffers[view.buffer].place is Place.CONSTANT for view in weights)

    def _native_step(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> NativeStep | None:
        """The native step of a kernelpress op, after copies of the images that do not lie as the kernel reads them."""
        operator = operator_of(node)
        if operator is None:
            return None
        tensors, options, backend = operator.signature.bind(*self.fetch_args_kwargs_from_env(node))
        requested = registry.requested_backend(backend)
        native_backend = "cpu" if requested == "auto" else requested
        entry = operator.on(native_backend) if native_backend in registry.NATIVE_BACKENDS else None
        if entry is None or entry.kernel is None:
            return None
        given: list[Any] = list(operator.signature.bind(args, kwargs)[0])
        if not self._has_constant_weights(operator, given):
            return None
        copies: list[tuple[int, Tensor]] = []
        layouts = entry.kernel.layouts
        for i, (name, tensor) in enumerate(zip(operator.tensors, tensors, strict=True)):
            layout = layouts.get(name)
            if layout is not None and tensor is not None and layout.spacing(tensor.shape, tensor.stride()) is None:
                tensors[i] = copied = layout.copy(tensor)
                copies.append((i, copied))
        named = {**options._asdict(), "backend": native_backend}
        if native_reason(operator.name, tensors, named, result) is not None:
            return None
        for i, copied in copies:
            given[i] = self._copy("copy to the kernel's layout", given[i], copied)
        out, *further = (self._new_view(leaf, Place.ARENA) for leaf in pytree.tree_leaves(result))
        return NativeStep(operator.name, tuple(given), named, out, further=tuple(further))


def _share_memory(tensor: Tensor, other: Tensor) -> bool:
    address = tensor.untyped_storage().data_ptr()
    return address != 0 and other.untyped_storage().data_ptr() == address


def _copied(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The results of a call in memory of their own, where they are views of an operand that no `View` describes: of
    another type, conjugated, negated."""
    return pytree.tree_map_only(Tensor, lambda t: t.resolve_conj().resolve_neg().clone(), target(*args, **kwargs))


@dataclass(frozen=True)
class PreparedLayer:
    """A kernelpress op on weights that it holds, packed; it takes the tensors at `positions` among `count`."""

    run: registry.Run
    positions: tuple[int, ...]
    count: int

    def __call__(self, *activations: Tensor) -> Tensor:
        tensors: list[Tensor | None] = [None] * self.count
        for position, t in zip(self.positions, activations, strict=True):
            tensors[position] = t
        return self.run(tensors)


def aten_copy(source: Tensor, *, out: Tensor) -> Tensor:
    """`source` in the memory format of `out`."""
    return out.copy_(source)


def _check_functional(node: Node) -> None:
    if writes(node) and not (isinstance(node.args[0], Node) and is_written(node.args[0])):
        raise ValueError(
            f"model: expected operations without side effects, got the in-place {node.target} at {node.name}; emit the "
            "model"
        )


def _check_static(node: Node, args: tuple[Any, ...]) -> None:
    """Sizes and numbers that follow from the values of tensors would stay those of the capture."""
    tags = getattr(node.target, "tags", ())
    depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*tags} or node.target in _BY_VALUES
    if node.target is aten.index.Tensor:
        depends = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    elif node.target in (aten.repeat_interleave.self_Tensor, aten.repeat_interleave.Tensor):
        depends = node.kwargs.get("output_size") is None
    elif node.target is aten.one_hot.default:
        depends = len(args) < 2 or args[1] < 0
    if depends and node.users:
        raise ValueError(
            f"model: a plan has fixed sizes, but those of {node.target} at {node.name} follow from the values of its"
            " inputs; call the emitted model itself"
        )


def _check_tensors(node: Node, result: Any) -> None:
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            raise ValueError(f"model: expected dense tensors, got {leaf.layout} at {node.name}; run the model itself")
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            raise ValueError(f"model: expected tensors on the CPU, got {leaf.device} at {node.name}")


def _out_variant(target: Any) -> Any:
    """The overload of an ATen operation that writes into a given tensor, where it does so without a copy of its own."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    if torch.Tag.dynamic_output_shape in target.tags:
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    packet = target.overloadpacket
    for name in packet.overloads():
        variant = getattr(packet, name)
        outs = [a for a in variant._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in variant._schema.arguments if not a.is_out]
        if len(outs) == 1 and outs[0].name == "out" and rest == wanted and torch.Tag.generated not in variant.tags:
            return variant
    return None
