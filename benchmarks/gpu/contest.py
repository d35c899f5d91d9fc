"""A layer with our ways to run it and everybody else's on one device, and the row that comes of timing them in turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.place import Place
from gpu.roofline import Roofline
from kernelpress import ops
from kernelpress.bench import Layer, Row, layers, ours
from kernelpress.bench.calls import Call
from kernelpress.bench.contest import (
    KINDS,
    OURS,
    PARTIAL,
    TOLERANCE,
    TRITON,
    UNFUSED,
    Contestant,
    expected_of,
    hold,
    judged,
    kind_of,
    reason_of,
    row_of,
)
from kernelpress.bench.layers import int8_matmul, sparse_matmul, tiny
from kernelpress.bench.peers import contiguous
from kernelpress.ops import registry
from kernelpress.ops.registry import Tensors
from kernelpress.ops.sparse_blocks import BlockCsr
from kernelpress.runtime.torch_private import addmm_activation, int_mm

__all__ = ["BATCHES", "Contest", "contest_of", "family_layers", "measure", "with_inductor"]

BATCHES = (32, 256, 1)

INDUCTOR = "Inductor"

TUNING_SECONDS = 3.0
"""Of a layer's Triton kernel. Other layers find compiled what was compiled for this one."""

_PRODUCTS = {
    "sparse": [
        partial(sparse_matmul, "matrix product", 4096, 4096, 4096, block, sparsity)
        for block, sparsity in ((64, 0.9), (64, 0.5), (64, 0.6), (64, 0.8), (64, 0.95), (32, 0.9), (16, 0.9))
    ],
    "int8": [
        partial(int8_matmul, "matrix product", *sizes)
        for sizes in ((8192, 8192, 8192), (4096, 4096, 4096), (32, 4096, 4096))
    ],
}
"""Timed once, whatever the batch, in place of products that networks have."""


def family_layers(family: str, place: Place) -> list[Layer]:
    """The layers of a family at every batch, the batches in turn, so that a short time sees all of them."""
    by_batch = [
        [layer for layer in layers(family, batch=batch, is_tiny=place.is_dry) if not layer.op.endswith("_matmul")]
        for batch in BATCHES
    ]
    products = _PRODUCTS.get(family, [])
    by_batch[-1] = [*(tiny(make) if place.is_dry else make() for make in products), *by_batch[-1]]
    return [layer for turn in itertools.zip_longest(*by_batch) for layer in turn if layer is not None]


@dataclass(frozen=True)
class Contest:
    """A layer on tensors of its own: our calls and the peers' by name, `expected` gives the result in float32. Results
    of those in `other_values` are not compared. `eager`, in plain torch, is what Inductor compiles."""

    kind: str
    backend: str
    calls: Mapping[str, Call | None]
    expected: Call
    eager: Call | None
    other_values: frozenset[str]

    def held(self, calls: Mapping[str, Call | None], place: Place) -> tuple[tuple[Contestant, ...], dict[str, float]]:
        """Some calls against the result in float32, for which cuDNN does not search its best way."""
        search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            expected = self.expected()
        finally:
            torch.backends.cudnn.benchmark = search
        with place.backend():
            return hold(calls, expected, TOLERANCE[KINDS[self.kind]], place.time, unjudged=self.other_values)


def contest_of(layer: Layer, place: Place) -> Contest:
    """Who runs a layer at a place."""
    call = layer.make(place.device, place.dtype)
    peers = {layer.library + " channels_last" * (len(layer.x) == 4): layer.plain(call[0])}
    if len(layer.x) == 4:
        peers[f"{layer.library} contiguous"] = layer.plain(contiguous(call[0]))
    further = _MORE_PEERS[layer.op](*call) if layer.op in _MORE_PEERS else {}
    with place.backend():
        backend = ours.backend_of(layer.op, *call)
        own: dict[str, Call | None] = {
            OURS: ours.on_backend(layer.op, *call, "auto"),
            TRITON: None if backend == "triton" else _tuned_triton(layer.op, *call),
            UNFUSED: ours.unfused(layer.op, *call),
        }
    eager = None if layer.op == "sparse_matmul" else next(iter(peers.values()))
    return Contest(
        kind_of(layer.dtype or place.dtype),
        backend,
        own | peers | further,
        lambda: expected_of(layer.op, *call),
        eager if layer.dtype is None else further.get(SEPARATE),
        frozenset({PARTIAL} if layer.dtype is None else {PARTIAL, *peers}),
    )


def _tuned_triton(op: str, tensors: Tensors, options: Mapping[str, Any]) -> Call | None:
    """A call of the op's Triton kernel, tuned for it here and now; None where it has none or that cannot run it."""
    if registry.why_not(op, *tensors, **options).get("triton", "no kernel") is not None:
        return None
    with contextlib.suppress(RuntimeError):  # the call itself will tell
        ops.tune(op, *tensors, **options, backend="triton", seconds=TUNING_SECONDS)
    return ours.on_backend(op, tensors, options, "triton")


SEPARATE = "_int_mm + epilogue"


def _products_in_int8(tensors: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Call]:
    x, weight, scale, bias, *_ = tensors
    transposed = weight.t()
    return {
        SEPARATE: lambda: F.relu(int_mm(x, transposed).float() * scale + bias).to(torch.bfloat16),
        PARTIAL: lambda: int_mm(x, transposed),
    }


def _products_of_blocks(tensors: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Call]:
    """torch's Triton kernel for block-sparse rows, with its own choice of tiles."""
    x, offsets, columns, blocks, bias, *_ = tensors
    dense = BlockCsr(offsets, columns, blocks, (len(bias), x.shape[1])).to_dense()
    weight = dense.to_sparse_bsr(tuple(blocks.shape[1:]))
    right, column = x.t(), bias[:, None].expand(-1, x.shape[0])

    def call() -> Tensor:
        from kernelpress.runtime.torch_private import bsr_dense_addmm

        return bsr_dense_addmm(column, weight, right).t()

    return {"torch BSR (Triton)": call}


def _fused_convolution(tensors: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Call]:
    """cuDNN's call with bias, relu and residual, where it has one."""
    x, weight, bias, _, residual, *_ = tensors
    if options["activation"] != "relu" or not x.is_cuda:
        return {}
    geometry = (options.get("stride", [1, 1]), options.get("padding", [0, 0]), [1, 1], 1)
    if residual is None:
        return {"cuDNN fused": lambda: torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)}
    added = (residual, 1.0, bias, *geometry)
    return {"cuDNN fused": lambda: torch.ops.aten.cudnn_convolution_add_relu(x, weight, *added)}


def _fused_pointwise(tensors: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Call]:
    """cuBLASLt's product with bias and relu, where that is all."""
    x, weight, bias, _, residual, *_ = tensors
    activation = options["activation"]
    if residual is not None or activation not in ("relu", "identity"):
        return _fused_convolution(tensors, options)
    matrix = weight.flatten(1).t()

    def product() -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, len(matrix))
        y = addmm_activation(bias, rows, matrix) if activation == "relu" else torch.addmm(bias, rows, matrix)
        return y.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)

    return {"cuBLASLt": product}


_MORE_PEERS: Mapping[str, Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Call]]] = {
    "conv2d": _fused_convolution,
    "pointwise_conv2d": _fused_pointwise,
    "sparse_matmul": _products_of_blocks,
    "int8_matmul": _products_in_int8,
}
"""One layer in one call of a library, where torch has that call."""


def measure(layer: Layer, place: Place, roofline: Roofline) -> Row:
    """Runs a layer's contestants once for their results, then times them in turn.

    A peer that cannot run, or computes something else, is kept with the reason. Ours too: the row then has no time.
    """
    contest = contest_of(layer, place)
    contestants, errors = contest.held(contest.calls, place)
    return row_of(layer, contest.kind, contest.backend, contestants, errors.get(OURS), roofline)


def with_inductor(row: Row, layer: Layer, place: Place, roofline: Roofline) -> Row:
    """The row with Inductor among the contestants, compiled here and timed in turn with ours; as it was if there is
    nothing to compile."""
    contest = contest_of(layer, place)
    if contest.eager is None or row.ms is None:
        return row
    try:
        compiled = torch.compile(contest.eager, dynamic=False, backend="eager" if place.is_dry else "inductor")
        contestants, _ = contest.held({OURS: contest.calls[OURS], INDUCTOR: compiled}, place)
    except Exception as error:  # Inductor fails in as many ways as it has parts
        added = Contestant(INDUCTOR, None, None, reason_of(error))
    else:
        held = {entry.name: entry for entry in contestants}
        added, mine = held[INDUCTOR], held[OURS].ms
        if added.ms is not None and mine is not None:
            # Beside our time in the same minutes, put on the scale of the row's.
            added = replace(added, ms=added.ms * row.ms / mine)
    finally:
        torch.compiler.reset()
    return judged(replace(row, contestants=(*row.contestants, added)), roofline)
