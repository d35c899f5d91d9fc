"""ResNet-18, -34 and -50 with torchvision's state-dict keys, and ResNet-8, -20 and -56 for 32×32 images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernelpress.layers import Conv2d, Linear, PointwiseConv2d
from kernelpress.models.architecture import Architecture, KeyMap, Published
from kernelpress.models.blocks import check_images, check_positive, initialise

__all__ = [
    "ARCHITECTURES",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "PaddedShortcut",
    "ResNet",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, fig. 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.bn2(self.conv2(hidden)) + shortcut)
        return out


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions and a shortcut (He et al. 2016, fig. 5 right)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = PointwiseConv2d(in_channels, channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, out_channels, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        out: Tensor = self.relu(self.bn3(self.conv3(hidden)) + shortcut)
        return out


class ResNet(nn.Module):
    """He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1.

    x: [N, in_channels, H, W] → [N, num_classes]. With `small_input` the stem is a 3×3 convolution of stride 1 without
    max-pooling, for images of about 32×32.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        if small_input:
            self.conv1 = Conv2d(in_channels, 64, 3, padding=1, bias=False)
        else:
            self.conv1 = Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(512 * block.expansion, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, depth: int, stride: int
) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        projection = (
            PointwiseConv2d(in_channels, out_channels, bias=False)
            if stride == 1
            else Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )
        downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
    blocks = [block(in_channels, channels, stride, downsample)]
    blocks += [block(out_channels, channels) for _ in range(1, depth)]
    return nn.Sequential(*blocks)


class PaddedShortcut(Conv2d):
    """Option A of He et al. 2016, section 3.3: every `stride`-th pixel, with zero channels added evenly on both sides.

    Written as a 1×1 convolution whose weight is a constant selection matrix, a buffer and not a parameter. So a pass
    that removes channels before or after it slices this weight like any other, each side on its own, and stays exact.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=False)
        first = (out_channels - in_channels) // 2
        selection = torch.zeros(out_channels, in_channels, 1, 1)
        selection[first : first + in_channels, :, 0, 0] = torch.eye(in_channels)
        del self.weight
        self.register_buffer("weight", selection)


class CifarResNet(nn.Module):
    """The ResNet for 32×32 images of He et al. 2016, section 4.2.

    x: [N, in_channels, H, W] → [N, num_classes]. `depth` blocks each of `width`, 2·`width`, 4·`width` channels.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        check_positive(depth=depth, num_classes=num_classes, in_channels=in_channels, width=width)
        self.conv1 = Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _padded_stage(width, width, depth, stride=1)
        self.layer2 = _padded_stage(width, 2 * width, depth, stride=2)
        self.layer3 = _padded_stage(2 * width, 4 * width, depth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _padded_stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    downsample = None if stride == 1 and in_channels == channels else PaddedShortcut(in_channels, channels, stride)
    blocks = [BasicBlock(in_channels, channels, stride, downsample)]
    blocks += [BasicBlock(channels, channels) for _ in range(1, depth)]
    return nn.Sequential(*blocks)


def resnet18(*, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.8 GMAC at 224×224."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, small_input=small_input)


def resnet34(*, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False) -> ResNet:
    """ResNet-34: 21.8 M parameters, 3.7 GMAC at 224×224."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, small_input=small_input)


def resnet50(*, num_classes: int = 1000, in_channels: int = 3, small_input: bool = False) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.1 GMAC at 224×224."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, small_input=small_input)


def resnet20(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 for 32×32 images: 0.27 M parameters and 41 MMAC at `width` 16."""
    return CifarResNet(3, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet8(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-8 for 32×32 images, one block a stage: 0.08 M parameters and 12 MMAC at `width` 16."""
    return CifarResNet(1, num_classes=num_classes, in_channels=in_channels, width=width)


def resnet56(*, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-56 for 32×32 images: 0.85 M parameters and 126 MMAC at `width` 16."""
    return CifarResNet(9, num_classes=num_classes, in_channels=in_channels, width=width)


_PAPER = "He et al. 2016, arXiv 1512.03385"
_MAPS = (KeyMap("torchvision"),)


def _published(parameters: int, multiply_adds: float, accuracy: float) -> tuple[Published, ...]:
    return (Published(_PAPER, parameters, multiply_adds, "torchvision", accuracy, "torchvision, IMAGENET1K_V1"),)


ARCHITECTURES = (
    Architecture("resnet18", resnet18, _published(11_689_512, 1.814e9, 69.758), _MAPS),
    Architecture("resnet34", resnet34, _published(21_797_672, 3.664e9, 73.314), _MAPS),
    Architecture("resnet50", resnet50, _published(25_557_032, 4.089e9, 76.130), _MAPS),
    Architecture("resnet20", resnet20, (Published(_PAPER, 0.27e6, None, "table 6"),)),
    Architecture("resnet56", resnet56, (Published(_PAPER, 0.85e6, None, "table 6"),)),
    Architecture("resnet8", resnet8, (Published(_PAPER, None, None, "section 4.2"),)),
)
