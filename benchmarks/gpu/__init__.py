"""What `make gpu` runs: build, checks and benchmarks on one CUDA device, with nothing but Python, torch and nvcc."""

import re

__all__ = ["folder_name"]


def folder_name(device: str) -> str:
    """Where the results of a device lie: `nvidia-h200` for `NVIDIA H200`."""
    return "-".join(re.findall(r"[a-z0-9.]+", device.lower()))
