"""Sub-graphs, written buffers, shared memory and other things of exported graphs that are no plain operations: they
emit and capture, and compute what the model does."""

import collections
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from emitting import ops_of, prefer
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import kernelpress as kp
from kernelpress.emit.tolerance import relative_error
from kernelpress.runtime.torch_private import associative_scan, map_rows, pytree, scan, while_loop
from kernelpress.trace import trace

pytestmark = pytest.mark.usefixtures("own_cache")

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Fields:
    image: Tensor
    total: Tensor


torch.export.register_dataclass(Fields, serialized_type_name="kernelpress.tests.Fields")


@torch.library.custom_op("kernelpress_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


@bump.register_fake
def _(x: Tensor) -> None:
    pass


class Net(nn.Module):
    """A stem, a projection and a head, put together by any function; with buffers that it may write."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.project, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)
        self.register_buffer("average", torch.rand(8))
        self.register_buffer("steps", torch.tensor(0))
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)

    def stem(self, x):
        return F.relu(self.norm(self.conv(x)))


def images(*sizes):
    return torch.randn(*(sizes or (2, 3, 8, 8)))


def assert_alike(got, expected, bound=1e-5):
    leaves, spec = pytree.tree_flatten(expected)
    own, own_spec = pytree.tree_flatten(got)
    assert own_spec == spec
    for a, b in zip(own, leaves, strict=True):
        if isinstance(b, Tensor):
            assert relative_error(a, b) < bound
        else:
            assert a == b


def emitted_and_captured(model, *inputs, bound=1e-5, layers=None):
    """Emits the model onto our layers, and compares graph and plan with it; its own buffers stay as they were."""
    model = model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = copy.deepcopy(model)(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))
    emitted = kp.emit(model, inputs, progress=False, cost=prefer("reference"))
    assert not emitted.record.kept_original, emitted.record.reason
    if layers is not None:
        assert sum("conv2d" in op for op in ops_of(emitted) if not op.startswith("aten")) == layers
    plan = kp.capture(emitted, *inputs)
    with torch.no_grad():
        assert_alike(plan(*inputs), expected, bound)
        assert_alike(emitted(*inputs), expected, bound)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return emitted, plan


def autocast_off(m, x):
    with torch.autocast("cpu", enabled=False):
        y = m.project(m.stem(x).float())
    return m.head(y)


def autocast_off_inside_on(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.stem(x)
        with torch.autocast("cpu", enabled=False):
            y = m.project(y.float())
    return m.head(y.float())


def gradients_on_and_off(m, x):
    with torch.enable_grad():
        y = m.stem(x)
        with torch.no_grad():
            z = m.project(y)
    return m.head(y + z), z


def inference(m, x):
    with torch.inference_mode():
        y = m.project(m.stem(x))
    return m.head(y)


def checkpointed(m, x):
    return m.head(checkpoint(lambda t: m.project(m.stem(t)), x, use_reentrant=False))


IS_OLD_TORCH = torch.__version__ < "2.12"


def compiled_region(m, x):
    region = torch.compiler.nested_compile_region(lambda t: m.project(t).relu())
    return m.head(region(region(m.stem(x))))


@pytest.mark.parametrize(
    ("function", "layers", "bound"),
    [
        (autocast_off, 3, 1e-5),
        (autocast_off_inside_on, 3, 1e-2),
        (gradients_on_and_off, 3, 1e-5),
        (inference, 3, 1e-5),
        (checkpointed, 3, 1e-5),
        (compiled_region, 2 if IS_OLD_TORCH else 4, 1e-5),
    ],
)
def test_layers_in_regions_that_only_set_a_mode_are_emitted_too(function, layers, bound):
    emitted, _ = emitted_and_captured(Net(function), images(), bound=bound, layers=layers)
    stay = function is compiled_region and IS_OLD_TORCH  # PyTorch did not put them in line.
    assert [note.partition(" ")[0] for note in emitted.record.notes] == ["invoke_subgraph"] * 2 * stay


no_aliases = pytest.mark.skipif(IS_OLD_TORCH, reason="torch.cond of this torch takes no branch that returns an operand")


def branches(m, x):
    return m.head(torch.cond(x.sum() > 0, lambda t: m.project(t), lambda t: t.relu() + 1, (m.stem(x),)))


def branches_in_branches(m, x):
    def inner(t):
        return torch.cond(t.mean() > 0.5, lambda u: m.project(u), lambda u: u * 2, (t,))

    return torch.cond(x.sum() > 0, inner, lambda t: t.sin(), (m.stem(x),))


def operand_returned(m, x):
    return m.head(torch.cond(x.sum() > 0, lambda t: m.project(t), lambda t: t, (m.stem(x),)))


def returned_twice(m, x):
    return torch.cond(x.sum() > 0, lambda t: (t + 1, t.clone()), lambda t: (t, t), (m.stem(x),))


def looped(m, x):
    count, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, m.project(y)), (torch.tensor(0), m.stem(x)))
    return m.head(y), count


def mapped(m, x):
    return m.head(map_rows(lambda row, average: m.project(row[None])[0] + average.sum(), m.stem(x), m.average))


def scanned(m, x):
    return scan(lambda a, b: (a + b, a * b), torch.zeros(8, 8), m.stem(x).mean(0), dim=0)


def scanned_by_pairs(m, x):
    return associative_scan(lambda a, b: a + b, m.stem(x), dim=2, combine_mode="generic")


def mapped_by_vmap(m, x):
    return m.head(torch.vmap(lambda row: m.project(row[None])[0] * row.sum())(m.stem(x)))


def written_by_a_custom_operation(m, x):
    y = m.stem(x)
    torch.ops.kernelpress_tests.bump(y)
    return m.project(y)


def flexible_attention(m, x):
    rows = m.stem(x).reshape(2, 1, 8, 64).transpose(-1, -2)
    return flex_attention(rows, rows, rows, score_mod=lambda score, b, h, i, j: score + (i - j))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (branches, "cond"),
        (branches_in_branches, "cond"),
        pytest.param(operand_returned, "cond", marks=no_aliases),
        pytest.param(returned_twice, "cond", marks=no_aliases),
        (looped, "while_loop"),
        (mapped, "map_impl"),
        (scanned, "scan"),
        (scanned_by_pairs, None),
        (mapped_by_vmap, None),
        (written_by_a_custom_operation, "auto_functionalized_v2"),
        (flexible_attention, "flex_attention"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_sub_graphs_stay_as_they_came_and_the_record_says_so(function, operator):
    emitted, _ = emitted_and_captured(Net(function), images())
    assert [note.split()[0] for note in emitted.record.notes] == ([operator] if operator else [])
    assert all(note in emitted.summary() for note in emitted.record.notes)


def test_both_branches_of_an_emitted_model_and_a_plan_compute_what_the_model_does():
    model, x = Net(branches).eval(), images()
    emitted, plan = emitted_and_captured(model, x)
    with torch.no_grad():
        results = [model(y) for y in (x.abs(), -x.abs())]
        for run in (emitted, plan):
            for y, expected in zip((x.abs(), -x.abs()), results, strict=True):
                assert_alike(run(y), expected)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(lambda: images(2, 1, 8, 8).expand(2, 3, 8, 8), id="grey to three channels"),
        pytest.param(lambda: images(1, 3, 8, 8).expand(4, 3, 8, 8), id="one image for a batch"),
        pytest.param(lambda: images(1, 1, 1, 1).expand(2, 3, 8, 8), id="one number"),
        pytest.param(lambda: images(2, 3, 12, 40).unfold(3, 8, 4)[:, :, 0], id="overlapping windows"),
        pytest.param(lambda: images(2, 6, 16, 16)[:, ::2, 1::2, ::2], id="every other row"),
        pytest.param(lambda: images(2, 8, 8, 3).permute(0, 3, 1, 2), id="channels last"),
        pytest.param(lambda: torch.complex(images(), images()).conj().imag, id="negated"),
    ],
)
def test_inputs_may_lie_in_memory_as_they_like(x):
    x = x()
    emitted, _ = emitted_and_captured(Net(lambda m, x: m.head(m.stem(x))), x)
    assert relative_error(emitted(x.contiguous()), emitted(x)) < 1e-5


@pytest.mark.slow
def test_measured_emission_takes_expanded_inputs_and_intermediates():
    def tokens(m, x):
        y = m.stem(x).flatten(2).transpose(1, 2)
        return F.linear(
            torch.cat([m.average.expand(y.shape[0], 1, 8), y.mean(1, keepdim=True).expand(-1, 64, -1)], 1),
            m.head.weight[:, :, 0, 0],
        )

    model, x = Net(tokens).eval(), images(2, 1, 8, 8).expand(2, 3, 8, 8)
    emitted = kp.emit(model, x, progress=False, cache=False)
    assert_alike(kp.capture(emitted, x)(x), model(x))


def memory_shared(m, x):
    y = m.stem(x)
    return y.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), y.unfold(2, 4, 2), m.project(y)[:, :, ::2]


def strides_told(m, x):
    return torch.as_strided(m.stem(x), (2, 4, 3, 3), (512, 64, 8, 1)), torch.as_strided(x, (2, 3), (192, 64))


def pairs_as_complex(m, x):
    return torch.view_as_complex(m.stem(x).reshape(2, 8, 8, 4, 2)) * 2


def spectrum(m, x):
    y = torch.fft.rfft2(m.stem(x))
    return torch.fft.irfft2(y * torch.exp(1j * y.angle())), y.conj(), y.conj().imag, y.conj().imag * 2, y.real


def bits(m, x):
    y = m.project(m.stem(x))
    ones = ((y * 0).to(torch.int32) + 0x3F800000).view(torch.float32)
    return ones + y, ones, torch.view_as_real(torch.fft.fft(y)) + 1, x.view(torch.int32) >> 23


def structured(m, x):
    y = m.stem(x)
    return {"a": y, "n": 3, "none": None, "name": "y", "nest": (m.project(y), [True, 2.5])}


def empty_and_single(m, x):
    return m.stem(x)[:, :0], m.stem(x).sum(), m.project(m.stem(x))[:0], torch.tensor(3.0)


def inputs_and_constants(m, x):
    y = m.stem(x)
    return x, x[:, :1], x.transpose(1, 2), y, y, y.view(2, -1), m.average, m.average[:4], m.conv.weight


@pytest.mark.parametrize(
    "function",
    [
        *(memory_shared, strides_told, pairs_as_complex, spectrum, bits),
        *(structured, empty_and_single, inputs_and_constants),
        pytest.param(lambda m, x: x, id="the input itself"),
        pytest.param(lambda m, x: x.relu() + 1, id="no layer"),
        pytest.param(lambda m, x: (m.average + 1, m.conv.weight * 2), id="constants alone"),
        pytest.param(lambda m, x: Pair(m.stem(x), m.project(m.stem(x))), id="a named tuple"),
        pytest.param(lambda m, x: Fields(m.stem(x), x.sum()), id="a data class"),
        pytest.param(lambda m, x: m.stem(x).flatten(1).topk(3), id="a result of torch's own type"),
    ],
)
def test_results_of_every_kind_are_those_of_the_model(function):
    emitted_and_captured(Net(function), images())


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (lambda: torch.eye(6).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(6).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.eye(6).to_mkldnn(), "torch._mkldnn"),
        (lambda: torch.quantize_per_tensor(torch.eye(6), 0.1, 0, torch.quint8), "torch.quint8"),
        (lambda: torch.eye(6, device="meta"), "a tensor on the meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_inputs_that_are_not_dense_are_refused(x, found):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, scale, nest):
            x = nest[0]
            return self.linear(x.dequantize() if x.is_quantized else x.to_dense()) * scale

    model, scale = Dense().eval(), torch.ones(())
    with pytest.raises(ValueError, match=rf"example_inputs: expected dense tensors.* got {found} at position 1"):
        kp.emit(model, (scale, [x()]), progress=False)
    dense = torch.eye(6)
    plan = kp.capture(kp.emit(model, (scale, [dense]), progress=False, cost=prefer("reference")), scale, [dense])
    with pytest.raises(ValueError, match=r"nest\[0\]: expected "):
        plan(scale, [x()])


def test_a_plan_gives_away_copies_of_its_constants_and_views_that_later_calls_leave_alone():
    x = images()
    _, plan = emitted_and_captured(Net(lambda m, x: (m.average, torch.fft.fft(m.stem(x)).conj().imag)), x)
    constant, imaginary = plan(x)
    before = constant.clone(), imaginary.clone()
    constant.zero_()
    again = plan(torch.randn_like(x))
    assert torch.equal(again[0], before[0])
    assert torch.equal(imaginary, before[1])


def count_by_adding(m, x):
    m.steps.add_(1)
    return m.stem(x) * m.steps


def count_by_assigning(m, x):
    m.steps = m.steps + 1
    return m.stem(x) * m.steps


def average_of_all_calls(m, x):
    y = m.stem(x)
    m.average.copy_(0.9 * m.average + 0.1 * y.mean((0, 2, 3)))
    return m.project(y) + m.average.view(1, -1, 1, 1)


def part_of_a_buffer(m, x):
    y = m.stem(x)
    m.average[2:4] += y.mean()
    return y + m.average.view(1, -1, 1, 1)


def statistics_of_the_batch(m, x):
    y = F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, training=True)
    return m.project(y) + m.norm.running_mean.sum()


def counted_in_a_region(m, x):
    with torch.autocast("cpu", enabled=False):
        m.steps.add_(1)
        return m.stem(x) * m.steps


@pytest.mark.parametrize(
    "function",
    [
        count_by_adding,
        count_by_assigning,
        average_of_all_calls,
        part_of_a_buffer,
        statistics_of_the_batch,
        counted_in_a_region,
    ],
)
def test_written_buffers_are_the_emitted_models_own_and_go_on_from_call_to_call(function):
    check_written_buffers(function, cost=prefer("reference"))


@pytest.mark.slow
def test_timing_leaves_written_buffers_as_they_were():
    check_written_buffers(average_of_all_calls, cost=None)


def check_written_buffers(function, cost):
    model, batches = Net(function).eval(), [images() for _ in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    emitted = kp.emit(model, batches[0], progress=False, cache=False, cost=cost)
    plan = kp.capture(emitted, batches[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = [model(x) for x in batches]
        assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for run in (emitted, plan):
            for x, y in zip(batches, expected, strict=True):
                assert_alike(run(x), y)


def test_writes_into_inputs_leave_the_callers_tensor_alone():
    def forward(m, x):
        x[:, 0].add_(1)
        x.mul_(2)
        return m.stem(x)

    x = images()
    before = x.clone()
    emitted_and_captured(Net(forward), x)
    assert torch.equal(x, before)


def test_the_traced_graph_writes_to_buffers_of_its_own():
    model = Net(count_by_adding).eval()
    traced = trace(model, images())
    traced(images())
    traced(images())
    assert int(traced.steps) == 2
    assert int(model.steps) == 0


def test_writes_that_pytorch_cannot_undo_are_refused_by_name():
    def forward(m, x):
        return F.instance_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, use_input_stats=True)

    with pytest.raises(ValueError, match=r"writes that can be made functional, got aten\.instance_norm"):
        trace(Net(forward), images())


def test_a_bias_folded_from_one_number_is_dense():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False).double(), Doubled())
    emitted, _ = emitted_and_captured(model, images().double())
    assert [p.stride() for p in emitted.parameters() if p.dim() == 1] == [(1,)]


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_under_autocast_are_judged_by_their_own_dtype(dtype):
    def forward(m, x):
        with torch.autocast("cpu", dtype=dtype):
            y = m.project(m.stem(x))
        return m.head(y.float())

    model = Net(forward)
    nn.init.uniform_(model.norm.running_var, 0.5, 1.5)
    nn.init.normal_(model.norm.weight)
    emitted, _ = emitted_and_captured(model, images(), bound=2e-2, layers=3)
    assert emitted.record.error < 2e-2
    refused = kp.emit(model, images(), progress=False, cost=prefer("reference"), tolerance=1e-6)
    assert refused.record.kept_original


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.conv, self.rows = nn.Conv2d(3, 8, 1), kind(8, 16, batch_first=True, **options)

    def forward(self, x):
        return self.rows(self.conv(x).flatten(2).transpose(1, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight, self.again = self.first.weight, self.first

    def forward(self, x):
        return self.again(self.second(self.first(x).relu()).relu())


def attention(m, x):
    y = m.stem(x).flatten(2).mT[:, None]
    return F.scaled_dot_product_attention(y, y, y, is_causal=True)


def sampled_by_itself(m, x):
    y = m.stem(x)
    return F.grid_sample(y, m.head(y).permute(0, 2, 3, 1)[..., :2], align_corners=False)


def chosen_and_written_by_index(m, x):
    y = m.stem(x).index_put((torch.tensor([0, 1]),), torch.tensor(1.0))
    return m.project(y).index_select(1, torch.tensor([3, 1, 1]))[:, [0, 2]]


def padded(m, x):
    y = m.stem(x)
    return [m.project(F.pad(y, (1, 2, 3, 0), mode=mode)) for mode in ("constant", "reflect", "replicate", "circular")]


def resized(m, x):
    modes = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    return [F.interpolate(m.stem(x), size=(5, 13), mode=mode) for mode in modes]


def unfolded(m, x):
    return F.fold(F.unfold(m.stem(x), 3, padding=1), (8, 8), 3, padding=1)


def contracted(m, x):
    return torch.einsum("bchw,dc->bdhw", m.stem(x), m.project.weight[:, :, 0, 0])


FUNCTIONS = [attention, sampled_by_itself, chosen_and_written_by_index, padded, resized, unfolded, contracted]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Recurrent(nn.LSTM), id="LSTM"),
        pytest.param(lambda: Recurrent(nn.GRU, bidirectional=True, num_layers=2), id="GRU"),
        pytest.param(Tied, id="tied weights"),
        *(pytest.param(lambda function=function: Net(function), id=function.__name__) for function in FUNCTIONS),
    ],
)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_operations_without_layers_of_ours_pass_through(model):
    emitted_and_captured(model(), images())
