"""Any `nn.Module` in eval mode as one functional, high-level ATen graph: what `compress` and `emit` both read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kernelpress.preserve import outside_modes
from kernelpress.runtime.torch_private import FakeTensor, OpOverload, pytree
from kernelpress.trace.export import TraceError, exports, proven
from kernelpress.trace.regions import (
    DROPOUTS,
    aliased,
    functionalised,
    has_regions,
    keep_layouts,
    memory_of,
    not_dense,
    writes,
)

__all__ = ["TraceError", "checked_inputs", "module_of", "parameter_name", "trace"]

aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.convolution.default}
)
_CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, dynamic_batch: bool = True) -> GraphModule:
    """Exports `model`, in eval mode, to a functional graph of high-level ATen operations.

    The graph holds `aten.conv2d`, `aten.batch_norm`, `aten.linear`, `aten.relu` … as the model's author wrote them:
    in-place operations have become functional ones, `view` has become `reshape` (memory may turn channels_last),
    dropout, shape assertions and dead code are gone. Parameters and buffers are `get_attr` nodes under their
    original qualified names and share memory with `model`, which is left as it was, as are the random numbers to
    come. Every node carries `meta["val"]`, its fake tensor (shape, dtype, device). An operation that the model applied
    in place to one of its inputs no longer writes to the caller's tensor. The result keeps the model's input and output
    structure.

    `example_inputs`: what `forward` takes by position. With `dynamic_batch`, the batch is symbolic; `export.exports`
    says which dimensions it is. A model that fixes its batch size is exported at the example's, with a warning. The
    calls that the graph answers as the model does are `meta["contract"]`; at `example_inputs` and, with a symbolic
    batch, at batches of one and none, both were run and compared.

    Raises `TraceError` for a model that `torch.export` cannot take, `TypeError` for arguments of another type,
    `ValueError` for tensors that are sparse, quantized or without values, and for writes that PyTorch cannot undo.
    """
    inputs = checked_inputs(model, example_inputs)
    name = type(model).__name__

    with outside_modes(model), torch.no_grad(), warnings.catch_warnings():
        # torch.export's own use of a deprecated pytree name.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        _ignore_computed_weights(model)
        _set_eval_mode(model)
        for exported in exports(model, inputs, dynamic_batch=dynamic_batch):
            module = _functional(exported.program)
            contract = proven(module, model, inputs, exported.contract)
            if contract is not None:
                break
        else:
            raise TraceError(f"{name}: its export does not compute what the model does on example_inputs")
    if dynamic_batch and not contract.dynamic_batch:
        warnings.warn(f"{name} fixes its batch size: exported for the batch of example_inputs only", stacklevel=2)
    module.meta["contract"] = contract
    return module


def _ignore_computed_weights(model: nn.Module) -> None:
    """Silences what torch.export says of weights that hooks compute before each call, under a mask or of a norm: they
    are computed in the graph as well. What a model assigns beside them is still told."""
    names = "|".join(map(re.escape, _computed_weights(model)))
    if names:
        listed = rf"The tensor attributes? (self\.({names})(, )?)+ (was|were) assigned during export"
        warnings.filterwarnings("ignore", category=UserWarning, message=listed)


def _computed_weights(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
                yield f"{path}.{name}" if path else name


def checked_inputs(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """What `forward` takes by position. Raises `TypeError` and `ValueError` for models and inputs that `trace` does not
    take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"model: expected a plain nn.Module, got {type(model).__name__}; pass the module it was made from"
        )
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, (tuple, list)) or not any(isinstance(x, Tensor) for x in pytree.tree_leaves(inputs)):
        hint = "; a dict that is the first argument goes into a tuple" if isinstance(inputs, dict) else ""
        raise TypeError(
            f"example_inputs: expected a Tensor or a tuple with Tensors, got {type(example_inputs).__name__}{hint}"
        )
    for position, x in enumerate(pytree.tree_leaves(tuple(inputs))):
        if isinstance(x, Tensor) and (reason := not_dense(x)) is not None:
            raise ValueError(f"example_inputs: expected dense tensors with values, got {reason} at position {position}")
    return tuple(inputs)


def module_of(node: Node) -> str:
    """Qualified name of the module whose `forward` ran `node` (`""` is the model itself); for `get_attr`, its owner.

    In the graph of a graph, whose modules hold parameters and run nothing, it is the owner of the parameters read.
    """
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    path = str(names[-1]).split("@")[0] if names else ""
    return path or next(filter(None, map(_owner_of_constant, node.all_input_nodes)), "")


def _owner_of_constant(node: Node) -> str:
    """The owner of the parameter that `node` reads, or computes from constants alone."""
    if node.op != "get_attr" and not all(source.op == "get_attr" for source in node.all_input_nodes):
        return ""
    return next((str(n.target).rpartition(".")[0] for n in (node, *node.all_input_nodes) if n.op == "get_attr"), "")


def parameter_name(node: Any) -> str | None:
    """Qualified name of the parameter or buffer that `node` reads, or None if it is anything else."""
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def _set_eval_mode(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:
        # Exported graphs, a quantizer's for example, refuse it: their mode is written into them.
        for module in model.modules():
            module.training = False


def _functional(program: torch.export.ExportedProgram) -> GraphModule:
    module = _clean(program.module())
    if _mutations(module.graph) or has_regions(module.graph):
        # Writes through views, sub-graphs: PyTorch's own functionalisation resolves the aliasing, spells out the
        # casts of autocast, and puts in line what only sets a mode.
        module = _clean(functionalised(program))
        _restore_batch_norm(module.graph)
    for part in [m for m in module.modules() if isinstance(m, GraphModule)]:
        _simplify(part.graph)
        keep_layouts(part.graph)
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()
    return module


def _clean(module: GraphModule) -> GraphModule:
    """Drops assertions, dropout and dead code, then makes in-place operations functional where that is safe."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
            module.delete_submodule("_guards_fn")
        elif node.target in _CHECKS and not node.users:
            graph.erase_node(node)
        elif node.target is aten._assert_async.default:  # fx takes this overload for dead code
            node.target, node.args = aten._assert_async.msg, (*node.args, "assertion of the model failed")
        elif node.target in DROPOUTS and not node.args[2]:
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
    assert isinstance(target, OpOverload)
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
    root = memory_of(written)
    if root.op == "get_attr":
        return True
    order = {n: i for i, n in enumerate(write.graph.nodes)}
    aliases, pending = {root}, [root]
    while pending:
        for user in pending.pop().users:
            if aliased(user) in aliases and user not in aliases and order[user] < order[write]:
                aliases.add(user)
                pending.append(user)
    return any(order[user] > order[write] for alias in aliases - {written} for user in alias.users)


def _same_result(twin: Any, node: Node) -> bool:
    """In-place operations keep their target's dtype; the functional twin may promote instead."""

    def value(n: Node) -> Any:
        return n.meta["val"]

    expected = node.meta.get("val")  # a write back to a buffer has none
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
        elif node.target is aten.copy.default:
            _replace(node, _copied(node))
        elif node.target in _CONVOLUTIONS and len(node.args) > 5:
            _drop_idle_dilation(node)


def _drop_idle_dilation(node: Node) -> None:
    """A kernel of one tap has no dilation, and PyTorch crashes where a strided and padded one in channels_last memory
    states one."""
    taps, dilation = node.args[1].meta["val"].shape[2:], node.args[5]  # type: ignore[union-attr]
    each = [dilation] * len(taps) if isinstance(dilation, int) else [*dilation] * (len(taps) // len(dilation))  # type: ignore
    node.update_arg(5, [1 if k == 1 else d for k, d in zip(taps, each, strict=True)])


def _copied(node: Node) -> Node:
    """What `aten.copy` gives, by operations that have derivatives: its source, in the target's shape and dtype."""
    target, source = node.args[:2]
    wanted, result = target.meta["val"], source.meta["val"]  # type: ignore[union-attr]
    steps: list[tuple[OpOverload, tuple[Node, ...]]] = [(aten.clone.default, ())]
    if (result.dtype, result.device) != (wanted.dtype, wanted.device):
        steps.append((aten.type_as.default, (target,)))  # type: ignore[arg-type]
    if str(result.shape) != str(wanted.shape):
        steps.append((aten.expand_as.default, (target,)))  # type: ignore[arg-type]
    with node.graph.inserting_before(node):
        for operation, others in steps:
            source = node.graph.call_function(operation, (source, *others))
            result = operation(result, *(other.meta["val"] for other in others))
            source.meta = {**node.meta, "val": result}
    return source  # type: ignore[return-value]


def _is_whole_slice(node: Node) -> bool:
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    start, end, step = (*node.args, *defaults[len(node.args) :])[2:]
    return start in (0, None) and step == 1 and end in (None, 2**63 - 1)
