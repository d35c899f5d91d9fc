"""Whole models, emitted and captured: as exact as the original, at any batch size and on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from emitting import FUSED_BACKENDS, Exactness, assert_as_exact_as, emit_fused, ops_of
from support import with_random_norms

import kernelpress as kp
from kernelpress.emit import EmittedModel


@dataclass(frozen=True)
class Emitted:
    """A model of ours, emitted with one image, and what the original computes on one, three and two channels_last."""

    name: str
    model: EmittedModel
    one: Exactness
    three: Exactness
    channels_last: Exactness


@pytest.fixture(scope="module", params=kp.models.names())
def emitted(request: pytest.FixtureRequest) -> Emitted:
    model = with_random_norms(kp.models.create(request.param))
    return Emitted(
        request.param,
        emit_fused(model, torch.randn(1, 3, 64, 64), FUSED_BACKENDS[-1]),
        Exactness(model, torch.randn(1, 3, 64, 64)),
        Exactness(model, torch.randn(3, 3, 64, 64)),
        Exactness(model, torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)),
    )


@pytest.mark.slow
def test_every_model_of_ours_emits_exactly_at_any_batch_size(emitted: Emitted) -> None:
    assert emitted.model.dynamic_batch
    left = [op for op in ops_of(emitted.model) if "batch_norm" in op or "relu" in op or "hardtanh" in op]
    # ShuffleNet V1 has an activation after a pooling.
    assert set(left) <= ({"aten.relu"} if emitted.name == "shufflenet_v1" else set())
    emitted.one.check(emitted.model)
    emitted.three.check(emitted.model)
    emitted.channels_last.check(emitted.model)


@pytest.mark.slow
def test_every_model_of_ours_is_exact_on_every_instruction_set(cpu_variant: str, emitted: Emitted) -> None:
    for case in (emitted.one, emitted.three):
        plan = kp.capture(emitted.model, *case.inputs)
        # AlexNet's adaptive pooling enlarges maps of images as small as these.
        assert len(plan) - plan.native_steps == (emitted.name == "alexnet"), repr(plan)
        case.check(plan)
        case.check(emitted.model)


@pytest.mark.slow
def test_a_model_emits_exactly_onto_the_reference_backend() -> None:
    model = with_random_norms(kp.models.create("mobilenet_v2"))
    emitted = emit_fused(model, torch.randn(1, 3, 32, 32), "reference")
    for batch in (1, 3):
        assert_as_exact_as(emitted, model, torch.randn(batch, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2"])
def test_models_of_transformers_emit_exactly(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    if name == "ResNet":
        sizes = {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 5,
        }
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    else:
        config = transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=5)
        model = transformers.MobileNetV2ForImageClassification(config)
    model = with_random_norms(model)
    x = torch.randn(2, 3, 64, 64)
    emitted = emit_fused(model, x)
    with torch.no_grad():
        expected, result = model(x), emitted(x)
    assert isinstance(result, type(expected)) or set(result) == set(expected)
    torch.testing.assert_close(result["logits"], expected.logits, rtol=1e-3, atol=1e-4)
    assert {"conv2d", "pointwise_conv2d"} & set(ops_of(emitted))
