"""Any `nn.Module` in eval mode as one functional, high-level ATen graph: what `compress` and `emit` both read."""

from __future__ import annotations

import operator
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from kernelpress.regions import functionalised, has_regions, keep_layouts, not_dense, writes

__all__ = ["TraceError", "module_of", "parameter_name", "trace"]

aten = torch.ops.aten

_DROPOUTS = frozenset(
    getattr(aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)
_CHECKS = frozenset(
    {
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
# Their schemas do not say so, but they can return their argument itself.
_UNDECLARED_ALIASES = _DROPOUTS | {aten.type_as.default, operator.getitem}
_ADVICE = (
    (("GuardOnDataDependent", "data-dependent", "Could not guard", "aten._local_scalar_dense"),
     "a branch or shape depends on tensor values: write it with torch.where or torch.cond, or move it out of forward"),
    (("numpy", "fake tensor to NumPy"), "stay in torch operations: NumPy cannot be exported"),
    (("symbolically trace", "control flow"), "replace the Python control flow on tensors by torch.where or torch.cond"),
    (("pickle", "ScriptModule", "ScriptFunction"), "pass the original nn.Module, not its scripted or compiled form"),
)  # fmt: skip


class TraceError(ValueError):
    """The model cannot be exported; the message names the place in the model and what to do about it."""


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, dynamic_batch: bool = True) -> GraphModule:
    """Exports `model`, in eval mode, to a functional graph of high-level ATen operations.

    The graph holds `aten.conv2d`, `aten.batch_norm`, `aten.linear`, `aten.relu` … as the model's author wrote them:
    in-place operations have become functional ones, `view` has become `reshape` (memory may turn channels_last),
    dropout, shape assertions and dead code are gone. Parameters and buffers are `get_attr` nodes under their
    original qualified names and share memory with `model`, whose training flags are left as they were. Every node
    carries `meta["val"]`, its fake tensor (shape, dtype, device). An operation that the model applied in place to one
    of its inputs no longer writes to the caller's tensor. The result keeps the model's input and output structure.

    `example_inputs`: what `forward` takes by position. With `dynamic_batch`, dimension 0 of every input tensor is
    symbolic; a model that only works at one batch size is exported at the example's, with a warning and
    `meta["dynamic_batch"] = False` on the returned module.

    Raises `TraceError` for a model that `torch.export` cannot take, `TypeError` for arguments of another type,
    `ValueError` for tensors that are sparse, quantized or without values, and for writes that PyTorch cannot undo.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model: expected a plain nn.Module, got {type(model).__name__}; pass the module it was made from"
        )
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, (tuple, list)) or not any(isinstance(x, Tensor) for x in pytree.tree_leaves(inputs)):
        raise TypeError(
            f"example_inputs: expected a Tensor or a tuple with Tensors, got {type(example_inputs).__name__}"
        )
    inputs = tuple(inputs)
    for position, x in enumerate(pytree.tree_leaves(inputs)):
        if isinstance(x, Tensor) and (reason := not_dense(x)) is not None:
            raise ValueError(f"example_inputs: expected dense tensors with values, got {reason} at position {position}")

    with _eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        # torch.export's own use of a deprecated pytree name.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        program = _export_dynamic(model, inputs) if dynamic_batch else None
        is_dynamic = program is not None
        if program is None:
            program = _export(model, inputs, dynamic=False)
        module = _clean(program.module())
        if _mutations(module.graph) or has_regions(module.graph):
            # Writes through views, sub-graphs: PyTorch's own functionalisation resolves the aliasing, spells out the
            # casts of autocast, and puts in line what only sets a mode.
            module = _clean(functionalised(program))
            _restore_batch_norm(module.graph)
    if dynamic_batch and not is_dynamic:
        name = type(model).__name__
        warnings.warn(f"{name} fixes its batch size: exported for the batch of example_inputs only", stacklevel=2)
    for part in [m for m in module.modules() if isinstance(m, GraphModule)]:
        _simplify(part.graph)
        keep_layouts(part.graph)
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()
    module.meta["dynamic_batch"] = is_dynamic
    return module


def module_of(node: Node) -> str:
    """Qualified name of the module whose `forward` ran `node` (`""` is the model itself); for `get_attr`, its owner."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return str(names[-1]).split("@")[0] if names else ""


def parameter_name(node: Any) -> str | None:
    """Qualified name of the parameter or buffer that `node` reads, or None if it is anything else."""
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
    except NotImplementedError:
        # Exported graphs, a quantizer's for example, refuse it: their mode is written into them.
        for module, _ in training:
            module.training = False
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _export_dynamic(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram | None:
    """The program with symbolic batch, or None where the model does not allow one."""
    # torch.export takes a size of 0 or 1 for a constant.
    batch = tuple(pytree.tree_map(_at_least_two, inputs))
    try:
        program = _export(model, batch, dynamic=True)
    except TraceError:
        if all(a is b for a, b in zip(pytree.tree_leaves(batch), pytree.tree_leaves(inputs), strict=True)):
            raise
        return None
    user_inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return program if all(isinstance(v.shape[0], torch.SymInt) for v in tensors) else None


def _at_least_two(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] > 1:
        return value
    return torch.cat([value, value]) if value.shape[0] == 1 else value.new_zeros((2, *value.shape[1:]))


def _export(model: nn.Module, inputs: tuple[Any, ...], *, dynamic: bool) -> torch.export.ExportedProgram:
    import torch.export

    def batch_dim(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() > 0 else None

    shapes: tuple[Any, ...] | None = tuple(pytree.tree_map(batch_dim, inputs)) if dynamic else None
    if shapes is not None and _has_var_positional(model):
        shapes = (shapes,)
    try:
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise TraceError(_explain(model, inputs, error)) from error


def _has_var_positional(model: nn.Module) -> bool:
    import inspect

    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _explain(model: nn.Module, inputs: tuple[Any, ...], error: Exception) -> str:
    """The place in the user's model where `error` rose, the first line of what it says, and what to do."""
    name = type(model).__name__
    try:
        model(*inputs)
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


def _clean(module: GraphModule) -> GraphModule:
    """Drops assertions, dropout and dead code, then makes in-place operations functional where that is safe."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
            module.delete_submodule("_guards_fn")
        elif node.target in _CHECKS and not node.users:
            graph.erase_node(node)
        elif node.target in _DROPOUTS and not node.args[2]:
            _replace(node, node.args[0])
    graph.eliminate_dead_code()
    for node in _mutations(graph):
        _make_functional(node)
    return module


def _replace(node: Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _mutations(graph: Graph) -> list[Node]:
    """The nodes that write to one of their arguments."""
    return [node for node in graph.nodes if writes(node)]


def _make_functional(node: Node) -> bool:
    """Replaces an in-place node by its functional twin if nobody else can see the write; says whether it did."""
    target, written = node.target, node.args[0] if node.args else None
    assert isinstance(target, torch._ops.OpOverload)
    packet, overload = target._schema.name.split("::")[-1], target._overloadname
    twin = getattr(getattr(aten, packet[:-1], None), overload, None) if packet.endswith("_") else None
    if twin is None or target.namespace != "aten" or not isinstance(written, Node):
        return False
    if _is_seen_elsewhere(written, node) or not _same_result(twin, node):
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    written.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    node.target = twin
    node.name = node.graph._graph_namespace.create_name(packet[:-1], None)
    return True


def _is_seen_elsewhere(written: Node, write: Node) -> bool:
    """Whether memory that `write` changes is read later under another name than `written` or its result."""
    root = written
    while (source := _aliased(root)) is not None:
        root = source
    if root.op == "get_attr":
        return True
    order = {n: i for i, n in enumerate(write.graph.nodes)}
    aliases, pending = {root}, [root]
    while pending:
        for user in pending.pop().users:
            if _aliased(user) in aliases and user not in aliases and order[user] < order[write]:
                aliases.add(user)
                pending.append(user)
    return any(order[user] > order[write] for alias in aliases - {written} for user in alias.users)


def _aliased(node: Node) -> Node | None:
    """The argument whose memory the result of `node` may share."""
    target = node.target
    if target in _UNDECLARED_ALIASES:
        return node.args[0]  # type: ignore[return-value]
    if isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns):
        return next((a for a in node.args if isinstance(a, Node)), None)
    return None


def _same_result(twin: Any, node: Node) -> bool:
    """In-place operations keep their target's dtype; the functional twin may promote instead."""

    def value(n: Node) -> Any:
        return n.meta["val"]

    expected = node.meta["val"]
    if not isinstance(expected, FakeTensor):
        return False
    args, kwargs = torch.fx.map_arg(node.args, value), torch.fx.map_arg(node.kwargs, value)
    with expected.fake_mode:
        got = twin(*args, **kwargs)
    return bool(got.dtype == expected.dtype and got.dim() == expected.dim())


def _restore_batch_norm(graph: Graph) -> None:
    """Writes the inference form that functionalisation leaves behind as `aten.batch_norm` again."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        if any(user.args[1] != 0 and user.users for user in node.users):
            continue
        with graph.inserting_before(node):
            whole = graph.call_function(
                aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
            )
        whole.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(whole)
            graph.erase_node(user)
        graph.erase_node(node)


def _simplify(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten.slice.Tensor and _is_whole_slice(node):
            _replace(node, node.args[0])


def _is_whole_slice(node: Node) -> bool:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    start, end, step = (*node.args, *defaults[len(node.args) :])[2:]
    return start in (0, None) and step == 1 and end in (None, 2**63 - 1)
