"""The ops of kernelpress, `torch.ops.kernelpress.*`, as typed functions, and the choice of who runs them."""

from kernelpress.ops.calls.steps import NativeCall, native_call
from kernelpress.ops.dense import conv2d, linear, pointwise_conv2d
from kernelpress.ops.depthwise import depthwise_conv2d
from kernelpress.ops.ghost import ghost_conv2d
from kernelpress.ops.grouped import channel_shuffle, grouped_conv2d, shuffle_concat
from kernelpress.ops.int8 import int8_conv2d, int8_depthwise_conv2d, int8_matmul
from kernelpress.ops.int8_pool import int8_global_avg_pool2d
from kernelpress.ops.int8_quantize import dequantize, int8_add, int8_gate, quantize, quantize_rows
from kernelpress.ops.lowrank import lowrank_conv2d, lowrank_linear
from kernelpress.ops.pool import global_avg_pool2d, max_pool2d
from kernelpress.ops.registry import BACKENDS, allocate, availability, use_backend, why_not
from kernelpress.ops.separable import inverted_residual, separable_conv2d, separable_stem
from kernelpress.ops.sparse import sparse_conv2d, sparse_matmul
from kernelpress.ops.sparse_blocks import BlockCsr
from kernelpress.ops.squeeze_excite import squeeze_excite
from kernelpress.ops.tuning.search import Tuning, tune

__all__ = [
    "BACKENDS",
    "BlockCsr",
    "NativeCall",
    "Tuning",
    "allocate",
    "availability",
    "channel_shuffle",
    "conv2d",
    "depthwise_conv2d",
    "dequantize",
    "ghost_conv2d",
    "global_avg_pool2d",
    "grouped_conv2d",
    "int8_add",
    "int8_conv2d",
    "int8_depthwise_conv2d",
    "int8_gate",
    "int8_global_avg_pool2d",
    "int8_matmul",
    "inverted_residual",
    "linear",
    "lowrank_conv2d",
    "lowrank_linear",
    "max_pool2d",
    "native_call",
    "pointwise_conv2d",
    "quantize",
    "quantize_rows",
    "separable_conv2d",
    "separable_stem",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
    "squeeze_excite",
    "tune",
    "use_backend",
    "why_not",
]
