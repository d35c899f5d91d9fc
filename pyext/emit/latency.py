"""How long modules take as plans, measured against each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kernelpress.emit.pipeline import emit
from kernelpress.emit.plan import capture
from kernelpress.measure.race import race

__all__ = ["plan_latencies"]


def plan_latencies(modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Milliseconds of each of `modules`, emitted for `x` and captured as a plan, measured in turn.

    What takes clearly longer than another is measured with fewer samples. Raises what `emit` and `capture` raise.
    """
    plans = {name: capture(emit(module, x, dynamic_batch=False, progress=False), x) for name, module in modules.items()}
    calls = {name: (lambda plan=plan: plan(x)) for name, plan in plans.items()}
    return race(calls, [[(name,) for name in plans]])
