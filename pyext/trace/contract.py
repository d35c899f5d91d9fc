"""What a graph was exported for: the form of every input, and what the export assumed of sizes. A call that breaks it
would be answered as at export, so it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from kernelpress.runtime import native
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.guards import Expression, check_expression, evaluate, spell, symbols_in

__all__ = ["Contract", "PlainInput", "SymbolRange", "TensorInput", "argument_names", "input_names"]

LARGEST_SIZE = 2**63 - 1
SHOWN_GUARDS = 2


@dataclass(frozen=True)
class TensorInput:
    """A tensor: sizes are integers, names of symbols, or expressions of these."""

    name: str
    shape: tuple[Expression, ...]
    dtype: torch.dtype
    device: str
    """Type of the device: "cpu", "cuda"."""
    layout: torch.layout = torch.strided
    stride: tuple[int, ...] | None = None
    """Where the model looks at how its inputs lie in memory: the example's strides, which then are the only ones."""

    @property
    def carries_batch(self) -> bool:
        """Whether dimension 0 may have several sizes."""
        return bool(self.shape) and not isinstance(self.shape[0], int)


@dataclass(frozen=True)
class PlainInput:
    """A number, flag, string or None that the graph has built in."""

    name: str
    value: Any


class SymbolRange(NamedTuple):
    """The sizes that a symbol stands for; those below two are in `Contract.small`."""

    name: str
    least: int = 2
    most: int = LARGEST_SIZE


@dataclass(frozen=True)
class Contract:
    """The inputs in their flat order, the structure they come in, and the conditions on the symbols in their sizes.

    torch's exporter reasons about sizes from two on. `small` are the sizes below two that were tried on the model
    itself: all symbols may have one of them together.
    """

    inputs: tuple[TensorInput | PlainInput, ...]
    arguments: tuple[str, ...]
    """Names of the model's arguments, in order."""
    structure: pytree.TreeSpec
    """Of `(arguments, {})`."""
    symbols: tuple[SymbolRange, ...] = ()
    guards: tuple[Expression, ...] = ()
    small: frozenset[int] = frozenset()
    any_key_order: bool = True
    """Whether the model was found to give the same for dicts with their keys in another order."""
    fixed_because: str = ""
    """Why no batch size but the example's can be had, if that was asked for."""
    made: str = "exported"
    """What was done to the model for these inputs, as refusals say it."""

    @property
    def dynamic_batch(self) -> bool:
        """Whether dimension 0 of an input may have several sizes."""
        return bool(self.symbols)

    @property
    def batch_carriers(self) -> frozenset[int]:
        """Positions of the flat inputs whose dimension 0 may have several sizes."""
        return frozenset(i for i, x in enumerate(self.inputs) if isinstance(x, TensorInput) and x.carries_batch)

    @cached_property
    def device(self) -> str:
        """Type of the device of the inputs: "cpu", "cuda"."""
        return next((x.device for x in self._tensors()), "cpu")

    @cached_property
    def _accepted(self) -> Any:
        """Forms of tensors that were accepted, which the native module knows again; None without it."""
        return native.cpu().AcceptedForms() if native.load().reads_tensors else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles look at their calls anew."""
        return {own.name: getattr(self, own.name) for own in fields(self)}

    def positional(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments by position. Raises `ValueError` for names that are not the model's, or given twice."""
        given = dict(zip(self.arguments, inputs, strict=False))
        for name in named:
            if name not in self.arguments:
                raise ValueError(f"{name}: expected one of the arguments exported, {list(self.arguments)}, got {name}")
            if name in given:
                raise ValueError(f"{name}: expected it once, got it by position and by name")
        given |= named
        missing = [name for name in self.arguments if name not in given]
        if missing:
            raise ValueError(f"{missing[0]}: expected all arguments exported, {list(self.arguments)}, got none of it")
        return (*(given[name] for name in self.arguments), *inputs[len(self.arguments) :])

    def check(self, inputs: tuple[Any, ...]) -> None:
        """Raises `ValueError`, naming the argument, what was exported and what came, unless the graph computes for
        `inputs` what the model does."""
        accepted = self._accepted
        if accepted is not None and accepted(inputs) and not torch.is_autocast_enabled(self.device):
            return
        self.require(inputs)
        if accepted is not None:
            accepted.accept(inputs)

    def require(self, inputs: tuple[Any, ...]) -> list[Any]:
        """As `check`, without remembering the answer; returns the flat inputs."""
        if torch.is_autocast_enabled(self.device):
            raise ValueError(
                f"torch.autocast: expected it off, as when the model was {self.made}, got it on for {self.device}:"
                " it would change the types that some operations compute in; call the model outside of it"
            )
        flat = self.flatten(inputs)
        sizes: dict[str, int] = {}
        for expected, given in zip(self.inputs, flat, strict=True):
            if isinstance(expected, PlainInput):
                self._require_value(expected, given)
            else:
                self._require_form(expected, given)
                _bind(expected, given, sizes)
        for expected, given in zip(self.inputs, flat, strict=True):
            if isinstance(expected, TensorInput):
                self._require_sizes(expected, given, sizes)
        self._require_guards(sizes)
        return flat

    def captured_for(self, flat: Sequence[Any]) -> Contract:
        """The contract of a plan for flat inputs of just these sizes."""
        fixed = [
            replace(expected, shape=tuple(given.shape)) if isinstance(expected, TensorInput) else expected
            for expected, given in zip(self.inputs, flat, strict=True)
        ]
        return replace(
            self, inputs=tuple(fixed), symbols=(), guards=(), small=frozenset(), fixed_because="", made="captured"
        )

    def flatten(self, inputs: tuple[Any, ...]) -> list[Any]:
        """The flat inputs, in the order of the graph's. Raises `ValueError` for another structure than was exported."""
        flat, structure = pytree.tree_flatten((inputs, {}))
        if structure != self.structure and self.any_key_order:
            flat, structure = pytree.tree_flatten((_in_order(inputs, self.structure.child(0)), {}))
        if structure != self.structure:
            self._refuse_structure(inputs, structure)
        return flat

    def describe(self) -> str:
        """One line on the batch: which inputs carry it, which sizes it may have, or why it is fixed."""
        if not self.symbols:
            reason = f": {self.fixed_because}" if self.fixed_because else ""
            return f"fixed sizes: {', '.join(map(self._spell_shape, self._tensors()))}{reason}"
        lines = [f"batch: {self._spell_range(*symbol)}" for symbol in self.symbols]
        shown = [spell(guard, self._names()) for guard in self.guards[:SHOWN_GUARDS]]
        more = len(self.guards) - len(shown)
        return "; ".join([*lines, *shown, *([f"and {more} conditions more"] if more else [])])

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers: all but `structure`, which the graph has too."""
        return {
            "inputs": [_input_to_json(x) for x in self.inputs],
            "arguments": list(self.arguments),
            "symbols": [[s.name, s.least, s.most] for s in self.symbols],
            "guards": list(self.guards),
            "small": sorted(self.small),
            "any_key_order": self.any_key_order,
            "fixed_because": self.fixed_because,
        }

    @classmethod
    def from_json(cls, stored: Any, structure: pytree.TreeSpec) -> Contract:
        """The inverse of `to_json`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        symbols = tuple(SymbolRange(_text(name), int(least), int(most)) for name, least, most in stored["symbols"])
        names = frozenset(symbol.name for symbol in symbols)
        inputs = tuple(_input_from_json(x, names) for x in stored["inputs"])
        if len(inputs) != structure.num_leaves:
            raise ValueError(f"inputs: expected {structure.num_leaves} as of the graph, got {len(inputs)}")
        unbound = names - {
            size for x in inputs if isinstance(x, TensorInput) for size in x.shape if isinstance(size, str)
        }
        if unbound:
            raise ValueError(f"symbols: expected sizes of inputs, got {sorted(unbound)}")
        guards = tuple(check_expression(guard, names) for guard in stored["guards"])
        arguments = tuple(map(_text, stored["arguments"]))
        small = frozenset(map(int, stored["small"])) & {0, 1}
        any_key_order, fixed_because = bool(stored["any_key_order"]), _text(stored["fixed_because"])
        return cls(inputs, arguments, structure, symbols, guards, small, any_key_order, fixed_because)

    def _tensors(self) -> list[TensorInput]:
        return [x for x in self.inputs if isinstance(x, TensorInput)]

    def _names(self) -> dict[str, str]:
        """Where each symbol is first read, as people call it: `x.shape[0]`."""
        names: dict[str, str] = {}
        for x in self._tensors():
            for dim, size in enumerate(x.shape):
                if isinstance(size, str):
                    names.setdefault(size, f"{x.name}.shape[{dim}]")
        return names

    def _spell_shape(self, expected: TensorInput) -> str:
        return f"{expected.name} [{', '.join(spell(size, {}) for size in expected.shape)}]"

    def _spell_range(self, symbol: str, least: int, most: int) -> str:
        readers = [
            f"dimension {dim} of {x.name}" for x in self._tensors() for dim, s in enumerate(x.shape) if s == symbol
        ]
        least = least if least > 2 else min(2, *self.small, 2)
        gap = " but 1" if least == 0 and 1 not in self.small else ""
        most_text = "any size" if most == LARGEST_SIZE else f"at most {most}"
        return f"{', '.join(readers)}: {most_text}, at least {least}{gap}"

    def _require_value(self, expected: PlainInput, given: Any) -> None:
        if not _same_value(expected.value, given):
            came = f"a Tensor {list(given.shape)}" if isinstance(given, Tensor) else f"{given!r:.80}"
            raise ValueError(f"{expected.name}: expected {expected.value!r} as {self.made}, got {came}{self._advice}")

    def _require_form(self, expected: TensorInput, given: Any) -> None:
        name, made = expected.name, self.made
        if not isinstance(given, Tensor):
            raise ValueError(f"{name}: expected a Tensor as {made}, got {type(given).__name__} {given!r:.40}")
        if given.dtype != expected.dtype:
            raise ValueError(f"{name}: expected {expected.dtype} as {made}, got {given.dtype}")
        if given.device.type != expected.device:
            raise ValueError(f"{name}: expected a tensor on {expected.device} as {made}, got {given.device}")
        if given.layout != expected.layout:
            raise ValueError(f"{name}: expected {expected.layout} as {made}, got {given.layout}")
        if given.dim() != len(expected.shape):
            dims = len(expected.shape)
            raise ValueError(f"{name}: expected {dims} dimensions as {made}, got shape {list(given.shape)}")
        if expected.stride is not None and given.stride() != expected.stride:
            raise ValueError(
                f"{name}: expected strides {list(expected.stride)} as {made}, as the model looks at them, got"
                f" {list(given.stride())}"
            )

    @property
    def _advice(self) -> str:
        return "; emit the model for it" if self.made == "exported" else "; capture the model for it"

    def _require_sizes(self, expected: TensorInput, given: Tensor, sizes: Mapping[str, int]) -> None:
        for dim, (size, got) in enumerate(zip(expected.shape, given.shape, strict=True)):
            wanted = size if isinstance(size, int) else _value(size, sizes)
            if wanted != got:
                rule = "" if isinstance(size, int) else f"{spell(size, self._names())} = "
                self._refuse_size(f"{expected.name}.shape[{dim}]", f"{rule}{wanted}", f"{got} in {list(given.shape)}")

    def _require_guards(self, sizes: Mapping[str, int]) -> None:
        names = self._names()
        values = set(sizes.values())
        if values and min(values) < 2 and not (len(values) == 1 and values <= self.small):
            small = " or ".join(map(str, sorted(self.small)))
            allowed = f"at least 2{small and f', or {small} of all inputs alike'}"
            symbol = min(sizes, key=sizes.__getitem__)
            self._refuse_size(names[symbol], allowed, str(sizes[symbol]))
        for symbol, least, most in self.symbols:
            if sizes[symbol] > most or sizes[symbol] < least > 2:
                allowed = f"at least {least}" if most == LARGEST_SIZE else f"{least} to {most}"
                self._refuse_size(names[symbol], allowed, str(sizes[symbol]))
        for guard in self.guards:
            if not _value(guard, sizes):
                read = sorted(symbols_in(guard))
                self._refuse_size(names[read[0]], spell(guard, names), ", ".join(str(sizes[symbol]) for symbol in read))

    def _refuse_size(self, where: str, allowed: str, got: str) -> NoReturn:
        batch = " (the batch)" if where.endswith("[0]") else ""
        why = self.fixed_because and f" ({self.fixed_because})"
        raise ValueError(f"{where}{batch}: expected {allowed} as {self.made}{why}, got {got}{self._advice}")

    def _refuse_structure(self, inputs: tuple[Any, ...], structure: pytree.TreeSpec) -> NoReturn:
        wanted, got = self.structure.child(0), structure.child(0)
        if wanted.num_children != got.num_children:
            arguments = ", ".join(self.arguments)
            raise ValueError(
                f"inputs: expected {wanted.num_children} as {self.made} ({arguments}), got {got.num_children} arguments"
            )
        for i, name in enumerate(self.arguments):
            if wanted.child(i) != got.child(i):
                raise ValueError(
                    f"{name}: expected {_spell_spec(wanted.child(i))} as {self.made}, got {_spell_spec(got.child(i))}"
                )
        raise ValueError(f"inputs: expected the structure {self.structure} as {self.made}, got {structure}")


def argument_names(forward: Callable[..., Any], count: int) -> tuple[str, ...]:
    """What `forward` calls its first `count` arguments; those of `*images` are `images[0]`, `images[1]`, …"""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    names += [f"inputs[{i}]" for i in range(len(names), count)]
    return tuple(names[:count])


def input_names(arguments: Sequence[str], inputs: tuple[Any, ...]) -> list[str]:
    """Names of the flat inputs: `x`, `boxes[1]`, `options['scale']`."""
    names: list[str] = []
    for argument, given in zip(arguments, inputs, strict=True):
        names += [argument + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(given)[0]]
    return names


def _same_value(a: Any, b: Any) -> bool:
    """Equal and of one type; NaN equals itself, and zeros have signs."""
    if type(a) is not type(b):
        return False
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)


def _bind(expected: TensorInput, given: Tensor, sizes: dict[str, int]) -> None:
    for size, got in zip(expected.shape, given.shape, strict=True):
        if isinstance(size, str):
            sizes.setdefault(size, got)


def _in_order(value: Any, structure: pytree.TreeSpec) -> Any:
    """`value` with the keys of its dicts in the order of the structure's."""
    if type(value) is not structure.type:
        return value
    if type(value) is dict and value.keys() == set(structure.context):
        return {key: _in_order(value[key], structure.child(i)) for i, key in enumerate(structure.context)}
    if type(value) in (list, tuple) and len(value) == structure.num_children:
        return type(value)(_in_order(item, structure.child(i)) for i, item in enumerate(value))
    return value


def _value(expression: Expression, sizes: Mapping[str, int]) -> Any:
    """What the expression comes to; None where it has no value."""
    try:
        return evaluate(expression, sizes)
    except ArithmeticError:
        return None


def _spell_spec(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "one value"
    kind = getattr(spec.type, "__name__", str(spec.type))
    keys = f" with keys {list(spec.context)}" if spec.type is dict else ""
    return f"a {kind} of {spec.num_children}{keys}"


def _input_to_json(x: TensorInput | PlainInput) -> dict[str, Any]:
    if isinstance(x, PlainInput):
        return {"name": x.name, "plain": x.value}
    dtype, layout = (str(kind).removeprefix("torch.") for kind in (x.dtype, x.layout))
    stored = {"name": x.name, "shape": list(x.shape), "dtype": dtype, "device": x.device, "layout": layout}
    return stored if x.stride is None else {**stored, "stride": list(x.stride)}


def _input_from_json(stored: Any, symbols: frozenset[str]) -> TensorInput | PlainInput:
    name = _text(stored["name"])
    if "plain" in stored:
        if not isinstance(stored["plain"], (bool, int, float, str, type(None))):
            raise ValueError(f"{name}: expected a number, flag, string or null, got {stored['plain']!r:.40}")
        return PlainInput(name, stored["plain"])
    dtype, layout = (vars(torch).get(_text(stored[kind])) for kind in ("dtype", "layout"))
    if not isinstance(dtype, torch.dtype) or not isinstance(layout, torch.layout):
        raise ValueError(
            f"{name}: expected a dtype and a layout of torch, got {stored['dtype']!r}, {stored['layout']!r}"
        )
    shape = tuple(check_expression(size, symbols) for size in stored["shape"])
    stride = tuple(map(int, stored["stride"])) if "stride" in stored else None
    return TensorInput(name, shape, dtype, torch.device(_text(stored["device"])).type, layout, stride)


def _text(stored: Any) -> str:
    if not isinstance(stored, str):
        raise ValueError(f"expected a string, got {stored!r:.40}")
    return stored
