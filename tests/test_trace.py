"""`trace`: the exported graph computes what the model computes, functionally, at any batch size."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.trace import TraceError, module_of, parameter_name, trace

aten = torch.ops.aten


class Net(nn.Module):
    """In-place activations, a residual sum, a channel shuffle, dropout and a flattening view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5, inplace=True))
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.body(y)
        z += y
        z = F.hardswish(F.hardtanh(z, 0.0, 6.0, inplace=True), inplace=True)
        z = torch.cat(z.chunk(2, 1)[::-1], 1)
        z = F.adaptive_avg_pool2d(z, 4)
        return self.head(self.drop(z).view(x.size(0), -1))


def _randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def _assert_same_outputs(model: nn.Module, graph: nn.Module, *shapes: tuple[int, ...]) -> None:
    model.eval()
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x.clone()), model(x.clone()), rtol=1e-6, atol=1e-6)


def _mutating(graph: torch.fx.GraphModule) -> list[str]:
    return [
        str(n.target) for n in graph.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)
    ]


@pytest.mark.parametrize("example_batch", [1, 4])
def test_graph_equals_model_at_every_batch_size(example_batch: int) -> None:
    model = _randomise(Net())
    graph = trace(model, torch.randn(example_batch, 3, 8, 8))
    assert graph.meta["contract"].dynamic_batch is True
    _assert_same_outputs(model, graph, (1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 8, 8))


def test_graph_is_functional_and_free_of_dropout_views_and_guards() -> None:
    graph = trace(Net(), torch.randn(2, 3, 8, 8))
    targets = [n.target for n in graph.graph.nodes]
    assert not _mutating(graph)
    assert {aten.conv2d.default, aten.batch_norm.default, aten.linear.default, aten.reshape.default} <= set(targets)
    assert {aten.relu.default, aten.add.Tensor, aten.hardtanh.default, aten.hardswish.default} <= set(targets)
    assert not {aten.dropout.default, aten.view.default} & set(targets)
    assert not any(n.op == "call_module" for n in graph.graph.nodes)


def test_parameters_keep_names_and_memory() -> None:
    model = Net()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    names = {parameter_name(n) for n in graph.graph.nodes if n.op == "get_attr"}
    assert {"stem.0.weight", "stem.1.running_mean", "body.bias", "head.weight"} <= names
    assert "stem.1.num_batches_tracked" not in names
    assert graph.get_parameter("body.weight").data_ptr() == model.body.weight.data_ptr()


def test_every_node_knows_its_module_and_its_shape() -> None:
    graph = trace(Net(), torch.randn(1, 3, 8, 8))
    owner = {n.target: module_of(n) for n in graph.graph.nodes if n.op == "call_function"}
    assert owner[aten.batch_norm.default] == "stem.1"
    assert owner[aten.linear.default] == "head"
    assert owner[aten.add.Tensor] == ""
    convolution = next(n for n in graph.graph.nodes if n.target is aten.conv2d.default)
    assert tuple(convolution.meta["val"].shape[1:]) == (8, 8, 8)
    assert module_of(convolution.args[1]) == "stem.0"


def test_training_flags_are_restored() -> None:
    model = Net().train()
    model.stem.eval()
    trace(model, torch.randn(2, 3, 8, 8))
    assert [model.training, model.body.training, model.stem.training] == [True, True, False]


class _WriteThenReadOld(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        before = y + 1
        y.relu_()
        return before + y


class _WriteThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2] += 1
        y[:, 2:].mul_(3)
        return y


class _WriteSeenByEarlierView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.flatten(1)
        y.add_(1)
        return view.sum(1)


class _WriteToFlattened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu((x * 2).flatten(1), inplace=True)


class _WriteSeenThroughDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = F.dropout(y, 0.5, training=self.training)
        y.add_(1)
        return z


class _WriteKeepsItsDtype(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).to(torch.float32)
        y += torch.ones(1, dtype=torch.float64)
        return y


class _BatchNormAfterViewWrite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 1:].neg_()
        return self.norm(y)


@pytest.mark.parametrize(
    "model",
    [
        _WriteThenReadOld(),
        _WriteThroughView(),
        _WriteSeenByEarlierView(),
        _WriteToFlattened(),
        _WriteSeenThroughDropout(),
        _WriteKeepsItsDtype(),
        _BatchNormAfterViewWrite(),
    ],
    ids=lambda model: type(model).__name__.strip("_"),
)
def test_in_place_writes_keep_their_meaning(model: nn.Module) -> None:
    graph = trace(_randomise(model), torch.randn(2, 4, 3, 3))
    assert not _mutating(graph)
    _assert_same_outputs(model, graph, (3, 4, 3, 3))


def test_batch_norm_survives_functionalisation_as_batch_norm() -> None:
    graph = trace(_BatchNormAfterViewWrite(), torch.randn(2, 4, 3, 3))
    assert aten.batch_norm.default in [n.target for n in graph.graph.nodes]


def test_write_to_an_input_leaves_the_callers_tensor_alone() -> None:
    graph = trace(nn.ReLU(inplace=True), torch.randn(2, 4))
    x = torch.randn(3, 4)
    kept = x.clone()
    torch.testing.assert_close(graph(x), kept.relu())
    torch.testing.assert_close(x, kept)


def test_view_on_channels_last_memory_works_as_reshape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = model[0]

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.view(y.size(0), -1)

    graph = trace(Viewing(), torch.randn(2, 3, 6, 6))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(graph(x.to(memory_format=torch.channels_last)), model(x))


class _OneImageOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 1:
            raise RuntimeError("one image at a time")
        return x * 2


def test_model_with_fixed_batch_is_exported_static_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="_OneImageOnly fixes its batch size"):
        graph = trace(_OneImageOnly(), torch.randn(1, 4))
    assert graph.meta["contract"].dynamic_batch is False
    _assert_same_outputs(_OneImageOnly(), graph, (1, 4))


class _MaskedAndCounting(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.conv = nn.utils.prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)
        self.norm = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
        self.counts, self.last = counts, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.counts:
            self.last = y.sum()
        return y


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_hooks_compute_are_traced_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        graph = trace(_MaskedAndCounting(counts=False), torch.randn(2, 3, 5, 5))
    assert {"conv.weight_orig", "conv.weight_mask"} <= {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    with pytest.warns(UserWarning, match="assigned during export"):
        trace(_MaskedAndCounting(counts=True), torch.randn(2, 3, 5, 5))


def test_static_batch_on_request_has_integer_shapes() -> None:
    graph = trace(nn.ReLU(), torch.randn(1, 4), dynamic_batch=False)
    assert [tuple(n.meta["val"].shape) for n in graph.graph.nodes if n.op == "placeholder"] == [(1, 4)]


def test_several_inputs_and_structured_outputs_are_kept() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
            return {"sum": x + y, "pair": (x, x * y)}

    graph = trace(Two(), (torch.randn(1, 4), torch.randn(1, 4)))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    result = graph(x, y)
    assert {key: type(value) for key, value in result.items()} == {"sum": Tensor, "pair": tuple}
    torch.testing.assert_close(result["pair"][1], x * y)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_data_dependent_branch_is_named_with_module_line_and_remedy() -> None:
    with pytest.raises(TraceError, match=r"inner \(_Branch\).*test_trace\.py:\d+.*x\.sum\(\) > 0.*torch\.where"):
        trace(_Branching(), torch.randn(2, 4))


def test_wrong_example_names_the_layer_that_refused_it() -> None:
    with pytest.raises(TraceError, match=r"forward fails on example_inputs in stem\.0 \(Conv2d\).*4 channels"):
        trace(Net(), torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("resnet", torch.ones(1), "model: expected an nn.Module, got str"),
        (nn.ReLU(), None, "example_inputs: expected a Tensor"),
        (nn.ReLU(), (), "example_inputs: expected a Tensor"),
    ],
)
def test_wrong_argument_types_are_refused(model: object, inputs: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        trace(model, inputs)  # type: ignore[arg-type]


_TINY_CONFIGS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "MobileNetV2": {"depth_multiplier": 0.25},
}


@pytest.mark.parametrize("name", _TINY_CONFIGS)
def test_transformers_models_trace_with_their_output_class(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers runs this test")
    config = getattr(transformers, f"{name}Config")(**_TINY_CONFIGS[name])
    model = _randomise(getattr(transformers, f"{name}ForImageClassification")(config))
    graph = trace(model, torch.randn(1, 3, 32, 32))
    assert not _mutating(graph)
    x = torch.randn(3, 3, 32, 32)
    expected = model.eval()(x)
    result = graph(x)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)


class _GradientsWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x).relu()
        with torch.enable_grad():
            return self.conv(x).sigmoid() + y


class _Condition(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.mean() > 0, lambda t: t + 1, lambda t: t * 2, (x.relu(),))


class _WrittenInputReturned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, :1].add_(1)
        return x


class _SizesAmongOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        y = x[:, 1:] * 2
        return y, y.shape


@pytest.mark.parametrize("model", [_GradientsWithin(), _Condition(), _WrittenInputReturned()])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_regions_and_written_inputs_trace_to_what_the_model_computes(model: nn.Module, sign: float) -> None:
    graph = trace(model, torch.randn(2, 3, 5, 6))
    # Before torch 2.13, the first branch that a process traces is specialised on its batch.
    x = sign * torch.rand(3 if graph.meta["contract"].dynamic_batch else 2, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(graph(x.clone()), model(x.clone()))


def test_a_written_input_that_is_returned_is_not_written() -> None:
    x = torch.randn(2, 3, 5, 6)
    before = x.clone()
    trace(_WrittenInputReturned(), x)(x)
    assert torch.equal(x, before)


def test_sizes_among_the_outputs_are_those_of_the_call() -> None:
    graph = trace(_SizesAmongOutputs(), torch.randn(2, 3, 5))
    y, sizes = graph(torch.randn(4, 3, 5))
    assert tuple(sizes) == tuple(y.shape) == (4, 2, 5)
