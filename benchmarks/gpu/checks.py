"""What must be right before anything is timed: `python -m gpu.checks golden|ops|triton|opcheck|smallest`.

golden: every PTX wrapper against computed vectors. ops: every op in every dtype against the reference, triton: the same
on Triton's kernels, opcheck: torch's own check of operators, smallest: one call of every CUDA kernel, for
compute-sanitizer to watch.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernelpress.bench.contest import reason_of

__all__ = ["main"]


@dataclass(frozen=True)
class Outcome:
    """What became of one check: "passed" or "failed", and why."""

    name: str
    result: str
    reason: str = ""


def golden(device: torch.device, family: str | None) -> Iterator[Outcome]:
    """The golden vectors, on the device."""
    from cuda_golden import GOLDEN, compile_for_device, on_gpu

    with tempfile.TemporaryDirectory() as folder:
        run = on_gpu(compile_for_device(Path(folder)))
        for name, check in GOLDEN.items():
            yield _outcome(name, functools.partial(check, run))


def ops(device: torch.device, family: str | None) -> Iterator[Outcome]:
    """Every case of every op: forced onto our CUDA kernel where there is one, and as it chooses by itself."""
    from cuda_cases import CASES, check, has_kernel

    for case in CASES:
        if family not in (None, case.family):
            continue
        backends = ["reference"] if device.type == "cpu" else ["cuda", "auto"] if has_kernel(case) else ["auto"]
        for dtype in case.dtypes:
            for backend in backends:
                call = functools.partial(check, case, dtype, device, backend=backend)
                yield _outcome(f"{case.name}, {dtype}, {backend}", call)


def triton(device: torch.device, family: str | None) -> Iterator[Outcome]:
    """Every case of every op that has a Triton kernel, forced onto it."""
    from cuda_cases import CASES, check, has_kernel

    for case in CASES:
        if family in (None, case.family) and has_kernel(case, "triton"):
            for dtype in case.dtypes:
                call = functools.partial(check, case, dtype, device, backend="triton")
                yield _outcome(f"{case.name}, {dtype}, triton", call)


def opcheck(device: torch.device, family: str | None) -> Iterator[Outcome]:
    """`torch.library.opcheck` of every op, on the first of its cases in float32 or int8."""
    from cuda_cases import CASES

    for case in {case.op: case for case in reversed(CASES)}.values():
        if family not in (None, case.family):
            continue
        tensors = tuple(None if t is None else t.to(device) for t in case.tensors(case.dtypes[-1]))
        overload = getattr(torch.ops.kernelpress, case.op).default
        yield _outcome(case.name, functools.partial(torch.library.opcheck, overload, tensors, case.options))


def smallest(device: torch.device, family: str | None) -> Iterator[Outcome]:
    """One call of each case, without a look at the result."""
    from cuda_cases import CASES, has_kernel, run

    for case in CASES:
        if family in (None, case.family) and has_kernel(case):
            backend = "reference" if device.type == "cpu" else "cuda"
            yield _outcome(case.name, functools.partial(run, case, case.dtypes[0], device, backend=backend))


def _outcome(name: str, call: Callable[[], object]) -> Outcome:
    try:
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:  # the other checks are to run all the same
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(name, "failed", f"{reason_of(error)} ({place.name}, line {place.lineno})")
    return Outcome(name, "passed")


CHECKS = {"golden": golden, "ops": ops, "triton": triton, "opcheck": opcheck, "smallest": smallest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what failed and a count; returns 1 where something did, or nothing ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--family", default=None)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU and the reference backend")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cpu" if options.dry_run else "cuda")
    counts = {"passed": 0, "failed": 0}
    for outcome in CHECKS[options.check](device, options.family):
        counts[outcome.result] += 1
        if outcome.result != "passed":
            print(f"{outcome.result.upper()} {outcome.name}: {outcome.reason}", flush=True)
    print(
        f"{options.check}: " + ", ".join(f"{count} {result}" for result, count in counts.items() if count), flush=True
    )
    return int(counts["failed"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
