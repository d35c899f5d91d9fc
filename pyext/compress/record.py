"""What passes did to a model, and compressed models on disk: one safetensors file with the record in its header."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelpress.compress.resize import replace_tensors, set_size_attributes, size_attributes
from kernelpress.files import write_atomically

__all__ = ["LayerChange", "PassRecord", "SkippedLayers", "add_record", "load", "record_of", "save"]

_HEADER = "kernelpress.compress"
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
        return "\n".join([head, *changes, *skipped])


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
    from safetensors.torch import save as serialise

    path = Path(path)
    sizes = {name: attributes for name, module in model.named_modules() if (attributes := size_attributes(module))}
    header = {"sizes": sizes, "passes": [asdict(record) for record in record_of(model)]}
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in model.state_dict().items()}
    content = serialise(tensors, metadata={_HEADER: json.dumps(header)})
    write_atomically(path, content)


@torch.inference_mode(False)
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Makes `model`, built as the original was, the compressed model that `save` wrote; changes and returns it.

    It trains, even if this is called, or `model` was made, under `torch.inference_mode`. Raises `ValueError` if the
    file is no such file or `model` is of another architecture; `model` is then unchanged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if header is None:
        raise ValueError(f"{path}: a safetensors file, but not one that kernelpress.compress.save wrote")
    _check_architecture(path, model, tensors, header["sizes"])

    current = model.state_dict(keep_vars=True)
    resized = {
        name: torch.empty(tensor.shape, dtype=current[name].dtype, device=current[name].device)
        for name, tensor in tensors.items()
        if tensor.shape != current[name].shape or current[name].is_inference()
    }
    replace_tensors(model, resized)
    for name, sizes in header["sizes"].items():
        set_size_attributes(model.get_submodule(name), sizes)
    model.load_state_dict(tensors)
    setattr(model, _ATTRIBUTE, tuple(_read_pass(values) for values in header["passes"]))
    return model


def _check_architecture(path: Path, model: nn.Module, tensors: dict[str, Any], sizes: dict[str, Any]) -> None:
    state = model.state_dict()
    modules = dict(model.named_modules())
    missing = sorted((state.keys() ^ tensors.keys()) | {name for name in sizes if name not in modules})
    wrong = sorted(name for name in state.keys() & tensors.keys() if state[name].dim() != tensors[name].dim())
    if missing or wrong:
        raise ValueError(
            f"model: {type(model).__name__} is not the architecture saved in {path}; "
            f"they differ in {', '.join([*missing, *wrong][:5])}"
        )


def _read_pass(values: dict[str, Any]) -> PassRecord:
    layers = tuple(LayerChange(c["layer"], tuple(c["before"]), tuple(c["after"])) for c in values.pop("layers"))
    skipped = tuple(SkippedLayers(tuple(s["layers"]), s["channels"], s["reason"]) for s in values.pop("skipped"))
    return PassRecord(**values, layers=layers, skipped=skipped)
