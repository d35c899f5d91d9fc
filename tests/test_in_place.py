"""Concatenations in plans: parts are written where they belong, copied where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emitting import Apply, emit_fused
from support import channels_last
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.emit.plans.plan import Plan
from kernelpress.runtime import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")

COPY = "native aten.cat.default"


def planned(function: Callable[..., Any], *layers: nn.Module, x: Tensor | None = None) -> tuple[Plan, int]:
    """The plan of a model, right on two inputs, and how many copies its concatenations need."""
    x = channels_last(2, 4, 9, 7) if x is None else x
    model = Apply(function, *layers).eval()
    plan = kp.capture(emit_fused(model, x, "cpu"), x, stream=False)
    for image in (x, torch.randn(x.shape)):
        with torch.no_grad():
            torch.testing.assert_close(plan(image), model(image), rtol=1e-5, atol=1e-5)
    assert isinstance(plan, Plan)
    return plan, plan.steps.count(COPY)


def convs(*channels: tuple[int, int]) -> list[nn.Conv2d]:
    return [nn.Conv2d(a, b, 3, padding=1) for a, b in channels]


def test_layers_write_their_channels_of_a_concatenation() -> None:
    plan, copies = planned(lambda x, a, b, c: c(torch.cat([a(x).relu(), b(x)], 1)), *convs((4, 6), (4, 5), (11, 3)))
    assert copies == 0
    assert plan.steps == ["native conv2d"] * 3


def test_what_others_read_is_read_from_there() -> None:
    def compute(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        y = a(x)
        return c(torch.cat([b(y), y, torch.nn.functional.max_pool2d(y, 3, 1, 1)], 1)) + y

    assert planned(compute, *convs((4, 6), (6, 5), (17, 6)))[1] == 0


def test_a_concatenation_may_be_returned() -> None:
    assert planned(lambda x, a, b: torch.cat([a(x), b(x)], 1), *convs((4, 6), (4, 5)))[1] == 0


def test_concatenations_that_grow_are_one() -> None:
    def compute(x: Tensor, *layers: nn.Module) -> Tensor:
        for layer in layers:
            x = torch.cat([x, layer(x)], 1)
        return x

    def flat(x: Tensor, *layers: nn.Module) -> Tensor:
        features = [layers[0](x)]
        for layer in layers[1:]:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)

    dense = convs((4, 5), (5, 3), (8, 3), (11, 2))
    plan, copies = planned(flat, *dense)
    assert copies == 0
    assert plan.steps.count("native conv2d") == len(plan) == 4
    assert planned(compute, *convs((4, 3), (7, 3), (10, 2)))[1] == 1  # the input


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda x, a, b: torch.cat([x, b(x)], 1), 1),
        (lambda x, a, b: torch.cat([a(x)] * 2, 1), 1),
        (lambda x, a, b: (lambda y: (y, torch.cat([y, b(x)], 1)))(a(x)), 1),
        (lambda x, a, b: (lambda y, z: torch.cat([y, z], 1) + torch.cat([z, y], 1))(a(x), b(x)), 2),
        (lambda x, a, b: torch.cat([a(x)[:, 1:3], b(x)], 1), 1),
        (lambda x, a, b: torch.cat([a(x).tanh(), b(x)], 1), 1),
        (lambda x, a, b: torch.cat([a(x).flatten(2), b(x).flatten(2)], 1), 2),
    ],
    ids=["an input", "one part twice", "a part that is returned", "two orders", "a slice", "torch's", "flattened"],
)
def test_what_cannot_be_there_is_copied(compute: Callable[..., Any], expected: int) -> None:
    assert planned(compute, *convs((4, 6), (4, 6)))[1] == expected


def test_parts_along_every_dimension() -> None:
    for dim in (0, 1, 2, 3, -1):
        planned(lambda x, a, b: torch.cat([a(x), b(x).relu()], dim), *convs((4, 6), (4, 6)))  # noqa: B023


def test_a_concatenation_of_concatenations() -> None:
    def compute(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        inner = torch.cat([a(x), b(x)], 1)
        return d(torch.cat([inner, c(inner)], 1)) + inner.sum()

    assert planned(compute, *convs((4, 6), (4, 5), (11, 3), (14, 2)))[1] <= 2


def test_one_pixel_and_one_channel() -> None:
    layers = [nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1), nn.Conv2d(2, 3, 1)]
    for size in ((1, 4, 1, 1), (3, 4, 1, 1), (1, 4, 5, 1)):
        planned(lambda x, a, b, c: c(torch.cat([a(x), b(x)], 1)), *layers, x=torch.randn(size))
