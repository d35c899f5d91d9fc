"""Runtimes of whole networks, each in a process: `python -m kernelpress.bench.runtimes JOB.json RUNTIME [SETTING]`.

The setting `int8` is the network after the runtime's own quantization (`bench.quantizers`)."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelpress.bench import quantizers
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
    """`torch.compile` with Inductor and frozen weights, for which `bench.processes` asks, in a memory format; the first
    call compiles."""
    network, x = build_plain_in(job, memory_format)
    return _without_gradients(torch.compile(network), x, f"freezing, {memory_format} weights and input")


def _inductor_int8(job: Job) -> Contestant:
    """The same of the network that PT2E quantized."""
    network, x = quantizers.for_inductor(job)
    return _without_gradients(torch.compile(network), x, "PT2E, X86InductorQuantizer, freezing, channels_last")


def _ours(job: Job, kind: str) -> Contestant:
    """The emitted model, or its plan where the kind is `captured`, or that of its file where `loaded`; the input is in
    PyTorch's default memory format, as that of the other runtimes."""
    import kernelpress as kp

    x = torch.from_numpy(job.load_input())
    network = _without_zeros(build(job, plain=False)) if kind == "dense" else build(job, plain=False)
    emitted = kp.load(job.emitted_file) if kind == "loaded" else kp.emit(network, (x,))
    model = emitted if kind == "uncaptured" else kp.capture(emitted, x)
    return _without_gradients(model, x, f"{_KINDS[kind]}, contiguous input")


def _ours_int8(job: Job, kind: str = "captured") -> Contestant:
    """Quantized, emitted and captured; it says how many places run in int8. Where the kind is `dense`, zeros are a step
    of int8 before, which costs accuracy."""
    import kernelpress as kp
    from kernelpress import compress

    x = torch.from_numpy(job.load_input())
    images = [torch.from_numpy(batch) for batch in job.calibration_batches()]
    network = build(job, plain=False)
    if kind == "dense":
        network = _without_zeros(network, steps=1)
    quantized = compress.quantize(network, x, data=images, progress=False)
    emitted = kp.emit(quantized, (x,), progress=False)
    record = emitted.record
    in_int8 = 0 if record.kept_original else sum("int8" in place.choice for place in record.places)
    told = f"{in_int8} of {len(record.places)} places in int8, {_KINDS[kind]}"
    return _without_gradients(kp.capture(emitted, x), x, told)


def _without_zeros(network: torch.nn.Module, steps: float = 0.0) -> torch.nn.Module:
    """The same function of the input, in which nobody finds a zero to leave out; or nearly, where these become so many
    steps of int8, of either sign."""
    with torch.no_grad():
        for weight in network.parameters():
            largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True) if weight.dim() > 1 else 0.0
            signs = torch.randint(0, 2, weight.shape) * 2 - 1
            weight.copy_(torch.where(weight == 0, (_NEXT_TO_NOTHING + steps / 127 * largest) * signs, weight))
    return network


_NEXT_TO_NOTHING = 1e-12

_KINDS = {
    "uncaptured": "emitted",
    "captured": "emitted and captured",
    "dense": "emitted and captured, zeros multiplied like other weights",
    "loaded": "emitted before, loaded and captured",
}


def _openvino(job: Job, dtype: str = "fp32") -> Contestant:
    """The ONNX file, compiled for latency at its exported shape; what is floating stays float32, as the default may be
    bfloat16."""
    import openvino as ov

    model = job.onnx_file if dtype == "fp32" else quantizers.nncf_model(job)

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(job.load_input()))
    kind = "f32" if dtype == "fp32" else "NNCF's defaults"
    return Contestant(request.infer, lambda y: y[0], f"latency hint, {kind}, 1 stream")


def _ort(job: Job, dtype: str = "fp32") -> Contestant:
    """The ONNX file in a session. Its threads spin between the calls of a burst, as it has them do by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    file = job.onnx_file if dtype == "fp32" else quantizers.ort_file(job)
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.load_input()}
    told = "all graph optimisations, default spinning" + ", QDQ, u8 × s8 per channel" * (dtype == "int8")
    return Contestant(lambda: session.run(None, feed), lambda y: y[0], told)


def _executorch(job: Job, dtype: str = "fp32") -> Contestant:
    """ExecuTorch with all that XNNPACK takes; its pool has a thread a core, whatever is asked for."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    network, x = build_plain_in(job, "contiguous") if dtype == "fp32" else quantizers.for_xnnpack(job)
    lowered = to_edge_transform_and_lower(torch.export.export(network, (x,)), partitioner=[XnnpackPartitioner()])
    file = Path(job.folder) / "model.pte"
    file.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    told = f"XNNPACK, {os.cpu_count()} threads" + ", PT2E, XNNPACKQuantizer per channel" * (dtype == "int8")
    return Contestant(lambda: method.execute((x,)), lambda y: y[0].numpy(), told)


def _deepsparse(job: Job) -> Contestant:
    """DeepSparse's engine on the ONNX file that it understands: an exporter's before this one, an opset of its time.

    The engine is loaded without its package, which wants other packages of 2023; so are strides of its results, which
    NumPy 2 reads as zeros, set right.
    """
    spec = importlib.util.find_spec("deepsparse")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'deepsparse'")
    kind = "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2"
    library = Path(spec.submodule_search_locations[0]) / kind / "deepsparse_engine.so"
    loading = importlib.util.spec_from_file_location(f"deepsparse.{kind}.deepsparse_engine", library)
    assert loading is not None
    assert loading.loader is not None
    engine = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(engine)
    network, x = build_plain_in(job, "contiguous")
    file = str(Path(job.folder) / "deepsparse.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), file, dynamo=False, opset_version=13)
    model = engine.deepsparse_engine(file, job.batch, job.threads, 1, "single_stream", None)
    pixels = [job.load_input()]

    def logits(results: Any) -> Any:
        first = results[0]
        return np.lib.stride_tricks.as_strided(first, first.shape, np.empty(first.shape, np.float32).strides)

    return Contestant(
        lambda: model.execute_list_out(pixels), logits, f"engine {version('deepsparse')}, {kind}, single stream"
    )


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
    "deepsparse": _deepsparse,
    "eager": _eager,
    "executorch": _executorch,
    "inductor": _inductor,
    "inductor_int8": _inductor_int8,
    "ncnn": _ncnn,
    "openvino": _openvino,
    "ort": _ort,
    "ours": _ours,
    "ours_int8": _ours_int8,
}

if __name__ == "__main__":
    _, job_file, runtime, *settings = sys.argv
    load = LOADERS[runtime]
    serve(job_file, lambda job: load(job, *settings))
