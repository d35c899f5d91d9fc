"""Graph modules as plain values and tensors, in a grammar that is read without running anything.

    graph      {"attributes": {target: attribute}, "nodes": [node], "signature": null | {"names", "inputs", "outputs"}}
    attribute  {"tensor": index, "parameter": bool} | {"graph": graph}
    node       {"op", "name", "target", "args", "kwargs"}, in order of execution; the last one is the output
    value      null, true, 1, 1.5, "text", [value] | {"tuple": [value]} | {"slice": [value, value, value]} | {"node": 3}
               | {"float": "inf"} | {"dtype": "float32"} | {"device": "cpu"} | {"layout" | "memory_format": name}
    structure  "*" | {"tuple" | "list": [structure]} | {"dict" | "ordered_dict": [[key, structure]]}
               | {"type": registered name, "context": plain value, "children": [structure]}

What is read becomes Python source in fx: names are checked to be identifiers, paths of attributes to hold no quotes.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from kernelpress.emit.files.operators import name_of, operator_named
from kernelpress.emit.graph import attribute
from kernelpress.runtime.torch_private import HigherOrderOperator, OpOverload, PyTreeCodeGen, PyTreeInfo, pytree

__all__ = ["graph_from_json", "graph_to_json", "value_from_json", "value_to_json"]

_DEEPEST = 24
_DEVICE = re.compile(r"(cpu|cuda|meta|mps|xpu)(:[0-9]{1,3})?")
_NOT_IN_PATHS = re.compile(r"[\"'\\{}\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAMED: Mapping[str, Mapping[str, Any]] = {
    cls.__name__: {name: value for name, value in vars(torch).items() if isinstance(value, cls)}
    for cls in (torch.dtype, torch.layout, torch.memory_format)
}
_SEQUENCES: Mapping[str, type] = {"tuple": tuple, "list": list}
_MAPPINGS: Mapping[str, type] = {"dict": dict, "ordered_dict": OrderedDict}
_LEAF = pytree.tree_flatten(0)[1]


def graph_to_json(module: GraphModule, tensors: list[Tensor]) -> dict[str, Any]:
    """`module` as plain values; the tensors that it reads are appended to `tensors`, each once.

    Raises `ValueError` for what has no place in a file: other constants, arguments, structures and functions.
    """
    known = {id(tensor): index for index, tensor in enumerate(tensors)}
    attributes: dict[str, Any] = {}
    nodes: list[dict[str, Any]] = []
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in attributes:
            found = attribute(module, ".".join(_path(str(node.target))))
            if isinstance(found, GraphModule):
                attributes[str(node.target)] = {"graph": graph_to_json(found, tensors)}
            elif isinstance(found, Tensor):
                index = known.setdefault(id(found), len(tensors))
                tensors.extend([found] * (index == len(tensors)))
                attributes[str(node.target)] = {"tensor": index, "parameter": isinstance(found, nn.Parameter)}
            else:
                raise ValueError(f"model: {node.target} is a {type(found).__name__}, which has no place in a file")
        is_known = node.op in ("get_attr", "call_function", "output") or (node.op == "placeholder" and not node.args)
        if not is_known:
            raise ValueError(f"model: the graph's {node.op} {node.format_node()} has no place in a file")
        nodes.append(
            {
                "op": node.op,
                "name": node.name,
                "target": name_of(node.target) if node.op == "call_function" else str(node.target),
                "args": [value_to_json(argument, order) for argument in node.args],
                "kwargs": {name: value_to_json(argument, order) for name, argument in node.kwargs.items()},
            }
        )
    return {"attributes": attributes, "nodes": nodes, "signature": _signature_to_json(module)}


def graph_from_json(
    stored: Any, tensors: Sequence[Tensor], allowed: Collection[str] = (), depth: int = 0
) -> GraphModule:
    """The inverse of `graph_to_json`, over `tensors`; `allowed`: operators besides those that files may name.

    Raises `ValueError` for anything else, `KeyError`, `TypeError` or `IndexError` where parts are missing or of other
    types.
    """
    if depth > _DEEPEST:
        raise ValueError("graphs lie in graphs too deeply")
    root, graph = nn.Module(), Graph()
    for target, entry in stored["attributes"].items():
        if entry.keys() == {"graph"}:
            found: Any = graph_from_json(entry["graph"], tensors, allowed, depth + 1)
        else:
            index, is_parameter = entry["tensor"], entry["parameter"]
            found = tensors[_index(index, len(tensors))]
            found = nn.Parameter(found, requires_grad=False) if is_parameter is True else found
        _set_attribute(root, _text(target), found)
    nodes: list[Node] = []
    for entry in stored["nodes"]:
        nodes.append(_node_from_json(entry, graph, stored["attributes"], nodes, allowed))
    outputs = [node for node in nodes if node.op == "output"]
    if outputs != nodes[-1:] or len(nodes[-1].args) != 1:
        raise ValueError("a graph ends with its one output")
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len({node.target for node in inputs}) != len(inputs):
        raise ValueError("two inputs of a graph have one name")
    if (signature := stored["signature"]) is not None:
        graph.set_codegen(_signature_from_json(signature, len(inputs), nodes[-1].args[0]))
    graph.lint()
    return GraphModule(root, graph)


def _node_from_json(
    stored: Any, graph: Graph, attributes: Mapping[str, Any], nodes: Sequence[Node], allowed: Collection[str]
) -> Node:
    op, target = stored["op"], _text(stored["target"])
    args = tuple(value_from_json(value, nodes) for value in stored["args"])
    kwargs = {_identifier(name): value_from_json(value, nodes) for name, value in stored["kwargs"].items()}
    function: Any = target
    if op == "call_function":
        function = operator_named(target, allowed)
        _check_arguments(function, target, args, kwargs)
    elif op == "placeholder":
        _identifier(target)
    elif op == "get_attr":
        if target not in attributes:
            raise ValueError(f"the graph reads {target[:80]!r}, which it does not have")
    elif (op, target) != ("output", "output"):
        raise ValueError(f"no node has the op {op!r} and the target {target[:80]!r}")
    if op in ("placeholder", "get_attr") and (args or kwargs):
        raise ValueError(f"a {op} takes no arguments")
    return graph.create_node(op, function, args, kwargs, name=_identifier(stored["name"]))


def _check_arguments(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Arguments that the operator's schema has; functions of sizes take theirs by position."""
    if isinstance(function, OpOverload):
        schema = function._schema.arguments
        fits = len(args) <= len(schema) and kwargs.keys() <= {argument.name for argument in schema[len(args) :]}
    else:
        fits = not kwargs or isinstance(function, HigherOrderOperator)
    if not fits:
        raise ValueError(f"{name} does not take {len(args)} arguments and {', '.join(kwargs) or 'none'} by name")


def value_to_json(value: Any, order: Mapping[Node, int] | None = None) -> Any:
    """An argument of a node as plain values; `order`: the place of each node. Raises `ValueError` for other types."""
    if isinstance(value, Node) and order is not None:
        return {"node": order[value]}
    if value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        items = [value_to_json(item, order) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, slice):
        return {"slice": [value_to_json(part, order) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise ValueError(f"model: an argument {str(value)[:80]} of type {type(value).__name__} has no place in a file")


def value_from_json(stored: Any, nodes: Sequence[Node] = (), depth: int = 0) -> Any:
    """The inverse of `value_to_json`; `nodes`: those that a value may refer to. Raises `ValueError` for others."""
    if depth > _DEEPEST:
        raise ValueError("values lie in values too deeply")
    if isinstance(stored, list):
        return [value_from_json(item, nodes, depth + 1) for item in stored]
    if not isinstance(stored, dict):
        is_large = isinstance(stored, int) and not -(2**63) <= stored < 2**63
        if is_large or (isinstance(stored, float) and not math.isfinite(stored)):
            raise ValueError(f"no value is the number {str(stored)[:40]}")
        return stored
    ((kind, inner),) = stored.items()
    if kind == "node":
        return nodes[_index(inner, len(nodes))]
    if kind in ("tuple", "slice") and isinstance(inner, list):
        items = [value_from_json(item, nodes, depth + 1) for item in inner]
        return tuple(items) if kind == "tuple" else slice(*items)
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "device" and _DEVICE.fullmatch(_text(inner)):
        return torch.device(inner)
    if kind in _NAMED and isinstance(inner, str) and inner in _NAMED[kind]:
        return _NAMED[kind][inner]
    raise ValueError(f"no value is {str(stored)[:80]}")


def _signature_to_json(module: GraphModule) -> dict[str, Any] | None:
    """Names and structures of what `forward` takes and returns; None for a graph that takes and returns flat values."""
    codegen = module.graph._codegen
    if type(codegen) is CodeGen:
        return None
    names, inputs, outputs = codegen.pytree_info if type(codegen) is PyTreeCodeGen else ([], None, None)
    if inputs is None or outputs is None:
        raise ValueError(f"model: its calling convention {type(codegen).__name__} has no place in a file")
    return {"names": list(names), "inputs": _structure_to_json(inputs), "outputs": _structure_to_json(outputs)}


def _signature_from_json(stored: Any, count: int, result: Any) -> PyTreeCodeGen:
    names = [_identifier(name) for name in stored["names"]]
    inputs, outputs = _structure_from_json(stored["inputs"]), _structure_from_json(stored["outputs"])
    results = len(result) if isinstance(result, (list, tuple)) else 1
    if (inputs.num_leaves, outputs.num_leaves) != (count, results) or len(set(names)) != len(names):
        raise ValueError("the graph takes or returns another number of values than its signature says")
    arguments = [child.type for child in inputs.children()] if inputs.type is tuple else []
    if arguments != [tuple, dict] or sum(child.num_children for child in inputs.children()) != len(names):
        raise ValueError("the names of the arguments do not fit their structure")
    for key in inputs.children()[1].context:
        _identifier(key)
    return PyTreeCodeGen(PyTreeInfo(names, inputs, outputs))


def _structure_to_json(spec: pytree.TreeSpec) -> Any:
    children = [_structure_to_json(child) for child in spec.children()]
    for kind, cls in _SEQUENCES.items():
        if spec.type is cls:
            return {kind: children}
    for kind, cls in _MAPPINGS.items():
        if spec.type is cls:
            return {kind: [[_key(key), child] for key, child in zip(spec.context, children, strict=True)]}
    if spec.is_leaf():
        return "*"
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)
    if registered is None or not isinstance(registered.serialized_type_name, str):
        raise ValueError(f"model: it takes or returns a {spec.type.__name__}, which has no place in a file")
    return {
        "type": registered.serialized_type_name,
        "context": value_to_json(spec.context),
        "children": children,
    }


def _structure_from_json(stored: Any, depth: int = 0) -> pytree.TreeSpec:
    if depth > _DEEPEST:
        raise ValueError("structures lie in structures too deeply")
    if stored == "*":
        return _LEAF
    if "type" in stored:
        cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(_text(stored["type"]))
        if not isinstance(cls, type) or not (issubclass(cls, (tuple, list, dict)) or is_dataclass(cls)):
            raise ValueError(f"the structure {stored['type'][:80]!r} is unknown: import the package that defines it")
        children = [_structure_from_json(child, depth + 1) for child in stored["children"]]
        return pytree.TreeSpec(cls, value_from_json(stored["context"]), children)
    ((kind, inner),) = stored.items()
    if kind in _SEQUENCES:
        return pytree.TreeSpec(_SEQUENCES[kind], None, [_structure_from_json(child, depth + 1) for child in inner])
    if kind not in _MAPPINGS or len({_key(key) for key, _ in inner}) != len(inner):
        raise ValueError(f"no structure is {str(stored)[:80]}")
    children = [_structure_from_json(child, depth + 1) for _, child in inner]
    return pytree.TreeSpec(_MAPPINGS[kind], [key for key, _ in inner], children)


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise ValueError(f"expected a text or an integer as a key, got {str(key)[:80]}")
    return key


def _set_attribute(root: nn.Module, target: str, value: Tensor | nn.Module) -> None:
    """Stores a parameter, buffer or graph under a path of names that mean nothing else to a graph module."""
    *owners, name = _path(target)
    owner = root
    for part in owners:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if hasattr(owner, name) or isinstance(owner, GraphModule):
        raise ValueError(f"two attributes have the name {target[:80]!r}")
    if isinstance(value, nn.Module):
        owner.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)


def _path(target: str) -> list[str]:
    """The parts of an attribute's name. Raises `ValueError` for one that does more in fx's source than to name it."""
    parts = target.split(".")
    if any(not part or _NOT_IN_PATHS.search(part) or hasattr(_empty(), part) for part in parts):
        raise ValueError(f"no attribute of a graph in a file can have the name {target[:80]!r}")
    return parts


@functools.cache
def _empty() -> GraphModule:
    return GraphModule(nn.Module(), Graph())


def _index(stored: Any, length: int) -> int:
    if type(stored) is not int or not 0 <= stored < length:
        raise ValueError(f"expected the index of one of {length}, got {str(stored)[:40]}")
    return stored


def _text(stored: Any) -> str:
    if not isinstance(stored, str):
        raise ValueError(f"expected a text, got {str(stored)[:80]}")
    return stored


def _identifier(stored: Any) -> str:
    if not _text(stored).isidentifier() or keyword.iskeyword(stored):
        raise ValueError(f"expected an identifier, got {stored[:80]!r}")
    return str(stored)
