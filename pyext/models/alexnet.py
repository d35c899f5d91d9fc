"""AlexNet in one column, with torchvision's state-dict keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpress.layers import Conv2d, Linear
from kernelpress.models.architecture import Architecture, KeyMap, Published
from kernelpress.models.blocks import check_images, check_positive, initialise

__all__ = ["ARCHITECTURES", "AlexNet", "alexnet"]

_WIDE = 4096


class AlexNet(nn.Module):
    """Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997: the network of
    Krizhevsky et al. 2012 in one column, without response normalisation.

    x: [N, in_channels, H, W] → [N, num_classes]. With `small_input` the first convolution is 5×5 of stride 1 instead of
    11×11 of stride 4, and 3×3 maps instead of 6×6 reach the wide layers, for images of about 32×32.
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        # Three poolings need a map of 15×15.
        self.smallest_image = 15 if small_input else 63
        first = (
            Conv2d(in_channels, 64, 5, padding=2) if small_input else Conv2d(in_channels, 64, 11, stride=4, padding=2)
        )
        self.features = nn.Sequential(
            first,
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        side = 3 if small_input else 6
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            Linear(256 * side * side, _WIDE),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Linear(_WIDE, _WIDE),
            nn.ReLU(inplace=True),
            Linear(_WIDE, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.smallest_image)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def alexnet(
    *, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False, dropout: float = 0.5
) -> AlexNet:
    """AlexNet: 61.1 M parameters and 714 MMAC at 224×224."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels, small_input=small_input, dropout=dropout)


ARCHITECTURES = (
    Architecture(
        "alexnet",
        alexnet,
        (
            Published(
                "Krizhevsky 2014, arXiv 1404.5997",
                61_100_840,
                714e6,
                "torchvision",
                56.522,
                "torchvision, IMAGENET1K_V1",
            ),
        ),
        (KeyMap("torchvision"),),
    ),
)
