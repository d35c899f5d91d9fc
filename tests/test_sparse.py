"""Block-CSR weights: format, ops against the float64 reference, layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MAKERS, absolute, assert_close, channels_last, exact, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelpress import ops
from kernelpress.kernels.reference import ACTIVATIONS, activate
from kernelpress.layers import BlockSparseConv2d, BlockSparseLinear
from kernelpress.ops.sparse_blocks import BlockCsr, conv_matrix, conv_weight


def random_weight(c_out: int, c_in: int, block: tuple[int, int], density: float = 0.4) -> BlockCsr:
    rows, columns = -(-c_out // block[0]), -(-c_in // block[1])
    return BlockCsr.from_dense(torch.randn(c_out, c_in), block, mask=torch.rand(rows, columns) < density)


def arguments(weight: BlockCsr) -> tuple[Tensor, Tensor, Tensor]:
    return weight.row_offsets, weight.columns, weight.blocks


def covered(weight: BlockCsr) -> Tensor:
    """Element by element, which values a block covers."""
    r, c = weight.block
    return (
        BlockCsr(weight.row_offsets, weight.columns, torch.ones(len(weight.blocks), r, c), weight.shape).to_dense() > 0
    )


class TestFormat:
    @pytest.mark.parametrize("shape", [(6, 8), (7, 9), (1, 1)])
    @pytest.mark.parametrize("block", [(1, 1), (2, 4), (4, 1), (16, 16)])
    def test_blocks_that_are_not_all_zero_give_the_weight_back(
        self, shape: tuple[int, int], block: tuple[int, int]
    ) -> None:
        weight = torch.randn(shape) * (torch.rand(shape) < 0.3)
        sparse = BlockCsr.from_dense(weight, block)
        assert torch.equal(sparse.to_dense(), weight)
        assert all(bool(entry.any()) for entry in sparse.blocks)

    def test_a_mask_keeps_its_blocks_only(self) -> None:
        mask = torch.tensor([[True, False, True], [False, False, False]])
        sparse = BlockCsr.from_dense(torch.ones(4, 6), (2, 2), mask=mask)
        assert sparse.row_offsets.tolist() == [0, 2, 2]
        assert sparse.columns.tolist() == [0, 2]
        assert torch.equal(sparse.to_dense(), mask.repeat_interleave(2, 0).repeat_interleave(2, 1).float())

    def test_density_keeps_the_blocks_of_largest_norm(self) -> None:
        weight = torch.full((4, 4), 0.01)
        weight[0, 3], weight[2:, 0:2] = 3.0, 1.0
        assert BlockCsr.from_dense(weight, 2, density=0.5).columns.tolist() == [1, 0]
        # By L1 the block of ones (4) comes before the single 3, by L2 (2) after it.
        assert BlockCsr.from_dense(weight, 2, density=0.25, norm=1).row_offsets.tolist() == [0, 0, 1]
        assert BlockCsr.from_dense(weight, 2, density=0.25, norm=2).row_offsets.tolist() == [0, 1, 1]

    @pytest.mark.parametrize(("density", "count"), [(0.0, 0), (0.001, 1), (0.5, 8), (1.0, 16)])
    def test_density_counts_blocks(self, density: float, count: int) -> None:
        sparse = BlockCsr.from_dense(torch.randn(8, 8), 2, density=density)
        assert len(sparse.blocks) == count
        assert sparse.density == count / 16

    def test_a_convolution_weight_becomes_a_matrix_and_back(self) -> None:
        weight = torch.randn(5, 6, 3, 2)
        matrix = conv_matrix(weight, 4)
        assert matrix.shape == (5, 6 * 8)
        assert torch.equal(matrix.view(5, 3, 2, 8)[:, 2, 1, :6], weight[:, :, 2, 1])
        assert torch.equal(conv_weight(matrix, 6, (3, 2)), weight)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"block": (0, 2)}, r"block: expected two integers of at least 1, got \[0, 2\]"),
            ({"block": (1, 2, 3)}, r"block: expected two integers of at least 1, got \[1, 2, 3\]"),
            ({"density": 1.5}, r"density: expected a fraction of blocks from 0 to 1, got 1\.5"),
            ({"density": float("nan")}, r"density: expected a fraction"),
            ({"density": 0.5, "norm": 0}, r"norm: expected a positive order, got 0"),
            (
                {"mask": torch.ones(2, 3, dtype=torch.bool)},
                r"mask: expected bool \[2, 2\], one value per 2×2 block, got",
            ),
            ({"mask": torch.ones(2, 2)}, r"mask: expected bool \[2, 2\].*got torch\.float32"),
            ({"mask": torch.ones(2, 2, dtype=torch.bool), "density": 0.5}, "mask, density: expected at most one"),
        ],
        ids=lambda value: None if isinstance(value, str) else "-".join(value),
    )
    def test_a_bad_argument_is_named(self, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BlockCsr.from_dense(torch.randn(4, 4), **{"block": (2, 2), **keywords})

    @pytest.mark.parametrize(
        ("offsets", "columns", "message"),
        [
            ([0, 1], [0, 1, 0], r"row_offsets: expected \[3\] for 3 blocks in 2 rows, got \[2\]"),
            ([0, 2, 3], [0, 1], r"columns: expected \[3\] for 3 blocks in 2 rows, got \[2\]"),
            ([0, 2, 2], [0, 1, 0], r"row_offsets: expected to rise from 0 to 3.*got from 0 to 2"),
            ([1, 2, 3], [0, 1, 0], r"row_offsets: .*got from 1 to 3"),
            ([0, 4, 3], [0, 1, 0], r"row_offsets: .*falling in between"),
            ([0, 2, 3], [0, 2, 0], r"columns: expected block columns from 0 to 1, got 0 to 2"),
            ([0, 2, 3], [0, -1, 0], r"columns: .* got -1 to 0"),
            ([0, 2, 3], [1, 0, 0], r"columns: expected to ascend within every block row"),
            ([0, 2, 3], [1, 1, 0], r"columns: expected to ascend within every block row"),
        ],
    )
    def test_a_bad_structure_is_named(self, offsets: list[int], columns: list[int], message: str) -> None:
        structure = [torch.tensor(index, dtype=torch.int32) for index in (offsets, columns)]
        with pytest.raises(ValueError, match=message):
            BlockCsr(*structure, torch.zeros(3, 2, 2), (4, 4))
        if "[" not in message.partition("got")[0]:
            with pytest.raises(ValueError, match=message):
                ops.sparse_matmul(torch.zeros(1, 4), *structure, torch.zeros(3, 2, 2))

    def test_indices_of_another_dtype_are_refused(self) -> None:
        weight = random_weight(4, 4, (2, 2), 1.0)
        with pytest.raises(TypeError, match=r"columns: expected int32, got torch\.int64"):
            BlockCsr(weight.row_offsets, weight.columns.long(), weight.blocks, (4, 4))
        with pytest.raises(TypeError, match=r"row_offsets: expected torch\.int32, got torch\.int64"):
            ops.sparse_matmul(torch.zeros(1, 4), weight.row_offsets.long(), weight.columns, weight.blocks)


sizes = st.sampled_from([1, 2, 3, 5, 8, 17])


@settings(max_examples=60)
@given(
    rows=st.lists(sizes, max_size=2),
    c_in=sizes,
    c_out=sizes,
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seeds=st.random_module(),
)
def test_sparse_matmul_is_linear_with_the_dense_weight(
    rows: list[int],
    c_in: int,
    c_out: int,
    block: tuple[int, int],
    density: float,
    activation: str,
    parts: tuple[bool, bool, bool],
    seeds: object,
) -> None:
    weight, x = random_weight(c_out, c_in, block, density), torch.randn(*rows, c_in)
    bias, scale = (torch.rand(c_out) + 0.5 if part else None for part in parts[:2])
    residual = torch.randn(*rows, c_out) if parts[2] else None
    out = ops.sparse_matmul(
        x, *arguments(weight), bias, scale, residual, out_features=c_out, activation=activation, backend="reference"
    )
    tensors = [x, weight.to_dense(), bias, scale, residual]
    assert_close(out, activate(dense_matmul(*exact(tensors)), activation), dense_matmul(*exact(absolute(tensors))))


def dense_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> Tensor:
    scaled = F.linear(x, weight) * (1 if scale is None else scale)
    return scaled + (0 if bias is None else bias) + (0 if residual is None else residual)


@settings(max_examples=60)
@given(
    batch=st.integers(0, 2),
    c_in=sizes,
    c_out=sizes,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    make=st.sampled_from(MAKERS),
    seeds=st.random_module(),
)
def test_sparse_conv2d_is_conv2d_with_the_dense_weight(
    batch: int,
    c_in: int,
    c_out: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    block: tuple[int, int],
    make: Any,
    seeds: object,
) -> None:
    x = make(batch, c_in, 6, 7)
    dense = torch.randn(c_out, c_in, *kernel)
    matrix = conv_matrix(dense, block[1])
    weight = random_weight(*matrix.shape, block)
    weight = BlockCsr.from_dense(matrix * covered(weight), block)
    dense = conv_weight(weight.to_dense(), c_in, kernel)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    bias = torch.randn(c_out)
    out = ops.sparse_conv2d(x, *arguments(weight), bias, kernel_size=kernel, out_channels=c_out, **geometry)
    assert out.is_contiguous(memory_format=torch.channels_last)
    tensors = [x, dense, bias]
    expected, terms = (F.conv2d(*exact(given), **geometry) for given in (tensors, absolute(tensors)))
    assert_close(out, expected, terms)


@pytest.mark.parametrize("output_dtype", [None, torch.float16])
def test_int8_products_are_summed_exactly(output_dtype: torch.dtype | None) -> None:
    x = torch.randint(-128, 128, (3, 40), dtype=torch.int8)
    dense = torch.randint(-128, 128, (9, 40), dtype=torch.int8)
    weight = BlockCsr.from_dense(dense, (4, 8), density=0.5)
    scale, bias = torch.rand(9) / 64, torch.randn(9)
    options = {"out_features": 9, "activation": "relu", "output_dtype": output_dtype}
    out = ops.sparse_matmul(x, *arguments(weight), bias, scale, **options)
    exact = x.long() @ weight.to_dense().long().T
    expected = (exact.double() * scale + bias.double()).relu().float().to(output_dtype or torch.float32)
    assert out.dtype == expected.dtype
    assert_close(out, expected)
    pixels = x.T.reshape(1, 40, 1, 3).contiguous(memory_format=torch.channels_last)
    options["out_channels"] = options.pop("out_features")
    again = ops.sparse_conv2d(pixels, *arguments(weight), bias, scale, **options)
    assert torch.equal(again[0, :, 0].T, out)


def test_int8_without_a_scale_and_other_dtypes_are_refused() -> None:
    x, weight = torch.zeros(1, 4, dtype=torch.int8), random_weight(4, 4, (2, 2), 1.0)
    blocks = weight.blocks.to(torch.int8)
    with pytest.raises(ValueError, match=r"scale: expected \[C_out\], input scale times weight scale"):
        ops.sparse_matmul(x, weight.row_offsets, weight.columns, blocks)
    scale = torch.ones(4)
    with pytest.raises(TypeError, match=r"blocks: expected torch\.int8, got torch\.float32"):
        ops.sparse_matmul(x, *arguments(weight), None, scale)
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32, got torch\.float16"):
        ops.sparse_matmul(x, weight.row_offsets, weight.columns, blocks, scale.half(), scale)
    with pytest.raises(TypeError, match=r"output_dtype: expected torch\.float32 or"):
        ops.sparse_matmul(x, weight.row_offsets, weight.columns, blocks, None, scale, output_dtype=torch.int8)
    with pytest.raises(TypeError, match="output_dtype: expected None or the dtype of x"):
        ops.sparse_matmul(torch.zeros(1, 4), *arguments(weight), output_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"blocks: expected the dtype of x, torch\.float64"):
        ops.sparse_matmul(torch.zeros(1, 4).double(), *arguments(weight))


X, W = torch.zeros(2, 8), random_weight(8, 8, (4, 4), 1.0)
BAD = {
    "form of blocks": ((X, W.row_offsets, W.columns, W.blocks[0]), {}, r"blocks: expected \[nnz, r, c\] with r, c ≥ 1"),
    "number of columns": ((X, W.row_offsets, W.columns[:2], W.blocks), {}, r"columns: expected \[nnz\] with nnz = 4"),
    "no row": ((X, W.row_offsets[:1], W.columns, W.blocks), {}, r"row_offsets: expected \[rows \+ 1\]"),
    "width of x": ((X[:, :4], *arguments(W)), {}, "columns: expected block columns from 0 to 0, got 0 to 1"),
    "too many outputs": ((X, *arguments(W)), {"out_features": 9}, "out_features: expected 5 to 8 for 2 rows of blocks"),
    "too few outputs": ((X, *arguments(W)), {"out_features": 4}, "out_features: expected 5 to 8 for 2 rows of blocks"),
    "bias": ((X, *arguments(W), torch.zeros(8)), {"out_features": 7}, r"bias: expected \[7\]"),
    "activation": ((X, *arguments(W)), {"activation": "tanh"}, "activation: expected one of identity"),
    "residual": ((X, *arguments(W), None, None, X[:1]), {}, "residual: expected the shape of the output"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_argument_is_named(case: tuple[Any, dict[str, Any], str]) -> None:
    tensors, options, message = case
    with pytest.raises(ValueError, match=message):
        ops.sparse_matmul(*tensors, **options)


def test_a_bad_convolution_is_named() -> None:
    pixels = torch.zeros(1, 8, 5, 5)
    with pytest.raises(ValueError, match=r"x: expected \[N, C, H, W\]"):
        ops.sparse_conv2d(X, *arguments(W))
    with pytest.raises(ValueError, match="kernel_size: expected two integers of at least 1"):
        ops.sparse_conv2d(pixels, *arguments(W), kernel_size=(0, 1))
    with pytest.raises(ValueError, match="x: expected a height of at least 7"):
        ops.sparse_conv2d(pixels, *arguments(W), kernel_size=(7, 1))
    with pytest.raises(ValueError, match="columns: expected block columns from 0 to 0, got 0 to 1"):
        ops.sparse_conv2d(pixels[:, :4], *arguments(W))
    with pytest.raises(TypeError, match=r"out_channels: expected an integer or None, got 8\.0"):
        ops.sparse_conv2d(pixels, *arguments(W), out_channels=8.0)


def test_changed_indices_are_looked_at_again() -> None:
    row_offsets, columns, blocks = arguments(random_weight(4, 4, (2, 2), 1.0))
    ops.sparse_matmul(torch.zeros(1, 4), row_offsets, columns, blocks)
    columns[0] = 7
    with pytest.raises(ValueError, match="columns: expected block columns"):
        ops.sparse_matmul(torch.zeros(1, 4), row_offsets, columns, blocks)


def test_flops_count_stored_blocks_only() -> None:
    weight = random_weight(12, 16, (4, 4), 0.5)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_matmul(torch.randn(3, 5, 16), *arguments(weight))
        ops.sparse_conv2d(torch.randn(2, 16, 6, 6), *arguments(weight), stride=2)
    assert counter.get_total_flops() == 2 * (15 + 18) * 16 * len(weight.blocks)


def example(op: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Small arguments that use every tensor of the op."""
    positions = 6 if op == "sparse_conv2d" else 1
    row_offsets, columns, blocks = arguments(random_weight(6, positions * 9, (4, 3), 0.6))
    x, shape = torch.randn(2, 4, 7), (2, 4, 6)
    options: dict[str, Any] = {"activation": "silu", "out_features": 6}
    if op == "sparse_conv2d":
        x, shape = torch.randn(2, 7, 5, 6), (2, 6, 2, 6)
        options |= {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 1], "dilation": [2, 2]}
        options["out_channels"] = options.pop("out_features")
    parts = (torch.randn(6), torch.rand(6) + 0.5, torch.randn(shape))
    floats = [t.to(dtype) for t in (x, blocks, *parts)]
    return [floats[0], row_offsets, columns, *floats[1:]], options


both = pytest.mark.parametrize("op", ["sparse_matmul", "sparse_conv2d"])


@pytest.mark.slow
@both
@pytest.mark.parametrize("with_gradient", [False, True], ids=["no gradient", "gradient"])
def test_torch_opcheck_finds_no_fault(op: str, with_gradient: bool) -> None:
    tensors, options = example(op)
    tensors = [t.requires_grad_(with_gradient) if t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(getattr(torch.ops.kernelpress, op).default, tuple(tensors), options)
    torch.library.opcheck(getattr(torch.ops.kernelpress, op).default, tuple(tensors[:4]), options)


@both
def test_gradients_are_those_of_finite_differences(op: str) -> None:
    tensors, options = example(op, torch.float64)
    floats = tuple(t.requires_grad_() for t in tensors if t.is_floating_point())

    def call(x: Tensor, *others: Tensor) -> Tensor:
        return getattr(torch.ops.kernelpress, op)(x, *tensors[1:3], *others, **options)

    assert torch.autograd.gradcheck(call, floats, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, floats, fast_mode=True)


@both
def test_a_symbolic_batch_has_no_condition(op: str) -> None:
    tensors, options = example(op)

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(torch.ops.kernelpress, op)(x, *tensors[1:6], **options)

    with torch.no_grad():
        exported = torch.export.export(Call(), (tensors[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.cat([tensors[0]] * 3)
        assert torch.equal(exported.module()(more), Call()(more))


LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), BlockSparseLinear.from_dense, (2, 3, 10)),
    "linear without bias": (lambda: nn.Linear(8, 8, bias=False), BlockSparseLinear.from_dense, (3, 8)),
    "conv": (lambda: nn.Conv2d(6, 9, 3, 2, 1), BlockSparseConv2d.from_dense, (2, 6, 9, 7)),
    "conv same": (
        lambda: nn.Conv2d(6, 9, (2, 3), padding="same", dilation=(1, 2), bias=False),
        BlockSparseConv2d.from_dense,
        (2, 6, 5, 7),
    ),
    "pointwise": (lambda: nn.Conv2d(8, 8, 1), BlockSparseConv2d.from_dense, (2, 8, 5, 3)),
}
layers = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


def pruned(case: Any, block: tuple[int, int] = (4, 4), density: float = 0.5) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module whose weight has zeros where the layer made of it has no block, the layer, an input."""
    make, convert, shape = case
    layer = convert(make(), block, density=density)
    return layer.to_dense(), layer, torch.randn(*shape)


class TestLayers:
    @layers
    def test_from_dense_computes_what_the_pruned_module_does(self, case: Any) -> None:
        module, layer, x = pruned(case)
        assert 0 < (module.weight == 0).float().mean() < 1
        with torch.no_grad():
            assert_close(layer(x), copy.deepcopy(module).double()(x.double()))
            layer.activation = "relu"
            residual = torch.randn_like(module(x))
            assert_close(layer(x, residual), (module.double()(x.double()) + residual).relu())

    @layers
    def test_all_blocks_are_the_module_and_a_mask_is_kept(self, case: Any) -> None:
        make, convert, shape = case
        module, x = make(), torch.randn(*shape)
        layer = convert(module, (4, 4))
        assert torch.equal(layer.to_dense().weight, module.weight)
        assert_close(layer(x).detach(), module.double()(x.double()).detach())
        grid = (-(-layer.weight.shape[0] // 4), -(-layer.weight.shape[1] // 4))
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[-1, 0] = True
        masked = convert(make(), (4, 4), mask=mask)
        assert masked.columns.tolist() == [0]
        assert masked.row_offsets.tolist() == [0] * grid[0] + [1]

    @layers
    def test_state_dicts_of_another_pattern_load_into_a_new_layer(self, case: Any) -> None:
        _, source, x = pruned(case)
        target = copy.deepcopy(pruned(case, density=0.2)[1])
        optimiser = torch.optim.SGD(target.parameters(), lr=0.1)
        target(x).sum().backward()
        assert target.blocks.shape != source.blocks.shape
        target.load_state_dict(source.state_dict())
        assert optimiser.param_groups[0]["params"][0] is target.blocks
        with torch.no_grad():
            assert torch.equal(target(x), source(x))
        nested, fresh = nn.Sequential(source), nn.Sequential(pruned(case, density=0.2)[1])
        fresh.load_state_dict(nested.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(fresh(x), source(x))
        optimiser.zero_grad()
        target(x).sum().backward()
        optimiser.step()

    def test_a_state_dict_that_does_not_fit_says_why(self) -> None:
        layer = BlockSparseLinear(8, 8, block=4, density=0.5)
        other = BlockSparseLinear(8, 8, block=2, density=0.5).state_dict()
        with pytest.raises(RuntimeError, match=r"blocks: expected \[nnz, 4, 4\], got \[8, 2, 2\]"):
            layer.load_state_dict(other)
        with pytest.raises(RuntimeError, match=r"0\.row_offsets: expected \[3\] for"):
            nn.Sequential(layer).load_state_dict(nn.Sequential(BlockSparseLinear(8, 12, block=4)).state_dict())
        broken = layer.state_dict()
        broken["columns"] = broken["columns"] + 5
        with pytest.raises(RuntimeError, match="columns: expected block columns from 0 to 1"):
            layer.load_state_dict(broken)

    @layers
    def test_layers_train_as_the_pruned_module_does(self, case: Any) -> None:
        module, layer, x = pruned(case)
        module, layer, x = module.double(), layer.double(), x.double()
        module(x).square().sum().backward()
        layer(x).square().sum().backward()
        gradient = copy.deepcopy(layer)
        gradient.blocks = nn.Parameter(layer.blocks.grad)
        if module.weight.dim() == 2:
            expected = module.weight.grad * covered(layer.weight)
        else:
            matrix = conv_matrix(module.weight.grad, 4) * covered(layer.weight)
            expected = conv_weight(matrix, layer.in_channels, layer.kernel_size)
        assert relative_error(gradient.to_dense().weight, expected) < 1e-12
        if module.bias is not None:
            assert relative_error(layer.bias.grad, module.bias.grad) < 1e-12

    @layers
    def test_export_is_portable_aten_and_compile_calls_the_op(self, case: Any) -> None:
        _, layer, x = pruned(case)
        layer.eval()
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert not any("kernelpress" in target for target in targets)
        more = torch.cat([x, x, x])
        with torch.no_grad():
            assert_close(exported.module()(more), copy.deepcopy(layer).double()(more.double()))
            torch.compiler.reset()
            assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x).double())

    def test_new_layers_have_the_density_and_the_variance_of_dense_ones(self) -> None:
        torch.manual_seed(0)
        layer, dense = BlockSparseLinear(256, 128, block=8, density=0.25), nn.Linear(256, 128)
        assert len(layer.blocks) == 128
        x = torch.randn(200, 256)
        ratio = (layer(x).std() / dense(x).std()).item()
        assert 0.85 < ratio < 1.15
        assert "block=8x8, density=0.25" in repr(layer)
        assert BlockSparseConv2d(6, 8, 3, block=(4, 4), density=0.0)(torch.randn(1, 6, 5, 5)).shape == (1, 8, 3, 3)

    def test_groups_and_other_modules_are_refused(self) -> None:
        with pytest.raises(ValueError, match="module: expected groups = 1"):
            BlockSparseConv2d.from_dense(nn.Conv2d(4, 4, 1, groups=2), 2, density=0.5)
        with pytest.raises(TypeError, match=r"module: expected torch\.nn\.Linear, got Conv2d"):
            BlockSparseLinear.from_dense(nn.Conv2d(4, 4, 1), 2)
        with pytest.raises(ValueError, match="density: expected a fraction of blocks from 0 to 1, got 2"):
            BlockSparseLinear(4, 4, block=2, density=2)
        with pytest.raises(ValueError, match="block: expected two integers of at least 1"):
            BlockSparseConv2d(4, 4, 1, block=(2, 0))


@pytest.mark.parametrize("with_gradient", [False, True], ids=["no gradient", "gradient"])
def test_an_empty_weight_gives_the_epilogue(with_gradient: bool) -> None:
    weight = random_weight(6, 8, (2, 4), 0.0)
    x, bias = channels_last(2, 8, 3, 3).requires_grad_(with_gradient), torch.randn(6)
    out = ops.sparse_conv2d(x, *arguments(weight), bias, activation="relu")
    assert torch.equal(out, bias.relu()[:, None, None].expand(2, 6, 3, 3))
    if with_gradient:
        out.sum().backward()
        assert not x.grad.any()
