"""Layers of the families with peers on the CPU, and blocks of networks and chains of low rank beside the same of stock
layers.

pytest benchmarks/bench_layers.py -k "separable or blocks or low_rank" --threads 2 --inductor --record
"""

from collections.abc import Callable

from kernelpress.bench import Layer, Row
from kernelpress.bench.blocks import Block


def test_layer(bench: Callable[[Layer], Row], layer: Layer) -> None:
    assert bench(layer).ms


def test_block(bench_block: Callable[[Block], Row], block: Block) -> None:
    assert bench_block(block).ms
