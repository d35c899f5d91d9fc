"""What passes did to a model, and compressed models on disk: one safetensors file with the record in its header."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.compress.changes import Change, Masked, Resized, replay
from kernelpress.compress.quantization.quantized_graph import Quantized, check_scales
from kernelpress.compress.resize import compute_weights, named_tensors, replace_tensors
from kernelpress.files import write_atomically
from kernelpress.files.plain import from_plain, printable
from kernelpress.files.sealed import seal_tensors, unseal_tensors
from kernelpress.measure.theory import Promise
from kernelpress.preserve import undone_on_error

__all__ = ["DecomposedLayer", "LayerError", "PassRecord", "SkippedLayers", "add_record", "load", "record_of", "save"]

_KIND, _FORMAT = "compressed model", 2
_ATTRIBUTE = "_kernelpress_record"


@dataclass(frozen=True)
class SkippedLayers:
    """Layers that a pass left as they were, how many channels that concerns, and why."""

    layers: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True)
class DecomposedLayer:
    """A layer that a chain of smaller ones stands for: its errors, relative, and costs before and after.

    `weight_error`: ‖Ŵ − W‖ ÷ ‖W‖; `output_error`: ‖Ŵx − Wx‖ ÷ ‖Wx‖ over the inputs x of the data, or of the example.
    `milliseconds`: of the layer and of the chain, where latency was measured. `is_whitened`: whether outputs on data,
    not the weight, have the least error.
    """

    layer: str
    method: str
    ranks: tuple[int, ...]
    weight_error: float
    output_error: float
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    milliseconds: tuple[float, ...] = ()
    is_whitened: bool = False

    def __str__(self) -> str:
        times = " → ".join(f"{time:.3g}" for time in self.milliseconds)
        return (
            f"{self.method}, rank {', '.join(map(str, self.ranks))}: error {self.weight_error:.1%} of the weight, "
            f"{self.output_error:.1%} of outputs; FLOPs {self.flops_before:,} → {self.flops_after:,}, "
            f"parameters {self.parameters_before:,} → {self.parameters_after:,}" + (times and f", {times} ms")
        )


@dataclass(frozen=True)
class LayerError:
    """How far a layer's result is off from that of the float network, ‖y − y₀‖ / ‖y₀‖ over the calibration data.

    `error`: as it runs, in int8 if `is_int8`; `float_error`: what it would be if this layer alone ran in float, on the
    same inputs, which carry the errors of the layers before.
    """

    layer: str
    is_int8: bool
    error: float
    float_error: float

    @property
    def sqnr(self) -> float:
        """The ratio of signal to error in dB."""
        return -20 * math.log10(max(self.error, 1e-12))

    def __str__(self) -> str:
        kind = "int8" if self.is_int8 else "float"
        return f"{kind}, SQNR {self.sqnr:.1f} dB, error {self.error:.2%} (in float {self.float_error:.2%})"


@dataclass(frozen=True)
class PassRecord:
    """One pass over a model: its name and arguments, the costs before and after, every layer it changed or skipped,
    what it promises beyond fewer FLOPs, and how far each layer's result is off.

    FLOPs are those of the example inputs, a multiplication and its addition counting as two.
    """

    name: str
    arguments: dict[str, Any]
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    changes: tuple[Change, ...] = ()
    skipped: tuple[SkippedLayers, ...] = ()
    promises: tuple[Promise, ...] = ()
    decomposed: tuple[DecomposedLayer, ...] = ()
    errors: tuple[LayerError, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def flops_removed(self) -> float:
        """Fraction of the FLOPs that is gone."""
        return 1 - self.flops_after / self.flops_before if self.flops_before else 0.0

    def costs(self) -> str:
        """The costs before and after in one line; FLOPs where they were counted, zeros where weights are masked."""
        parts = [f"parameters {self.parameters_before:,} → {self.parameters_after:,}"]
        if self.flops_before:
            parts.insert(0, f"FLOPs {self.flops_before:,} → {self.flops_after:,} (−{self.flops_removed:.1%})")
        masked = [(c.kept, c.of) for c in self.changes if isinstance(c, Masked) and c.kept is not None and c.of]
        if of := sum(of for _, of in masked):
            kept = sum(kept for kept, _ in masked)
            parts.append(f"masks leave {kept:,} of {of:,} ({1 - kept / of:.1%} zeros)")
        return ", ".join(parts)

    def layers(self) -> list[tuple[str, str]]:
        """Every layer that was changed with what became of it; norms and such follow from the layers before."""
        chains = {chain.layer: str(chain) for chain in self.decomposed}
        shown = [
            c
            for c in self.changes
            if not isinstance(c, Quantized)
            and (not isinstance(c, Resized) or max(map(len, c.after.values()), default=0) > 1)
        ]
        # The parameters of a parametrised weight lie below its layer.
        changed = [
            (printable(c.layer.partition(".parametrizations.")[0]), printable(chains.get(c.layer, str(c))))
            for c in shown
        ]
        return changed + [(printable(e.layer), str(e)) for e in self.errors]

    def kept(self) -> list[str]:
        """A line for every reason why layers were left as they were, and for what else was noticed."""
        kept = [f"kept {', '.join(s.layers)} ({s.channels} channels): {s.reason}" for s in self.skipped]
        return [printable(line) for line in (*kept, *self.notes)]

    def __str__(self) -> str:
        """The costs, the changed layers as a table, then the skipped ones with their reasons."""
        layers = self.layers()
        width = max((len(layer) for layer, _ in layers), default=0)
        lines = [*(f"{layer:<{width}}  {change}" for layer, change in layers), *self.kept()]
        return "\n".join([f"{printable(self.name)}: {self.costs()}", *(f"  {line}" for line in lines)])


def record_of(model: nn.Module) -> tuple[PassRecord, ...]:
    """The passes that made `model` what it is, oldest first; empty for an untouched model."""
    records: tuple[PassRecord, ...] = getattr(model, _ATTRIBUTE, ())
    return records


def add_record(model: nn.Module, record: PassRecord) -> None:
    """Appends `record` to what `record_of(model)` returns."""
    setattr(model, _ATTRIBUTE, (*record_of(model), record))


def save(model: nn.Module, path: str | Path) -> None:
    """Writes a compressed, still trainable model to one safetensors file; its header holds the records of its passes.

    The file takes the place of an older one only when it is complete: a full disk (`OSError`) leaves the older intact.
    """
    content = {"passes": [asdict(record) for record in record_of(model)]}
    write_atomically(path, seal_tensors(_KIND, _FORMAT, model.state_dict(), content))


@torch.inference_mode(False)
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Makes `model`, built as the original was, the compressed model that `save` wrote; changes and returns it.

    The changes that its passes made are replayed, then the weights loaded. It trains, even if this is called, or
    `model` was made, under `torch.inference_mode`. Raises `ValueError` if the file is no such file, damaged, truncated
    or of another format, or `model` is of another architecture; `model` is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tensors, content = unseal_tensors(path.read_bytes(), _KIND, _FORMAT, str(path))
    passes = from_plain(_Content, content, f"{path}: its header").passes
    device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
    with undone_on_error(model):
        try:
            rebuilt = replay(model, [change for record in passes for change in record.changes])
            _check_state(rebuilt, tensors)
        except ValueError as error:
            raise ValueError(
                f"model: {type(model).__name__} is not the architecture saved in {path}; {printable(str(error))[:400]}"
            ) from error
    current = rebuilt.state_dict(keep_vars=True)
    new = {name: tensor for name, tensor in current.items() if tensor.is_meta or tensor.is_inference()}
    replace_tensors(rebuilt, {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in new.items()})
    rebuilt.load_state_dict(tensors)
    for module in rebuilt.modules():
        compute_weights(module)
    try:
        check_scales(rebuilt)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from error
    setattr(rebuilt, _ATTRIBUTE, passes)
    return rebuilt


@dataclass(frozen=True)
class _Content:
    """What the header of a file holds."""

    passes: tuple[PassRecord, ...]


def _check_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    state = model.state_dict()
    differing = sorted(state.keys() ^ tensors.keys())
    differing += [name for name, t in state.items() if name in tensors and t.shape != tensors[name].shape]
    if differing:
        raise ValueError(f"they differ in {', '.join(differing[:5])}")
