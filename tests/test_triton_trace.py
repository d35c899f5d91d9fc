"""Inductor and AOTInductor see the launches of ops on the backend "triton"; exports keep the ops whole."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

import kernelpress  # noqa: F401 - registers the ops
from kernelpress.runtime.torch_private import aoti_compile_and_package, aoti_load_package


@functools.cache
def run(what: str) -> Any:
    """`triton_tracing.py` in a process without Triton's interpreter."""
    script = Path(__file__).with_name("triton_tracing.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_traced_op_makes_the_launches_of_a_call() -> None:
    found = run("ops")
    assert {"depthwise_conv2d", "depthwise_conv2d, any batch", "pointwise_conv2d", "linear"} <= set(found)
    for name, launches in found.items():
        assert launches["called"], name
        assert launches["traced"] == launches["called"], name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "op"), [("reference", "pointwise_conv2d"), ("exported", "pointwise_conv2d")])
def test_an_op_stays_whole(name: str, op: str) -> None:
    assert [target for target in run("whole")[name] if "kernelpress" in target] == [f"kernelpress.{op}.default"]


class Separable(nn.Module):
    """A depthwise and a pointwise convolution on the backend "triton"."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Parameter(torch.randn(32, 1, 3, 3)), nn.Parameter(torch.randn(48, 32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.kernelpress.depthwise_conv2d(x, self.depthwise, padding=[1, 1], backend="triton")
        return torch.ops.kernelpress.pointwise_conv2d(y, self.pointwise, activation="relu", backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu` runs it")
def test_inductor_and_aot_inductor_carry_the_kernels(tmp_path: Path) -> None:
    model, x = Separable().cuda().eval(), torch.randn(4, 32, 17, 13, device="cuda")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model)(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        package = aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        carried = aoti_load_package(package)
        torch.testing.assert_close(carried(x), expected)
        torch.testing.assert_close(carried(x[:2]), expected[:2])
