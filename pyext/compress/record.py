"""What passes did to a model, and compressed models on disk: one safetensors file with the record in its header."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.resize import replace_tensors, set_size_attributes, size_attributes
from kernelpress.files import write_atomically
from kernelpress.files.plain import from_plain, printable
from kernelpress.files.sealed import seal_tensors, unseal_tensors

__all__ = ["LayerChange", "PassRecord", "SkippedLayers", "add_record", "load", "record_of", "save"]

_KIND, _FORMAT = "compressed model", 1
_ATTRIBUTE = "_kernelpress_record"


@dataclass(frozen=True)
class LayerChange:
    """Shape of one layer's weight before and after a pass."""

    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class SkippedLayers:
    """Layers that a pass left as they were, how many channels that concerns, and why."""

    layers: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """One pass over a model: its name and arguments, the costs before and after, and every layer it changed or skipped.

    FLOPs are those of the example inputs, a multiplication and its addition counting as two.
    """

    name: str
    arguments: dict[str, Any]
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    layers: tuple[LayerChange, ...]
    skipped: tuple[SkippedLayers, ...]

    @property
    def flops_removed(self) -> float:
        """Fraction of the FLOPs that is gone."""
        return 1 - self.flops_after / self.flops_before if self.flops_before else 0.0

    def __str__(self) -> str:
        """The changed layers as a table, then the skipped ones with their reasons."""
        head = (
            f"{self.name}: FLOPs {self.flops_before:,} → {self.flops_after:,} (−{self.flops_removed:.1%}), "
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}"
        )
        width = max((len(change.layer) for change in self.layers), default=0)
        changes = [f"  {c.layer:<{width}}  {list(c.before)} → {list(c.after)}" for c in self.layers]
        skipped = [f"  kept {', '.join(s.layers)} ({s.channels} channels): {s.reason}" for s in self.skipped]
        return printable("\n".join([head, *changes, *skipped]))


def record_of(model: nn.Module) -> tuple[PassRecord, ...]:
    """The passes that made `model` what it is, oldest first; empty for an untouched model."""
    records: tuple[PassRecord, ...] = getattr(model, _ATTRIBUTE, ())
    return records


def add_record(model: nn.Module, record: PassRecord) -> None:
    """Appends `record` to what `record_of(model)` returns."""
    setattr(model, _ATTRIBUTE, (*record_of(model), record))


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a compressed, still trainable model to one safetensors file; its header holds the record and layer sizes.

    The file takes the place of an older one only when it is complete: a full disk (`OSError`) leaves the older intact.
    """
    sizes = {name: attributes for name, module in model.named_modules() if (attributes := size_attributes(module))}
    content = {"sizes": sizes, "passes": [asdict(record) for record in record_of(model)]}
    write_atomically(path, seal_tensors(_KIND, _FORMAT, model.state_dict(), content))


@torch.inference_mode(False)
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Makes `model`, built as the original was, the compressed model that `save` wrote; changes and returns it.

    It trains, even if this is called, or `model` was made, under `torch.inference_mode`. Raises `ValueError` if the
    file is no such file, damaged, truncated or of another format, or `model` is of another architecture; `model` is
    then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors, content = unseal_tensors(path.read_bytes(), _KIND, _FORMAT, str(path))
    stored = from_plain(_Content, content, f"{path}: its header")
    _check_architecture(path, model, tensors, stored.sizes)

    current = model.state_dict(keep_vars=True)
    resized = {
        name: torch.empty(tensor.shape, dtype=current[name].dtype, device=current[name].device)
        for name, tensor in tensors.items()
        if tensor.shape != current[name].shape or current[name].is_inference()
    }
    replace_tensors(model, resized)
    for name, sizes in stored.sizes.items():
        set_size_attributes(model.get_submodule(name), sizes)
    model.load_state_dict(tensors)
    setattr(model, _ATTRIBUTE, stored.passes)
    return model


@dataclass(frozen=True)
class _Content:
    """What the header of a file holds: the sizes that each module states, and the passes."""

    sizes: dict[str, dict[str, Any]]
    passes: tuple[PassRecord, ...]


def _is_size(value: Any) -> bool:
    """A size, or the sizes of a normalised shape."""
    sizes = value if isinstance(value, (list, tuple)) else [value]
    return bool(sizes) and all(type(size) is int and 0 < size < 2**31 for size in sizes)


def _check_architecture(
    path: Path, model: nn.Module, tensors: dict[str, Tensor], sizes: dict[str, dict[str, Any]]
) -> None:
    state = model.state_dict()
    stated = {name: attributes for name, module in model.named_modules() if (attributes := size_attributes(module))}
    missing = sorted((state.keys() ^ tensors.keys()) | (stated.keys() ^ sizes.keys()))
    wrong = {name for name in state.keys() & tensors.keys() if state[name].dim() != tensors[name].dim()}
    wrong |= {name for name in stated.keys() & sizes.keys() if stated[name].keys() != sizes[name].keys()}
    wrong |= {name for name, values in sizes.items() if not all(map(_is_size, values.values()))}
    if missing or wrong:
        raise ValueError(
            f"model: {type(model).__name__} is not the architecture saved in {path}; "
            f"they differ in {printable(', '.join([*missing, *sorted(wrong)][:5]))}"
        )
