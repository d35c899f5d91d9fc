"""Calls outside what was exported: the original's answer, or a `ValueError` that says what was exported, what came."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emitting import FUSED_BACKENDS, prefer
from torch import Tensor, nn

import kernelpress as kp
from kernelpress.runtime.torch_private import assert_async, pytree
from kernelpress.trace import TraceError, trace
from kernelpress.trace.contract import Contract, PlainInput, SymbolRange, TensorInput
from kernelpress.trace.guards import UnknownExpressionError, check_expression, evaluate, from_sympy, spell

BACKEND = FUSED_BACKENDS[-1]


class Model(nn.Module):
    """A convolution, and what `compute(convolution, *inputs)` makes of it."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.compute = compute
        self.eval()


class OneImage(Model):
    def forward(self, x: Any) -> Any:
        return self.compute(self.conv, x)


class Two(Model):
    def forward(self, x: Any, other: Any) -> Any:
        return self.compute(self.conv, x, other)


class OtherFirst(Model):
    def forward(self, a: Any, x: Any) -> Any:
        return self.compute(self.conv, x, a)


class Optional(Model):
    def forward(self, x: Any, other: Any = None) -> Any:
        return self.compute(self.conv, x, other)


class Rest(Model):
    def forward(self, x: Any, *rest: Any) -> Any:
        return self.compute(self.conv, x, *rest)


def images(batch: int, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


def emit(model: nn.Module, *inputs: Any, **options: Any) -> kp.EmittedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fixes its batch size")
        return kp.emit(model, inputs, cost=prefer(BACKEND), progress=False, **options)


def answers(run: Callable[..., Any], model: nn.Module, *inputs: Any, **named: Any) -> bool:
    """Whether `run` answers at all; what it answers must be what the model does."""
    try:
        got = run(*inputs, **named)
    except ValueError:
        return False
    with torch.no_grad():
        expected = model(*inputs, **named)
    got_leaves, got_spec = pytree.tree_flatten(got)
    leaves, spec = pytree.tree_flatten(expected)
    assert got_spec == spec
    for a, b in zip(got_leaves, leaves, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert type(a) is type(b)
            assert a == b
    return True


def more_than_two(conv: nn.Module, x: Tensor) -> Tensor:
    assert x.shape[0] > 2
    return conv(x)


# model, example batch, batches that must be answered, batches that must be refused
BATCHES: dict[str, tuple[Callable[..., Any], int, set[int], set[int]]] = {
    "any batch": (lambda conv, x: conv(x).relu(), 1, {0, 1, 2, 7}, set()),
    "one image apart, emitted on it": (
        lambda conv, x: conv(x).flip(3) if x.shape[0] == 1 else conv(x), 1, {1}, {2}),
    "one image apart, emitted on four": (
        lambda conv, x: conv(x).flip(3) if x.shape[0] == 1 else conv(x), 4, {2, 4, 7}, {1}),
    "no image apart": (lambda conv, x: conv(x) if x.shape[0] else x.new_ones(1), 2, {1, 2, 5}, {0}),
    "large batches apart": (lambda conv, x: conv(x)[:, :, ::2] if x.shape[0] > 4 else conv(x), 2, {1, 2, 4}, {5}),
    "a range apart": (lambda conv, x: conv(x) if 3 < x.shape[0] < 7 else conv(x) * 2, 4, {4, 5, 6}, {1, 2, 3, 7}),
    "even batches": (lambda conv, x: conv(x) if x.shape[0] % 2 == 0 else conv(x) * 2, 4, {2, 4, 8}, {1, 3}),
    "clips of four": (lambda conv, x: conv(x).view(-1, 4, 8, 8, 8).mean(1), 8, {8, 12}, {1, 3, 7}),
    "a loop over images": (
        lambda conv, x: torch.stack([row / row.abs().sum() for row in conv(x).amax((2, 3))]), 2, {2}, {1, 3}),
    "divided by the batch": (lambda conv, x: conv(x).sum() / x.shape[0], 2, {1, 2, 5}, set()),
    "divided by its root": (lambda conv, x: conv(x).sum() / x.shape[0] ** 0.5, 2, {2}, set()),
    "a position in the batch": (
        lambda conv, x: conv(x) + torch.arange(x.shape[0])[:, None, None, None], 3, {1, 2, 3, 6}, set()),
    "the third image": (lambda conv, x: conv(x)[2], 4, {3, 4, 7}, {1, 2}),
    "the last image": (lambda conv, x: conv(x)[-1], 2, {1, 2, 7}, set()),
    "squeezed": (lambda conv, x: conv(x).mean((2, 3)).squeeze(), 2, {1, 2, 7}, set()),
    "squeezed, emitted on one": (lambda conv, x: conv(x).mean((2, 3)).squeeze(), 1, {1}, set()),
    "its size returned": (lambda conv, x: (conv(x), x.shape[0], x.shape[2]), 2, {1, 2, 5}, set()),
    "compared with the first": (lambda conv, x: conv(x) - conv(x[:1]), 2, {1, 2, 5}, set()),
    "checked": (more_than_two, 3, {3, 5}, {2}),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_size_is_answered_rightly_or_refused(name: str) -> None:
    compute, batch, right, refused = BATCHES[name]
    model = OneImage(compute)
    emitted = emit(model, images(batch))
    for size in range(9):
        if size in right | refused:
            assert answers(emitted, model, images(size)) == (size in right), size
        else:
            try:
                model(images(size))
            except Exception:
                with pytest.raises(ValueError, match="batch"):
                    emitted(images(size))
            else:
                answers(emitted, model, images(size))


def test_one_image_whose_results_are_merely_apart_in_memory_is_not_taken_for_a_batch_of_them() -> None:
    def pooled_twice(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = conv(x).mean((2, 3), keepdim=True)
        return (y.flip(3) if x.shape[0] == 1 else y), y

    model = OneImage(pooled_twice)
    emitted = emit(model, images(1))
    for run in (emitted, kp.capture(emitted, images(1))):
        first, second = run(images(1))
        first.zero_()
        assert bool(second.any())
    assert not answers(emitted, model, images(2))


SIZES: dict[str, tuple[Callable[..., Any], int]] = {
    "resized to the input": (lambda conv, x: F.interpolate(F.max_pool2d(conv(x), 2), size=x.shape[-2:]), 16),
    "pooled over the map": (lambda conv, x: F.avg_pool2d(conv(x), x.shape[-2:]).flatten(1), 16),
    "times a coordinate": (lambda conv, x: conv(x) * torch.linspace(-1, 1, x.shape[3]), 1),
    "scaled by the width": (lambda conv, x: conv(x) * x.shape[3] ** -0.5, 12),
    "padded to a multiple of six": (lambda conv, x: F.pad(conv(x), (0, -x.shape[3] % 6)), 12),
    "odd widths apart": (lambda conv, x: conv(x) * 2 if x.shape[3] % 2 else conv(x), 9),
    "no size in the code": (lambda conv, x: conv(x).relu(), 16),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_image_sizes_are_answered_rightly_or_refused_by_name(name: str) -> None:
    compute, size = SIZES[name]
    model = OneImage(compute)
    emitted = emit(model, images(1))
    assert answers(emitted, model, images(3))
    if not answers(emitted, model, images(1, size)):
        with pytest.raises(ValueError, match=rf"x\.shape\[2\]: expected 8 as exported, got {size}"):
            emitted(images(1, size))


def test_the_refusal_names_argument_what_was_exported_and_what_came() -> None:
    emitted = emit(Two(lambda conv, x, other: conv(x) * other), images(2), images(2, channels=1))
    refusals: dict[str, tuple[Any, ...]] = {
        r"x: expected torch.float32 as exported, got torch.float64": (images(2).double(), images(2)),
        r"x: expected 4 dimensions as exported, got shape \[3, 8, 8\]": (images(2)[0], images(2)),
        r"x\.shape\[1\]: expected 3 as exported, got 4 in \[2, 4, 8, 8\]": (images(2, channels=4), images(2)),
        r"other\.shape\[0\] \(the batch\): expected x\.shape\[0\] = 3 as exported, got 2": (
            images(3),
            images(2, channels=1),
        ),
        r"other: expected a Tensor as exported, got float": (images(2), 1.0),
        r"other: expected a Tensor as exported, got NoneType": (images(2), None),
        r"x: expected torch.strided as exported, got torch.sparse_coo": (images(2).to_sparse(), images(2)),
        r"inputs: expected 2 as exported \(x, other\), got 1 arguments": (images(2),),
        r"other: expected one value as exported, got a list of 1": (images(2), [images(2)]),
    }
    for message, inputs in refusals.items():
        with pytest.raises(ValueError, match=message):
            emitted(*inputs)


# model class, how it computes, example inputs, inputs that must be answered, inputs that must be refused
Calls = tuple[type[Model], Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]], list[tuple[Any, ...]]]
CALLS: dict[str, Callable[[], Calls]] = {
    "a float": lambda: (
        Two, lambda conv, x, f: conv(x) * f, (images(2), 1.5), [(images(3), 1.5)], [(images(2), 2.0), (images(2), 1)]),
    "a float that is no number": lambda: (
        Two, lambda conv, x, f: conv(x) if f != f else conv(x) * f, (images(2), float("nan")),
        [(images(1), float("nan"))], [(images(2), 2.0)]),
    "zeros have signs": lambda: (
        Two, lambda conv, x, f: conv(x) * torch.copysign(torch.ones(()), torch.tensor(f)), (images(2), 0.0),
        [(images(1), 0.0)], [(images(2), -0.0)]),
    "a flag": lambda: (
        Two, lambda conv, x, flag: conv(x) if flag else x, (images(2), True), [(images(1), True)],
        [(images(2), False), (images(2), 1)]),
    "a string": lambda: (
        Two, lambda conv, x, mode: F.interpolate(conv(x), scale_factor=2, mode=mode), (images(2), "nearest"),
        [(images(1), "nearest")], [(images(2), "bilinear")]),
    "None": lambda: (
        Optional, lambda conv, x, m: conv(x) if m is None else conv(x) * m, (images(2), None), [(images(1), None)],
        [(images(2), images(2, channels=1)), (images(2), 0)]),
    "a tensor where None may be": lambda: (
        Optional, lambda conv, x, m: conv(x) if m is None else conv(x) * m, (images(2), images(2, channels=1)),
        [(images(1), images(1, channels=1))], [(images(2), None), (images(2),)]),
    "a mask of one for a batch of three": lambda: (
        Two, lambda conv, x, m: conv(x) * m, (images(3), images(1, channels=1)),
        [(images(b), images(1, channels=1)) for b in (0, 1, 2, 5)], [(images(2), images(2, channels=1))]),
    "a mask without its batch axis": lambda: (
        Two, lambda conv, x, m: conv(x) * m.squeeze(0), (images(1), images(1, channels=1)),
        [(images(1), images(1, channels=1))], []),
    "a table of one row": lambda: (
        Two, lambda conv, x, t: conv(x) + t[0, :, None, None], (images(1), torch.randn(1, 8)),
        [(images(1), torch.randn(1, 8)), (images(2), torch.randn(2, 8))], []),
    "a single number before the image": lambda: (
        OtherFirst, lambda conv, x, a: conv(x) * a, (torch.randn(1), images(1)),
        [(torch.randn(1), images(b)) for b in (0, 1, 4)], [(torch.randn(2), images(2))]),
    "a scalar tensor": lambda: (
        Two, lambda conv, x, t: conv(x) * t, (images(1), torch.tensor(2.0)), [(images(4), torch.tensor(3.0))],
        [(images(1), 3.0), (images(1), torch.ones(1))]),
    "a gallery of five": lambda: (
        Two, lambda conv, x, y: conv(x).flatten(1) @ conv(y).flatten(1).T, (images(1), images(5)),
        [(images(2), images(5))], [(images(2), images(3))]),
    "two batches apart": lambda: (
        Two, lambda conv, x, y: torch.cat([conv(x), conv(y)]), (images(2), images(2)),
        [(images(2), images(2)), (images(3), images(2)), (images(1), images(1))], []),
    "a dict in any order": lambda: (
        OneImage, lambda conv, d: conv(d["x"]) * d["m"], ({"x": images(2), "m": torch.randn(2, 1, 1, 1)},),
        [({"m": torch.randn(3, 1, 1, 1), "x": images(3)},)], [({"x": images(2)},), (images(2),)]),
    "a dict whose order counts": lambda: (
        OneImage, lambda conv, d: conv(list(d.values())[1]), ({"a": images(2), "b": images(2), "c": images(2)},),
        [({"a": images(3), "b": images(3), "c": images(3)},)], [({"c": images(3), "b": images(3), "a": images(3)},)]),
    "a list": lambda: (
        OneImage, lambda conv, xs: [conv(x).sum() for x in xs], ([images(2), images(2)],), [([images(3), images(2)],)],
        [([images(2)],), ((images(2), images(2)),)]),
    "a list of images of their own sizes": lambda: (
        OneImage, lambda conv, xs: [conv(x) for x in xs], ([torch.randn(3, 8, 8), torch.randn(3, 6, 8)],),
        [([torch.randn(3, 8, 8), torch.randn(3, 6, 8)],)], [([torch.randn(3, 8, 8), torch.randn(3, 8, 8)],)]),
    "any number of arguments": lambda: (
        Rest, lambda conv, x, *rest: conv(x) + sum(rest), (images(1), images(1, channels=8)),
        [(images(2), images(2, channels=8))], [(images(2),)]),
    "indices": lambda: (
        Two, lambda conv, x, i: conv(x)[i], (images(4), torch.tensor([0, 1, 2, 3])),
        [(images(3), torch.tensor([0, 2])), (images(2), torch.tensor([1, 0]))], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_other_arguments_are_answered_rightly_or_refused(name: str) -> None:
    kind, compute, example, right, refused = CALLS[name]()
    model = kind(compute)
    if name == "a float that is no number" and torch.__version__ < "2.12":  # which exports it as one that is
        with pytest.raises(TraceError, match="does not compute what the model does"):
            emit(model, *example)
        return
    emitted = emit(model, *example)
    assert answers(emitted, model, *example)
    for inputs in right:
        assert answers(emitted, model, *inputs)
    for inputs in refused:
        assert not answers(emitted, model, *inputs)


@pytest.mark.parametrize("order", [Two, OtherFirst])
def test_a_mask_for_one_image_is_one_an_image_whatever_the_arguments_are_called(order: type[Model]) -> None:
    model = order(lambda conv, x, mask: conv(x) * mask)

    def arrange(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return (x, mask) if order is Two else (mask, x)

    emitted = emit(model, *arrange(images(1), images(1, channels=1)))
    assert answers(emitted, model, *arrange(images(3), images(3, channels=1)))
    assert not answers(emitted, model, *arrange(images(3), images(1, channels=1)))


def test_a_model_that_looks_at_strides_answers_for_the_exported_ones() -> None:
    model = OneImage(lambda conv, x: conv(x) if x.is_contiguous() else conv(x) * 2)
    emitted = emit(model, images(2))
    assert answers(emitted, model, images(2))
    with pytest.raises(ValueError, match=r"x: expected strides \[192, 64, 8, 1\] as exported"):
        emitted(images(2).to(memory_format=torch.channels_last))


def test_arguments_go_by_name_as_in_the_model() -> None:
    model = Optional(lambda conv, x, other: conv(x) * other)
    emitted = emit(model, images(2), images(2, channels=1))
    assert answers(emitted, model, images(3), other=images(3, channels=1))
    assert answers(emitted, model, other=images(3, channels=1), x=images(3))
    for message, inputs, named in (
        ("otter: expected one of the arguments exported", (images(2),), {"otter": images(2)}),
        ("x: expected it once", (images(2),), {"x": images(2), "other": images(2)}),
        ("x: expected all arguments exported", (), {"other": images(2)}),
    ):
        with pytest.raises(ValueError, match=message):
            emitted(*inputs, **named)


def test_what_a_norm_hides_at_the_example_is_still_told_apart() -> None:
    model = OneImage(lambda conv, x: F.instance_norm(0.3 * conv(x if x.shape[0] == 1 else 2 * x)))
    emitted, x = emit(model, images(1)), images(1)
    torch.testing.assert_close(emitted(x), model(x), rtol=2e-5, atol=2e-5)


def test_the_summary_tells_the_batch_or_why_it_is_fixed() -> None:
    assert "batch: dimension 0 of x: any size" in emit(OneImage(lambda conv, x: conv(x)), images(1)).summary()
    looped = OneImage(lambda conv, x: torch.stack([conv(x[i : i + 1]) for i in range(x.shape[0])]))
    with pytest.warns(UserWarning, match="fixes its batch size"):
        emitted = kp.emit(looped, images(3), cost=prefer(BACKEND), progress=False)
    assert "fixed sizes: x [3, 3, 8, 8]: the model reads its size" in emitted.summary()


def test_a_fixed_batch_can_be_asked_for() -> None:
    emitted = emit(OneImage(lambda conv, x: conv(x)), images(2), dynamic_batch=False)
    with pytest.raises(ValueError, match=r"x\.shape\[0\] \(the batch\): expected 2 as exported, got 3"):
        emitted(images(3))


@pytest.mark.parametrize("name", ["one image apart, emitted on four", "even batches", "large batches apart"])
def test_saved_models_and_plans_hold_to_what_was_exported(name: str, tmp_path: Any) -> None:
    compute, batch, right, refused = BATCHES[name]
    model = OneImage(compute)
    emitted = emit(model, images(batch))
    emitted.save(tmp_path / "model.pt2")
    loaded = kp.load(tmp_path / "model.pt2")
    assert loaded.contract == emitted.contract
    for size in right:
        assert answers(loaded, model, images(size))
        assert answers(kp.capture(loaded, images(size)), model, images(size))
    for size in refused:
        assert not answers(loaded, model, images(size))
        with pytest.raises(ValueError, match="batch"):
            kp.capture(emitted, images(size))


def test_a_model_that_looks_at_the_order_of_keys_answers_for_one_also_as_a_plan() -> None:
    model = OneImage(lambda conv, d: conv(next(iter(d.values()))))
    emitted = emit(model, {"a": images(2), "b": images(2)})
    for run in (emitted, kp.capture(emitted, {"a": images(2), "b": images(2)})):
        assert answers(run, model, {"a": images(2), "b": images(2)})
        assert not answers(run, model, {"b": images(2), "a": images(2)})


def test_a_plan_compares_numbers_with_their_type() -> None:
    plan = kp.capture(emit(Two(lambda conv, x, f: conv(x) * f), images(2), 1.0), images(2), 1.0)
    plan(images(2), 1.0)
    for other in (1, True, 2.0, None, images(1)):
        with pytest.raises(ValueError, match=r"other: expected 1\.0 as captured, got"):
            plan(images(2), other)


def test_sizes_that_follow_from_values_are_no_plan() -> None:
    model = OneImage(lambda conv, x: conv(x).flatten()[conv(x).flatten() > 0])
    emitted = emit(model, images(2))
    assert answers(emitted, model, images(2))
    with pytest.raises(ValueError, match="a plan has fixed sizes"):
        kp.capture(emitted, images(2))


def test_autocast_is_refused_and_does_not_reach_emission() -> None:
    model = OneImage(lambda conv, x: conv(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        emitted = emit(model, images(2))
    assert answers(emitted, model, images(2))
    plan = kp.capture(emitted, images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for run in (emitted, plan):
            with pytest.raises(ValueError, match=r"torch\.autocast: expected it off"):
                run(images(2))


def test_assertions_of_the_model_hold_in_graph_and_plan() -> None:
    model = OneImage(lambda conv, x: (assert_async(x.min() > -100), conv(x))[1])
    emitted = emit(model, images(2))
    for run in (emitted, kp.capture(emitted, images(2))):
        assert answers(run, model, images(2))
        with pytest.raises(RuntimeError, match="assertion"):
            run(images(2) - 1000)


def test_written_buffers_go_on_from_call_to_call_in_what_was_saved_too(tmp_path: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.conv(x) * self.calls

    model, x = Counts().eval(), images(2)
    emitted = emit(model, x)
    emitted.save(tmp_path / "model.pt2")
    runs = [emitted, kp.load(tmp_path / "model.pt2"), kp.capture(kp.load(tmp_path / "model.pt2"), x)]
    for _ in range(3):
        with torch.no_grad():
            expected = model(x)
        for run in runs:
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_emitted_model_holds_to_it_too() -> None:
    model = OneImage(lambda conv, x: conv(x) if x.shape[0] % 2 == 0 else conv(x) * 2)
    emitted = emit(model, images(2))
    compiled = torch.compile(emitted, backend="eager")
    assert answers(compiled, model, images(4))
    with pytest.raises(ValueError, match="batch"):
        compiled(images(3))


def test_the_model_itself_tells_what_an_export_computes() -> None:
    class Lies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if torch.compiler.is_compiling() else x * 3

    with pytest.raises(ValueError, match="does not compute what the model does on example_inputs"):
        trace(Lies(), images(2))


def test_expressions_are_computed_spelled_and_read_from_files() -> None:
    sympy = pytest.importorskip("sympy")
    s = sympy.Symbol("s0", integer=True)
    tree = from_sympy(sympy.And(sympy.Ne(s + 1, 4), 2 * s <= sympy.Max(s, 9), s**2 > 3))
    assert all(evaluate(tree, {"s0": n}) == (n != 3 and 2 * n <= max(n, 9) and n**2 > 3) for n in range(12))
    assert check_expression(_as_lists(tree), frozenset({"s0"})) == tree
    assert spell(("<=", ("max", "s0", 2), ("*", 3, "s0")), {"s0": "n"}) == "max(n, 2) <= (3 * n)"
    with pytest.raises(UnknownExpressionError):
        from_sympy(sympy.sin(s))


def test_expressions_of_an_export_are_those_of_the_model() -> None:
    contract = trace(OneImage(BATCHES["even batches"][0]), images(4)).meta["contract"]
    ((symbol, *_),) = contract.symbols
    for n in range(2, 9):
        assert all(evaluate(guard, {symbol: n}) for guard in contract.guards) == (n % 2 == 0)


def _as_lists(tree: Any) -> Any:
    return [_as_lists(part) for part in tree] if isinstance(tree, tuple) else tree


DEEP: Any = 1
for _ in range(100):
    DEEP = ["not", DEEP]


@pytest.mark.parametrize(
    "stored", ["s1", "__import__('os')", ["eval", "s0"], ["+"], ["not", 1, 2], {"a": 1}, None, DEEP]
)
def test_expressions_of_a_file_that_are_none_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match="expression"):
        check_expression(stored, frozenset({"s0"}))


def test_an_expression_occupies_nothing() -> None:
    with pytest.raises(OverflowError):
        evaluate(("**", 9, ("**", 9, 9)), {})


def test_a_contract_survives_its_stored_form() -> None:
    _, structure = pytree.tree_flatten(((torch.zeros(1), None), {}))
    contract = Contract(
        (TensorInput("x", ("s0", 3, ("+", "s0", 1)), torch.float32, "cpu"), PlainInput("flag", None)),
        ("x", "flag"),
        structure,
        (SymbolRange("s0", 3, 9),),
        (("==", ("%", "s0", 3), 0),),
    )
    assert Contract.from_json(contract.to_json(), structure) == contract
    contract.check((torch.zeros(6, 3, 7), None))
    for shape in ((6, 3, 6), (12, 3, 13), (4, 3, 5), (0, 3, 1)):
        with pytest.raises(ValueError, match=r"x\.shape"):
            contract.check((torch.zeros(*shape), None))
