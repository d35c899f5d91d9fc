"""Plans: the same numbers as the emitted model, over one arena, for many calls and threads."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from emitting import prefer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kernelpress as kp
from kernelpress.emit.plans.arena import ALIGNMENT, Lifetime, lay_out
from kernelpress.measure.memory import peak_memory_bytes
from kernelpress.ops import registry
from kernelpress.ops.backends.cpu import cpu_implementation
from kernelpress.runtime import native

HAS_NATIVE = native.cpu() is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no native kernels: build them with `make build`")


def emit(model, inputs, variant="cpu" if HAS_NATIVE else "reference", **options):
    return kp.emit(model.eval(), inputs, cost=prefer(variant), progress=False, **options)


class Mixed(nn.Module):
    """Layers of ours and operations that only torch has, views, a concatenation and a split, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left = nn.Conv2d(4, 8, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.merge = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.stem(x).relu()
        a, b = y.chunk(2, dim=1)
        merged = torch.cat([self.left(a), self.right(b)], dim=1)
        z = F.leaky_relu(self.merge(merged)) + y
        pooled = z.mean((2, 3))
        return {"logits": self.head(pooled), "map": z.permute(0, 2, 3, 1), "same": pooled}


@pytest.fixture(scope="module", params=["cpu", "reference", "onednn", "channels_last"])
def mixed(request):
    if request.param == "cpu" and not HAS_NATIVE:
        pytest.skip("no native kernels: build them with `make build`")
    x = torch.randn(2, 3, 17, 15)
    emitted = emit(Mixed(), x, request.param)
    return emitted, kp.capture(emitted, x)


def test_a_plan_computes_what_the_emitted_model_does(mixed):
    emitted, plan = mixed
    for _ in range(3):
        x = torch.randn(2, 3, 17, 15)
        expected, result = emitted(x), plan(x)
        assert set(result) == set(expected)
        for name in expected:
            torch.testing.assert_close(result[name], expected[name])


def test_a_plan_of_any_instruction_set_stays_on_it(cpu_variant):
    module, x = native.cpu(), torch.randn(2, 3, 17, 15)
    emitted = emit(Mixed(), x)
    plan = kp.capture(emitted, x)
    assert plan.native_steps > 0
    expected = plan(x)
    torch.testing.assert_close(expected["map"], emitted(x)["map"])
    for other in module.variants():
        module.select(other)
        assert torch.equal(plan(x)["map"], expected["map"])


def test_inputs_may_lie_in_memory_as_they_like(mixed):
    emitted, plan = mixed
    wide = torch.randn(4, 6, 17, 15)
    for x in (
        wide[::2, ::2],
        wide[:2, :3].contiguous(memory_format=torch.channels_last),
        wide[:1, :3].expand(2, 3, 17, 15),
    ):
        torch.testing.assert_close(plan(x)["logits"], emitted(x)["logits"])


def test_results_outlive_the_next_call(mixed):
    _, plan = mixed
    x, other = torch.randn(2, 3, 17, 15), torch.randn(2, 3, 17, 15)
    first = plan(x)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    plan(other)
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_threads_that_share_a_plan_get_their_own_results(mixed):
    _, plan = mixed
    inputs = [torch.randn(2, 3, 17, 15) for _ in range(8)]
    expected = [plan(x)["logits"] for x in inputs]
    wrong: list[int] = []

    def work(i):
        wrong.extend(i for _ in range(20) if not torch.equal(plan(inputs[i])["logits"], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_our_models_run_natively_from_end_to_end(name):
    model = kp.models.create(name)
    x = torch.randn(2, 3, 32, 32)
    emitted = emit(model, x)
    plan = kp.capture(emitted, x)
    assert plan.native_steps == len(plan)
    torch.testing.assert_close(plan(x), emitted(x))
    assert plan.arena_bytes < plan.intermediate_bytes


@needs_native
def test_a_stem_reads_the_callers_image_without_a_copy():
    emitted = emit(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 9, 9))
    assert kp.capture(emitted, torch.randn(1, 3, 9, 9)).steps == ["native conv2d"]


@needs_native
def test_a_kernel_that_wants_a_workspace_is_no_native_step(monkeypatch):
    """Steps would give it no memory there."""
    x = torch.randn(2, 3, 9, 9)
    emitted, operator = emit(nn.MaxPool2d(2), x), registry.operator("max_pool2d")
    assert "native max_pool2d" in kp.capture(emitted, x).steps
    kernel = replace(operator.kernel("cpu"), workspace=lambda problem, device: 64)
    changed = replace(operator, implementations=(cpu_implementation(kernel), operator.on("reference")))
    monkeypatch.setitem(registry._OPERATORS, "max_pool2d", changed)
    plan = kp.capture(emitted, x)
    assert plan.native_steps == 0
    torch.testing.assert_close(plan(x), emitted(x), rtol=0, atol=0)


@needs_native
def test_views_cost_no_steps_and_torch_calls_stand_between_native_stretches():
    x = torch.randn(2, 3, 16, 16)
    plan = kp.capture(emit(Mixed(), x), x)
    assert plan.steps[0] == "native conv2d"
    assert "torch aten.leaky_relu.default" in plan.steps
    assert not any(name in step for step in plan.steps for name in ("permute", "chunk", "split", "getitem"))
    assert plan.native_steps < len(plan)


def test_nothing_that_lives_in_the_arena_overlaps(mixed):
    _, plan = mixed
    assert_disjoint(plan.arena, plan.arena_bytes)


def assert_disjoint(placed, end):
    for i, (lifetime, offset) in enumerate(placed):
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= offset + lifetime.nbytes <= end
        for other, other_offset in placed[:i]:
            together = lifetime.first <= other.last and other.first <= lifetime.last
            apart = offset + lifetime.nbytes <= other_offset or other_offset + other.nbytes <= offset
            assert apart or not together


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(0, 5000)), max_size=30))
def test_layouts_are_disjoint_and_no_larger_than_side_by_side(drawn):
    lifetimes = [Lifetime(first, first + length, nbytes) for first, length, nbytes in drawn]
    layout = lay_out(lifetimes)
    assert_disjoint(list(zip(lifetimes, layout.offsets, strict=True)), layout.nbytes)
    assert layout.nbytes <= sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for _, _, nbytes in drawn)


def test_a_chain_needs_room_for_two():
    layout = lay_out([Lifetime(i, i + 1, 640) for i in range(10)])
    assert layout.nbytes == 2 * 640


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 3, 17, 15), r"input\.shape\[0\] .*expected 2 as captured, got 3 in \[3, 3, 17, 15\]"),
        (torch.zeros(2, 3, 17, 15, dtype=torch.float64), r"input: .*float32.*float64"),
        (torch.zeros(2, 3, 17, 15, device="meta"), r"input: .*cpu.*meta"),
        ("image", r"input: .*Tensor.*str"),
        ([torch.zeros(2, 3, 17, 15)], "input: expected one value as captured, got a list of 1"),
    ],
    ids=["shape", "dtype", "device", "type", "structure"],
)
def test_other_inputs_than_captured_are_refused_by_name(x, message):
    model = emit(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 17, 15))
    plan = kp.capture(model, torch.randn(2, 3, 17, 15))
    with pytest.raises(ValueError, match=message):
        plan(x)


def test_numbers_among_the_inputs_are_part_of_what_is_captured():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, factor):
            return self.conv(x) * factor

    x = torch.randn(2, 3, 8, 8)
    emitted = emit(Scaled(), (x, 3))
    plan = kp.capture(emitted, x, 3)
    torch.testing.assert_close(plan(x, 3), emitted(x, 3))
    with pytest.raises(ValueError, match=r"factor: expected 3 as captured, got 4"):
        plan(x, 4)


def test_a_model_that_was_not_emitted_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match="emit it first"):
        kp.capture(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
    with pytest.raises(TypeError, match="EmittedModel"):
        kp.capture("model", torch.randn(1, 3, 8, 8))


def test_an_empty_batch_runs():
    x = torch.randn(2, 3, 16, 16)
    emitted = emit(kp.models.create("resnet20"), x)
    plan = kp.capture(emitted, x[:0])
    assert plan(x[:0]).shape == (0, *emitted(x).shape[1:])


def test_inputs_and_weights_may_be_outputs():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return x, x.flatten(1), self.conv(x)

    x = torch.randn(2, 3, 8, 8)
    emitted = emit(Echo(), x)
    plan = kp.capture(emitted, torch.randn(2, 3, 8, 8))
    for expected, result in zip(emitted(x), plan(x), strict=True):
        torch.testing.assert_close(result, expected)


def test_plans_record_no_gradients():
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    plan = kp.capture(emit(nn.Conv2d(3, 4, 3), x.detach()), x)
    assert not plan(x).requires_grad


def test_a_loaded_model_is_captured_as_the_saved_one(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    emitted = emit(Mixed(), x)
    emitted.save(tmp_path / "m.pt2")
    plan = kp.capture(kp.load(tmp_path / "m.pt2"), x)
    for name, expected in emitted(x).items():
        torch.testing.assert_close(plan(x)[name], expected)
    assert len(plan) == len(kp.capture(emitted, x))


def test_what_torch_made_is_released_after_its_last_use():
    class Sums(nn.Module):
        def forward(self, x):
            for dim in (0, 1) * 6:
                x = F.layer_norm(x.cumsum(dim), (256,))
            return x

    x = torch.randn(64, 256)
    plan = kp.capture(emit(Sums(), x), x)
    assert len(plan) - plan.native_steps >= 12
    plan(x)
    assert peak_memory_bytes(lambda: plan(x), device=x.device) <= 4 * x.nbytes
