"""Sixty random models and some calls of each: right, or refused with a reason. `make fuzz` tries 2,000."""

import os
import random

import pytest
from modelfuzz.generator import draw
from modelfuzz.shrink import shrink, snippet
from modelfuzz.verdict import examine

BUNDLES, MODELS = 6, 10

GIVEN = os.environ.get("KERNELPRESS_TEST_SEED")
FIRST = random.SystemRandom().randrange(1 << 30) if GIVEN is None else int(GIVEN) * BUNDLES * MODELS
"""Without a seed in the environment, every run tries other models."""


@pytest.mark.parametrize("bundle", range(BUNDLES))
def test_random_models_are_right_or_refused(bundle: int) -> None:
    for seed in range(FIRST + bundle * MODELS, FIRST + (bundle + 1) * MODELS):
        program = draw(seed)
        fault = examine(program, count=4).fault
        if fault is not None:
            pytest.fail(f"seed {seed}: {fault}\n\n{snippet(*shrink(program, fault, seconds=20.0))}")
