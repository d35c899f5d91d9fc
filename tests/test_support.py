"""What the tests stand on: data that follow from a drawn example, errors that are relative to what cancels."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative_error


def test_data_of_an_example_follow_from_what_it_drew() -> None:
    def drawn_after(seed: int) -> list[float]:
        found: list[float] = []

        @settings(max_examples=10, derandomize=True)
        @given(seeds=st.random_module())
        def draw(seeds: object) -> None:
            found.append(float(torch.rand(())))

        torch.manual_seed(seed)
        draw()
        return found

    first = drawn_after(1)
    assert first == drawn_after(2)
    assert len(set(first)) > 1


def test_an_error_is_relative_to_the_terms_of_a_sum_where_they_cancel() -> None:
    out, expected = torch.tensor([1.5]), torch.tensor([1.0])
    assert relative_error(out, expected) == 0.5
    assert relative_error(out, expected, torch.tensor([40.0])) == 0.125
    assert relative_error(out, expected, torch.tensor([2.0])) == 0.5
