"""What this machine's processor is, and which packages it has."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path

__all__ = ["processor_facts", "processor_name", "version_of"]


def processor_facts() -> dict[str, str]:
    """What the system tells of its first processor, by the system's names; nothing where it tells nothing."""
    with contextlib.suppress(OSError):
        first, *_ = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def processor_name() -> str:
    """As in `Intel(R) Xeon(R) Processor @ 2.50GHz`."""
    said = processor_facts()
    name = said.get("model name") or platform.processor() or platform.machine()
    if any(map(str.isdigit, name)) or "cpu family" not in said:
        return name
    return f"{name} family {said['cpu family']} model {said['model']}"  # a guest's may be no more than a brand


def version_of(package: str) -> str | None:
    """Of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
