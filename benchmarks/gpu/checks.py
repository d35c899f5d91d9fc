"""What must be right before anything is timed: `python -m gpu.checks golden|ops|triton|opcheck|smallest`.

golden: every PTX wrapper against computed vectors. ops: every op in every dtype against the reference, triton: the same
on Triton's kernels, opcheck: torch's own check of operators, smallest: one call of every CUDA kernel, for
compute-sanitizer to watch.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gpu import stage_parser
from kernelpress.bench.contest import reason_of

__all__ = ["CHECKS", "Outcome", "main", "outcomes"]

CHECKS = ("golden", "ops", "triton", "opcheck", "smallest")


@dataclass(frozen=True)
class Outcome:
    """What became of one check: "passed" or "failed", and why."""

    name: str
    result: str
    reason: str = ""


def outcomes(check: str, device: torch.device, family: str | None = None) -> Iterator[Outcome]:
    """Runs one of `CHECKS`, of one family or of all."""
    named = _golden() if check == "golden" else _opcheck(device, family) if check == "opcheck" else None
    return (_outcome(name, call) for name, call in named or _cases(check, device, family))


def _outcome(name: str, call: Callable[[], object]) -> Outcome:
    try:
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:  # the other checks are to run all the same
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(name, "failed", f"{reason_of(error)} ({place.name}, line {place.lineno})")
    return Outcome(name, "passed")


Named = Iterator[tuple[str, Callable[[], object]]]


def _golden() -> Named:
    from cuda_golden import GOLDEN, compile_for_device, on_gpu

    with tempfile.TemporaryDirectory() as folder:
        run = on_gpu(compile_for_device(Path(folder)))
        yield from ((name, partial(check, run)) for name, check in GOLDEN.items())


def _opcheck(device: torch.device, family: str | None) -> Named:
    """On the first case of every op, in float32 or int8."""
    from cuda_cases import CASES

    for case in {case.op: case for case in reversed(CASES) if family in (None, case.family)}.values():
        tensors = tuple(None if t is None else t.to(device) for t in case.tensors(case.dtypes[-1]))
        overload = getattr(torch.ops.kernelpress, case.op).default
        yield case.name, partial(torch.library.opcheck, overload, tensors, case.options)


def _cases(check: str, device: torch.device, family: str | None) -> Named:
    """Every case forced onto our kernel where there is one; ops also as they choose by themselves."""
    import cuda_cases

    for case in cuda_cases.CASES:
        if family not in (None, case.family):
            continue
        backends = [name for name in ("triton" if check == "triton" else "cuda",) if cuda_cases.has_kernel(case, name)]
        backends += ["auto"] if check == "ops" else []
        function, dtypes = cuda_cases.check, case.dtypes
        if check == "smallest":  # without a look at the result
            function, dtypes = cuda_cases.run, case.dtypes[:1]
        for dtype in dtypes:
            for backend in ["reference"] * bool(backends) if device.type == "cpu" else backends:
                call = partial(function, case, dtype, device, backend=backend)
                yield f"{case.name}, {dtype}, {backend}", call


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what failed and a count; returns 1 where something did, or nothing ran."""
    parser = stage_parser(__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--family", default=None)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    counts: Counter[str] = Counter()
    for outcome in outcomes(options.check, torch.device("cpu" if options.dry_run else "cuda"), options.family):
        counts[outcome.result] += 1
        if outcome.result != "passed":
            print(f"{outcome.result.upper()} {outcome.name}: {outcome.reason}", flush=True)
    told = ", ".join(f"{counts[result]} {result}" for result in ("passed", "failed") if counts[result])
    print(f"{options.check}: {told}", flush=True)
    return int(counts["failed"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
