"""Dense, depthwise and separable layers: the shapes of `kernelpress.bench`, against cuDNN and cuBLAS."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gpu.contest import Contest, Workload
from gpu.place import Call, Place
from kernelpress.bench import Case, layer_of_case, ours
from kernelpress.bench import cases as layer_cases
from kernelpress.bench.peers import LayerInputs, eager, random_inputs
from kernelpress.runtime.torch_private import addmm_activation

__all__ = ["workloads"]


def workloads(family: str, place: Place, batch: int) -> list[Workload]:
    """The layers of one family at a batch."""
    return [_workload(_fitted(case, place), place) for case in layer_cases(family, batch=batch)]


def _fitted(case: Case, place: Place) -> Case:
    """The case, tiny in a dry run."""
    stages = tuple(
        replace(
            stage,
            c_in=place.channels(stage.c_in),
            c_out=place.channels(stage.c_out),
            groups=place.channels(stage.groups) if stage.is_depthwise else 1,
        )
        for stage in case.stages
    )
    return replace(case, size=place.size(case.size), stages=stages, batch=place.batch(case.batch))


def _workload(case: Case, place: Place) -> Workload:
    return Workload.of(layer_of_case(case), lambda: _contest(case, place))


def _contest(case: Case, place: Place) -> Contest:
    with place.device:
        exact = random_inputs(case)
    inputs = exact.to(place.dtype)
    with place.backend():
        call, backend = ours.fused(case, inputs), ours.backend_of(case, inputs)
        parts = ours.unfused(case, inputs) if len(case.stages) > 1 else None
    plain = eager(case, inputs)
    contiguous = inputs.contiguous()
    peers: dict[str, Call] = {"cuDNN channels_last": plain}
    if case.op == "linear":
        peers = {"cuBLAS": plain}
    else:
        peers["cuDNN contiguous"] = eager(case, contiguous)
    fused = _fused_peer(case, inputs)
    if fused is not None:
        peers[fused[0]] = fused[1]
    return Contest(
        backend=backend,
        ours=place.ours(call),
        peers=peers,
        expected=eager(case, inputs.to(torch.float32)),
        triton=place.triton(case.op, *ours.arguments(case, inputs)),
        parts=None if parts is None else place.ours(parts),
        eager=plain,
    )


def _fused_peer(case: Case, inputs: LayerInputs) -> tuple[str, Call] | None:
    """One layer with its bias and relu in one call of a library, where torch has that call."""
    if len(case.stages) > 1:
        return None
    (stage,), (weight,), (bias,) = case.stages, inputs.weights, inputs.biases
    x, residual = inputs.x, inputs.residual
    if case.op == "pointwise_conv2d" and residual is None and stage.activation in ("relu", "identity"):
        matrix = weight.flatten(1).t()

        def product() -> Tensor:
            rows = x.permute(0, 2, 3, 1).reshape(-1, stage.c_in)
            y = addmm_activation(bias, rows, matrix) if stage.activation == "relu" else torch.addmm(bias, rows, matrix)
            return y.view(x.shape[0], *x.shape[2:], stage.c_out).permute(0, 3, 1, 2)

        return "cuBLASLt", product
    if stage.activation != "relu" or stage.is_depthwise or case.op == "linear" or not x.is_cuda:
        return None
    geometry = ([stage.stride] * 2, [stage.padding] * 2, [1, 1], 1)

    def convolution() -> Tensor:
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return "cuDNN fused", convolution
