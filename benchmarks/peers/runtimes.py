"""The contestants, each in a process of its own: `python -m peers.runtimes PIPE RUNTIME [SETTING]`.

They import nothing of kernelpress that an older checkout may lack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from peers.networks import build, build_plain_in
from peers.protocol import Contestant, Job, serve

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
    """The emitted model, or its plan where the kind is `captured`; the input is in PyTorch's default memory format, as
    that of the other runtimes."""
    import kernelpress as kp

    x = torch.from_numpy(job.x)
    emitted = kp.emit(build(job, plain=False), (x,))
    is_captured = kind == "captured"
    settings = f"emitted{' and captured' * is_captured}, contiguous input"
    return _without_gradients(kp.capture(emitted, x) if is_captured else emitted, x, settings)


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
    request.set_input_tensor(ov.Tensor(job.x))
    return Contestant(request.infer, lambda y: y[0], "latency hint, f32, 1 stream")


def _ort(job: Job) -> Contestant:
    """The ONNX file in a session. Its threads spin between the calls of a burst, as it has them do by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(job.onnx_file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.x}
    return Contestant(lambda: session.run(None, feed), lambda y: y[0], "all graph optimisations, default spinning")


LOADERS: dict[str, Callable[..., Contestant]] = {
    "eager": _eager,
    "inductor": _inductor,
    "openvino": _openvino,
    "ort": _ort,
    "ours": _ours,
}

if __name__ == "__main__":
    _, pipe, runtime, *settings = sys.argv
    load = LOADERS[runtime]
    serve(Connection(int(pipe)), lambda job: load(job, *settings))
