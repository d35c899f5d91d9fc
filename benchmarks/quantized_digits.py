"""Trains networks on the digits, quantizes them in several ways and states the test accuracies.

python benchmarks/quantized_digits.py --networks resnet20 mobilenet_v3_small --epochs 6
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from kernelpress import compress, data, models

NETWORKS = ("resnet20", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2", "ghostnet")
WAYS: dict[str, dict[str, Any]] = {
    "static": {},
    "equalized, biases corrected": {"equalize": True, "correct_bias": True},
    "mse": {"observer": "mse"},
}


def main() -> None:
    """Prints a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--qat-epochs", type=int, default=1, help="0 leaves training in int8 out")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--lr", type=float, default=0.05, help="of the training; a 25th of it trains in int8")
    parser.add_argument("--image-size", type=int, default=32)
    given = parser.parse_args()
    train = data.digits(given.image_size, train=True, transform=data.RandomShift(2))
    test = data.digits(given.image_size, train=False)
    loader, test_loader = data.loaders(train, test, batch_size=64, workers=0)
    calibration = DataLoader(data.digits(given.image_size, train=True), batch_size=64)
    print("network | float | " + " | ".join([*WAYS, "trained in int8"]) + " | seconds", flush=True)
    for name in given.networks:
        start = time.perf_counter()
        torch.manual_seed(0)
        options = {} if name == "resnet20" else {"small_input": True}
        model = models.build(name, options, in_channels=1, classes=10)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.1  # MobileNet V3's follow by a hundredth a step: too slow for some hundred steps
        training: dict[str, Any] = {"optimizer": given.optimizer, "weight_decay": 5e-4, "progress": False}
        compress.finetune(model, loader, epochs=given.epochs, lr=given.lr, **training)
        model.eval()
        x = test[0][0][None]
        found = [compress.evaluate(model, test_loader)]
        for way in WAYS.values():
            quantized = compress.quantize(model, x, data=calibration, samples=256, progress=False, **way)
            found.append(compress.evaluate(quantized, test_loader))
        if given.qat_epochs:
            qat = compress.quantize(model, x, data=calibration, samples=256, method="qat", progress=False)
            compress.finetune(qat, loader, epochs=given.qat_epochs, lr=given.lr / 25, **training)
            found.append(compress.evaluate(compress.convert_qat(qat), test_loader))
        cells = " | ".join(f"{accuracy:.2%}" for accuracy in found)
        print(f"{name} | {cells} | {time.perf_counter() - start:.0f}", flush=True)


if __name__ == "__main__":
    main()
