"""`unchanged`, on which the tests of side effects rely, notices each of them."""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from unchanged import unchanged

from kernelpress.runtime.torch_private import mark_dynamic

CHANGES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "module 0, 1, running_mean, value": lambda model, x: model.train()(x) and model.eval(),
    "module 0, 1, num_batches_tracked, value": lambda model, x: model[1].num_batches_tracked.add_(1),
    "module 0, 0, weight, value": lambda model, x: model[0].weight.data.view(-1)[7].mul_(2),
    "module 0, 0, weight, form": lambda model, x: setattr(
        model[0].weight, "data", model[0].weight.data.transpose(0, 1)
    ),
    "module 0, 0, weight, identity": lambda model, x: setattr(model[0], "weight", nn.Parameter(model[0].weight.data)),
    "module 0, 0, weight, requires_grad": lambda model, x: model[0].weight.requires_grad_(False),
    "module 0, 0, weight, grad's value": lambda model, x: model(x).sum().backward(),
    "module 0, 0, training": lambda model, x: model[0].train(),
    "module 0, 0, padding": lambda model, x: setattr(model[0], "padding", (1, 1)),
    "module 0, 0, _forward_hooks": lambda model, x: model[0].register_forward_hook(lambda *_: None),
    "module 0, the module itself, children": lambda model, x: model.append(nn.ReLU()),
    "tensor 1[0], value": lambda model, x: x.view(-1)[3].fill_(torch.nan),
    "tensor 1[0], requires_grad": lambda model, x: x.requires_grad_(),
    "tensor 1[0], marks": lambda model, x: mark_dynamic(x, 0),
    "torch's random state": lambda model, x: torch.randn(1),
    "Python's random state": lambda model, x: random.random(),
    "NumPy's random state": lambda model, x: numpy.random.rand(),  # noqa: NPY002
    "default dtype": lambda model, x: torch.set_default_dtype(torch.float64),
    "threads": lambda model, x: torch.set_num_threads(3),
    "grad mode": lambda model, x: torch.set_grad_enabled(False),
    "garbage collector": lambda model, x: gc.disable(),
}


@pytest.fixture(autouse=True)
def _process_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    gc.enable()


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_every_change_is_named(what: str, raises: bool) -> None:
    model, x = _model(), torch.randn(2, 3, 8, 8)

    def run() -> None:
        with unchanged(model, (x,)):
            CHANGES[what](model, x)
            if raises:
                raise ValueError("refused")

    with pytest.raises(AssertionError, match=f"(^|; ){re.escape(what)}:"):
        run()


def test_what_changes_nothing_passes_with_its_own_error() -> None:
    model, x = _model(), torch.randn(2, 3, 8, 8)
    with unchanged(model, (x,)), torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="refused"), unchanged(model, (x,)):
        raise ValueError("refused")
