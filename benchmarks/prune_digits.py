"""Criteria of `prune_channels` on the digits, at half of the FLOPs, over several seeds; and budgets at equal latency.

One ResNet-20 is trained for each seed. Every criterion prunes it to half of its FLOPs: accuracy straight after, and
after a short fine-tuning. With `--latency` it is also pruned by a budget of latency, until it is as fast as that.

python benchmarks/prune_digits.py --seeds 5
python benchmarks/prune_digits.py --seeds 5 --image-size 16 --criteria l2 taylor --scopes local global --latency
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_models import positive
from recording import RESULTS, save
from torch import nn
from torch.utils.data import DataLoader

from kernelpress import compress, models
from kernelpress.compress.prune_channels.criteria import CRITERIA
from kernelpress.data import digits
from kernelpress.emit import layer_times, plan_latencies

RATIO = 0.5
BATCHES = 8
"""Of training data, that criteria look at."""
CLOSE = 1.01
"""Latencies that count as equal."""
ATTEMPTS = 5
"""To reach a latency: what the layers take one by one is not quite what the network takes."""
RACES = 3


@dataclass(frozen=True)
class Row:
    """What is left of a network: accuracies of each seed, 0…1, and medians of what it costs."""

    budget: str
    criterion: str
    scope: str
    accuracy_dense: tuple[float, ...]
    accuracy_pruned: tuple[float, ...]
    accuracy_finetuned: tuple[float, ...]
    flops_removed: float
    parameters_removed: float
    milliseconds: tuple[float, ...] = ()
    """Of each seed's network, emitted and captured; where budgets are compared."""

    def __str__(self) -> str:
        means = (
            f"{statistics.fmean(a):.3f} ± {statistics.pstdev(a):.3f}"
            for a in (self.accuracy_pruned, self.accuracy_finetuned)
        )
        return (
            f"{self.budget:8} {self.criterion:20} {self.scope:6} accuracy {' → fine-tuned '.join(means)} "
            f"(dense {statistics.fmean(self.accuracy_dense):.3f}), FLOPs −{self.flops_removed:.1%}"
            + (f", {statistics.fmean(self.milliseconds):.4f} ms" if self.milliseconds else "")
        )


class Digits:
    """Loaders, and the dense network of each seed with its accuracy."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        size = options.image_size
        self.train = DataLoader(digits(size), batch_size=64, shuffle=True)
        self.test = DataLoader(digits(size, train=False), batch_size=180)
        self.example = torch.randn(1, 1, size, size)
        self.dense = {seed: self._trained(seed) for seed in range(options.seeds)}
        self.accuracy = {seed: compress.evaluate(model, self.test) for seed, model in self.dense.items()}

    def _trained(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = models.create("resnet20", num_classes=10, in_channels=1)
        training: dict[str, Any] = {"epochs": self._options.epochs, "lr": 0.1, "weight_decay": 5e-4}
        compress.finetune(model, self.train, **training, bn_l1=self._options.bn_l1, seed=seed, progress=False)
        return model.eval()

    def pruned(self, seed: int, criterion: str, **arguments: Any) -> nn.Module:
        """The dense network of this seed, pruned."""
        torch.manual_seed(seed)
        data: list[Any] = list(itertools.islice(self.train, BATCHES))
        return compress.prune_channels(
            self.dense[seed],
            self.example,
            criterion=criterion,
            round_to=self._options.round_to,
            data=data,
            **arguments,
        )

    def finetuned(self, model: nn.Module, seed: int) -> float:
        """Accuracy after a fine-tuning of a copy."""
        copied = copy.deepcopy(model)
        options = self._options
        compress.finetune(
            copied, self.train, epochs=options.finetune, lr=0.05, weight_decay=5e-4, seed=seed, progress=False
        )
        return compress.evaluate(copied, self.test)

    def milliseconds(self, *networks: nn.Module) -> list[float]:
        """Of these, emitted and captured, in turn: the best of three races, as a machine may be slow through one."""
        named = {str(i): network for i, network in enumerate(networks)}
        races = [plan_latencies(named, self.example) for _ in range(RACES)]
        return [min(race[name] for race in races) for name in named]

    def rows(self, criterion: str, scope: str) -> Iterator[Row]:
        """By a budget of FLOPs and, where asked for, by one of latency that comes to as many milliseconds."""
        pruned = {seed: self.pruned(seed, criterion, scope=scope, ratio=RATIO) for seed in self.dense}
        if not self._options.latency:
            yield self.row("flops", criterion, scope, pruned)
            return
        others: dict[int, nn.Module] = {}
        for seed, dense in self.dense.items():
            whole, reached = self.milliseconds(dense, pruned[seed])
            left = reached / whole
            for _ in range(ATTEMPTS):
                latency: Any = {"ratio": 1 - left, "target": "latency", "layer_costs": layer_times}
                others[seed] = self.pruned(seed, criterion, scope=scope, **latency)
                wanted, got = self.milliseconds(pruned[seed], others[seed])
                if got <= CLOSE * wanted:
                    break
                left *= wanted / got
        times = zip(*(self.milliseconds(pruned[seed], others[seed]) for seed in self.dense), strict=True)
        for budget, networks, milliseconds in zip(("flops", "latency"), (pruned, others), times, strict=True):
            yield replace(self.row(budget, criterion, scope, networks), milliseconds=milliseconds)

    def row(self, budget: str, criterion: str, scope: str, pruned: dict[int, nn.Module]) -> Row:
        """Accuracies and costs of the networks of all seeds."""
        records = [compress.record_of(model)[-1] for model in pruned.values()]
        return Row(
            budget,
            criterion,
            scope,
            tuple(self.accuracy[seed] for seed in pruned),
            tuple(compress.evaluate(model, self.test) for model in pruned.values()),
            tuple(self.finetuned(model, seed) for seed, model in pruned.items()),
            statistics.median(record.flops_removed for record in records),
            statistics.median(1 - record.parameters_after / record.parameters_before for record in records),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prunes, prints a line for each row and records them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=8, help="of the dense network")
    parser.add_argument("--finetune", type=positive, default=2, help="epochs after pruning")
    parser.add_argument("--bn-l1", type=float, default=0.0, help="of the dense network's training, for bn_scale")
    parser.add_argument("--image-size", type=positive, default=8)
    parser.add_argument("--round-to", type=positive, default=4)
    parser.add_argument("--scopes", nargs="+", choices=["local", "global"], default=["local"])
    parser.add_argument("--criteria", nargs="*", choices=list(CRITERIA), default=list(CRITERIA))
    parser.add_argument("--latency", action="store_true", help="also by a budget of latency, at what FLOPs came to")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data = Digits(options)
    settings = {key: value for key, value in vars(options).items() if key != "results"}
    rows: list[Row] = []
    for criterion, scope in itertools.product(options.criteria, options.scopes):
        for row in data.rows(criterion, scope):
            rows.append(row)
            print(row, flush=True)
        save("prune_budgets" if options.latency else "prune_criteria", rows, options.results, settings=settings)


if __name__ == "__main__":
    main()
