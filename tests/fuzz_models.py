"""Random models, emitted onto our CPU kernels, and random calls of them: each right, or refused with a reason.

`make fuzz` tries 2,000 in two processes. What is done is kept in build/fuzz_models.json, so that an interrupted run
goes on; of every kind of fault, the smallest failing model is printed and kept in build/fuzz/. `--seed N` examines one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "fuzz_models.json"
SNIPPETS = ROOT / "build" / "fuzz"

MODELS = 2000
PROCESSES = 2
LONGEST_SECONDS = 180.0
"""A model that takes longer hangs."""
SHRINKING_SECONDS = 60.0
MODELS_PER_PROCESS = 250
"""What torch keeps of the models that it has seen grows."""

NOTHING: dict[str, Any] = {"fault": None, "snippet": None, "refusal": None, "calls": 0, "refused_calls": 0}
"""What is told of a model of which nothing is known."""


@dataclass
class State:
    """What a run has done: seeds from `first` on."""

    first: int
    models: int
    done: int = 0
    waiting: list[int] = field(default_factory=list)
    """Seeds that were drawn before `done` and not finished."""
    calls: int = 0
    refused_calls: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """Seed, and text of the smallest failing model, by kind."""
    seconds: float = 0.0


def examine_seed(seed: int, ignored: tuple[str, ...], known: tuple[str, ...]) -> dict[str, Any]:
    """The outcome of one seed; a fault of a kind that is not `known` comes with a snippet of the smallest model."""
    from modelfuzz.generator import draw
    from modelfuzz.shrink import shrink, snippet
    from modelfuzz.verdict import examine

    program = draw(seed)
    outcome = examine(program, ignored=ignored)
    told = {**asdict(outcome), "fault": None, "snippet": None}
    if outcome.fault is not None:
        fault = outcome.fault
        told["fault"] = fault.kind
        if fault.kind not in known:
            program, fault = shrink(program, fault, SHRINKING_SECONDS, ignored)
            told["snippet"] = snippet(program, fault)
    return told


def work(connection: Connection, ignored: tuple[str, ...]) -> None:
    """Examines the seeds that come until there are no more."""
    prepare()
    while (message := connection.recv()) is not None:
        seed, known = message
        try:
            told = examine_seed(seed, ignored, known)
        except Exception as error:
            told = NOTHING | {"fault": f"the fuzzer fails: {type(error).__name__}: {error}"}
        connection.send(told)


def prepare() -> None:
    """One thread, and no warnings of torch's own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    os.environ.setdefault("KERNELPRESS_CACHE", str(ROOT / "build" / "fuzz_cache"))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)


class Worker:
    """A process that examines models, begun anew when it dies or hangs."""

    def __init__(self, ignored: tuple[str, ...]) -> None:
        self.ignored = ignored
        self.seed: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.ignored), daemon=True)
        self.process.start()
        theirs.close()
        self.count = 0

    def give(self, seed: int, known: tuple[str, ...]) -> None:
        """Lets it examine `seed`."""
        if self.count >= MODELS_PER_PROCESS:
            self.stop()
            self._start()
        self.seed, self.begun, self.count = seed, time.monotonic(), self.count + 1
        self.connection.send((seed, known))

    def result(self) -> dict[str, Any] | None:
        """The outcome, if there is one."""
        if self.connection.poll():
            try:
                return self.connection.recv()
            except (EOFError, ConnectionError):
                return self._lost("the process dies")
        if time.monotonic() - self.begun > LONGEST_SECONDS:
            return self._lost(f"takes longer than {LONGEST_SECONDS:.0f} s")
        return None

    def _lost(self, kind: str) -> dict[str, Any]:
        self.process.kill()
        self.process.join()
        self._start()
        return NOTHING | {"fault": kind}

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()


def run(state: State, ignored: tuple[str, ...], processes: int) -> None:
    """Examines what is left of the seeds."""
    workers = [Worker(ignored) for _ in range(processes)]
    seeds = _left(state)
    begun, before = time.monotonic(), state.seconds
    busy = [worker for worker in workers if _next(worker, seeds, state)]
    try:
        while busy:
            wait([worker.connection for worker in busy], timeout=5)
            for worker in list(busy):
                told = worker.result()
                if told is None:
                    continue
                assert worker.seed is not None
                _note(state, worker.seed, told)
                state.seconds = before + time.monotonic() - begun
                _save(state)
                if not _next(worker, seeds, state):
                    busy.remove(worker)
                _show(state)
    finally:
        for worker in workers:
            worker.stop()


def _left(state: State) -> Iterator[int]:
    yield from list(state.waiting)
    while state.done < state.models:
        seed = state.first + state.done
        state.done += 1
        state.waiting.append(seed)
        yield seed


def _next(worker: Worker, seeds: Iterator[int], state: State) -> bool:
    seed = next(seeds, None)
    if seed is not None:
        worker.give(seed, tuple(state.faults))
    return seed is not None


def _note(state: State, seed: int, told: dict[str, Any]) -> None:
    state.waiting.remove(seed)
    state.calls += told["calls"]
    state.refused_calls += told["refused_calls"]
    if told["refusal"]:
        reason = re.sub(r"\d+", "#", told["refusal"])[:160]
        state.refusals[reason] = state.refusals.get(reason, 0) + 1
    if (kind := told["fault"]) is not None:
        count, first, text = state.faults.get(kind, [0, seed, None])
        state.faults[kind] = [count + 1, first, text or told["snippet"]]
        if count == 0:
            print(f"\nFAULT at seed {seed}: {kind}\n", told["snippet"] or f"(fuzz_models.py --seed {seed})", flush=True)


def _save(state: State) -> None:
    from kernelpress.files import write_atomically

    STATE.parent.mkdir(exist_ok=True)
    write_atomically(STATE, json.dumps(asdict(state), indent=1).encode())


def _show(state: State) -> None:
    finished = state.done - len(state.waiting)
    if finished % 50 == 0 or finished == state.models:
        rate = state.seconds / finished
        print(
            f"{finished} of {state.models} models, {state.calls} calls ({state.refused_calls} refused), "
            f"{sum(state.refusals.values())} emissions refused, {sum(f[0] for f in state.faults.values())} faults; "
            f"{rate * (state.models - finished) / 60:.0f} minutes left",
            flush=True,
        )


def report(state: State) -> int:
    """Prints what was refused and what is at fault; 1 if anything is."""
    for reason, count in Counter(state.refusals).most_common():
        print(f"refused {count} × {reason}")
    smallest = min((f for f in state.faults.values() if f[2]), key=lambda fault: len(fault[2]), default=None)
    for i, (kind, (count, seed, text)) in enumerate(state.faults.items()):
        where = ""
        if text:
            SNIPPETS.mkdir(parents=True, exist_ok=True)
            path = SNIPPETS / f"{i:02d}_{seed}.py"
            path.write_text(text)
            where = f", {path.relative_to(ROOT)}"
        print(f"FAULT {count} × {kind} (first seed {seed}{where})")
    if smallest:
        print(f"The smallest failing model:\n\n{smallest[2]}")
    return bool(state.faults)


def main() -> int:
    """Runs, or goes on with, the search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=MODELS, help="how many models (default %(default)s)")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="default %(default)s")
    parser.add_argument("--seed", type=int, help="examine this seed alone, and print its smallest failing model")
    parser.add_argument("--first", type=int, help="the first seed of a new run; random by default")
    parser.add_argument("--ignore", action="append", default=[], metavar="KIND", help="pass over faults of this kind")
    given = parser.parse_args()
    ignored = tuple(given.ignore)
    if given.seed is not None:
        prepare()
        told = examine_seed(given.seed, ignored, ())
        print(told["snippet"] or told["refusal"] or f"right: {told['calls']} calls, {told['refused_calls']} refused")
        return bool(told["fault"])
    if STATE.exists() and given.first is None:
        state = State(**json.loads(STATE.read_text()))
        print(f"going on after {state.done - len(state.waiting)} models, seeds from {state.first}")
    else:
        first = random.SystemRandom().randrange(1 << 30) if given.first is None else given.first
        state = State(first, given.models)
        print(f"{state.models} models, seeds from {state.first}")
    run(state, ignored, given.processes)
    failed = report(state)
    STATE.unlink()
    return failed


if __name__ == "__main__":
    sys.exit(main())
