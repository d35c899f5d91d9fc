"""Networks made of kernelpress layers, created by name: `models.create("mobilenet_v2", num_classes=10)`."""

from kernelpress.models.mobilenet_v1 import mobilenet_v1
from kernelpress.models.mobilenet_v2 import mobilenet_v2
from kernelpress.models.registry import create, names
from kernelpress.models.resnet import resnet18, resnet20, resnet34, resnet50
from kernelpress.models.sources import build

__all__ = ["build", "create", "mobilenet_v1", "mobilenet_v2", "names", "resnet18", "resnet20", "resnet34", "resnet50"]
