"""Trials on Ray Tune, for clusters: each has a node to itself, since it is to be timed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernelpress.files.plain import from_plain
from kernelpress.report import Trial

__all__ = ["LOCAL", "run_on_ray"]

LOCAL = "local"
"""In place of a cluster's address: a Ray of this machine's own."""


def run_on_ray(attempt: Callable[[int], Trial], count: int, folder: Path, address: str) -> list[Trial | str]:
    """`attempt(0)` … `attempt(count - 1)`, in that order: what each gives, or why its process ended without a result.

    Ray's own files go to `folder`, which, as all that trials read and write, must be the same on every node. Trials
    take whole nodes of the largest kind: others are left alone, as times of different machines do not compare.

    Raises `ImportError` where Ray Tune is not installed, `ConnectionError` where nothing answers at the address.
    """
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ImportError(f"ray: {error}; `pip install kernelpress[ray]` installs it") from error
    variables = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}  # paths of recipes are relative to where the sweep was started
    started = not ray.is_initialized()
    ray.init(
        address=None if address == LOCAL else address, ignore_reinit_error=True, runtime_env={"env_vars": variables}
    )
    try:
        tuner = tune.Tuner(
            tune.with_resources(_reporting(attempt), _largest_node(ray.nodes())),
            param_space={"index": tune.grid_search(list(range(count)))},
            run_config=tune.RunConfig(name="ray", storage_path=str(folder.resolve())),
        )
        results = tuner.fit()
        found: dict[int, Trial | str] = {}
        for result in results:
            told = None if result.metrics is None else result.metrics.get("trial")
            reason = f"Ray: {result.error or 'no result'}".splitlines()[0]
            found[result.config["index"]] = reason if told is None else from_plain(Trial, told, "trial")
        return [found.get(index, "Ray: not run") for index in range(count)]
    finally:
        if started:
            ray.shutdown()


def _reporting(attempt: Callable[[int], Trial]) -> Callable[[dict[str, Any]], None]:
    def train(config: dict[str, Any]) -> None:
        from ray import tune

        tune.report({"trial": asdict(attempt(config["index"]))})

    return train


def _largest_node(nodes: list[dict[str, Any]]) -> dict[str, float]:
    """All processors and GPUs of the largest node alive, as a request of resources."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    largest = max(alive, key=lambda resources: (resources.get("GPU", 0), resources.get("CPU", 0)))
    return {kind.lower(): largest[kind] for kind in ("CPU", "GPU") if largest.get(kind)}
