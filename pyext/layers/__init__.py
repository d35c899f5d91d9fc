"""Drop-in layers over the ops of kernelpress: they load the state dicts of the modules they replace, and train.

In evaluation they run on packed weights, which are packed anew once the parameters are others or were written to, also
through `.data` on the CPU; `runtime.snapshot.Snapshot` tells what remains invisible.
"""

from kernelpress.layers.dense import Conv2d, Linear, PointwiseConv2d
from kernelpress.layers.depthwise import DepthwiseConv2d
from kernelpress.layers.ghost import GhostBottleneck, GhostModule, SqueezeExcite
from kernelpress.layers.grouped import ChannelShuffle, GroupedConv2d, ShuffleUnit, ShuffleUnitV2
from kernelpress.layers.int8 import Int8Conv2d, Int8Linear
from kernelpress.layers.lowrank import LowRankConv2d, LowRankLinear
from kernelpress.layers.separable import DepthwiseSeparableConv2d, InvertedResidual
from kernelpress.layers.sparse import BlockSparseConv2d, BlockSparseLinear

__all__ = [
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "ChannelShuffle",
    "Conv2d",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "GhostBottleneck",
    "GhostModule",
    "GroupedConv2d",
    "Int8Conv2d",
    "Int8Linear",
    "InvertedResidual",
    "Linear",
    "LowRankConv2d",
    "LowRankLinear",
    "PointwiseConv2d",
    "ShuffleUnit",
    "ShuffleUnitV2",
    "SqueezeExcite",
]
