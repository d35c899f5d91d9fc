"""Sizes of layers that networks have."""

from __future__ import annotations

__all__ = [
    "ALEXNET_CLASSIFIER",
    "DEPTHWISE",
    "GHOSTNET",
    "GHOSTNET_BOTTLENECKS",
    "HEADS",
    "LOW_RANK_CP",
    "LOW_RANK_TUCKER",
    "MOBILENET_V1_PAIRS",
    "MOBILENET_V2_BLOCKS",
    "MOBILENET_V2_POINTWISE",
    "MOBILENET_V3_GATES",
    "RESNET18",
    "RESNET50",
    "RESNEXT50",
    "SHUFFLENET_V1",
    "SHUFFLENET_V2",
]

MOBILENET_V1_PAIRS = (
    (112, 32, 64, 1),
    (112, 64, 128, 2),
    (56, 128, 128, 1),
    (56, 128, 256, 2),
    (28, 256, 256, 1),
    (28, 256, 512, 2),
    (14, 512, 512, 1),
    (14, 512, 1024, 2),
    (7, 1024, 1024, 1),
)
"""Depthwise → pointwise pairs: map size, channels before and after, stride (Howard et al. 2017, table 1)."""

MOBILENET_V2_BLOCKS = (
    (112, 16, 96, 24, 2),
    (56, 24, 144, 24, 1),
    (56, 24, 144, 32, 2),
    (28, 32, 192, 32, 1),
    (28, 32, 192, 64, 2),
    (14, 64, 384, 64, 1),
    (14, 64, 384, 96, 1),
    (14, 96, 576, 96, 1),
    (14, 96, 576, 160, 2),
    (7, 160, 960, 160, 1),
    (7, 160, 960, 320, 1),
)
"""Inverted residuals: map size, channels, expanded channels, channels after, stride (Sandler et al. 2018, table 2)."""

MOBILENET_V2_POINTWISE = (
    (112, 16, 96, "relu6", False),
    (56, 24, 144, "relu6", False),
    (56, 144, 24, "identity", True),
    (28, 192, 32, "identity", True),
    (14, 96, 576, "relu6", False),
    (14, 576, 96, "identity", True),
    (7, 960, 160, "identity", True),
    (7, 960, 320, "identity", False),
    (7, 320, 1280, "relu6", False),
)
"""Some expansions and projections: map size, channels in and out, activation, with a residual or without."""

MOBILENET_V3_GATES = ((28, 72, 24), (28, 120, 32), (14, 480, 120), (14, 672, 168), (7, 960, 240))
"""Large: map size, channels, channels between the products of squeeze-and-excitation (Howard et al. 2019, table 1; a
quarter of the channels in multiples of 8)."""

DEPTHWISE = (
    ("MobileNet V2", 112, 96, 3, 2, "relu6"),
    ("MobileNet V2", 56, 144, 3, 1, "relu6"),
    ("MobileNet V2", 28, 192, 3, 1, "relu6"),
    ("MobileNet V2", 14, 576, 3, 1, "relu6"),
    ("MobileNet V2", 7, 960, 3, 1, "relu6"),
    ("MobileNet V3", 56, 72, 5, 2, "relu"),
    ("MobileNet V3", 28, 120, 5, 1, "relu"),
    ("MobileNet V3", 14, 672, 5, 2, "hardswish"),
    ("MobileNet V3", 7, 960, 5, 1, "hardswish"),
    ("ConvNeXt-T", 56, 96, 7, 1, "identity"),
    ("ConvNeXt-T", 14, 384, 7, 1, "identity"),
)
"""Network, map size, channels, window, stride, activation."""

HEADS = (("MobileNet V1", 1024), ("MobileNet V2", 1280), ("ResNet-50", 2048))
"""Features into the last layer."""

RESNET18 = (
    (56, 64, 64, 3, 1, "relu", False),
    (56, 64, 64, 3, 1, "relu", True),
    (56, 64, 128, 3, 2, "relu", False),
    (28, 128, 128, 3, 1, "relu", True),
    (28, 128, 256, 3, 2, "relu", False),
    (14, 256, 256, 3, 1, "relu", True),
    (14, 256, 512, 3, 2, "relu", False),
    (7, 512, 512, 3, 1, "relu", True),
)
"""Map size, channels in and out, window, stride, activation, with a residual or without (He et al. 2016, table 1)."""

RESNET50 = (
    (56, 64, 64, 1),
    (56, 64, 64, 3),
    (56, 64, 256, 1),
    (56, 256, 64, 1),
    (28, 512, 128, 1),
    (28, 128, 128, 3),
    (28, 128, 512, 1),
    (14, 1024, 256, 1),
    (14, 256, 256, 3),
    (14, 256, 1024, 1),
    (7, 2048, 512, 1),
    (7, 512, 512, 3),
    (7, 512, 2048, 1),
)
"""Map size, channels in and out, window (He et al. 2016, table 1)."""

RESNEXT50 = ((56, 128), (28, 256), (14, 512), (7, 1024))
"""32×4d: map size, channels of the grouped 3×3 convolution (Xie et al. 2017, table 1)."""

SHUFFLENET_V1 = ((28, 240, 60), (14, 480, 120), (7, 960, 240))
"""Three groups: map size, channels of a unit, of its bottleneck (Zhang et al. 2018, table 1)."""

SHUFFLENET_V2 = ((28, 116), (14, 232), (7, 464))
"""1×: map size, channels of both branches together (Ma et al. 2018, table 5)."""

GHOSTNET = (
    (112, 16, 16, "relu"),
    (112, 16, 48, "relu"),
    (56, 48, 24, "identity"),
    (56, 24, 72, "relu"),
    (56, 72, 24, "identity"),
    (28, 72, 40, "identity"),
    (28, 40, 120, "relu"),
    (28, 120, 40, "identity"),
    (14, 240, 80, "identity"),
    (14, 80, 184, "relu"),
    (14, 80, 480, "relu"),
    (14, 480, 112, "identity"),
    (14, 112, 672, "relu"),
    (7, 672, 160, "identity"),
    (7, 160, 960, "relu"),
    (7, 960, 160, "identity"),
)
"""1.0: map size, channels in and out of its ghost modules, activation (Han et al. 2020, table 1)."""

GHOSTNET_BOTTLENECKS = (
    (112, 16, 48, 24, 3, 2, 0.0),
    (56, 24, 72, 24, 3, 1, 0.0),
    (28, 40, 120, 40, 5, 1, 0.25),
    (14, 80, 184, 80, 3, 1, 0.0),
    (14, 112, 672, 112, 3, 1, 0.25),
    (7, 160, 960, 160, 5, 1, 0.25),
)
"""1.0: map size, channels before, inside and after, window, stride, share of squeeze-and-excitation (ibid.)."""

LOW_RANK_TUCKER = ((56, 64, 32), (56, 64, 24), (28, 128, 64), (28, 128, 48), (14, 256, 128), (14, 256, 88))
"""Map size, channels of ResNet-18's 3×3 convolutions, ranks that save three to four fifths of the FLOPs."""

LOW_RANK_CP = ((56, 64, 64), (28, 128, 128), (14, 256, 256))
"""The same for CP."""

ALEXNET_CLASSIFIER = ((9216, 4096), (4096, 4096))
"""Features in and out of its wide layers (Krizhevsky et al. 2012, section 3.5)."""
