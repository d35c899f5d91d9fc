"""What the build needs of ninja, for machines that have none: the same rules, run by a few processes at a time.

It knows no build file: rules and steps are declared to a `Plan` as to `ninja.ninja_syntax.Writer`, and run by `run`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Plan", "Step"]


@dataclass(frozen=True)
class Step:
    """One command: it makes `target` of `inputs`; what it finds out it depends on is in `depfile`."""

    target: str
    command: str
    inputs: tuple[str, ...]
    depfile: str | None
    description: str


@dataclass(frozen=True)
class _Rule:
    command: str
    depfile: str
    description: str


@dataclass
class Plan:
    """Steps in the order of their declaration, in which each input that another step makes stands before its use."""

    steps: list[Step] = field(default_factory=list)
    _variables: dict[str, str] = field(default_factory=dict)
    _rules: dict[str, _Rule] = field(default_factory=dict)

    def variable(self, name: str, value: str) -> None:
        """Sets what `$name` stands for in every command."""
        self._variables[name] = value

    def rule(self, name: str, command: str, depfile: str = "", deps: str = "", description: str = "") -> None:
        """Declares a kind of step; `deps`, ninja's way to read `depfile`, is that of gcc."""
        self._rules[name] = _Rule(command, depfile, description)

    def build(
        self, target: str, rule: str, inputs: str | Sequence[str], variables: Mapping[str, str] | None = None
    ) -> list[str]:
        """Declares a step; returns its target, in a list as ninja's writer does."""
        inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        known = self._variables | dict(variables or {}) | {"in": " ".join(inputs), "out": target}
        chosen = self._rules[rule]
        command, depfile, description = (
            _expanded(text, known) for text in (chosen.command, chosen.depfile, chosen.description)
        )
        self.steps.append(Step(target, command, tuple(inputs), depfile or None, description))
        return [target]

    def run(self, root: Path, jobs: int) -> None:
        """Runs, in `root`, what is older than what it is made of or was made by another command; `jobs` at a time.

        Raises: CalledProcessError of the first step that fails, once those that run beside it have ended.
        """
        waiting, made = list(self.steps), set[str]()
        targets = {step.target for step in self.steps}
        with ThreadPoolExecutor(jobs) as pool:
            while waiting:
                ready = [step for step in waiting if targets.isdisjoint(set(step.inputs) - made)]
                if not ready:
                    raise ValueError(f"steps: {', '.join(step.target for step in waiting)} wait for each other")
                list(pool.map(lambda step: _run(root, step), ready))
                made.update(step.target for step in ready)
                waiting = [step for step in waiting if step.target not in made]


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`text` with `$name` replaced, `$$` as `$`; what is not known stands for nothing."""
    return re.sub(r"\$(\$|\w+)", lambda m: "$" if m[1] == "$" else variables.get(m[1], ""), text)


def _run(root: Path, step: Step) -> None:
    target, note = root / step.target, root / f"{step.target}.command"
    if not _is_stale(root, step, target, note):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    print(step.description, flush=True)
    subprocess.run(step.command, cwd=root, shell=True, check=True)
    note.write_text(step.command, encoding="utf-8")


def _is_stale(root: Path, step: Step, target: Path, note: Path) -> bool:
    try:
        if note.read_text(encoding="utf-8") != step.command:
            return True
        made = target.stat().st_mtime_ns
        used = [*step.inputs, *(_dependencies(root / step.depfile) if step.depfile else ())]
        return any(os.stat(root / path).st_mtime_ns > made for path in used)
    except OSError:
        return True


def _dependencies(depfile: Path) -> list[str]:
    """What a depfile of gcc lists behind its colon."""
    text = depfile.read_text(encoding="utf-8").replace("\\\n", " ")
    return shlex.split(text.partition(": ")[2])
