"""Long-lived copies: side by side, aligned, each its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernelpress.runtime.memory import ALIGNMENT, long_lived_copy


@pytest.mark.parametrize(
    "elements", [0, 7, 20_001, 3_000_000], ids=["empty", "small", "in a chunk", "larger than half a chunk"]
)
def test_a_copy_is_equal_contiguous_and_its_own(elements: int) -> None:
    source = torch.randn(2, elements)[1]
    copy = long_lived_copy(source)
    assert torch.equal(copy, source)
    assert copy.is_contiguous()
    source.zero_()
    assert elements == 0 or copy.abs().sum() > 0


def test_copies_in_one_chunk_are_aligned_and_do_not_overlap() -> None:
    copies = [long_lived_copy(torch.full((20_001 + i,), float(i))) for i in range(40)]
    assert all(copy.data_ptr() % ALIGNMENT == 0 for copy in copies)
    for i, copy in enumerate(copies):
        copy.fill_(-float(i))
    assert all(bool((copy == -float(i)).all()) for i, copy in enumerate(copies))


def test_threads_that_copy_at_once_get_memory_of_their_own() -> None:
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda i: long_lived_copy(torch.full((30_000,), float(i))), range(64)))
    assert all(bool((copy == float(i)).all()) for i, copy in enumerate(copies))
