"""Runtimes of whole networks, each in a process: `python -m kernelpress.bench.runtimes JOB.json RUNTIME [SETTING]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelpress.bench.twins import build, build_plain_in
from kernelpress.bench.worker import Contestant, Job, serve

__all__ = ["LOADERS"]


def _without_gradients(run: Callable[[Any], Any], x: torch.Tensor, settings: str) -> Contestant:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return run(x)

    return Contestant(call, lambda y: y.numpy(), settings)


def _eager(job: Job, memory_format: str) -> Contestant:
    """PyTorch as it comes, in a memory format."""
    network, x = build_plain_in(job, memory_format)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return network(x)

    return Contestant(call, lambda y: y.numpy(), f"inference_mode, {memory_format} weights and input")


def _inductor(job: Job, memory_format: str) -> Contestant:
    """`torch.compile` with Inductor and frozen weights, in a memory format; the first call compiles."""
    network, x = build_plain_in(job, memory_format)
    compiled = torch.compile(network, options={"freezing": True})
    return _without_gradients(compiled, x, f"freezing, {memory_format} weights and input")


def _ours(job: Job, kind: str) -> Contestant:
    """The emitted model, or its plan where the kind is `captured`, or that of its file where `loaded`; the input is in
    PyTorch's default memory format, as that of the other runtimes."""
    import kernelpress as kp

    x = torch.from_numpy(job.load_input())
    emitted = kp.load(job.emitted_file) if kind == "loaded" else kp.emit(build(job, plain=False), (x,))
    model = emitted if kind == "uncaptured" else kp.capture(emitted, x)
    return _without_gradients(model, x, f"{_KINDS[kind]}, contiguous input")


_KINDS = {
    "uncaptured": "emitted",
    "captured": "emitted and captured",
    "loaded": "emitted before, loaded and captured",
}


def _openvino(job: Job) -> Contestant:
    """The ONNX file, compiled for latency at its exported shape; float32 is forced, as its default may be bfloat16."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    request = ov.Core().compile_model(job.onnx_file, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(job.load_input()))
    return Contestant(request.infer, lambda y: y[0], "latency hint, f32, 1 stream")


def _ort(job: Job) -> Contestant:
    """The ONNX file in a session. Its threads spin between the calls of a burst, as it has them do by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(job.onnx_file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.load_input()}
    return Contestant(lambda: session.run(None, feed), lambda y: y[0], "all graph optimisations, default spinning")


def _executorch(job: Job) -> Contestant:
    """ExecuTorch with all that XNNPACK takes; its pool has a thread a core, whatever is asked for."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    network, x = build_plain_in(job, "contiguous")
    lowered = to_edge_transform_and_lower(torch.export.export(network, (x,)), partitioner=[XnnpackPartitioner()])
    file = Path(job.folder) / "model.pte"
    file.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    return Contestant(lambda: method.execute((x,)), lambda y: y[0].numpy(), f"XNNPACK, {os.cpu_count()} threads")


def _ncnn(job: Job) -> Contestant:
    """ncnn, converted by pnnx, in float32 throughout."""
    import ncnn
    import pnnx

    if job.batch != 1:
        raise ValueError(f"batch: ncnn takes one image at a time, got {job.batch}")
    network, x = build_plain_in(job, "contiguous")
    folder = Path(job.folder)
    pnnx.export(network, str(folder / "pnnx.pt"), (x,), fp16=False)
    net = ncnn.Net()
    net.opt.num_threads = job.threads
    net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_fp16_packed = False
    net.opt.use_bf16_storage = False
    net.load_param(str(folder / "pnnx.ncnn.param"))
    net.load_model(str(folder / "pnnx.ncnn.bin"))
    pixels = job.load_input()[0]

    def call() -> Any:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(pixels))  # which only refers to them
            return np.array(extractor.extract("out0")[1])

    return Contestant(call, lambda y: y[None], "converted by pnnx, fp32")


LOADERS: dict[str, Callable[..., Contestant]] = {
    "eager": _eager,
    "executorch": _executorch,
    "inductor": _inductor,
    "ncnn": _ncnn,
    "openvino": _openvino,
    "ort": _ort,
    "ours": _ours,
}

if __name__ == "__main__":
    _, job_file, runtime, *settings = sys.argv
    load = LOADERS[runtime]
    serve(job_file, lambda job: load(job, *settings))
