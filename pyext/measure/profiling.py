"""`profile`: what one model costs on this machine, in real metrics (latency, memory, energy) and in proxies (FLOPs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from kernelpress.measure.cost import count_flops, count_parameters, module_of
from kernelpress.measure.energy import energy_per_call
from kernelpress.measure.memory import peak_memory_bytes, weight_bytes
from kernelpress.measure.units import count_text, energy_text, latency_text, memory_text
from kernelpress.preserve import evaluation
from kernelpress.runtime.clock import Timing, threads_set_to, time_alternately

__all__ = ["Profile", "describe", "profile"]


@dataclass(frozen=True)
class Profile:
    """What one inference costs; proxies are `None` for a callable whose mathematics cannot be looked into."""

    name: str
    device: str
    threads: int
    batch: int | None
    """Images per inference: the first input's first dimension."""
    latency: Timing
    peak_memory_bytes: int
    """Allocations alive at once during an inference, weights and inputs aside; an arena counts whole."""
    weight_bytes: int | None
    flops: int | None
    """Per inference, of the whole batch; a multiplication and its addition count as two."""
    promised_flops: float | None
    """What of `flops` is left in theory; the same unless `compare` was told of promises."""
    parameters: int | None
    energy_joules: float | None
    energy_source: str | None
    energy_reason: str | None
    """Why `energy_joules` is `None`."""

    @property
    def throughput(self) -> float:
        """Images per second; inferences per second where there is no batch."""
        return (1 if self.batch is None else self.batch) / (self.latency.median * 1e-3)

    @property
    def flops_per_second(self) -> float | None:
        """Achieved FLOP/s."""
        return None if self.flops is None else self.flops / (self.latency.median * 1e-3)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {**asdict(self), "throughput": self.throughput}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Profile:
        """The inverse of `to_dict`, which may hold more; raises `KeyError` or `TypeError` for anything else."""
        latency = Timing(**{**stored["latency"], "rounds": tuple(stored["latency"]["rounds"])})
        return cls(**{**{entry.name: stored[entry.name] for entry in fields(cls)}, "latency": latency})

    def table(self) -> str:
        """The profile as text, one quantity per line."""
        timing = self.latency
        speed = "" if self.flops_per_second is None else f" ({count_text(int(self.flops_per_second), 'FLOP/s')})"
        lines = {
            "latency": f"{latency_text(timing.median)} median, {latency_text(timing.p10)} – {latency_text(timing.p90)} "
            f"(p10 – p90), {timing.calls} calls after {timing.warmup} to warm up",
            "throughput": f"{self.throughput:.4g} images/s{speed}",
            "peak memory": memory_text(self.peak_memory_bytes),
            "weights": memory_text(self.weight_bytes),
            "FLOPs": count_text(self.flops),
            "parameters": count_text(self.parameters),
            "energy": f"not measured: {self.energy_reason}"
            if self.energy_joules is None
            else f"{energy_text(self.energy_joules)} per inference ({self.energy_source}, idle share included)",
        }
        head = f"{self.name} on {self.device}, batch {self.batch}, {self.threads} threads"
        return "\n".join([head, *(f"  {label:<12} {text}" for label, text in lines.items())])


def _first_tensor(inputs: tuple[Any, ...]) -> torch.Tensor | None:
    return next((value for value in inputs if isinstance(value, torch.Tensor)), None)


def _device_of(model: Callable[..., Any], inputs: tuple[Any, ...]) -> torch.device:
    module = module_of(model)
    parameter = None if module is None else next(module.parameters(), None)
    tensor = parameter if parameter is not None else _first_tensor(inputs)
    return torch.device("cpu") if tensor is None else tensor.device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(
    name: str, model: Callable[..., Any], inputs: tuple[Any, ...], latency: Timing, *, energy_seconds: float = 0.5
) -> Profile:
    """The `Profile` of a model whose latency is measured already: memory, energy and proxies are taken here."""
    if not callable(model):
        raise TypeError(f"{name}: expected a module or another callable, got {type(model).__name__}")
    module = module_of(model)
    device = _device_of(model, inputs)
    tensor = _first_tensor(inputs)
    with evaluation(module, inputs), torch.no_grad():
        peak = peak_memory_bytes(
            lambda: model(*inputs), device=device, arena_bytes=int(getattr(model, "arena_bytes", 0))
        )
        energy = energy_per_call(lambda: model(*inputs), device=device, seconds=energy_seconds)
    flops = None if module is None else count_flops(module, *inputs)
    return Profile(
        name=name,
        device=_device_name(device),
        threads=torch.get_num_threads(),
        batch=None if tensor is None or tensor.ndim == 0 else tensor.shape[0],
        latency=latency,
        peak_memory_bytes=peak,
        weight_bytes=None if module is None else weight_bytes(module),
        flops=flops,
        promised_flops=flops,
        parameters=None if module is None else count_parameters(module),
        energy_joules=energy.joules,
        energy_source=energy.source,
        energy_reason=energy.reason,
    )


def profile(
    model: Callable[..., Any],
    *inputs: Any,
    warmup: int = 3,
    repeats: int | None = None,
    rounds: int = 5,
    budget_seconds: float = 1.0,
    threads: int | None = None,
    name: str | None = None,
) -> Profile:
    """Measure a module (in evaluation mode), an emitted model, a captured plan or any callable on `inputs`.

    Latency comes from `time_alternately` with `warmup`, `repeats` (samples per round), `rounds` and `budget_seconds`;
    `threads` sets torch's thread number for the duration.

    Raises `TypeError` for a model that is not callable, `ValueError` for counts that are not positive.
    """
    if not callable(model):
        raise TypeError(f"model: expected a module or another callable, got {type(model).__name__}")
    module = module_of(model)
    title = name or type(model).__name__
    with threads_set_to(threads), evaluation(module, inputs):
        timings = time_alternately(
            {title: lambda: model(*inputs)},
            budget_seconds=budget_seconds,
            rounds=rounds,
            warmup=warmup,
            repeats=repeats,
        )
        return describe(title, model, inputs, timings[title])
