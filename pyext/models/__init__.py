"""Networks made of kernelpress layers, created by name: `models.create("mobilenet_v2", num_classes=10)`."""

from kernelpress.models.alexnet import alexnet
from kernelpress.models.architecture import Published
from kernelpress.models.ghostnet import ghostnet, ghostnet_v2
from kernelpress.models.mobilenet_v1 import mobilenet_v1
from kernelpress.models.mobilenet_v2 import mobilenet_v2
from kernelpress.models.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from kernelpress.models.registry import create, names, published
from kernelpress.models.resnet import resnet8, resnet18, resnet20, resnet34, resnet50, resnet56
from kernelpress.models.shufflenet_v1 import shufflenet_v1
from kernelpress.models.shufflenet_v2 import shufflenet_v2
from kernelpress.models.sources import build
from kernelpress.models.squeezenet import squeezenet1_0, squeezenet1_1
from kernelpress.models.weights import LoadedWeights, weights_of

__all__ = [
    "LoadedWeights",
    "Published",
    "alexnet",
    "build",
    "create",
    "ghostnet",
    "ghostnet_v2",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "names",
    "published",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "shufflenet_v1",
    "shufflenet_v2",
    "squeezenet1_0",
    "squeezenet1_1",
    "weights_of",
]
