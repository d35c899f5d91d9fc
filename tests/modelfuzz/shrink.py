"""The smallest program, and the one call, that still show a fault of the same kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from modelfuzz.program import COSTS, PRELUDE, Argument, Call, Program, Step, environment, evaluate
from modelfuzz.verdict import Fault, examine

__all__ = ["shrink", "snippet"]


def shrink(program: Program, fault: Fault, seconds: float, ignored: tuple[str, ...] = ()) -> tuple[Program, Fault]:
    """Drops outputs, statements, arguments and the program's dtype as long as the same kind of fault shows, for at most
    `seconds`."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for smaller, call in _smaller(program, fault.call):
            if time.monotonic() > deadline:
                return program, fault
            found = _same_fault(smaller, call, fault, ignored)
            if found is not None:
                program, fault, progress = smaller, found, True
                break
    return program, fault


def _same_fault(program: Program, call: Call | None, fault: Fault, ignored: tuple[str, ...]) -> Fault | None:
    try:
        # Whoever was at fault, emitted model, file or plan, is asked again.
        thorough = not fault.kind.startswith("emi")
        found = examine(program, [call] if call else [], thorough=thorough, ignored=ignored).fault
    except Exception:
        return None
    return found if found is not None and found.kind == fault.kind else None


def _smaller(program: Program, call: Call | None) -> Iterator[tuple[Program, Call | None]]:
    """Programs with one thing less."""
    values = _values(program)
    for output in _outputs(program):
        yield _fitted(replace(program, output=output), call)
    for simpler in ({"cost": "cpu"}, {"kernels": ""}, {"threads": 1}):
        if replace(program, **simpler) != program:
            yield replace(program, **simpler), call
    if program.dtype != "float32":

        def plain(text: str) -> str:
            return text.replace(f".to(torch.{program.dtype})", "")

        arguments = tuple(replace(a, example=plain(a.example)) for a in program.arguments)
        yield (
            replace(program, dtype="float32", arguments=arguments),
            call and replace(call, positional=tuple(map(plain, call.positional))),
        )
    for i, step in reversed(list(enumerate(program.steps))):
        others = (*program.steps[:i], *program.steps[i + 1 :])
        if not step.writes & _read_later(program, i):
            yield _fitted(replace(program, steps=others), call)
            continue
        written = sorted(name for name in step.writes if name.startswith("v"))
        if len(written) != 1:
            continue
        wanted = values.get(written[0])
        # The statement's result is one of its operands, or a new argument.
        for name in sorted(step.reads & values.keys()):
            if _alike(values[name], wanted):
                later = tuple(s.renamed(written[0], name) for s in program.steps[i + 1 :])
                output = Step(program.output).renamed(written[0], name).code
                yield _fitted(replace(program, steps=(*program.steps[:i], *later), output=output), call)
        if isinstance(wanted, Tensor) and wanted.is_floating_point() and call is None and i:
            text = f"torch.randn({', '.join(map(str, wanted.shape))})"
            taken = Argument(written[0], text)
            smaller = replace(program, steps=others, arguments=(taken, *program.arguments)).without_unused()
            yield smaller, None


def _outputs(program: Program) -> Iterator[str]:
    """Each variable alone that the output is made of."""
    names = sorted(
        name
        for name in Step(program.output).reads
        if name.startswith(("v", "x")) or name in {a.name for a in program.arguments}
    )
    yield from (name for name in names if name != program.output)


def _fitted(program: Program, call: Call | None) -> tuple[Program, Call | None]:
    """The program without what is unused, and the call without the arguments that went with it."""
    smaller = program.without_unused()
    if call is None or len(smaller.arguments) == len(program.arguments):
        return smaller, call
    kept = [i for i, a in enumerate(program.arguments) if a in smaller.arguments]
    names = {a.name for a in smaller.arguments}
    positional = tuple(e for i, e in enumerate(call.positional) if i in kept or i >= len(program.arguments))
    return smaller, replace(call, positional=positional, named=tuple(n for n in call.named if n[0] in names))


def _read_later(program: Program, i: int) -> set[str]:
    return set(Step(program.output).reads).union(*(step.reads for step in program.steps[i + 1 :]))


def _values(program: Program) -> dict[str, object]:
    """The program's variables on its example."""
    positional, _ = program.example.arguments()
    space = {**environment(), "self": program.model()}
    rest = [evaluate(argument.default or "None") for argument in program.arguments[len(positional) :]]
    names = {a.name: value for a, value in zip(program.arguments, (*positional, *rest), strict=True)}
    space |= names
    with torch.no_grad():
        for step in program.steps:
            exec(step.code, space)
            names |= {name: space[name] for name in step.writes}
    return names


def _alike(a: object, b: object) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def snippet(program: Program, fault: Fault) -> str:
    """A script that shows the fault."""
    example = program.example
    lines = [
        f'"""{fault}"""',
        PRELUDE,
        "import kernelpress as kp",
        "from kernelpress.runtime import native",
        "",
        "",
        program.source,
        "",
        program.making,
        f"torch.set_num_threads({program.threads})",
        *([f'native.cpu().select("{program.kernels}")'] if program.kernels else []),
        f"torch.manual_seed({example.seed})",
        f"cost = {COSTS[program.cost]}",
        f"emitted = kp.emit(model, ({example.code},), cost=cost, cache=False, progress=False)",
        "print(emitted.record.reason)",
    ]
    if fault.call is not None:
        lines += [f"with {fault.call.context}:"]
        for run in ("model", "emitted"):
            lines += [f"    torch.manual_seed({fault.call.seed})", f"    print({run}({fault.call.code}))"]
    return "\n".join(lines) + "\n"
