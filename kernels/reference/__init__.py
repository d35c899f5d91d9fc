"""What every op of kernelpress means, in plain PyTorch: any float dtype, differentiable, exportable.

Every op ends in the same epilogue, `activation(accumulator * scale + bias + residual)`. Nothing is checked here;
`kernelpress.ops` owns the checks.
"""

from __future__ import annotations

from kernelpress.kernels.reference.activation import ACTIVATIONS, activate, epilogue
from kernelpress.kernels.reference.dense import conv2d, global_avg_pool2d, linear, max_pool2d, pointwise_conv2d
from kernelpress.kernels.reference.ghost import ghost_conv2d
from kernelpress.kernels.reference.grouped import channel_shuffle, grouped_conv2d, shuffle_concat
from kernelpress.kernels.reference.int8 import int8_conv2d, int8_depthwise_conv2d, int8_matmul
from kernelpress.kernels.reference.int8_pool import int8_global_avg_pool2d
from kernelpress.kernels.reference.int8_quantize import (
    dequantize,
    int8_add,
    int8_epilogue,
    int8_gate,
    quantize,
    quantize_rows,
)
from kernelpress.kernels.reference.lowrank import lowrank_conv2d, lowrank_linear
from kernelpress.kernels.reference.separable import (
    depthwise_conv2d,
    inverted_residual,
    separable_conv2d,
    separable_stem,
)
from kernelpress.kernels.reference.sparse import block_csr_to_dense, sparse_conv2d, sparse_matmul
from kernelpress.kernels.reference.squeeze_excite import squeeze_excite

__all__ = [
    "ACTIVATIONS",
    "activate",
    "block_csr_to_dense",
    "channel_shuffle",
    "conv2d",
    "depthwise_conv2d",
    "dequantize",
    "epilogue",
    "ghost_conv2d",
    "global_avg_pool2d",
    "grouped_conv2d",
    "int8_add",
    "int8_conv2d",
    "int8_depthwise_conv2d",
    "int8_epilogue",
    "int8_gate",
    "int8_global_avg_pool2d",
    "int8_matmul",
    "inverted_residual",
    "linear",
    "lowrank_conv2d",
    "lowrank_linear",
    "max_pool2d",
    "pointwise_conv2d",
    "quantize",
    "quantize_rows",
    "separable_conv2d",
    "separable_stem",
    "shuffle_concat",
    "sparse_conv2d",
    "sparse_matmul",
    "squeeze_excite",
]
