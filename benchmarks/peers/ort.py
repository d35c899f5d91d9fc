"""ONNX Runtime on the CPU."""

from __future__ import annotations

from peers.protocol import Contestant, Job, serve

__all__ = ["load"]


def load(job: Job) -> Contestant:
    """The ONNX file in a session. Its threads spin between the calls of a burst, as it has them do by default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(job.onnx_file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.load_input()}
    return Contestant(lambda: session.run(None, feed), lambda y: y[0], "all graph optimisations, default spinning")


if __name__ == "__main__":
    serve(load)
