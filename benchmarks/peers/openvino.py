"""OpenVINO on the CPU, in float32."""

from __future__ import annotations

from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
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


if __name__ == "__main__":
    serve(load)
