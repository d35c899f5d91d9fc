"""This checkout beside another revision of the project: whole networks, captured and not, in processes run in turn.

Each revision runs `kernelpress.bench.runtimes` of its own, so it must have it.

python benchmarks/checkouts.py main~5 --models mobilenet_v1 resnet18
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_models import contest_parser, run
from gpu import link_packages
from recording import save

from kernelpress.bench.model_contest import ModelResult, Runtime

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("captured", "uncaptured")


def checkout(revision: str) -> Path:
    """A folder from which `revision` is imported as `kernelpress`, its CPU kernels built."""
    name = _git("rev-parse", "--short=12", revision)
    tree = ROOT / "build" / "checkouts" / name
    if not tree.exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", "--force", str(tree), name)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True, env={**os.environ, "KERNELPRESS_CUDA": "0"})
    return _importable(tree)


def _importable(tree: Path) -> Path:
    return link_packages(tree, ROOT / "build" / "checkouts" / f"{tree.name}-import")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def ratio(result: ModelResult, kind: str) -> str:
    """Best round of this checkout ÷ best round of the other."""
    best = {runtime.runtime: runtime.best_ms for runtime in result.runtimes}
    before, now = best[f"before, {kind}"], best[f"now, {kind}"]
    return "not timed" if before is None or now is None else f"{now / before:.3f} of the time before"


def main(arguments: Sequence[str] | None = None) -> None:
    """Times the networks asked for on both revisions, prints a table each and records them."""
    parser = contest_parser(__doc__, rounds=10)
    parser.add_argument("revision", help="what to compare with")
    options = parser.parse_args(arguments)
    before, now = checkout(options.revision), _importable(ROOT)
    runtimes = [
        Runtime(f"{when}, {kind}", "ours", (kind,), import_from=str(folder))
        for kind in KINDS
        for when, folder in (("before", before), ("now", now))
    ]
    results = run(options, runtimes, lambda of: "; ".join(f"{of.model}, {kind}: {ratio(of, kind)}" for kind in KINDS))
    print(f"recorded in {save('checkouts', results, options.results)}")


if __name__ == "__main__":
    main()
