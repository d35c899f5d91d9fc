"""How the time of networks grows with the batch, with the image and with threads, ours beside a peer's.

python benchmarks/growth.py --models mobilenet_v2 --batches 1 16 64 --sizes 96 448 --threads 2 --rounds 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench_models import KEY, add_runtimes, chosen_runtimes, contest_parser, positive, run
from recording import save

from kernelpress.bench.contest import OURS

__all__ = ["main", "points"]

MODELS = ["mobilenet_v2", "shufflenet_v2", "resnet50"]
BATCHES = [1, 2, 4, 8, 16, 32, 64]
SIZES = [96, 128, 160, 224, 320, 448]
FEWEST_CALLS = 3
"""In a burst, however long they are."""


def points(batches: Sequence[int], sizes: Sequence[int], size: int, threads: int) -> list[tuple[int, int, int]]:
    """Batch, size and threads of what is timed, each once: one of them at a time is another than at first."""
    batch = batches[0]
    varied = [*((n, size, threads) for n in batches), *((batch, side, threads) for side in sizes)]
    return list(dict.fromkeys([*varied, (batch, size, 1)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the networks asked for at every point, prints a table each and records it at once."""
    parser = contest_parser(__doc__, rounds=3)
    parser.set_defaults(models=MODELS, iterations=20)
    add_runtimes(parser, ["ONNX Runtime", OURS])
    parser.add_argument(
        "--batches", nargs="+", type=positive, default=BATCHES, help="the first one goes with all sizes"
    )
    parser.add_argument("--sizes", nargs="+", type=positive, default=SIZES, help="rows and columns of the image")
    parser.add_argument("--size", type=positive, default=224, help="that goes with all batches")
    options = parser.parse_args(arguments)
    for model in options.models:
        for batch, size, threads in points(options.batches, options.sizes, options.size, options.threads):
            times_longer = batch * size**2 / (options.batches[0] * options.size**2)
            calls = max(FEWEST_CALLS, round(options.iterations / max(1, times_longer)))
            at = argparse.Namespace(models=[model], threads=threads, rounds=options.rounds, iterations=calls)
            path = save("growth", run(at, chosen_runtimes(options), batch=batch, size=size), options.results, key=KEY)
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
