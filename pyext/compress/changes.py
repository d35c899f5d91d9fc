"""What passes change in a network's structure, as records that are replayed on its architecture.

A change keeps its place: what replaces a layer lies at or below the layer's path.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from kernelpress.compress.masks import lay_mask
from kernelpress.compress.quantization.quantized_graph import Quantized
from kernelpress.compress.resize import (
    named_tensors,
    replace_tensors,
    set_size_attributes,
    size_attributes,
)
from kernelpress.files.plain import did_you_mean

__all__ = [
    "Change",
    "Masked",
    "NewLayer",
    "Quantized",
    "Rebuilt",
    "Replaced",
    "Resized",
    "Unmasked",
    "copied",
    "mask_layer",
    "put",
    "replace_layer",
    "replay",
    "resizes",
]

_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_LAYERS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "BatchNorm2d": (nn.BatchNorm2d, _NORM),
    "Identity": (nn.Identity, ()),
    "ReLU": (nn.ReLU, ()),
    "SiLU": (nn.SiLU, ()),
    "Hardswish": (nn.Hardswish, ()),
}
"""What may take a layer's place, and the arguments that make it."""
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_FLAGS = frozenset({"bias", "affine", "track_running_stats"})
_MOST_CHANNELS = 2**31


@dataclass(frozen=True)
class Resized:
    """A layer whose tensors have other shapes; `sizes` are the attributes of it that state sizes and changed."""

    layer: str
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    sizes: dict[str, Any]
    kind: Literal["resized"] = "resized"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with tensors of the new shapes, on the meta device."""
        module = _module(model, self.layer)
        own = dict(named_tensors(module))
        new: dict[str, Tensor] = {}
        for name, shape in self.after.items():
            old, expected = own.get(name), self.before.get(name)
            if old is None or expected is None or "." in name:
                raise ValueError(f"{self.layer} has no {name} to resize")
            # Tensors that layers share are resized once.
            if tuple(old.shape) not in (expected, shape) or len(shape) != len(expected) or min(shape, default=0) < 0:
                raise ValueError(f"{self.layer}.{name} is {list(old.shape)}, not {list(expected)} to become {shape}")
            new[_joined(self.layer, name)] = torch.empty(shape, dtype=old.dtype, device="meta")
        stated = size_attributes(module)
        for name, value in self.sizes.items():
            if name not in stated or not _is_size(value) or isinstance(value, int) != isinstance(stated[name], int):
                raise ValueError(f"{self.layer} states no size {name} that could be {value!r}")
        replace_tensors(model, new)
        set_size_attributes(module, self.sizes)
        return model

    def __str__(self) -> str:
        name = max(self.after, key=lambda name: math.prod(self.after[name]), default="")
        return f"{list(self.before[name])} → {list(self.after[name])}" if name else f"sizes {self.sizes}"


@dataclass(frozen=True)
class NewLayer:
    """A layer of PyTorch by its class name and the arguments that make it."""

    kind: str
    options: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> NewLayer:
        """What makes a layer like `module`; `ValueError` if it is none of those that may take a layer's place."""
        kind = type(module).__name__
        if _LAYERS.get(kind, (None,))[0] is not type(module):
            raise ValueError(f"by: expected some of {', '.join(_LAYERS)}, got {module}")
        values = {name: _plain(getattr(module, name)) for name in _LAYERS[kind][1]}
        if getattr(module, "padding_mode", "zeros") != "zeros":
            values["padding_mode"] = module.padding_mode
        layer = cls(kind, values | ({"bias": module.bias is not None} if "bias" in values else {}))
        layer.make()
        return layer

    def make(self) -> nn.Module:
        """The layer, on the meta device."""
        if self.kind not in _LAYERS:
            raise ValueError(f"no layer {self.kind!r} may be made")
        factory, names = _LAYERS[self.kind]
        padding_mode = self.options.get("padding_mode", "zeros")
        wrong = [name for name in names if not _is_option(name, self.options.get(name))]
        if wrong or set(self.options) - {*names, "padding_mode"} or padding_mode not in _PADDING_MODES:
            raise ValueError(f"a {self.kind} is not made of {self.options}")
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        with torch.device("meta"):
            return factory(**options)

    def __str__(self) -> str:
        sizes = [str(self.options[name]) for name in ("in_channels", "in_features") if name in self.options]
        sizes += [str(self.options[name]) for name in ("out_channels", "out_features") if name in self.options]
        return f"{self.kind} {'→'.join(sizes)}".strip()


@dataclass(frozen=True)
class Replaced:
    """A layer in whose place others run one after the other: an `nn.Sequential`, or a single one at the same path."""

    layer: str
    by: tuple[NewLayer, ...]
    kind: Literal["replaced"] = "replaced"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with the new layers, on the meta device."""
        old = _module(model, self.layer)
        if not self.layer or not self.by:
            raise ValueError(f"{self.layer or 'the whole model'} is not replaced by {len(self.by)} layers")
        made = [layer.make() for layer in self.by]
        new = made[0] if len(made) == 1 else nn.Sequential(*made)
        like = next((tensor for _, tensor in named_tensors(old) if tensor.is_floating_point()), None)
        put(model, self.layer, new.to(dtype=None if like is None else like.dtype).train(old.training))
        return model

    def __str__(self) -> str:
        return "replaced by " + ", ".join(map(str, self.by))


@dataclass(frozen=True)
class Masked:
    """A parameter whose zeros stay zero in training, by the masks of `torch.nn.utils.prune`; of how many elements it
    `kept` how many."""

    layer: str
    parameter: str = "weight"
    kept: int | None = None
    of: int | None = None
    kind: Literal["masked"] = "masked"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with a mask that keeps everything."""
        module = _module(model, self.layer)
        if f"{self.parameter}_mask" in module._buffers:
            return model
        if self.parameter not in module._parameters:
            raise ValueError(f"{self.layer} has no parameter {self.parameter} to mask")
        lay_mask(module, self.parameter, torch.ones_like(module.get_parameter(self.parameter)))
        return model

    def __str__(self) -> str:
        if self.kept is None or not self.of:
            return f"{self.parameter} masked"
        zeros = 1 - self.kept / self.of
        return f"{self.parameter} masked: {self.kept:,} of {self.of:,} left ({zeros:.1%} zeros)"


@dataclass(frozen=True)
class Rebuilt:
    """The whole model, in whose place stands one of `kernelpress.models` by name, as a student does."""

    name: str
    options: dict[str, Any]
    layer: Literal[""] = ""
    kind: Literal["rebuilt"] = "rebuilt"

    def build(self) -> nn.Module:
        """The network, freshly initialised. Raises `ValueError` for an unknown name or a value out of range,
        `TypeError` for an option that it does not have."""
        from kernelpress.models.registry import ARCHITECTURES

        if self.name not in ARCHITECTURES:
            known = sorted(ARCHITECTURES)
            raise ValueError(
                f"student: expected one of {', '.join(known)}, got {self.name!r}{did_you_mean(self.name, known)}"
            )
        factory = ARCHITECTURES[self.name].build
        if wrong := sorted(self.options.keys() - inspect.signature(factory).parameters):
            raise TypeError(f"options: {self.name} has no {', '.join(map(str, wrong))}")
        if any(isinstance(value, int) and abs(value) >= _MOST_CHANNELS for value in self.options.values()):
            raise ValueError(f"options: {self.name} is not made of {self.options}")
        return factory(**self.options)

    def apply(self, model: nn.Module) -> nn.Module:
        """The network, on the meta device."""
        with torch.device("meta"):
            return self.build().train(model.training)

    def __str__(self) -> str:
        return f"the whole model → {self.name}"


@dataclass(frozen=True)
class Unmasked:
    """A parameter that holds the zeros of its mask itself, as any other parameter does."""

    layer: str
    parameter: str = "weight"
    kind: Literal["unmasked"] = "unmasked"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with a plain parameter."""
        module = _module(model, self.layer)
        if f"{self.parameter}_mask" not in module._buffers:
            raise ValueError(f"{self.layer} has no mask over {self.parameter} to take off")
        prune.remove(module, self.parameter)
        return model

    def __str__(self) -> str:
        return f"{self.parameter} plain, with its zeros"


Change = Resized | Replaced | Masked | Unmasked | Rebuilt | Quantized
"""A change has a `layer`, a `kind` by which files know it, and `apply`, which returns the model to go on with."""


def replay(model: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """`model`, built as the original was, with the structure that `changes` lead to; what is new has no values yet: it
    lies on the meta device.

    Raises `ValueError` where a change does not fit; parts of `model` are then changed already.
    """
    try:
        for change in changes:
            model = change.apply(model)
    # What torch says of arguments that make no layer.
    except (RuntimeError, TypeError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"{change.layer}: {str(error).splitlines()[0]}") from error
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of weights that hooks of `torch.nn.utils` (masks among them) have computed with gradients,
    which torch refuses. Raises `ValueError` where a model cannot be copied.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo = {id(tensor): tensor.detach().clone() for tensor in computed}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"model: {type(model).__name__} cannot be copied: {error}") from error


def resizes(before: nn.Module, after: nn.Module) -> tuple[Resized, ...]:
    """The layers of `after` that have other sizes than the same layers of `before`."""
    old_state, new_state = before.state_dict(), after.state_dict()
    found: list[Resized] = []
    old_modules = dict(before.named_modules())
    for layer, module in after.named_modules():
        names = [name for name, _ in named_tensors(module) if "." not in name]
        pairs = {
            name: (tuple(old_state[key].shape), tuple(new_state[key].shape))
            for name in names
            if (key := _joined(layer, name)) in new_state and key in old_state
        }
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        stated = size_attributes(old_modules[layer])
        sizes = {name: _plain(value) for name, value in size_attributes(module).items() if value != stated.get(name)}
        if changed or sizes:
            shapes = [{name: pair[i] for name, pair in changed.items()} for i in (0, 1)]
            found.append(Resized(layer, shapes[0], shapes[1], sizes))
    return tuple(found)


def replace_layer(model: nn.Module, layer: str, *by: nn.Module) -> Replaced:
    """Puts `by`, which run one after the other, in the place of `layer` and returns the change."""
    change = Replaced(layer, tuple(map(NewLayer.of, by)))
    chain = nn.Sequential(*by)
    chain.training = _module(model, layer).training
    put(model, layer, by[0] if len(by) == 1 else chain)
    return change


def mask_layer(model: nn.Module, layer: str, mask: Tensor, parameter: str = "weight") -> Masked:
    """Keeps at zero what `mask`, of the parameter's shape, or an earlier mask has zeros for, and returns the change.

    Raises `ValueError` for what is neither a parameter nor masked already, such as a constant or a weight that is
    computed (`module._parameters` does not have it), and for a mask of another shape.
    """
    module = _module(model, layer)
    earlier = module._buffers.get(f"{parameter}_mask")
    masked = module._parameters.get(parameter) if earlier is None else earlier
    if masked is None:
        raise ValueError(f"{_joined(layer, parameter)}: expected a parameter, which alone can be masked")
    if mask.shape != masked.shape:
        raise ValueError(f"mask: expected the shape of {parameter}, {[*masked.shape]}, got {[*mask.shape]}")
    lay_mask(module, parameter, mask if earlier is None else earlier * mask)
    return Masked(layer, parameter, int(module.get_buffer(f"{parameter}_mask").count_nonzero()), mask.numel())


def _module(model: nn.Module, layer: str) -> nn.Module:
    found = dict(model.named_modules()).get(layer)
    if found is None:
        raise ValueError(f"there is no layer {layer!r}")
    return found


def put(model: nn.Module, layer: str, new: nn.Module) -> None:
    """`new` in the place of the module at `layer`, under all its names."""
    old = _module(model, layer)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            owner, _, name = path.rpartition(".")
            _module(model, owner).register_module(name, new)


def _plain(value: Any) -> Any:
    """A tuple as the list that files give back."""
    return list(value) if isinstance(value, tuple) else value


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _is_size(value: Any) -> bool:
    """A size, or the sizes of a normalised shape."""
    sizes = value if isinstance(value, (list, tuple)) else [value]
    return bool(sizes) and all(type(size) is int and 0 < size < _MOST_CHANNELS for size in sizes)


def _is_option(name: str, value: Any) -> bool:
    if name in _FLAGS:
        return isinstance(value, bool)
    if name in ("eps", "momentum"):
        return isinstance(value, float) and math.isfinite(value)
    sizes = value if isinstance(value, (list, tuple)) else [value]
    least = 0 if name == "padding" else 1
    return len(sizes) in (1, 2) and all(type(size) is int and least <= size < _MOST_CHANNELS for size in sizes)
