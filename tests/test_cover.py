"""The cheapest cover of a graph by candidates, and the forms of the values between them."""

from __future__ import annotations

import itertools

import pytest
import torch
from emitting import emit_fused
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kernelpress as kp
from kernelpress.emit.cover import Forms, Option, cheapest_cover, regions


@given(
    st.integers(1, 6), st.lists(st.tuples(st.frozensets(st.integers(0, 5), min_size=1), st.integers(1, 9)), max_size=9)
)
def test_the_cover_is_the_cheapest_of_all(count, drawn):
    elements = list(range(count))
    options = [Option(frozenset({i}), 5.0, i) for i in elements]
    options += [Option(s, float(c), 10 + i) for i, (s, c) in enumerate(drawn) if s <= set(elements)]
    cover = cheapest_cover(elements, options)
    assert sorted(e for option in cover for e in option.elements) == elements
    exact = (
        sum(option.cost for option in selection)
        for size in range(1, count + 1)
        for selection in itertools.combinations(options, size)
        if sorted(e for option in selection for e in option.elements) == elements
    )
    assert sum(option.cost for option in cover) == min(exact)


def test_elements_without_an_option_cannot_be_covered():
    with pytest.raises(ValueError, match="options"):
        cheapest_cover([0, 1], [Option(frozenset({0}), 1.0, 0)])


def test_regions_are_what_groups_connect():
    assert regions([0, 1, 2, 3, 4], [frozenset({0, 2}), frozenset({2, 4})]) == [[0, 2, 4], [1], [3]]


FORMS = ("pixels", "planes")


@st.composite
def chains(draw):
    """Options over a graph in which each element reads some before it; a value has the name of its element."""
    count = draw(st.integers(1, 5))
    sources = [draw(st.frozensets(st.integers(0, i - 1), max_size=2)) if i else frozenset() for i in range(count)]
    form = st.sampled_from(FORMS)
    covers = [{i} for i in range(count)] + draw(st.lists(st.sets(st.integers(0, count - 1), min_size=1), max_size=4))
    options = []
    for cover in covers:
        outer = sorted({source for i in cover for source in sources[i]} - cover)
        for _ in range(draw(st.integers(1, 2))):
            reads = tuple((source, draw(form)) for source in outer)
            cost = float(draw(st.integers(0, 9)))
            options.append(Option(frozenset(cover), cost, len(options), (max(cover), draw(form)), reads))
    wanted = {value: draw(form) for value in draw(st.sets(st.integers(0, count - 1)))}
    prices = {(value, form): float(draw(st.integers(0, 4))) for value in range(count) for form in FORMS}
    return count, options, wanted, prices


@given(chains())
def test_the_cover_is_the_cheapest_of_all_with_what_turning_costs(drawn):
    count, options, wanted, prices = drawn
    forms = Forms({}, wanted, lambda value, form, other: prices[value, other])

    def cost(selection):
        gives = dict(option.gives for option in selection)
        needs = {need for option in selection for need in option.reads} | set(wanted.items())
        turned = (prices[value, form] for value, form in needs if value in gives and gives[value] != form)
        return sum(option.cost for option in selection) + sum(turned)

    def is_exact(selection):
        return sorted(e for option in selection for e in option.elements) == list(range(count))

    selections = (s for size in range(1, count + 1) for s in itertools.combinations(options, size))
    cover = cheapest_cover(list(range(count)), options, forms)
    assert is_exact(cover)
    assert cost(cover) == min(map(cost, filter(is_exact, selections)))


def test_values_made_outside_are_turned_as_well():
    options = [
        Option(frozenset({0}), 2.0, 0, None, (("x", "pixels"),)),
        Option(frozenset({0}), 1.0, 1, None, (("x", "planes"),)),
    ]
    for price, best in ((0.5, 1), (1.5, 0)):
        forms = Forms({"x": "pixels"}, {}, lambda value, form, other, price=price: price)
        assert [option.index for option in cheapest_cover([0], options, forms)] == [best]


class Trunk(nn.Module):
    """Two convolutions that read one value, and a sum behind them."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))

    def forward(self, x):
        y = self.stem(x).relu()
        return self.left(y) + self.right(y)


@pytest.mark.parametrize("turning", [0.01, 10.0])
def test_a_value_is_turned_once_for_all_who_read_it_otherwise(turning):
    def cost(candidate):
        if candidate.name == "conversion":
            return turning
        is_stem = "conv2d" in {node.name for node in candidate.nodes}
        return len(candidate.nodes) * (1.0 if (candidate.variant == "contiguous") != is_stem else 2.0)

    model, x = Trunk().eval(), torch.randn(2, 3, 6, 6)
    emitted = kp.emit(model, x, cost=cost, progress=False)
    torch.testing.assert_close(emitted(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kp.capture(emitted, x, cache=False)(x), model(x), rtol=1e-4, atol=1e-5)
    target = torch.ops.aten.contiguous.default
    formats = [node.kwargs for node in emitted.body.graph.find_nodes(op="call_function", target=target)]
    images = [{"memory_format": torch.contiguous_format}, {"memory_format": torch.channels_last}]
    assert [given for given in formats if given] == (images if turning < 1 else [])


def test_layers_of_ours_need_no_turning():
    emitted = emit_fused(Trunk().eval(), torch.randn(2, 3, 6, 6))
    assert not emitted.body.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)
