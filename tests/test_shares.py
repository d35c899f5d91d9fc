"""Batches in shares: threads that each take some images through all steps compute what the whole batch does."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from emitting import prefer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kernelpress as kp
from kernelpress.emit import pipeline
from kernelpress.emit.cache import TimingCache
from kernelpress.emit.plans import plan as plans
from kernelpress.emit.plans.plan import Plan, plan_of
from kernelpress.emit.plans.shares import MOST_IMAGES, divide
from kernelpress.runtime import native
from kernelpress.runtime.clock import threads_set_to

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="no native kernels: build them with `make build`")


@pytest.fixture(autouse=True)
def two_threads():
    with threads_set_to(2):
        yield


def emitted_for(model, *inputs):
    return kp.emit(model.eval(), inputs, cost=prefer("cpu"), progress=False)


def shared(model, *inputs):
    return plan_of(model, list(inputs), shared=True)


class Net(nn.Module):
    """Of the steps that images take: branches, a concatenation, a shuffle, a gate, a pool, a sum, two results."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.left, self.right = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 8, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Hardsigmoid()
        )
        self.last = nn.Conv2d(32, 32, 3, 1, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        y = self.depthwise(self.stem(x))
        both = torch.cat([F.relu(self.left(y)), F.hardswish(self.right(y))], 1)
        n, c, h, w = both.shape
        both = both.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        z = F.relu(self.last(both * self.gate(both)) + both)
        return self.head(z.mean((2, 3))), F.max_pool2d(z, 2)


@pytest.mark.parametrize("batch", [4, 6, 8, 12])
@pytest.mark.parametrize("contiguous", [True, False])
def test_shares_compute_what_the_batch_does(batch, contiguous, cpu_variant):
    model, x = Net(), torch.randn(batch, 3, 22, 18)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 22, 18))
    x = x if contiguous else x.contiguous(memory_format=torch.channels_last)
    plan = shared(emitted_for(model, x), x)
    assert plan.images_at_once == divide(batch, 2).images
    for _ in range(2):
        x = torch.randn_like(x)
        for out, expected in zip(plan(x), model(x), strict=True):
            torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    other_form = x.contiguous() if not contiguous else x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plan(other_form)[0], model(x)[0].detach(), rtol=1e-4, atol=1e-5)


def test_shares_of_int8_give_the_same_bits():
    model, x = nn.Sequential(Net().stem, nn.Conv2d(16, 20, 1), nn.ReLU()), torch.randn(8, 3, 20, 20)
    quantized = kp.compress.quantize(model.eval(), x, data=[x], progress=False)
    emitted = emitted_for(quantized, x)
    plan = shared(emitted, x)
    assert plan.images_at_once == 4
    assert torch.equal(plan(x), plan_of(emitted, [x])(x))


def test_all_inputs_are_shared():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 8, 3, padding=1)

        def forward(self, x, y):
            return F.relu(self.a(x)) + self.b(y)

    model, inputs = Two(), (torch.randn(6, 3, 9, 9), torch.randn(6, 5, 9, 9))
    plan = shared(emitted_for(model, *inputs), *inputs)
    assert plan.images_at_once == 3
    torch.testing.assert_close(plan(*inputs), model(*inputs).detach())


SQUARE = 8
"""Images of a batch, and channels: what mistakes one for the other goes wrong in silence."""

MIXING = {
    "the mean of the batch": lambda x: x + x.mean(0, keepdim=True),
    "images added to channels": lambda x: x + x.mean(1),
    "another order of images": lambda x: x.flip(0),
    "a matrix turned over": lambda x: x.t() * 1.0,
    "images after one another": lambda x: torch.cat([x[4:], x[:4]], 0),
    "images moved on": lambda x: F.pad(x, (0, 0, 1, -1)),
    "normalised over the batch": lambda x: x.softmax(0),
    "two images as one": lambda x: (x.reshape(4, 16) * 2).reshape(8, 8),
    "every other image": lambda x: torch.cat([x[::2], x[1::2]], 0) + x,
    "one image for all": lambda x: x * x[:1],
    "sorted images": lambda x: x.sort(0).values,
    "sums of images": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("what", MIXING)
@pytest.mark.parametrize("has_dynamic_batch", [True, False])
def test_batches_whose_images_depend_on_each_other_stay_whole(what, has_dynamic_batch):
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(SQUARE, SQUARE)

        def forward(self, x):
            return F.relu(MIXING[what](F.relu(self.linear(x))))

    model, x = Mixes().eval(), torch.randn(SQUARE, SQUARE)
    emitted = kp.emit(model, x, cost=prefer("cpu"), progress=False, dynamic_batch=has_dynamic_batch)
    plan = shared(emitted, x)
    torch.testing.assert_close(plan(x), model(x).detach())
    assert plan.images_at_once is None


def test_images_are_told_from_constants_of_their_number():
    class Constants(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.linear = nn.Linear(SQUARE, SQUARE)
            self.register_buffer("values", torch.randn(*shape))

        def forward(self, x):
            return self.linear(x) * self.values

    x = torch.randn(SQUARE, SQUARE)
    of_channels, of_both = Constants(SQUARE), Constants(SQUARE, SQUARE)
    plan = shared(emitted_for(of_channels, x), x)
    assert plan.images_at_once == MOST_IMAGES
    torch.testing.assert_close(plan(x), of_channels(x).detach())
    plan = shared(emitted_for(of_both, x), x)
    assert plan.images_at_once is None
    torch.testing.assert_close(plan(x), of_both(x).detach())


@given(batch=st.integers(0, 200), threads=st.integers(1, 70))
def test_a_division_covers_the_batch_and_keeps_threads_busy(batch, threads):
    division = divide(batch, threads)
    if division is None:
        assert batch < max(2, threads)
        return
    assert division.images * division.count == batch
    assert 1 <= division.images <= MOST_IMAGES
    assert division.count >= max(2, threads)
    runs = division.offsets([], 64)
    assert len(runs) == threads
    assert [run for of_thread in runs for run in of_thread] == [[64 * t] for t, r in enumerate(runs) for _ in r]
    assert max(map(len, runs)) == division.rounds
    assert sum(map(len, runs)) == division.count


def test_copies_and_pickles_run_in_shares_too():
    model, x = Net().eval(), torch.randn(8, 3, 16, 16)
    plan = shared(emitted_for(model, x), x)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other.images_at_once == plan.images_at_once == 4
        torch.testing.assert_close(other(x)[0], plan(x)[0])


def test_every_thread_has_an_arena():
    model, x = Net().eval(), torch.randn(16, 3, 32, 32)
    emitted = emitted_for(model, x)
    plan, whole = shared(emitted, x), plan_of(emitted, [x])
    assert plan.arena_bytes * 2 == whole.arena_bytes
    assert plan.steps == whole.steps
    with threads_set_to(1):  # the pool may be smaller by the time of a call
        torch.testing.assert_close(plan(x)[0], whole(x)[0])


@pytest.mark.parametrize(("whole", "by_shares"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_way_is_taken_from_remembered_times(whole, by_shares, monkeypatch):
    model, x = Net().eval(), torch.randn(8, 3, 16, 16)
    emitted = emitted_for(model, x)
    times = TimingCache(torch.device("cpu"), enabled=False)
    name = plan_of(emitted, [x])._native.name
    times.put(f"{name} as a whole", whole)
    times.put(f"{name} by 4", by_shares)
    monkeypatch.setattr(plans, "race", lambda *a, **k: pytest.fail("timed"))
    assert plan_of(emitted, [x], times).images_at_once == (4 if by_shares < whole else None)


def test_capture_takes_the_faster_way(monkeypatch):
    model, x = Net().eval(), torch.randn(8, 3, 16, 16)
    emitted = emitted_for(model, x)
    for faster, images in ((" by 4", 4), (" as a whole", None)):
        times = lambda calls, *a, faster=faster, **k: {n: 1.0 if n.endswith(faster) else 2.0 for n in calls}  # noqa: E731
        monkeypatch.setattr(plans, "race", times)
        assert kp.capture(emitted, x, cache=False).images_at_once == images
    assert kp.capture(emitted, x, stream=False).images_at_once is None


@pytest.mark.parametrize("is_faster", [True, False])
def test_batches_are_emitted_by_the_times_of_a_share_and_of_the_whole_where_that_is_faster(is_faster, monkeypatch):
    timed, evaluate = [], pipeline.evaluate

    def evaluated(graph_module, candidates, examples, *rest):
        *_, copies = rest
        images = next(e.shape[0] for node, e in examples.items() if node.op == "placeholder")
        timed.append((images, copies))
        return evaluate(graph_module, candidates, examples, *rest)

    monkeypatch.setattr(pipeline, "evaluate", evaluated)
    monkeypatch.setattr(Plan, "images_at_once", property(lambda plan: 4 if is_faster else None))
    model, x = Net().eval(), torch.randn(8, 3, 16, 16)
    emitted = kp.emit(model, x, cache=False, progress=False)
    assert timed == [(4, 2), (8, 1)][: 1 if is_faster else 2]
    assert {place.shape[0] for place in emitted.record.places} <= {8}
    torch.testing.assert_close(emitted(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_plans_side_by_side_refuse_other_addresses_than_theirs():
    module = native.cpu()
    plan = module.Plan()
    plan.external(64, 64)
    with pytest.raises(ValueError, match="one for each of 1 external buffers, got 2"):
        module.run_side_by_side([plan], [[[64, 128]]])
    with pytest.raises(ValueError, match="lists for each of 2 plans, got 1"):
        module.run_side_by_side([plan, plan], [[[64]]])
