"""Steps of a run kept on disk: each is redone only when what it depends on has changed or its files are damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernelpress.files import write_atomically
from kernelpress.files.plain import from_plain
from kernelpress.files.sealed import seal, unseal

__all__ = ["RunFolder", "StepRecord", "step_key"]

_KIND, _FORMAT = "step of a run", 1


def step_key(*parts: Any) -> str:
    """A key that changes with any of `parts`, which are plain values as JSON knows them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StepRecord:
    """What a finished step left: the key it was made under, its results, the digests of its files, its time in s."""

    key: str
    results: dict[str, Any]
    files: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run: the steps' files lie in it, their records in `steps/`.

    A step is finished when its record is there, which is written last: what an interruption leaves is no step.
    """

    path: Path

    def create(self) -> None:
        """Make the folder. Raises `NotADirectoryError` or `PermissionError` naming it."""
        try:
            (self.path / "steps").mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(f"output: {self.path} (or its steps/) is a file, not a folder") from error
        except OSError as error:
            raise type(error)(error.errno, f"output: {self.path} cannot be made: {error.strerror}") from error

    def write(self, name: str, content: bytes) -> None:
        """Write one file of the folder, whole or not at all."""
        write_atomically(self.path / name, content)

    def finish(
        self, step: str, key: str, results: Mapping[str, Any], files: tuple[str, ...], seconds: float
    ) -> StepRecord:
        """Write the record of a step whose `files` are written already."""
        digests = {name: _digest(self.path / name) for name in files}
        record = StepRecord(key, dict(results), digests, seconds)
        self.write(f"steps/{step}.json", seal(_KIND, _FORMAT, asdict(record)))
        return record

    def take(self, step: str, key: str, other: RunFolder) -> StepRecord | None:
        """A step that the run of another folder has finished under the same key, here too; None where it has not."""
        record = other.finished(step, key)
        if not isinstance(record, StepRecord):
            return None
        for name in record.files:
            shutil.copyfile(other.path / name, self.path / name)
        return self.finish(step, key, record.results, tuple(record.files), record.seconds)

    def forget(self, step: str) -> None:
        """Drop the record of a step, so that it is run again."""
        (self.path / "steps" / f"{step}.json").unlink(missing_ok=True)

    def finished(self, step: str, key: str) -> StepRecord | str:
        """The record of `step` if it can be used, else the reason why it has to be run; `""` where it never was."""
        file = self.path / "steps" / f"{step}.json"
        try:
            content = unseal(file.read_bytes(), _KIND, _FORMAT, str(file))
            record = from_plain(StepRecord, content, f"{file} is damaged: record")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            return str(error)
        if record.key != key:
            return "the recipe, an earlier step, the machine or a version has changed"
        for name, digest in record.files.items():
            if not (self.path / name).is_file():
                return f"{self.path / name} is missing"
            if _digest(self.path / name) != digest:
                return f"{self.path / name} is not as it was written"
        return record


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
