"""Steps of a long run as processes of their own: each with a log and a time, so that none can stop the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
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
    begin = time.monotonic()
    running: dict[str, tuple[Stage, subprocess.Popen[bytes]]] = {}
    results: dict[str, Result] = {}
    for stage in stages:
        with (logs / f"{stage.name}.log").open("wb") as log:
            process = subprocess.Popen(
                stage.command,
                cwd=cwd,
                env={**environment, **stage.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        running[stage.name] = (stage, process)
    while running:
        for name, (stage, process) in list(running.items()):
            seconds = time.monotonic() - begin
            code = process.poll()
            if code is None and seconds <= stage.seconds:
                continue
            outcome = "passed" if code == 0 else "failed"
            if code is None:
                outcome = "stopped" if stage.may_be_stopped else "out of time"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            lines = SHORT_TAIL_LINES if outcome == "passed" else TAIL_LINES
            results[name] = Result(name, outcome, seconds, tail(logs / f"{name}.log", lines))
            del running[name]
        time.sleep(0.05)
    return [results[stage.name] for stage in stages]


def tail(path: Path, lines: int) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
