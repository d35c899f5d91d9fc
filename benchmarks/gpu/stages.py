"""Steps of a long run as processes of their own: each with a log and a time, so that none can stop the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Result", "Stage", "run_beside", "tail"]

TAIL_LINES = 25
SHORT_TAIL_LINES = 4


@dataclass(frozen=True)
class Stage:
    """A command that is to end well within `seconds`; one that `may_be_stopped` saves what it has as it goes."""

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    may_be_stopped: bool = False


@dataclass(frozen=True)
class Result:
    """How a stage ended ("passed", "failed", "out of time", "stopped" or "skipped"), when, and what it said last."""

    name: str
    outcome: str
    seconds: float
    last_lines: str = ""

    @property
    def is_good(self) -> bool:
        return self.outcome in ("passed", "skipped", "stopped")


def run_beside(stages: Sequence[Stage], environment: Mapping[str, str], cwd: Path, logs: Path) -> list[Result]:
    """Runs the stages at the same time, output into `<logs>/<name>.log`; a stage beyond its time is ended with all its
    children."""
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(stages)) as pool:
        return list(pool.map(lambda stage: _run(stage, environment, cwd, logs / f"{stage.name}.log"), stages))


def _run(stage: Stage, environment: Mapping[str, str], cwd: Path, log: Path) -> Result:
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            stage.command,
            cwd=cwd,
            env={**environment, **stage.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        outcome = "failed" if process.wait(stage.seconds) else "passed"
    except subprocess.TimeoutExpired:
        outcome = "stopped" if stage.may_be_stopped else "out of time"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = SHORT_TAIL_LINES if outcome == "passed" else TAIL_LINES
    return Result(stage.name, outcome, time.monotonic() - begin, tail(log, lines))


def tail(path: Path, lines: int) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
