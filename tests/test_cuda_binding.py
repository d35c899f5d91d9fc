"""How ops reach the CUDA module: fields of a launch, prepared calls, refusals, measured configurations, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernelpress import doctor, ops
from kernelpress.kernels.reference import ACTIVATIONS
from kernelpress.ops import registry
from kernelpress.ops.backends import cuda
from kernelpress.ops.backends.kernel import FLOATING, Kernel, float_vector, tf32_reason
from kernelpress.ops.calls import prepared
from kernelpress.ops.calls.dispatch import declare
from kernelpress.ops.layout import PIXELS
from kernelpress.ops.tuning import stored
from kernelpress.runtime import native

needs_module = pytest.mark.skipif(native.cuda() is None, reason=f"no _cuda: {native.load_cuda().absent_because}")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU; this machine has one")

ROOT = Path(__file__).resolve().parent.parent
TOY = "toy_scale"
DEVICE = cuda.CudaDevice("pretended device", 80, 108, 164 << 10, 40 << 20)
CONFIGURATIONS = ("narrow", "wide", "huge")


def toy_scale(
    x: Tensor, weight: Tensor, *, factor: float = 1.0, activation: str = "identity", backend: str = "auto"
) -> Tensor:
    """`x · weight · factor`."""
    raise NotImplementedError


@dataclass
class Recorder:
    """A target on the CPU that computes x · weight · factor, and remembers its launches."""

    launches: list[list[int | float]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    packed: int = 0
    reason: str | None = None

    def launch(self, name: str, tensors: Sequence[Tensor], fields: Sequence[int | float], index: int) -> None:
        if fields[-2] in self.refused:
            raise RuntimeError(f"{name}: kernel refused configuration {fields[-2]}")
        assert [t.data_ptr() for t in tensors if t.data_ptr() in fields] == [t.data_ptr() for t in tensors]
        self.launches.append(list(fields))
        y, weight, *rest = tensors
        y.copy_(rest[-1 if len(rest) == 1 else 0].float() * weight[:, None, None] * fields[-1])

    def target(self, device_type: str = "cpu") -> dict[str, Any]:
        return {
            "device_type": device_type,
            "reason": lambda index: self.reason,
            "describe": lambda index: DEVICE,
            "launch": self.launch,
            "configurations": lambda name: CONFIGURATIONS,
        }


def toy_kernel(recorder: Recorder, **changes: Any) -> Kernel:
    def operands(options: Any, x: Any, weight: Tensor) -> tuple[Any, ...]:
        recorder.packed += 1
        return (x, float_vector(weight))

    return Kernel(
        "toy_launcher",
        operands,
        sizes=lambda problem, spacing: (*problem.shape, spacing["x"], spacing["y"]),
        layouts={"x": PIXELS},
        supports=tf32_reason,
        scalars=lambda problem: (problem.options.factor,),
        **changes,
    )


def make_toy(recorder: Recorder, **changes: Any) -> registry.Operator:
    return declare(
        toy_scale,
        out=PIXELS,
        shape=lambda options, x, weight: x.shape,
        reference=lambda x, weight, factor, activation: x * weight[:, None, None] * factor,
        implementations=(cuda.cuda_implementation(toy_kernel(recorder, **changes)),),
    )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """An op `toy_scale` whose CUDA kernel runs on the recorder."""
    recorder = Recorder()
    monkeypatch.setattr(registry, "_OPERATORS", {**registry._OPERATORS, TOY: make_toy(recorder)})
    with cuda.TARGET.changed(**recorder.target()):
        yield recorder


def run(*tensors: Tensor, factor: float = 1.0, activation: str = "identity", backend: str = "cuda") -> Tensor:
    return prepared.run(registry.operator(TOY), tensors, (factor, activation), backend)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_launch_is_told_addresses_sizes_enumerations_and_scalars_in_this_order(recorder, dtype) -> None:
    wide, weight = image(2, 8, 3, 5, dtype=dtype), torch.randn(6).to(dtype)
    x = wide[:, 1:7]
    y = run(x, weight, factor=2.5, activation="gelu")
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, (x.float() * weight.float()[:, None, None] * 2.5).to(dtype))
    (fields,) = recorder.launches
    assert fields[0] == x.data_ptr()
    assert fields[2] == y.data_ptr()
    assert fields[3:] == [2, 6, 3, 5, 8, 6, FLOATING.index(dtype), 7, cuda.HEURISTIC, 2.5]
    assert [type(value) for value in fields] == [int] * 12 + [float]


@pytest.mark.parametrize(
    ("enumeration", "names"),
    [
        ("DataType", [str(dtype).removeprefix("torch.") for dtype in cuda.DATA_TYPES]),
        ("Activation", list(ACTIVATIONS)),
    ],
)
def test_enumerations_are_numbered_as_in_the_kernels(enumeration: str, names: list[str]) -> None:
    header = (ROOT / "kernels/cuda/common/status.h").read_text()
    found = re.search(rf"enum class {enumeration} : int64_t {{(.*?)}}", header)
    assert found is not None
    assert found[1].replace(" ", "").split(",") == names


@pytest.mark.parametrize(("needed", "given"), [(0, False), (48, True)])
def test_a_workspace_of_the_wanted_size_follows_the_output(recorder, monkeypatch, needed, given) -> None:
    toy = make_toy(recorder, workspace=lambda problem, device: needed)
    monkeypatch.setitem(registry._OPERATORS, TOY, toy)
    y = run(image(1, 4, 2, 2), torch.randn(4))
    (fields,) = recorder.launches
    assert fields[2] == y.data_ptr()
    assert (fields[3] != 0) == given


def test_weights_are_packed_once_and_again_when_they_change(recorder) -> None:
    x, weight = image(1, 4, 2, 2), torch.randn(4)
    first = run(x, weight)
    assert torch.equal(run(x, weight), first)
    assert run(image(1, 4, 2, 2), weight).shape == first.shape
    assert recorder.packed == 1
    weight.mul_(2)
    assert torch.equal(run(x, weight), 2 * first)
    assert recorder.packed == 2


def test_other_memory_is_laid_out_anew_for_the_kernel(recorder) -> None:
    x, weight = torch.randn(2, 4, 3, 3), torch.randn(4)
    assert torch.equal(run(x, weight), x * weight[:, None, None])
    assert recorder.launches[0][0] != x.data_ptr()


def test_nothing_is_launched_for_an_empty_batch(recorder) -> None:
    assert run(image(0, 4, 3, 3), torch.randn(4)).shape == (0, 4, 3, 3)
    assert recorder.launches == []


def test_a_tensor_elsewhere_is_refused_where_cuda_is_asked_for(recorder) -> None:
    x, weight = image(1, 4, 2, 2), torch.randn(4)
    with cuda.TARGET.changed(**recorder.target("cuda")):
        with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run this call: x is on cpu"):
            run(x, weight)
        assert torch.equal(run(x, weight, backend="auto"), x * weight[:, None, None])
    assert recorder.launches == []


def test_tensors_of_two_devices_are_refused(recorder) -> None:
    with pytest.raises(ValueError, match="weight: expected the device of x, cpu, got meta"):
        run(image(1, 4, 2, 2), torch.empty(4, device="meta"))


def test_a_dtype_that_no_kernel_takes_falls_to_the_next_backend(recorder) -> None:
    x, weight = image(1, 4, 2, 2).double(), torch.randn(4).double()
    with pytest.raises(RuntimeError, match=r"the kernel takes torch.float32 or torch.float16 or torch.bfloat16, got "):
        run(x, weight)
    assert run(x, weight, backend="auto").dtype == torch.float64
    assert recorder.launches == []


def test_a_device_that_cannot_be_used_is_explained(recorder) -> None:
    recorder.reason = "no driver"
    prepared.clear()
    with pytest.raises(RuntimeError, match="cannot run this call: no driver"):
        run(image(1, 4, 2, 2), torch.randn(4))


def test_tf32_is_used_only_where_torch_allows_it(recorder, monkeypatch) -> None:
    x, weight = image(1, 4, 2, 2), torch.randn(4)
    assert registry.allows_tf32()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not registry.allows_tf32()
    prepared.clear()
    with pytest.raises(RuntimeError, match="allow_tf32 forbids"):
        run(x, weight)
    run(x.half(), weight.half())
    assert len(recorder.launches) == 1


@pytest.mark.slow
def test_the_later_setting_of_tf32_counts_too() -> None:
    code = (
        "import torch; torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "from kernelpress.ops import registry; print(registry.allows_tf32())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# Measured configurations


@pytest.fixture
def cache(own_cache: Path) -> Iterator[Path]:
    """An empty cache folder."""
    stored.forget()
    yield own_cache
    stored.forget()


def measure_by(recorder: Recorder, times: dict[int, float]) -> Callable[[Callable[[], Tensor]], float]:
    """A clock that runs what it is given and reads the time of the configuration that it ran in."""

    def measure(run: Callable[[], Tensor]) -> float:
        run()
        return times[int(recorder.launches[-1][-2])]

    return measure


def test_the_fastest_configuration_is_found_kept_and_used(recorder, cache) -> None:
    x, weight = image(1, 4, 2, 2), torch.randn(4)
    run(x, weight)
    found = ops.tune(TOY, x, weight, measure=measure_by(recorder, {0: 3.0, 1: 1.0, 2: 2.0}))
    assert (found.best, found.device) == ("wide", DEVICE.name)
    assert found.milliseconds == {"narrow": 3.0, "wide": 1.0, "huge": 2.0}
    run(x, weight)
    assert recorder.launches[-1][-2] == 1
    run(image(2, 4, 2, 2), weight)
    assert recorder.launches[-1][-2] == cuda.HEURISTIC, "another problem"
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    assert stored["device"] == DEVICE.name
    assert list(stored["configurations"].values()) == ["wide"]


def test_a_second_problem_is_added_to_the_file(recorder, cache) -> None:
    weight = torch.randn(4)
    for batch, best in ((1, 0), (2, 2)):
        times = {index: 1.0 + (index != best) for index in range(3)}
        ops.tune(TOY, image(batch, 4, 2, 2), weight, measure=measure_by(recorder, times))
    run(image(1, 4, 2, 2), weight)
    run(image(2, 4, 2, 2), weight)
    assert [fields[-2] for fields in recorder.launches[-2:]] == [0, 2]


def test_configurations_that_cannot_run_are_left_out(recorder, cache) -> None:
    recorder.refused = {0, 2}
    found = ops.tune(TOY, image(1, 4, 2, 2), torch.randn(4), measure=measure_by(recorder, {1: 1.0}))
    assert found.milliseconds == {"wide": 1.0}
    recorder.refused = {0, 1, 2}
    with pytest.raises(RuntimeError, match=r"no configuration of toy_launcher runs this call: .* refused"):
        ops.tune(TOY, image(3, 4, 2, 2), torch.randn(4), measure=measure_by(recorder, {}))


@pytest.mark.parametrize(
    "content",
    ['{"device": "another device", "configurations": {KEY: "wide"}}', "{", "[]", '{"device": DEVICE}',
     '{"device": DEVICE, "configurations": {KEY: "a name of an older table"}}'],
    ids=["another device", "half a file", "another shape", "no configurations", "unknown configuration"],
)  # fmt: skip
def test_a_file_that_says_nothing_of_use_leaves_the_heuristic(recorder, cache, content: str) -> None:
    x, weight = image(1, 4, 2, 2), torch.randn(4)
    ops.tune(TOY, x, weight, measure=measure_by(recorder, {0: 3.0, 1: 1.0, 2: 2.0}))
    (file,) = cache.iterdir()
    (key,) = json.loads(file.read_text())["configurations"]
    file.write_text(content.replace("KEY", json.dumps(key)).replace("DEVICE", json.dumps(DEVICE.name)))
    stored.forget()
    prepared.clear()
    run(x, weight)
    assert recorder.launches[-1][-2] == cuda.HEURISTIC


def test_a_measurement_that_cannot_be_kept_is_an_error_with_the_file(recorder, cache) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cache"):
        ops.tune(TOY, image(1, 4, 2, 2), torch.randn(4), measure=measure_by(recorder, {0: 1.0, 1: 2.0, 2: 3.0}))


def test_what_has_no_cuda_kernel_or_no_gpu_cannot_be_tuned(recorder) -> None:
    with pytest.raises(ValueError, match=rf"can be tuned on cuda \(.*{TOY}.*\), got 'max_pool2d'"):
        ops.tune("max_pool2d", image(1, 4, 2, 2), kernel_size=2, stride=2)
    with cuda.TARGET.changed(**recorder.target("cuda")), pytest.raises(RuntimeError, match="x is on cpu"):
        ops.tune(TOY, image(1, 4, 2, 2), torch.randn(4))


# Architectures


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_80"], 80, True),
        (["sm_80"], 86, True),
        (["sm_86"], 80, False),
        (["sm_80"], 90, False),
        (["sm_90a"], 90, True),
        (["sm_90a"], 91, False),
        (["sm_80", "compute_90"], 120, True),
        (["sm_80", "compute_120"], 90, False),
        (["sm_100"], 103, True),
        (["sm_120"], 100, False),
        ([], 80, False),
    ],
)
def test_which_devices_code_runs_on(architectures: list[str], capability: int, expected: bool) -> None:
    assert native.runs_on(architectures, capability) == expected


@pytest.fixture
def pretended_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `_cuda` with code for sm_80 on a machine with one sm_90 and one sm_86 device."""
    capabilities = [90, 86]

    def device(index: int) -> dict[str, Any]:
        if index >= len(capabilities):
            raise ValueError(f"device: expected an index below {len(capabilities)}, got {index}")
        return {**DEVICE._asdict(), "name": f"GPU {index}", "capability": capabilities[index]}

    module = SimpleNamespace(
        architectures=lambda: ["sm_80"],
        unavailable_because=lambda: None,
        device=device,
        device_count=lambda: len(capabilities),
        toolkit_version=lambda: 13000,
    )
    monkeypatch.setattr(native, "load_cuda", lambda: native.NativeCuda(module, None))  # type: ignore[arg-type]
    native.cuda_reason.cache_clear()
    yield
    native.cuda_reason.cache_clear()


def test_a_mismatch_names_the_code_and_the_device(pretended_module) -> None:
    assert native.cuda_reason() is None
    assert native.cuda_reason(1) is None
    reason = native.cuda_reason(0)
    assert reason is not None
    for part in ("code for sm_80,", "GPU 0", "sm_90", "KERNELPRESS_CUDA_ARCHS=90"):
        assert part in reason
    assert native.cuda_reason(2) == "device: expected an index below 2, got 2"


def test_doctor_tells_of_each_device_whether_it_can_be_used(pretended_module) -> None:
    found = {finding.name: finding for finding in doctor.examine() if finding.section == "GPU"}
    assert found["_cuda"].detail == "code for sm_80, built with CUDA 13.0"
    assert [found[f"CUDA kernels, device {index}"].is_ok for index in (0, 1)] == [False, True]
    assert "KERNELPRESS_CUDA_ARCHS=90" in found["CUDA kernels, device 0"].detail


def test_doctor_tells_why_there_are_no_cuda_kernels(monkeypatch) -> None:
    absent = native.NativeCuda(None, "No module named 'kernelpress._cuda' (building it takes nvcc)")
    monkeypatch.setattr(native, "load_cuda", lambda: absent)
    (finding,) = [finding for finding in doctor.examine() if finding.name == "_cuda"]
    assert not finding.is_ok
    assert "takes nvcc" in finding.detail


# The module itself


@needs_module
@needs_no_gpu
def test_without_a_gpu_the_module_loads_and_says_why_nothing_runs() -> None:
    module = native.cuda()
    reason = module.unavailable_because()
    assert any(word in reason for word in ("driver", "device"))
    assert reason in native.cuda_reason()
    assert module.device_count() == 0
    with pytest.raises(RuntimeError, match=r"driver|device"):
        module.device(0)
    names = {finding.name: finding for finding in doctor.examine() if finding.section == "GPU"}
    assert all(architecture in names["_cuda"].detail for architecture in module.architectures())
    assert names["CUDA kernels"].detail == reason


@needs_module
def test_every_kernel_of_an_op_is_bound() -> None:
    launchers = {entry.kernel("cuda").name for entry in registry.operators() if entry.on("cuda")}
    assert launchers
    assert [name for name in sorted(launchers) if not hasattr(native.cuda(), name)] == []


@needs_module
def test_launchers_refuse_fields_of_another_number_or_kind() -> None:
    for kernel in {entry.kernel("cuda").name for entry in registry.operators() if entry.on("cuda")}:
        launcher = getattr(native.cuda(), kernel)
        with pytest.raises(TypeError, match=rf"{kernel}: expected (\d+) integers, (\d+) floats, the stream") as raised:
            launcher(1)
        words = str(raised.value).split()
        integers, floats = int(words[2]), int(words[4])
        with pytest.raises(TypeError):
            launcher(*[0.5] * integers, *[0.5] * floats, 0, 0)
        if floats:
            with pytest.raises(TypeError, match="expected a float"):
                launcher(*[0] * (integers + floats), 0, 0)


@needs_module
@needs_no_gpu
def test_a_launch_without_a_device_is_an_error() -> None:
    launcher = native.cuda().depthwise_conv2d
    with pytest.raises(TypeError) as raised:
        launcher()
    words = str(raised.value).split()
    with pytest.raises(RuntimeError, match=r"driver|device"):
        launcher(*[0] * int(words[2]), *[0.0] * int(words[4]), 0, 0)


@needs_module
@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (2, ["out of memory", "smaller batch"]),
        (9, ["invalid configuration argument", "does not fit the device"]),
        (209, ["no kernel image", "this build has code for sm_", "KERNELPRESS_CUDA_ARCHS"]),
        (700, ["illegal memory access", "context of this process is lost", "compute-sanitizer"]),
        (1, ["invalid argument"]),
    ],
)
def test_a_failed_launch_says_what_failed_where_why_and_what_to_do(code: int, parts: list[str]) -> None:
    text = native.cuda().describe_failure("depthwise_conv2d", "ring", "3x3, 8 channels", code, 0)
    for part in ("depthwise_conv2d: kernel ring in configuration 3x3, 8 channels failed on device 0", *parts):
        assert part in text
