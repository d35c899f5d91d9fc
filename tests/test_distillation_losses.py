"""Losses of distillation: each against its paper's formula in plain loops, what is extreme, refusals."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from support import RELATIVE_ERROR
from torch import Tensor

from kernelpress import compress
from kernelpress.compress.losses import LOSSES

CLASSES = 10


def logits(*shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*(shape or (4, CLASSES)), dtype=torch.float64) * scale


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * (np.log(p) - np.log(q))))


def close(value: Tensor, expected: float) -> None:
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


class TestResponses:
    def test_divergence_is_of_the_batch_and_times_the_squared_temperature(self):
        student, teacher = logits(), logits()
        pairs = zip(student.numpy(), teacher.numpy(), strict=True)
        expected = 16 * sum(divergence(softmax(t / 4), softmax(s / 4)) for s, t in pairs) / 4
        close(compress.ResponseLoss(temperature=4)(student, teacher), expected)
        in_float32 = compress.ResponseLoss(temperature=4)(student.float(), teacher.float())
        assert float(in_float32) == pytest.approx(expected, rel=1e-6)
        close(compress.ResponseLoss(temperature=4, weight=0.3)(student, teacher), 0.3 * expected)

    @pytest.mark.parametrize("temperature", [1, 4, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equal_logits_give_exactly_nothing(self, temperature: float, dtype: torch.dtype):
        same = logits().to(dtype)
        assert compress.ResponseLoss(temperature=temperature)(same, same.clone()).item() == 0

    def test_dense_logits_average_over_positions(self):
        student, teacher = logits(2, 19, 8, 8), logits(2, 19, 8, 8)
        rows = [x.permute(0, 2, 3, 1).reshape(-1, 19).numpy() for x in (student, teacher)]
        expected = 4 * sum(divergence(softmax(t / 2), softmax(s / 2)) for s, t in zip(*rows, strict=True)) / (2 * 8 * 8)
        close(compress.ResponseLoss(temperature=2)(student, teacher), expected)
        channels_last = student.contiguous(memory_format=torch.channels_last)
        close(compress.ResponseLoss(temperature=2)(channels_last, teacher), expected)

    @pytest.mark.parametrize("loss", [compress.ResponseLoss(1), compress.DKDLoss(1), compress.DISTLoss(1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_huge_logits_stay_finite_and_so_do_their_gradients(self, loss, dtype: torch.dtype):
        student = (logits().sign() * 1e4).to(dtype).requires_grad_()
        value = loss(student, (logits().sign() * 1e4).to(dtype), torch.randint(0, CLASSES, (4,)))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()

    def test_classes_that_the_teacher_rules_out_count_nothing(self):
        student, teacher = logits().requires_grad_(), logits()
        teacher[:, 3] = -math.inf
        value = compress.ResponseLoss(2)(student, teacher)
        value.backward()
        others = [c for c in range(CLASSES) if c != 3]
        expected = sum(
            float(np.sum(softmax(t[others] / 2) * (np.log(softmax(t[others] / 2)) - np.log(softmax(s / 2)[others]))))
            for s, t in zip(student.detach().numpy(), teacher.numpy(), strict=True)
        )
        close(value, 4 * expected / 4)
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["response", "dkd", "dist"])
    def test_half_precision_is_summed_in_float32(self, name: str):
        loss = compress.create_loss(name, temperature=2)
        student, teacher, target = logits(64, 100).bfloat16(), logits(64, 100).bfloat16(), torch.randint(0, 100, (64,))
        value = loss(student, teacher, target)
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(loss(student.double(), teacher.double(), target)), rel=1e-5)

    def test_decoupled_distillation_is_what_its_paper_says(self):
        student, teacher, target = logits(), logits(), torch.tensor([0, 3, 9, 3])
        tckd = nckd = 0.0
        for s, t, c in zip(student.numpy() / 4, teacher.numpy() / 4, target.tolist(), strict=True):
            p_s, p_t, rest = softmax(s), softmax(t), [k for k in range(CLASSES) if k != c]
            tckd += divergence(np.array([p_t[c], 1 - p_t[c]]), np.array([p_s[c], 1 - p_s[c]]))
            nckd += divergence(softmax(t[rest]), softmax(s[rest]))
        close(compress.DKDLoss(temperature=4)(student, teacher, target), 16 * (tckd + 8 * nckd) / 4)
        loss = compress.DKDLoss(temperature=4, alpha=0.5, beta=2, weight=3)
        close(loss(student, teacher, target), 3 * 16 * (0.5 * tckd + 2 * nckd) / 4)

    def test_decoupled_distillation_with_its_own_weights_is_the_divergence(self):
        """Eq. 6: KD = TCKD + (1 − p_t) NCKD, here for one image."""
        student, teacher, target = logits(1, CLASSES), logits(1, CLASSES), torch.tensor([2])
        rest = 1 - softmax(teacher[0].numpy())[2]
        whole = compress.DKDLoss(temperature=1, alpha=1, beta=rest)(student, teacher, target)
        close(whole, float(compress.ResponseLoss(temperature=1)(student, teacher)))

    def test_decoupled_distillation_takes_two_classes_and_dense_targets(self):
        close(compress.DKDLoss()(*[logits(4, 2)] * 2, torch.tensor([0, 1, 1, 0])), 0)
        student, teacher, target = logits(2, 5, 3, 3), logits(2, 5, 3, 3), torch.randint(0, 5, (2, 3, 3))
        rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
        close(compress.DKDLoss()(student, teacher, target), float(compress.DKDLoss()(*rows, target.flatten())))

    def test_correlations_are_what_their_paper_says(self):
        student, teacher = logits(), logits()
        p_s, p_t = (np.stack([softmax(row / 2) for row in x.numpy()]) for x in (student, teacher))
        inter = np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(p_s, p_t, strict=True)])
        intra = np.mean([1 - np.corrcoef(s, t)[0, 1] for s, t in zip(p_s.T, p_t.T, strict=True)])
        close(compress.DISTLoss(2, beta=2, gamma=0.5, weight=3)(student, teacher), 3 * (2 * inter + 0.5 * intra))

    def test_correlations_of_one_image_and_of_constant_rows_are_finite(self):
        student = torch.zeros(1, CLASSES, requires_grad=True)
        value = compress.DISTLoss()(student, logits(1, CLASSES).float())
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["response", "dkd", "dist"])
    def test_no_gradient_reaches_the_teacher(self, name: str):
        student, teacher = logits().requires_grad_(), logits().requires_grad_()
        compress.create_loss(name)(student, teacher, torch.randint(0, CLASSES, (4,))).backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None

    @pytest.mark.parametrize("name", ["response", "dkd", "dist"])
    def test_other_classes_and_shapes_are_named(self, name: str):
        loss, target = compress.create_loss(name), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"^teacher_output: expected .* \[4, 10\], got \[4, 100\]"):
            loss(logits(), logits(4, 100), target)
        with pytest.raises(ValueError, match=r"^student_output: expected logits .* 2 classes or more, got \[4, 1\]"):
            loss(logits(4, 1), logits(4, 1), target)
        with pytest.raises(ValueError, match=r"^student_output: expected logits .*, got \[4\]"):
            loss(logits(4), logits(4), target)

    def test_soft_targets_are_refused_where_classes_are_asked_for(self):
        with pytest.raises(ValueError, match=r"^target: expected class indices \[4\], got torch.float64 \[4, 10\]"):
            compress.DKDLoss()(logits(), logits(), logits().softmax(1))

    @pytest.mark.parametrize("value", [-100, CLASSES])
    def test_targets_that_are_no_class_are_named(self, value: int):
        with pytest.raises(ValueError, match=r"^target: expected classes 0 … 9, got"):
            compress.DKDLoss()(logits(), logits(), torch.tensor([0, 1, 2, value]))


def maps(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 4, 5, 6)), dtype=torch.float64)


def attention(image: np.ndarray) -> np.ndarray:
    flat = (image**2).sum(axis=0).ravel()
    return flat / np.sqrt((flat**2).sum())


class TestFeatures:
    def test_attention_is_what_its_paper_says(self):
        student, teacher = maps(), maps(3, 7, 5, 6)
        distances = [
            0.5 * np.linalg.norm(attention(s) - attention(t))
            for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
        ]
        close(compress.AttentionLoss(["a"], weight=10)([student], [teacher]), 10 * np.mean(distances))

    def test_larger_maps_are_pooled(self):
        student, teacher = maps(3, 4, 4, 4), maps(3, 4, 8, 8)
        pooled = teacher.reshape(3, 4, 4, 2, 4, 2).mean(dim=(3, 5))
        loss = compress.AttentionLoss(["a"])
        close(loss([student], [teacher]), float(loss([student], [pooled])))

    def test_similarity_is_what_its_paper_says(self):
        student, teacher = maps(), maps(3, 7, 2, 2)
        grams = []
        for x in (student, teacher):
            flat = x.numpy().reshape(3, -1)
            gram = flat @ flat.T
            grams.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
        expected = np.sum((grams[1] - grams[0]) ** 2) / 9
        close(compress.SimilarityLoss(["a"], weight=3000)([student], [teacher]), 3000 * expected)

    @pytest.mark.parametrize("shapes", [((3, 4, 5, 6), (3, 7, 5, 6)), ((3, 4), (3, 7))])
    def test_hints_are_what_their_paper_says(self, shapes):
        student, teacher = (torch.randn(shape) for shape in shapes)
        loss = compress.HintLoss(["a"], weight=2)
        loss.prepare([student], [teacher])
        weight, bias = (parameter.detach().double() for parameter in loss.parameters())
        regressed = torch.einsum("oi,ni...->no...", weight.flatten(1), student.double())
        error = regressed + bias.view(-1, *[1] * (student.dim() - 2)) - teacher.double()
        expected = 2 * 0.5 * float((error**2).sum()) / teacher.numel()
        value = loss([student], [teacher])
        assert value.item() == pytest.approx(expected, rel=1e-6)

    def test_variational_information_is_what_its_paper_says(self):
        student, teacher = torch.randn(3, 4, 5, 6), torch.randn(3, 7, 5, 6)
        loss = compress.VIDLoss(["a"], weight=2)
        loss.prepare([student], [teacher])
        with torch.no_grad():
            loss.alphas[0].copy_(torch.linspace(-2, 2, 7))
            mean = loss.regressors[0](student).double().numpy()
        expected = 0.0
        for c in range(7):
            variance = math.log1p(math.exp(-2 + 4 * c / 6)) + loss.EPSILON
            squares = (teacher[:, c].double().numpy() - mean[:, c]) ** 2
            expected += np.sum(math.log(math.sqrt(variance)) + squares / (2 * variance))
        value = loss([student], [teacher])
        assert value.item() == pytest.approx(2 * expected / teacher.numel(), rel=1e-5)

    def test_variances_start_where_they_are_said_to(self):
        loss = compress.VIDLoss(["a"])
        loss.prepare([torch.randn(2, 3, 4, 4)], [torch.randn(2, 5, 4, 4)])
        variance = torch.nn.functional.softplus(loss.alphas[0]) + loss.EPSILON
        assert variance.tolist() == pytest.approx([loss.FIRST_VARIANCE] * 5, rel=1e-5)

    def test_flows_are_what_their_paper_says(self):
        student, teacher = ([maps(3, 4, 8, 8), maps(3, 5, 4, 4), maps(3, 6, 4, 4)] for _ in range(2))
        expected = 0.0
        for n in range(3):
            for first, second in ((0, 1), (1, 2)):
                matrices = []
                for side in (student, teacher):
                    a, b = side[first][n].numpy(), side[second][n].numpy()
                    if a.shape[1] == 8:
                        a = a.reshape(4, 4, 2, 4, 2).max(axis=(2, 4))
                    matrix = np.zeros((len(a), len(b)))
                    for i in range(len(a)):
                        for j in range(len(b)):
                            matrix[i, j] = np.sum(a[i] * b[j]) / 16
                    matrices.append(matrix)
                expected += np.sum((matrices[1] - matrices[0]) ** 2) / 3
        close(compress.FSPLoss(["a", "b", "c"], weight=2)(student, teacher), 2 * expected)


def huber(error: float) -> float:
    return 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5


class TestRelations:
    def test_distances_are_what_their_paper_says(self):
        student, teacher = maps(5, 4), maps(5, 2, 3, 3)
        psi = []
        for x in (student, teacher):
            flat = x.numpy().reshape(5, -1)
            norms = {pair: np.linalg.norm(flat[pair[0]] - flat[pair[1]]) for pair in combinations(range(5), 2)}
            psi.append({pair: norm / np.mean(list(norms.values())) for pair, norm in norms.items()})
        expected = np.mean([huber(psi[1][pair] - psi[0][pair]) for pair in psi[0]])
        close(compress.RKDDistanceLoss(weight=25)([student], [teacher]), 25 * expected)

    def test_angles_are_what_their_paper_says(self):
        student, teacher = maps(5, 4), maps(5, 7)

        def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
            a, b = x[i] - x[j], x[k] - x[j]
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        triplets = list(permutations(range(5), 3))
        errors = [cosine(teacher.numpy(), *triplet) - cosine(student.numpy(), *triplet) for triplet in triplets]
        close(compress.RKDAngleLoss(weight=50)([student], [teacher]), 50 * np.mean([huber(e) for e in errors]))

    @pytest.mark.parametrize("loss", [compress.RKDDistanceLoss(), compress.RKDAngleLoss()])
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_images_that_are_equal_or_alone_have_finite_gradients(self, loss, count: int):
        student = torch.ones(count, 4, requires_grad=True)
        loss([student], [torch.randn(count, 4)]).backward()
        assert student.grad.isfinite().all()


LAYERS = ["hint", "attention", "similarity", "vid", "rkd_distance", "rkd_angle", "fsp"]


def made(name: str, student: list[Tensor], teacher: list[Tensor], **options: float) -> compress.LayerLoss:
    loss = compress.create_loss(name, layers=["a", "b"], **options)
    torch.manual_seed(0)
    loss.prepare([x.float() for x in student], [x.float() for x in teacher])
    return loss


@pytest.mark.parametrize("name", LAYERS)
class TestAllLayerLosses:
    def features(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [maps(5, 4, 6, 6).to(dtype), maps(5, 3, 3, 3).to(dtype)]

    def test_weight_multiplies_and_pairs_add(self, name: str):
        student, teacher = self.features(), self.features()
        value = made(name, student, teacher)(student, teacher)
        assert value.shape == ()
        weighted = made(name, student, teacher, weight=3.0)(student, teacher)
        assert float(weighted) == pytest.approx(3 * float(value), rel=1e-6)
        if name not in ("fsp", "hint", "vid"):  # a flow takes two layers; regressors of one pair would start elsewhere
            singles = [
                compress.create_loss(name, layers=["a"])([s], [t]) for s, t in zip(student, teacher, strict=True)
            ]
            assert float(value) == pytest.approx(float(sum(singles)), rel=1e-6)

    def test_half_precision_is_summed_in_float32(self, name: str):
        student, teacher = self.features(torch.bfloat16), self.features(torch.bfloat16)
        loss = made(name, student, teacher)
        value = loss(student, teacher)
        assert value.dtype == torch.float32
        exact = loss.double()([x.double() for x in student], [x.double() for x in teacher])
        assert float(value) == pytest.approx(float(exact), rel=100 * RELATIVE_ERROR[torch.float32])

    def test_no_gradient_reaches_the_teacher(self, name: str):
        student, teacher = ([x.requires_grad_() for x in self.features()] for _ in range(2))
        made(name, student, teacher)(student, teacher).backward()
        assert all(x.grad.abs().sum() > 0 for x in student)
        assert all(x.grad is None for x in teacher)

    def test_other_images_are_named_with_their_layers(self, name: str):
        student, teacher = self.features(), self.features()
        loss = made(name, student, teacher)
        with pytest.raises(ValueError, match=r"features \[N, C, …\] of the same images, got \[5, 3, 3, 3\] and \[2, 3"):
            loss(student, [teacher[0], teacher[1][:2]])

    @pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, "1"])
    def test_weight_out_of_range_is_named(self, name: str, weight: object):
        with pytest.raises(ValueError, match=r"^weight: expected a finite number above 0"):
            compress.create_loss(name, layers=["a", "b"], weight=weight)

    @pytest.mark.parametrize("layers", [[], {}, [1, 2]])
    def test_no_layers_are_refused(self, name: str, layers: object):
        with pytest.raises(ValueError, match=r"^layers: expected at least one path"):
            compress.create_loss(name, layers=layers)
        with pytest.raises(TypeError, match=r"^loss: .*layers: expected a mapping or a sequence .* the string"):
            compress.create_loss(name, layers="layer1")


def test_maps_that_do_not_fit_are_named_with_their_layers():
    with pytest.raises(ValueError, match=r"^layers: 'x' of the student, 'y' of the teacher: expected maps"):
        compress.AttentionLoss({"x": "y"})([maps()], [maps(3, 4)])
    with pytest.raises(ValueError, match=r"^layers: expected maps \[N, C, H, W\] of the same C, got \[3, 4.* 'b'"):
        compress.FSPLoss({"a": "a", "x": "b"})([maps(), maps()], [maps(), maps(3, 9, 5, 6)])
    with pytest.raises(ValueError, match=r"^layers: expected two or more"):
        compress.FSPLoss(["a"])


@pytest.mark.parametrize("option", ["temperature", "weight"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, None])
@pytest.mark.parametrize("name", ["response", "dkd", "dist"])
def test_option_out_of_range_is_named(name: str, option: str, value: object):
    with pytest.raises(ValueError, match=rf"^{option}: expected a finite number above 0, got"):
        compress.create_loss(name, **{option: value})


def test_losses_are_known_by_name():
    assert sorted(LOSSES) == sorted(["response", "dkd", "dist", *LAYERS])
    assert compress.create_loss("response", temperature=2.0) == compress.ResponseLoss(temperature=2.0)
    with pytest.raises(ValueError, match=r"^loss: expected .*, got 'atention', did you mean 'attention'\?"):
        compress.create_loss("atention")
    with pytest.raises(TypeError, match=r"^loss: response is not made of .*temprature"):
        compress.create_loss("response", temprature=2)


class TestBesideTorchdistill:
    """Where it states a loss as the paper does. Its FSP takes norms where eq. 2 squares them, and its similarities are
    divided by the sum of a row where eq. 2 divides by the root of the sum of squares."""

    @pytest.fixture
    def theirs(self):
        module = "torchdistill.losses.mid_level"
        return pytest.importorskip(module, reason="no torchdistill: pip install --no-deps torchdistill")

    def outputs(self, *tensors: Tensor) -> list[dict]:
        return [{"a": {"output": tensor}} for tensor in tensors]

    def test_responses(self, theirs):
        student, teacher, target = logits(), logits(), torch.tensor([0, 3, 9, 3])
        both = self.outputs(student, teacher)
        hard = 0.5 * torch.nn.functional.cross_entropy(student, target).item()
        divergence = theirs.KDLoss("a", "output", "a", "output", temperature=4, alpha=0.5, beta=1.0)(*both, target)
        close(compress.ResponseLoss(4)(student, teacher), divergence.item() - hard)
        correlations = theirs.DISTLoss("a", "output", "a", "output", beta=2.0, gamma=3.0, tau=2.0)(*both)
        close(compress.DISTLoss(2, beta=2, gamma=3, weight=4)(student, teacher), correlations.item())

    def test_features(self, theirs):
        student, teacher = maps(), maps(3, 7, 5, 6)
        both = self.outputs(student, teacher)
        pair = {name: {"path": "a", "io": "output"} for name in ("student", "teacher")}
        attention = theirs.ATLoss({"pair": pair}, mode="paper")(*both)
        close(compress.AttentionLoss(["a"], weight=2)([student], [teacher]), attention.item())

    def test_relations(self, theirs):
        """It takes the mean over all pairs and triplets, equal images among them, whose terms are 0 of both."""
        student, teacher = maps(5, 4), maps(5, 7)
        both = self.outputs(student, teacher)
        distance = theirs.RKDLoss("a", "a", dist_factor=1, angle_factor=0, reduction="sum")(*both)
        close(compress.RKDDistanceLoss(weight=5 * 4)([student], [teacher]), distance.item())
