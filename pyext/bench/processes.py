"""Contestants in processes of their own (`bench.worker`), timed in turn: no runtime meets the threads of another."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernelpress.bench.worker import Job

__all__ = ["SETTLE_SECONDS", "Rounds", "Start", "Worker", "WorkerError", "rounds_in_turn"]

SETTLE_SECONDS = 0.25
"""Sleep before each burst: worker threads of the runtime before may spin for some tens of milliseconds."""


class WorkerError(RuntimeError):
    """A process that could not load its model, with its last words."""


@dataclass(frozen=True)
class Start:
    """How a process came to its first result: seconds of its imports, of loading its model, and of one call."""

    import_s: float
    load_s: float
    first_s: float

    @property
    def total_s(self) -> float:
        """From the start of the process to its first result."""
        return self.import_s + self.load_s + self.first_s


@dataclass(frozen=True)
class Rounds:
    """The median of each round in ms, in the order they ran, and how little the process did meanwhile."""

    milliseconds: tuple[float, ...]
    idle_cpu_share: float | None
    """Processor time that it took while others were timed ÷ that time; near 0 if it disturbed nobody."""


class Worker:
    """A contestant's process and the talk with it. `command` is followed by the path of `job`, then `arguments`."""

    def __init__(
        self, job: Job, command: Sequence[str], arguments: Sequence[str] = (), *, environment: Mapping[str, str] = {}
    ) -> None:
        self.job = job
        self.errors = Path(job.folder) / f"stderr-{job.runtime}.txt"
        with self.errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [*command, str(job.save()), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(job.threads),
                    # Emission times its candidates in this very run, not in some busier hour before.
                    "KERNELPRESS_CACHE": str(Path(job.folder) / "timings"),
                    # Inductor folds weights; as an option of `torch.compile` that comes too late for quantized ones.
                    "TORCHINDUCTOR_FREEZING": "1",
                    **environment,
                },
            )

    def start(self) -> tuple[str, Start]:
        """Waits until the model is loaded and warm; its settings. Raises `WorkerError` where it cannot be."""
        answer = self._answer()
        if "skipped" in answer:
            self.stop()
            raise WorkerError(answer["skipped"])
        return answer["settings"], Start(**answer["seconds"])

    def output(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The logits it computed."""
        return np.load(self.job.output_file, allow_pickle=False).astype(np.float64)

    def round(self) -> float:
        """Has it time one burst; the median in ms."""
        return float(self._ask("round")["median_ms"])

    def peak_bytes(self) -> int | None:
        """Its highest resident memory since it was warm, above that after its imports; `None` where unknown."""
        peak: int | None = self._ask("memory")["peak_bytes"]
        return peak

    def cpu_seconds(self) -> float | None:
        """Processor time of all its threads so far; `None` where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.popen.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends its input, upon which it ends."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        self.popen.wait(timeout=60)

    def _ask(self, command: str) -> dict[str, Any]:
        assert self.popen.stdin is not None
        print(command, file=self.popen.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.popen.wait(timeout=60)
        last_words = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise WorkerError(f"process ended with status {self.popen.returncode}: {''.join(last_words)}")


def rounds_in_turn(workers: Mapping[str, Worker], rounds: int) -> dict[str, Rounds]:
    """The rounds, each beginning with another contestant so that nobody always follows the same one."""
    medians: dict[str, list[float]] = {name: [] for name in workers}
    idle_cpu = dict.fromkeys(workers, 0.0)
    idle_time = dict.fromkeys(workers, 0.0)
    names = list(workers)
    for index in range(rounds):
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_SECONDS)
            before = {other: workers[other].cpu_seconds() for other in names}
            start = time.perf_counter()
            medians[name].append(workers[name].round())
            elapsed = time.perf_counter() - start
            for other in names:
                used, until = before[other], workers[other].cpu_seconds()
                if other != name and used is not None and until is not None:
                    idle_cpu[other] += until - used
                    idle_time[other] += elapsed
    return {
        name: Rounds(tuple(medians[name]), idle_cpu[name] / idle_time[name] if idle_time[name] else None)
        for name in names
    }
