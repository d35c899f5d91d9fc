"""Drop-in layers over the ops of kernelpress: they load the state dicts of the modules they replace, and train."""

from kernelpress.layers.dense import Conv2d, Linear, PointwiseConv2d
from kernelpress.layers.depthwise import DepthwiseConv2d
from kernelpress.layers.ghost import GhostBottleneck, GhostModule, SqueezeExcite
from kernelpress.layers.grouped import ChannelShuffle, GroupedConv2d, ShuffleUnit, ShuffleUnitV2
from kernelpress.layers.separable import DepthwiseSeparableConv2d, InvertedResidual

__all__ = [
    "ChannelShuffle",
    "Conv2d",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "GhostBottleneck",
    "GhostModule",
    "GroupedConv2d",
    "InvertedResidual",
    "Linear",
    "PointwiseConv2d",
    "ShuffleUnit",
    "ShuffleUnitV2",
    "SqueezeExcite",
]
