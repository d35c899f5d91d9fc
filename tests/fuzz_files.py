"""Thousands of mutated files of every kind that kernelpress reads: none may run code, crash, hang or pass as good.

    python tests/fuzz_files.py [--count 10000] [--seed N] [--only KIND]

It goes on where it was stopped, and ends with the smallest mutation that did harm, if one did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from file_kinds import SECONDS, Kind, all_kinds, harm_of
from mutating import Edit, smallest

STATE = Path(__file__).parent.parent / "build" / "fuzz_files.json"
BATCH = 250


def main() -> int:
    """Runs what is left; the exit code is 1 if a file did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="mutated files of each kind")
    parser.add_argument("--seed", type=int, help="of the mutations; drawn, or that of the run that was stopped")
    parser.add_argument("--only", default="", help="a part of the names of the kinds to try")
    options = parser.parse_args()
    state = _state(options.seed)
    print(f"seed {state['seed']}: {options.count} mutated files of each kind", flush=True)
    torch.set_num_threads(1)  # so that forked processes can use torch
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in all_kinds(Path(folder), options.only):
            if not _fuzz(kind, state, options.count):
                return 1
        strays = [path.name for path in Path(folder).glob("executed*")]
        assert not strays, f"some file ran code that left {strays}"
    STATE.unlink(missing_ok=True)
    print("no harm")
    return 0


def _state(seed: int | None) -> dict[str, int]:
    """The seed, and how many files of each kind are done: what a run that was stopped or failed left, or a new one."""
    state: dict[str, int] = json.loads(STATE.read_text()) if STATE.exists() else {}
    if "seed" not in state or seed not in (None, state["seed"]):
        state = {"seed": random.SystemRandom().randrange(10**9) if seed is None else seed}
    _keep(state)
    return state


def _keep(state: dict[str, int]) -> None:
    STATE.parent.mkdir(exist_ok=True)
    STATE.write_text(json.dumps(state))


def _fuzz(kind: Kind, state: dict[str, int], count: int) -> bool:
    """Whether all files of a kind did no harm; prints the smallest mutation that did."""
    start, first = time.monotonic(), state.get(kind.name, 0)

    def edits_of(index: int) -> list[Edit]:
        return kind.draw(random.Random(f"{state['seed']} {kind.name} {index}"))

    for begin in range(first, count, BATCH):
        batch = range(begin, min(begin + BATCH, count))
        if _harm_in_child(kind, map(edits_of, batch), len(batch)):
            index = next(i for i in batch if _harm_in_child(kind, [edits_of(i)]))
            edits = smallest(edits_of(index), lambda fewer: bool(_harm_in_child(kind, [fewer])))
            harm = _harm_in_child(kind, [edits])
            print(f"{kind.name}, file {index} of seed {state['seed']}: {harm}\n  after {edits}", flush=True)
            return False
        state[kind.name] = batch.stop
        _keep(state)
        print(f"\r{kind.name}: {batch.stop} ({time.monotonic() - start:.0f} s)", end="", flush=True)
    print(f"\r{kind.name}: {count} refused or harmless ({time.monotonic() - start:.0f} s)", flush=True)
    return True


def _harm_in_child(kind: Kind, mutations: Iterable[Sequence[Edit]], count: int = 1) -> str | None:
    """The first harm that these mutations do in a process of its own, or how that ended before it could tell."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = next((harm for edits in mutations if (harm := harm_of(kind, edits))), "")
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode(errors="replace")[:2000])
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + SECONDS * (2 + count / 25)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    if os.WIFSIGNALED(ended[1]):
        return f"the process died of {signal.Signals(os.WTERMSIG(ended[1])).name}"
    return said or None


if __name__ == "__main__":
    sys.exit(main())
