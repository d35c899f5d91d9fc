"""Masks, indices, roundings and what they select: an emitted model may differ at ties, and nowhere else."""

import json

import pytest
import torch
import torch.nn.functional as F
from emitting import prefer
from support import with_random_norms
from torch import nn

import kernelpress as kp
from kernelpress.emit import pipeline
from kernelpress.emit.record import EmissionRecord
from kernelpress.emit.ties import compare

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = 21


class Segmenter(nn.Module):
    """Logits `[N, 21, H, W]`, and what a head makes of them."""

    def __init__(self, head):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, CLASSES, 1)]
        self.layers, self.head = nn.Sequential(*layers), head

    def forward(self, x):
        return self.head(self.layers(x))


def detections(y):
    scores, best = y.flatten(1).sigmoid().topk(50)
    cells = (best // CLASSES)[:, None].expand(-1, CLASSES, -1)
    return scores, best, y.flatten(2).gather(2, cells)


def routed(y):
    experts = torch.stack([y, 3 * y, -y], 1)
    chosen = y.mean((2, 3)).topk(2).indices % 3
    return experts.gather(1, chosen[:, :, None, None, None].expand(-1, -1, *y.shape[1:]))


HEADS = {
    "argmax": lambda y: y.argmax(1),
    "one-hot argmax": lambda y: F.one_hot(y.argmax(1), CLASSES).float(),
    "threshold": lambda y: y > 0.1,
    "where": lambda y: torch.where(y > 0.1, y, torch.full_like(y, 5.0)),
    "scores and boxes": detections,
    "boxes above a threshold": lambda y: y[y > 0.3],
    "their places": lambda y: (y > 0.3).nonzero(),
    "peaks": lambda y: (F.max_pool2d(y, 3, 1, 1) == y) * y,
    "rounded": lambda y: torch.round(y * 1e3) / 1e3,
    "whole numbers": lambda y: (y * 1e4).int(),
    "order": lambda y: y.flatten(1).argsort(-1),
    "gathered in order": lambda y: y.flatten(2).gather(2, y.flatten(2).argsort(-1)),
    "signs": lambda y: y.sign() * y.abs().mean((2, 3), keepdim=True),
    "buckets": lambda y: torch.bucketize(y, torch.linspace(-1, 1, 200)),
    "remainder": lambda y: (y % 0.01, torch.frac(y * 100)),
    "unpooled": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "nearest pixels": lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1), mode="nearest", align_corners=False),
    "experts": routed,
    "a branch": lambda y: torch.cond(y.mean() > 0, lambda t: t.round(), lambda t: t + 1, (y,)),
}


def segmenter(name):
    return with_random_norms(Segmenter(HEADS[name]))


def with_weights(body, change):
    """Gives the graph weights of its own, changed; the last layer's come last."""
    weights = [name for name, parameter in body.named_parameters() if parameter.dim() == 4]
    for name in weights:
        owner, _, attribute = name.rpartition(".")
        own = body.get_parameter(name).detach().clone()
        setattr(body.get_submodule(owner), attribute, nn.Parameter(change(own) if name == weights[-1] else own, False))


def one_row_off(weight):
    weight[0] *= 1.02
    return weight


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_decisions_at_ties_leave_the_emission_and_wrong_layers_do_not(name, monkeypatch):
    model, x = segmenter(name), torch.randn(2, 3, 24, 24)
    emitted = kp.emit(model, x, progress=False, cost=prefer("reference"))
    assert not emitted.record.kept_original, emitted.record.reason
    assert emitted.record.error < 1e-5

    faster_of = pipeline._faster_of

    def broken(traced, body, *others, **named):
        with_weights(body, one_row_off)
        return faster_of(traced, body, *others, **named)

    monkeypatch.setattr(pipeline, "_faster_of", broken)
    refused = kp.emit(model, x, progress=False, cost=prefer("reference"))
    assert refused.record.kept_original
    assert "error" in refused.record.reason


def judged(name, change, x):
    """The comparison of an emitted segmenter with the original, its last weight changed."""
    model = segmenter(name)
    body = kp.emit(model, x, progress=False, cost=prefer("reference")).body
    original = kp.emit(model, x, progress=False, cost=lambda candidate: 1.0 if candidate.is_original else 9.0).body
    with_weights(body, change)
    return model, body, compare(original, body, [x], 1e-3)


def test_the_elements_that_differ_are_counted_and_each_lies_at_a_tie():
    x = torch.randn(4, 3, 48, 48)
    model, body, found = judged("argmax", lambda weight: weight * (1 + 2e-4 * torch.randn_like(weight)), x)
    with torch.no_grad():
        logits, own = model.layers(x), body(x)
    expected = logits.argmax(1)
    differs = own != expected
    assert found.differing == int(differs.sum()) > 0
    assert found.elements == expected.numel()
    assert 0 < found.turned < 0.01
    assert found.decision == "argmax"
    margin = logits.gather(1, expected[:, None]) - logits.gather(1, own[:, None])
    assert float(margin[:, 0][differs].max()) < 2 * found.error * float(logits.square().mean().sqrt() + logits.max())
    assert found.error < 1e-3


def test_what_is_selected_is_compared_on_the_originals_decisions():
    x = torch.randn(4, 3, 48, 48)
    _, _, found = judged("where", lambda weight: weight * (1 + 1e-5), x)
    assert found.error < 3e-5


def test_a_mask_that_turns_over_everywhere_is_refused_although_all_of_it_lies_at_the_tie(monkeypatch):
    model, x = segmenter("threshold"), torch.randn(2, 3, 24, 24)
    model.head = lambda y: y > 0
    nn.init.zeros_(model.layers[-1].weight)
    nn.init.zeros_(model.layers[-1].bias)
    faster_of = pipeline._faster_of

    def shifted(traced, body, *others, **named):
        with_weights(body, lambda weight: weight + 1e-9)
        return faster_of(traced, body, *others, **named)

    monkeypatch.setattr(pipeline, "_faster_of", shifted)
    record = kp.emit(model, x, progress=False, cost=prefer("reference")).record
    assert record.kept_original
    assert record.error < 1e-6
    assert "turned over at ties, above 1.0%" in record.reason


@pytest.mark.parametrize("share", [0.005, 0.02])
def test_the_share_that_may_turn_over_is_bounded(share):
    found = pipeline.Comparison(error=1e-6, turned=share, decision="gt", differing=1, elements=100)
    refusal = pipeline._refusal(found, bound=1e-3)
    assert (refusal is not None) == (share > pipeline.TURNED_SHARE)
    assert refusal is None or "of gt turned over at ties" in refusal
    assert pipeline._refusal(found, bound=0.1) is None


def test_the_record_counts_what_differs_and_survives_json():
    record = EmissionRecord((), "cpu", error=1e-6, differing=3, decided=4096, notes=("cond stays as it came: head",))
    assert EmissionRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    emitted = kp.emit(segmenter("argmax"), torch.randn(2, 3, 24, 24), progress=False, cost=prefer("reference"))
    assert emitted.record.decided == 2 * 24 * 24
    assert f"differ, at ties: {emitted.record.differing} of {emitted.record.decided}" in emitted.summary()


def test_random_operations_are_compared_on_the_same_numbers():
    x = torch.randn(2, 3, 24, 24)
    model = with_random_norms(Segmenter(lambda y: y + torch.randn(CLASSES, 1, 1)))
    emitted = kp.emit(model, x, progress=False, cost=prefer("reference"))
    assert not emitted.record.kept_original, emitted.record.reason
    assert emitted.record.error < 1e-5


def test_infinities_and_nan_among_the_floats_are_compared_by_their_places():
    def head(y):
        return y.masked_fill(y < 0, -torch.inf).argmax(1), torch.where(y > 1, torch.nan, y) > 0

    emitted = kp.emit(
        with_random_norms(Segmenter(head)), torch.randn(2, 3, 24, 24), progress=False, cost=prefer("reference")
    )
    assert not emitted.record.kept_original, emitted.record.reason
