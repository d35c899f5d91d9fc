"""Chains: consecutive layers streamed by rows compute just what the layers do one after the other."""

import pytest
import torch
from emitting import prefer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import channel_slice, native_plan
from torch import nn

import kernelpress as kp
from kernelpress.emit.cache import TimingCache
from kernelpress.emit.lower import NativeStep, lower
from kernelpress.emit.plans import native_steps, streaming
from kernelpress.measure.race import Heat
from kernelpress.ops import registry
from kernelpress.ops.calls.steps import native_call
from kernelpress.runtime import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")

LAYERS = st.tuples(
    st.sampled_from(["depthwise", "pointwise", "separable", "inverted"]),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 8, 17, 32, 40]),
    st.sampled_from(["identity", "relu6", "hardswish"]),
)


def call_of(kind, c_in, kernel, stride, c_out, activation):
    """The op, its parameters and options, of a layer on `c_in` channels."""
    window = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
    depthwise = lambda c: (torch.randn(c, 1, kernel, kernel) / kernel, torch.randn(c))  # noqa: E731
    pointwise = lambda c, o: (torch.randn(o, c, 1, 1) / c**0.5, torch.randn(o))  # noqa: E731
    if kind == "conv":
        weight = torch.randn(c_out, c_in, kernel, kernel) / (c_in**0.5 * kernel)
        return "conv2d", (weight, torch.randn(c_out)), {**window, "activation": activation}
    if kind == "depthwise":
        return "depthwise_conv2d", depthwise(c_in), {**window, "activation": activation}
    if kind == "pointwise":
        return "pointwise_conv2d", pointwise(c_in, c_out), {"activation": activation}
    if kind == "separable":
        named = {**window, "depthwise_activation": activation}
        return "separable_conv2d", (*depthwise(c_in), *pointwise(c_in, c_out)), named
    hidden = c_in + 9
    named = {**window, "expand_activation": "relu", "depthwise_activation": activation}
    return "inverted_residual", (*pointwise(c_in, hidden), *depthwise(hidden), *pointwise(hidden, c_out)), named


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=5),
    stem=st.booleans(),
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    batch=st.sampled_from([1, 3]),
    residual=st.booleans(),
    contiguous=st.booleans(),
    seeds=st.random_module(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_chain_computes_what_its_layers_do(cpu_variant, layers, stem, size, batch, residual, contiguous, seeds):
    c = 3
    x = torch.randn(batch, c, *size)
    if not (stem and contiguous):
        x = x.contiguous(memory_format=torch.channels_last)
    calls = []
    if stem:
        calls.append(call_of("conv", c, 3, 2, 12, "relu6"))
        c = 12
    if not stem and layers[0][0] == "pointwise":
        layers = [("depthwise", *layers[0][1:]), *layers]
    for kind, kernel, stride, c_out, activation in layers:
        calls.append(call_of(kind, c, kernel, stride, c_out, activation))
        c = c if kind == "depthwise" else c_out
    if len(calls) < 2:
        calls.append(call_of("pointwise", c, 1, 1, 24, "relu"))
    plan, out, held = native_plan(x, calls, residual and calls[-1][0] != "conv2d")
    addresses = [x.data_ptr(), out.data_ptr()]
    plan.run(0, len(plan), addresses)
    expected = out.clone()
    joined = plan.copy()
    assert joined.join(0, len(calls)) == (sum(_layers_in(call[0]) for call in calls) <= 12)
    other_x = x.clone(memory_format=torch.preserve_format)
    other_out = torch.full_like(out, float("nan"))
    joined.run(0, len(joined), [other_x.data_ptr(), other_out.data_ptr()])
    torch.testing.assert_close(other_out, expected, rtol=1e-4, atol=1e-4)
    del held


def _layers_in(op):
    return {"separable_conv2d": 2, "inverted_residual": 3}.get(op, 1)


def test_a_large_map_is_streamed_in_many_steps(cpu_variant):
    x = torch.randn(2, 3, 96, 80)
    calls = [
        call_of("conv", 3, 3, 2, 64, "relu6"),
        call_of("depthwise", 64, 3, 1, 64, "relu6"),
        call_of("pointwise", 64, 1, 1, 96, "relu6"),
        call_of("depthwise", 96, 5, 2, 96, "relu6"),
        call_of("pointwise", 96, 1, 1, 72, "identity"),
    ]
    plan, out, held = native_plan(x, calls, residual=False)
    plan.run(0, len(plan), [x.data_ptr(), out.data_ptr()])
    expected = out.clone()
    assert plan.join(0, 5)
    assert len(plan) == 1
    out.fill_(float("nan"))
    plan.run(0, 1, [x.data_ptr(), out.data_ptr()])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    del held


def append_shuffle(plan, passing, made, groups=2):
    """A step that shuffles both together; its output."""
    out = registry.allocate("shuffle_concat", (passing, made), {"groups": groups}).fill_(float("nan"))
    call = native_call("shuffle_concat", (passing, made), {"groups": groups}, out)
    getattr(plan, call.name)(*call.arguments)
    return out, call.tensors


@given(
    kind=st.sampled_from(["pointwise", "separable", "inverted", "depthwise and pointwise"]),
    c_in=st.sampled_from([3, 16, 40]),
    c_out=st.sampled_from([1, 7, 8, 16, 31, 32, 58, 70]),
    activation=st.sampled_from(["identity", "relu6", "hardswish"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.sampled_from([1, 3]),
    residual=st.booleans(),
    seeds=st.random_module(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_layer_stores_its_channels_between_those_that_pass(
    cpu_variant, kind, c_in, c_out, activation, size, batch, residual, seeds
):
    x, passing = channel_slice(batch, c_in, *size), channel_slice(batch, c_out, *size)
    calls = [call_of(one, c_in, 3, 1, c_out, activation) for one in kind.split(" and ")]
    plan, made, held = native_plan(x, calls, residual)
    out, shuffled = append_shuffle(plan, passing, made)
    plan.run(0, len(plan), [x.data_ptr(), made.data_ptr()])
    expected = out.clone()
    assert torch.equal(expected[:, 0::2], passing)
    assert torch.equal(expected[:, 1::2], made)
    made.fill_(float("nan"))
    out.fill_(float("nan"))
    assert plan.join(0, len(calls) + 1)
    plan.run(0, 1, [x.data_ptr(), made.data_ptr()])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert made.isnan().all()
    del held, shuffled


def test_shuffles_that_no_layer_can_make_are_not_joined():
    x = channel_slice(2, 8, 5, 6)
    for swapped, passing, groups in [(False, 8, 4), (False, 4, 2), (True, 8, 2)]:
        plan, made, held = native_plan(x, [call_of("pointwise", 8, 1, 1, 8, "relu")], residual=False)
        parts = (channel_slice(2, passing, 5, 6), made)
        _, shuffled = append_shuffle(plan, *(parts[::-1] if swapped else parts), groups)
        assert not plan.join(0, 2)
        del held, shuffled
    plan, made, held = native_plan(x, [call_of("depthwise", 8, 3, 1, 8, "relu")], residual=False)
    _, shuffled = append_shuffle(plan, x, made)
    assert not plan.join(0, 2)
    del held, shuffled


def test_nothing_follows_a_shuffle_in_its_chain():
    x = channel_slice(1, 8, 5, 6)
    plan, made, held = native_plan(x, [call_of("pointwise", 8, 1, 1, 8, "relu")], residual=False)
    out, shuffled = append_shuffle(plan, x, made)
    op, parameters, options = call_of("depthwise", 8, 3, 1, 8, "relu")
    following = native_call(op, (out[:, :8], *parameters), options, torch.empty_like(out[:, :8]))
    getattr(plan, following.name)(*following.arguments)
    assert not plan.join(0, 3)
    assert plan.join(0, 2)
    del held, shuffled


def test_layers_that_do_not_feed_each_other_are_not_joined():
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    depthwise = call_of("depthwise", 8, 3, 1, 8, "relu")
    plan, first, held = native_plan(x, [depthwise], residual=False)
    second = registry.allocate(depthwise[0], [x, *depthwise[1]], depthwise[2])
    call = native_call(depthwise[0], [x, *depthwise[1]], depthwise[2], second)
    getattr(plan, call.name)(*call.arguments)
    assert not plan.join(0, 2)
    assert not plan.join(0, 1)
    assert len(plan) == 2
    with pytest.raises(IndexError, match="0 <= first <= last <= 2"):
        plan.join(1, 3)
    del first, held


def test_a_layer_that_adds_what_it_reads_does_not_follow_in_a_chain():
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    plan, first, held = native_plan(x, [call_of("inverted", 8, 3, 1, 8, "relu")], residual=False)
    op, parameters, options = call_of("inverted", 8, 3, 1, 8, "relu")
    call = native_call(op, [first, *parameters], {**options, "residual": first}, torch.empty_like(first))
    getattr(plan, call.name)(*call.arguments)
    assert not plan.join(0, 2)
    shuffling, out, kept = native_plan(x, [call_of("pointwise", 8, 1, 1, 8, "relu")], residual=False)
    both = registry.allocate("shuffle_concat", (out, out), {"groups": 2})
    call = native_call("shuffle_concat", (out, out), {"groups": 2}, both)
    getattr(shuffling, call.name)(*call.arguments)
    assert not shuffling.join(0, 2)
    del held, kept


class Head(nn.Module):
    """Layers that can be streamed, in front of some that cannot."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.ReLU6(),
            nn.Conv2d(32, 32, 3, 1, 1, groups=32),
            nn.ReLU6(),
            nn.Conv2d(32, 64, 1),
            nn.ReLU6(),
            nn.Conv2d(64, 64, 3, 2, 1, groups=64),
            nn.ReLU6(),
            nn.Conv2d(64, 48, 1),
        )

    def forward(self, x):
        y = self.layers(x)
        return (y + y.mean((2, 3), keepdim=True)).softmax(1)


def single_layers(candidate):
    """A cost under which every layer is a native step of its own."""
    if candidate.variant != "cpu":
        return 50.0 * len(candidate.nodes)
    return 1.0 if candidate.name in ("conv2d", "depthwise_conv2d", "pointwise_conv2d") else 99.0


@pytest.fixture
def head():
    x = torch.randn(2, 3, 64, 48)
    return kp.emit(Head().eval(), x, cost=single_layers, progress=False), x


@pytest.mark.parametrize("ranges", [[(0, 5)], [(0, 2), (3, 5)], [(1, 4)], [(3, 5)]])
def test_a_plan_with_chains_computes_what_the_model_does(head, ranges, monkeypatch):
    emitted, x = head
    plain = kp.capture(emitted, x, stream=False)
    assert plain.chains == []
    monkeypatch.setattr(native_steps, "choose_chains", lambda *arguments: ranges)
    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    plan = kp.capture(emitted, x)
    assert [len(chain) for chain in plan.chains] == [last - first for first, last in ranges]
    assert plan.intermediate_bytes < plain.intermediate_bytes
    for _ in range(2):
        x = torch.randn(2, 3, 64, 48)
        torch.testing.assert_close(plan(x), plain(x))


def test_what_a_chain_reads_and_writes_never_shares_memory(head, monkeypatch):
    emitted, x = head
    monkeypatch.setattr(native_steps, "choose_chains", lambda *arguments: [(3, 5)])
    plan = kp.capture(emitted, x)
    arena = [(lifetime, offset, offset + lifetime.nbytes) for lifetime, offset in plan.arena]
    for i, (one, begin, end) in enumerate(arena):
        for other, start, stop in arena[:i]:
            assert not one.meets(other) or end <= start or stop <= begin
    assert sum(lifetime.first <= 3 and lifetime.last >= 4 for lifetime, _ in plan.arena) >= 2


def test_the_chains_that_save_most_are_chosen_from_remembered_times(head, monkeypatch):
    emitted, x = head
    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    steps = [step for step in lower(emitted.body, [x]).steps if isinstance(step, NativeStep)]
    name = streaming.name_of_plan(steps)
    cache = TimingCache(torch.device("cpu"), enabled=False)
    times = {"[]": 10.0, "[(0, 2)]": 9.7, "[(0, 3)]": 9.5, "[(0, 4)]": 9.6, "[(0, 5)]": 11.0, "[(0, 3), (3, 5)]": 9.3}
    for first, last in [(1, 3), (1, 4), (1, 5)]:
        times[f"[({first}, {last})]"] = 10.0
    times["[(3, 5)]"] = 9.9
    for ranges, time in times.items():
        cache.put(f"{name} with chains {ranges}", time)
    plain = kp.capture(emitted, x, stream=False)
    assert plain._native.faster_chains(cache) == [(0, 2), (3, 4)]
    cache.put(f"{name} with chains [(0, 3), (3, 5)]", 9.45)
    assert plain._native.faster_chains(cache) == [(0, 2)]


def test_chains_that_gain_nothing_alone_are_not_tried_beside_others(head, monkeypatch):
    emitted, x = head
    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    tried = []

    def times(plan, addresses, steps, arrangements, cache):
        tried.append(arrangements)
        return [{(0, 3): 9.5, (3, 5): 10.1}.get(ranges[-1], 10.0) if ranges else 10.0 for ranges in arrangements]

    monkeypatch.setattr(streaming, "_times", times)
    plain = kp.capture(emitted, x, stream=False)
    assert plain._native.faster_chains(TimingCache(torch.device("cpu"), enabled=False)) == [(0, 2)]
    assert len(tried) == 1


@pytest.mark.parametrize("cache", [True, False])
def test_times_are_remembered_on_disk_unless_told_otherwise(head, cache, monkeypatch, tmp_path):
    emitted, x = head
    monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    monkeypatch.setattr(streaming, "HEATS", (Heat(1, 1.0),))
    kp.capture(emitted, x, cache=cache)
    assert bool(list(tmp_path.iterdir())) == cache


def test_tensors_that_others_read_are_not_private(monkeypatch):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
            self.c = nn.Conv2d(8, 8, 3, 1, 1, groups=8)

        def forward(self, x):
            y = self.a(x)
            return self.c(self.b(y)) * y

    x = torch.randn(1, 8, 20, 20).contiguous(memory_format=torch.channels_last)
    emitted = kp.emit(Fork().eval(), x, cost=single_layers, progress=False)
    program = lower(emitted.body, [x])
    positions = [i for i, step in enumerate(program.steps) if isinstance(step, NativeStep)]
    links = streaming.private_bytes(program, positions)
    assert links == [0, 8 * 20 * 20 * 4, 8 * 20 * 20 * 4]
    steps = kp.capture(emitted, x, stream=False)._native
    assert steps._plan.copy().join(0, 2)
    assert steps.joinable([(positions[0], positions[1])]) == []


def test_inverted_residuals_in_a_row_add_the_maps_between_them(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
            self.layers = nn.Sequential(nn.Conv2d(8, 24, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(24, 8, 1))

        def forward(self, x):
            return x + self.layers(x)

    def in_one(candidate):
        return 1.0 if candidate.label == "inverted_residual[cpu]" else 50.0 * len(candidate.nodes)

    monkeypatch.setattr(streaming, "LEAST_BYTES", 1)
    joined = []

    def choose(plan, addresses, steps, links, cache):
        joined.extend(streaming._candidates(plan, links))
        return []

    monkeypatch.setattr(native_steps, "choose_chains", choose)
    model, x = nn.Sequential(*(Block() for _ in range(3))).eval(), torch.randn(2, 8, 12, 12)
    plan = kp.capture(kp.emit(model, x, cost=in_one, progress=False), x)
    assert [step.op for step in plan._program.steps].count("inverted_residual") == 3
    assert joined == []
    torch.testing.assert_close(plan(x), model(x).detach())


def test_small_maps_are_not_timed(monkeypatch):
    monkeypatch.setattr(streaming, "race", lambda *a, **k: pytest.fail("timed"))
    x = torch.randn(1, 3, 32, 32)
    emitted = kp.emit(Head().eval(), x, cost=prefer("cpu"), progress=False)
    assert kp.capture(emitted, x).chains == []
