"""A network of a comparison in int8, by the tools of each runtime: all calibrate on the same images.

Weights are symmetric with a scale for each output channel everywhere; the rest is what a tool does by default or its
documentation advises on this processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from kernelpress.bench.twins import build_plain_in
from kernelpress.bench.worker import Array, Job
from kernelpress.runtime.host import processor_facts

__all__ = ["for_inductor", "for_xnnpack", "nncf_model", "ort_file"]


def _has_vnni() -> bool:
    """Without it, products of bytes saturate at 16 bits in other runtimes, which then want weights or activations of
    seven bits."""
    return "vnni" in processor_facts().get("flags", "")


def ort_file(job: Job) -> Path:
    """The ONNX file with QDQ pairs: unsigned activations and signed weights, the fast combination on x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = job.calibration_batches()

        def get_next(self) -> dict[str, Array] | None:
            return {name: self.left.pop()} if self.left else None

    folded, quantized = (Path(job.folder) / f"model-{kind}.onnx" for kind in ("folded", "int8"))
    quant_pre_process(str(job.onnx_file), str(folded), skip_symbolic_shape=True)
    name = _onnx_input(folded)
    quantize_static(
        str(folded),
        str(quantized),
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not _has_vnni(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


def _onnx_input(file: Path) -> str:
    import onnx

    name: str = onnx.load(file, load_external_data=False).graph.input[0].name
    return name


def nncf_model(job: Job) -> Any:
    """The ONNX file as OpenVINO reads it, after NNCF's quantization with its defaults: symmetric activations, biases
    corrected."""
    import nncf
    import openvino as ov

    return nncf.quantize(ov.Core().read_model(job.onnx_file), nncf.Dataset(job.calibration_batches()))


def for_inductor(job: Job) -> tuple[GraphModule, torch.Tensor]:
    """The network in channels_last by PT2E with torchao's `X86InductorQuantizer`, and its input."""
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(reduce_range=not _has_vnni())
    return _by_pt2e(job, "channels_last", x86.X86InductorQuantizer().set_global(config))


def for_xnnpack(job: Job) -> tuple[GraphModule, torch.Tensor]:
    """The network by PT2E with ExecuTorch's `XNNPACKQuantizer`, and its input."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    return _by_pt2e(job, "contiguous", xnnpack.XNNPACKQuantizer().set_global(config))


def _by_pt2e(job: Job, memory_format_name: str, quantizer: Any) -> tuple[GraphModule, torch.Tensor]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    network, x = build_plain_in(job, memory_format_name)
    # Strictly: else torchao takes all calls of an activation that layers share for one.
    exported = torch.export.export(network, (x,), strict=True).module()
    with torch.no_grad():
        observed = prepare_pt2e(exported, quantizer)
        for images in job.calibration_batches():
            observed(torch.from_numpy(images))
        return convert_pt2e(observed), x
