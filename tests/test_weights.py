"""Weights that change: layers and emitted models compute with the present ones however they were written, an emitted
model and its original own theirs, a plan keeps the captured ones."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from emitting import FUSED_BACKENDS, emit_fused, prefer
from support import assert_close, with_random_norms
from torch import Tensor, nn

import kernelpress as kp
from kernelpress import layers, ops
from kernelpress.emit import EmittedModel
from kernelpress.layers import folding
from kernelpress.ops.calls import packing, prepared
from kernelpress.runtime import native
from kernelpress.runtime.snapshot import PythonSnapshot, Snapshot


@pytest.fixture(params=["native", "python"])
def snapshots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Who remembers parameters; in Python it is what serves a torch without the exchange, and CUDA."""
    if request.param == "python":
        for module in (packing, prepared, folding):
            monkeypatch.setattr(module, "Snapshot", PythonSnapshot)
        monkeypatch.setattr(prepared, "_reads_tensors", False)
        monkeypatch.setattr(prepared, "attempt", prepared._attempt_nothing)
        return PythonSnapshot
    if not native.load().reads_tensors:
        pytest.skip("no native module, or a torch that publishes no DLPack exchange")
    return Snapshot


def bits(size: int = 4096, **options: Any) -> Tensor:
    return torch.rand(size, **options) + 0.5


FORMS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: bits(5),
    "one element": lambda: torch.tensor(1.5),
    "large": bits,
    "channels_last": lambda: bits().view(8, 8, 8, 8).contiguous(memory_format=torch.channels_last),
    "a slice of channels": lambda: bits().view(16, 256)[:, 3:250],
    "every other element": lambda: bits()[1::2],
    "transposed": lambda: bits().view(64, 64)[5:, 2:40].t(),
    "expanded": lambda: bits(64).view(64, 1).expand(64, 64),
    "half precision": lambda: bits(dtype=torch.bfloat16),
    "int8": lambda: torch.randint(1, 9, (4096,), dtype=torch.int8),
    "bool": lambda: torch.ones(4096, dtype=torch.bool),
    "complex": lambda: bits(dtype=torch.complex64),
    "one value in 2000 is not zero": lambda: torch.zeros(20000).index_fill_(0, torch.arange(700, 20000, 2000), 2.0),
    "negative zeros": lambda: torch.full((20000,), -0.0).index_fill_(0, torch.tensor([7001]), 2.0),
    "made under inference_mode": lambda: torch.inference_mode()(bits)(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_whatever_updates_a_whole_tensor_is_seen(snapshots: Any, form: Callable[[], Tensor]) -> None:
    t = form()
    snapshot = snapshots((None, t))
    assert snapshot((None, t))
    with torch.inference_mode():
        version = 0 if t.is_inference() else t._version
        written = t.data[:, :1] if t.dim() == 2 and 0 in t.stride() else t.data
        written.copy_(~written if t.dtype == torch.bool else written * 3)
    assert t.is_inference() or t._version == version, "nothing counted the write"
    assert not snapshot((None, t))
    assert snapshots((None, t))((None, t))


@pytest.mark.parametrize("edge", [0, -1])
def test_the_first_and_the_last_values_are_looked_at(snapshots: Any, edge: int) -> None:
    """Else what is packed while a write goes on would pass for what was written."""
    for t in (bits(), bits().view(64, 64)[1:, 3:50]):
        snapshot = snapshots((t,))
        t.data[edge].mul_(2)
        assert not snapshot((t,))


def test_bytes_are_compared_not_numbers(snapshots: Any) -> None:
    t = torch.full((100,), torch.nan)
    snapshot = snapshots((t,))
    assert snapshot((t,))
    zeros = torch.zeros(100)
    snapshot = snapshots((zeros,))
    zeros.data.neg_()
    assert not snapshot((zeros,))


def test_bytes_between_the_elements_are_nobodys(snapshots: Any) -> None:
    whole = bits().view(64, 64)
    t = whole[:, 8:24]
    snapshot = snapshots((t,))
    for outside in (whole[:, :8], whole[:, 24:]):
        outside.data.mul_(2)
    assert snapshot((t,))


def test_other_tensors_forms_and_numbers_of_tensors_are_seen(snapshots: Any) -> None:
    t, other = bits(), bits()
    snapshot = snapshots((t, None))
    assert snapshot((t, other)), "an absent one is not looked at"
    assert not snapshot((other, None))
    assert not snapshot((None, None))
    assert not snapshot((t,))
    t.data = t.data.view(64, 64)
    assert not snapshot((t, None))


def test_tensors_without_elements_stay_the_same(snapshots: Any) -> None:
    t = torch.empty(0, 3)
    assert snapshots((t,))((t,))
    assert not snapshots((t,))((torch.empty(0, 3),))


@pytest.mark.parametrize("size", [0, 100])
def test_memory_that_a_framework_freed_is_never_read(snapshots: Any, size: int) -> None:
    t = bits(1 << 20)
    before = snapshots((t,))
    t.untyped_storage().resize_(size)
    assert not before((t,))
    after = snapshots((t,))
    assert not after((t,))
    t.untyped_storage().resize_(4 << 20)
    t.data.fill_(1.0)
    assert not after((t,))


def test_another_storage_at_the_same_address_is_another_one(snapshots: Any) -> None:
    """Without a look at values, as on a GPU: `p.data = …` twice may give the second the first's memory."""
    memory = bytearray(64)
    t = nn.Parameter(torch.frombuffer(memory, dtype=torch.float32), requires_grad=False)
    snapshot = snapshots((t,), False)
    t.data.fill_(2.0)
    assert snapshot((t,)), "what remains invisible there"
    address = t.data_ptr()
    t.data = torch.frombuffer(memory, dtype=torch.float32)
    assert t.data_ptr() == address
    assert not snapshot((t,))
    assert snapshots((t,), False)((t,))


@pytest.mark.skipif(native.cpu() is None, reason="no native module")
def test_bad_arguments_of_a_snapshot_are_refused() -> None:
    with pytest.raises(TypeError):
        native.cpu().Snapshots([bits()])
    with pytest.raises(TypeError, match="expected the tensors as a tuple"):
        native.cpu().Snapshots(())([])
    with pytest.raises(TypeError, match=r"expected \(tensors, options, backend, prepared, snapshot\)"):
        native.cpu().CallTable((0,)).remember((bits(),), (), "auto", len)


def shadow(layer: nn.Module) -> None:
    for p in layer.parameters():
        p.data.copy_(torch.randn_like(p))


def assigned_twice(layer: nn.Module) -> None:
    for p in layer.parameters():
        p.data = p.data * 0.5
        p.data = p.data * 0.5


def from_a_vector(layer: nn.Module) -> None:
    values = torch.randn(sum(p.numel() for p in layer.parameters()))
    nn.utils.vector_to_parameters(values, layer.parameters())
    layer(inputs_of(layer))
    values.mul_(2)  # the parameters are views of it


def under_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        for p in layer.parameters():
            p.mul_(2)


def shared_then_written(layer: nn.Module) -> None:
    layer.share_memory()
    layer(inputs_of(layer))
    for p in layer.parameters():
        p.data.mul_(2)


def freed_and_filled(layer: nn.Module) -> None:
    for p in layer.parameters():
        storage, values = p.untyped_storage(), p.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        p.data.copy_(values * 2)


def swapped_with_an_average(layer: nn.Module) -> None:
    average = torch.optim.swa_utils.AveragedModel(layer)
    shadow(layer)
    average.update_parameters(layer)
    for p, mean in zip(layer.parameters(), average.module.parameters(), strict=True):
        kept = p.data.clone()
        p.data.copy_(mean.data)
        mean.data.copy_(kept)


def parametrized(layer: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())


WRITES: dict[str, Callable[[Any], object]] = {
    "p.data.copy_": shadow,
    "p.data.mul_": lambda layer: [p.data.mul_(2) for p in layer.parameters()],
    "the bias alone": lambda layer: layer.bias.data.add_(1),
    "p.data = , twice": assigned_twice,
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(3),
    "DLPack": lambda layer: torch.from_dlpack(layer.weight.detach()).mul_(2),
    "inference_mode": under_inference_mode,
    "vector_to_parameters": from_a_vector,
    "set_": lambda layer: layer.weight.set_(torch.randn_like(layer.weight)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "assign": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
    "shared memory": shared_then_written,
    "a mask": lambda layer: layer.weight.data.mul_(torch.rand_like(layer.weight) > 0.5),
    "one filter": lambda layer: layer.weight.data[-1].mul_(3),
    "freed and filled": freed_and_filled,
    "another dtype and back": lambda layer: (layer.double().float(), layer.weight.data.mul_(2)),
    "an average": swapped_with_an_average,
    "a parametrization": parametrized,
}

LAYERS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "Conv2d": (lambda: layers.Conv2d(16, 24, 3), F.conv2d),
    "PointwiseConv2d": (lambda: layers.PointwiseConv2d(16, 24), F.conv2d),
    "DepthwiseConv2d": (lambda: layers.DepthwiseConv2d(16, 3), lambda *given: F.conv2d(*given, groups=16)),
    "Linear": (lambda: layers.Linear(16, 24), F.linear),
}


def inputs_of(layer: nn.Module) -> Tensor:
    return torch.randn(5, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 6, 5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_layer_computes_with_its_present_weights(snapshots: Any, write: Callable[[Any], object], kind: str) -> None:
    make, function = LAYERS[kind]
    layer = make().requires_grad_(False).eval()
    x = inputs_of(layer)
    with torch.no_grad():
        for _ in range(2):
            assert_close(layer(x), function(x.double(), layer.weight.double(), layer.bias.double()))
        write(layer)
        for _ in range(2):
            assert_close(layer(x), function(x.double(), layer.weight.double(), layer.bias.double()))


def test_a_norm_written_through_data_is_folded_anew(snapshots: Any) -> None:
    block = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24))
    ours, x = layers.DepthwiseSeparableConv2d.from_dense(with_random_norms(block)).eval(), torch.randn(2, 16, 6, 5)
    tensors = [t for t in [*ours.parameters(), *ours.buffers()] if t.is_floating_point()]
    with torch.no_grad():
        for t in tensors:
            ours(x)
            t.data.mul_(1.5)
            assert_close(ours(x), copy.deepcopy(ours)(x))  # a copy folds anew


def test_a_layer_whose_weight_was_freed_names_it(snapshots: Any) -> None:
    layer, x = layers.Conv2d(16, 24, 3).requires_grad_(False).eval(), torch.randn(2, 16, 6, 5)
    layer(x)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight: expected 13824 bytes of values, got a storage that was resized to 0"):
        layer(x)


def test_a_layer_in_use_while_another_thread_writes_ends_with_the_last_weights() -> None:
    layer, x, done = layers.Conv2d(64, 64, 3).requires_grad_(False).eval(), torch.randn(1, 64, 5, 5), threading.Event()

    def write() -> None:
        for i in range(300):
            layer.weight.data.fill_(float(i))
            layer.bias.data = torch.full((64,), float(i))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        layer(x)
    thread.join()
    assert_close(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double()))


@pytest.mark.skipif(native.cpu() is None, reason="no native module")
def test_what_the_cpus_kernels_run_on_is_never_the_parameters_memory() -> None:
    """A prepared call outlives its parameters' memory; only what it reads itself must stay."""
    gc.collect()
    layer, x = layers.PointwiseConv2d(16, 24).requires_grad_(False).eval(), torch.randn(2, 16, 6, 5)
    found = prepared.prepare(*_call_of(layer, x))
    expected = found((x, layer.weight, layer.bias, None, None, None))
    for p in layer.parameters():
        p.data.fill_(torch.nan)
    assert torch.equal(found((x, layer.weight, layer.bias, None, None, None)), expected)


def _call_of(layer: nn.Module, x: Tensor) -> tuple[Any, ...]:
    operator = ops.registry.operator("pointwise_conv2d")
    return operator, (x, layer.weight, layer.bias, None, None, None), ("identity",), "cpu"


class Net(nn.Module):
    """Layers of every backend, operations of torch with weights, a buffer, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.twice = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 8)
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.norm(self.first(x)).relu()).relu()
        y = self.twice(self.grouped(self.twice(y)).tanh()).relu()
        return self.head(y.mean((2, 3))) + self.offset


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: [t.mul_(0.5) for t in tensors_of(m)],
    "through .data": lambda m: [t.data.mul_(0.5) for t in tensors_of(m)],
    "other .data": lambda m: [setattr(t, "data", torch.rand_like(t) + 0.5) for t in tensors_of(m)],
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
    "to": lambda m: m.double().float(),
    "share_memory": lambda m: m.share_memory(),
    "sent to a process": ForkingPickler.dumps,
}
ALL_BACKENDS = [*FUSED_BACKENDS, "onednn", "contiguous"]


@pytest.fixture(scope="module", params=ALL_BACKENDS)
def emission(request: pytest.FixtureRequest) -> tuple[nn.Module, EmittedModel]:
    model = with_random_norms(Net())
    return model, emit_fused(model, torch.randn(2, 3, 7, 6), request.param)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_original_emitted_model_and_plan_have_weights_of_their_own(
    emission: tuple[nn.Module, EmittedModel], change: Callable[[nn.Module], object]
) -> None:
    x = torch.randn(2, 3, 7, 6)
    model, emitted = copy.deepcopy(emission)
    plan = kp.capture(emitted, x)
    present, captured = emitted(x), plan(x)
    change(model)
    assert torch.equal(emitted(x), present)
    assert torch.equal(plan(x), captured)
    changed = model(x)
    change(emitted)
    reused = [torch.full((n,), 1e30) for n in (8, 32, 288, 864, 1024) for _ in range(50)]  # takes freed memory
    assert torch.equal(plan(x), captured)
    assert torch.equal(model(x), changed)
    del reused
    torch.testing.assert_close(emitted(x), emitted.body(x))
    torch.testing.assert_close(kp.capture(emitted, x)(x), emitted.body(x))


def test_emitted_models_share_no_memory_with_the_original(emission: tuple[nn.Module, EmittedModel]) -> None:
    model, emitted = emission
    storages = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not any(t.untyped_storage().data_ptr() in storages for t in [*emitted.parameters(), *emitted.buffers()])


def test_a_plan_shares_what_is_packed_with_the_model_it_was_captured_from() -> None:
    if native.cpu() is None:
        pytest.skip("no native module")
    emitted, x = emit_fused(nn.Conv2d(32, 32, 3).eval(), torch.randn(1, 32, 6, 6), "cpu"), torch.randn(1, 32, 6, 6)
    emitted(x)
    plan, again = kp.capture(emitted, x), kp.capture(emitted, x)
    weight = next(p for p in emitted.parameters() if p.dim() == 4)
    held = [{t.data_ptr() for tensors in p._native._held for t in tensors} for p in (plan, again)]
    assert packing.panels(weight, None).data_ptr() in held[0] & held[1]


@torch.no_grad()
def test_capturing_again_sees_what_no_snapshot_does() -> None:
    """One element set by hand through `.data`: the capture reads every value."""
    if native.cpu() is None:
        pytest.skip("no native module")
    emitted, x = emit_fused(nn.Conv2d(64, 64, 3).eval(), torch.randn(1, 64, 6, 6), "cpu"), torch.randn(1, 64, 6, 6)
    emitted(x)
    kp.capture(emitted, x)
    weight = next(p for p in emitted.parameters() if p.dim() == 4)
    weight.data.view(-1)[1000] += 100.0
    torch.testing.assert_close(kp.capture(emitted, x)(x), F.conv2d(x, weight, emitted.body.get_parameter("bias")))


@torch.no_grad()
def test_weights_that_the_graph_computes_are_computed_at_each_call_of_a_plan() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return ops.pointwise_conv2d(x, self.weight * x.mean(), backend=FUSED_BACKENDS[-1])

    model, x = Scaled().eval(), torch.randn(2, 8, 5, 5)
    plan = kp.capture(kp.emit(model, x, progress=False, cost=prefer(FUSED_BACKENDS[-1])), x)
    for _ in range(3):
        x = torch.randn(2, 8, 5, 5)
        torch.testing.assert_close(plan(x), model(x))


@torch.no_grad()
def test_a_weight_that_a_plan_hands_out_is_a_copy() -> None:
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, self.weight

    x = torch.randn(8)
    plan = kp.capture(kp.emit(Weight().eval(), x, progress=False, cost=prefer(FUSED_BACKENDS[-1])), x)
    expected = plan(x)[0]
    plan(x)[1].zero_()
    assert torch.equal(plan(x)[0], expected)


@torch.no_grad()
def test_int8_and_sparse_layers_follow_their_buffers_too() -> None:
    linear = layers.Int8Linear.from_float(nn.Linear(32, 64).eval())
    sparse = layers.BlockSparseLinear(64, 48, block=(16, 16), density=0.5).eval()
    model, x = nn.Sequential(linear, sparse).eval(), torch.randn(4, 32)
    emitted = emit_fused(model, x)
    plan = kp.capture(emitted, x)
    captured = plan(x)
    torch.testing.assert_close(emitted(x), captured)
    for t in (linear.weight, linear.weight_scale, linear.bias, sparse.blocks, sparse.bias):
        before = model(x)
        t.data.neg_()
        assert not torch.equal(model(x), before)
        torch.testing.assert_close(model(x), sparse.to_dense()(copy.deepcopy(linear)(x)))
    for t in emitted.buffers():
        if t.dtype == torch.float32:
            t.data.mul_(2)
    torch.testing.assert_close(emitted(x), emitted.body(x))
    assert torch.equal(plan(x), captured)
