"""Every method of compression by itself, and combinations, on scanned digits: the cases of `recipes/methods.yaml`.

python benchmarks/methods.py

It goes on where it was stopped, writes `methods.json` and the table in README.md; `make methods` builds first.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import RESULTS, Method, method_cells, save
from resources import ROOT, write_table

from kernelpress.bench.tables import markdown
from kernelpress.press import sweep
from kernelpress.press.reading import read_recipe

__all__ = ["MARKS", "NETWORKS", "PAGE", "main"]

RECIPE = ROOT / "recipes" / "methods.yaml"
PAGE = ROOT / "README.md"
MARKS = ("<!-- methods: written by `make methods` -->", "<!-- /methods -->")
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "ResNet-20": {"model": "resnet20"},
    "MobileNet V2 ×0.5": {
        "model": {"name": "mobilenet_v2", "options": {"small_input": True, "width_mult": 0.5}},
        "data.batch_size": 32,
        "steps.2.finetune.epochs": 2,
    },
}
"""Changes of the recipe by network."""
QUICK: Mapping[str, Any] = {
    "data.image_size": 8,
    "data.train_fraction": 0.1,
    "steps.0.train.epochs": 1,
    "steps.2.finetune.epochs": 1,
    "steps.4.measure": {"rounds": 1, "budget_seconds": 0.01, "peers": ["eager"]},
}
"""The smallest settings, which show that it runs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweeps over the methods for each network, and records what they reached."""
    cases = read_recipe(RECIPE).raw["sweep"]["cases"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="small images, few of them: to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "methods", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks of the table")
    options = parser.parse_args(arguments)
    found: list[Method] = []
    for network in options.networks:
        changes: dict[str, Any] = {"sweep.cases": {name: cases[name] for name in options.cases}, **NETWORKS[network]}
        changes |= QUICK if options.quick else {}
        report = sweep(RECIPE, options=changes, output=options.output / network.replace(" ", "-").replace("×", ""))
        found += [Method(network, trial) for trial in report.trials]
    save("methods", found, options.results)
    write_table(options.page, "\n".join(markdown(method_cells([asdict(method) for method in found]))), MARKS)


if __name__ == "__main__":
    main()
