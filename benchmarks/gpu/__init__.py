"""What `make gpu` runs: build, checks and benchmarks on one CUDA device, with nothing but Python, torch and nvcc."""

import argparse
import re
import shutil
from pathlib import Path

__all__ = ["folder_name", "link_packages", "stage_parser"]


def folder_name(device: str) -> str:
    """Where the results of a device lie: `nvidia-h200` for `NVIDIA H200`."""
    return "-".join(re.findall(r"[a-z0-9.]+", device.lower()))


def link_packages(root: Path, site: Path) -> Path:
    """A folder in which a checkout's folders have their import names, renewed; nothing is installed."""
    package = site / "kernelpress"
    shutil.rmtree(site, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(root / "pyext").iterdir(), root / "kernels"]:
        (package / path.name).symlink_to(path)
    return site


def stage_parser(description: str | None, *, seconds: float | None = None) -> argparse.ArgumentParser:
    """Of a stage's process; of one that measures for some `seconds` unless told otherwise."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="everything tiny, on the reference backend and the CPU")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds)
        parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the result files")
    return parser
