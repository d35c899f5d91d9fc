"""Networks of timm and torchvision, in processes of their own: what their plans leave to torch. `make zoo` holds their
results against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernelpress.ops import registry
from kernelpress.runtime import native

TESTS = Path(__file__).resolve().parent
PACKAGES = TESTS.parent / "build" / "zoo"

NETWORKS = [
    *(
        ("timm", name)
        for name in ("mobilenetv3_large_100", "ghostnet_100", "efficientnet_b0", "mixnet_s", "regnety_004")
    ),
    *(("torchvision", name) for name in ("shufflenet_v2_x1_0", "squeezenet1_1", "densenet121", "googlenet")),
]

SCRIPT = """
import json, sys
import kernelpress as kp, torch, zoo
from emitting import emit_fused
zoo.import_packages()
model, inputs, _ = zoo.make(zoo.family_of(sys.argv[1], "", sys.argv[2]))
emitted = emit_fused(model, *inputs, "cpu", cache=False)
plan = kp.capture(emitted, *inputs, stream=False, cache=False)
print(json.dumps(plan.steps))
"""


@pytest.mark.slow
@pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")
@pytest.mark.skipif(not PACKAGES.is_dir(), reason="neither timm nor torchvision: `make zoo` installs them")
@pytest.mark.parametrize(("library", "name"), NETWORKS, ids=lambda value: value)
def test_plans_leave_nothing_to_torch(library: str, name: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", SCRIPT, library, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    without_kernel = [f"kernelpress.{op.name}.default" for op in registry.operators() if op.on("cpu") is None]
    assert {step for step in steps if step.startswith("torch")} <= {f"torch {name}" for name in without_kernel}
    assert "native aten.cat.default" not in steps
