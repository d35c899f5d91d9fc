"""Layers of the families with peers on the CPU: dense, depthwise, separable and int8 ones.

pytest benchmarks/bench_layers.py -k separable --threads 2 --record
"""

from collections.abc import Callable

from kernelpress.bench import Layer, Row


def test_layer(bench: Callable[[Layer], Row], layer: Layer) -> None:
    assert bench(layer).ms
