"""Training with a teacher: what it may not change, whom one may ask, layers by path, memory, several processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kernelpress import compress
from kernelpress.compress.finetune import CHECKPOINT_NAME

pytest.importorskip("accelerate", reason="training needs: pip install 'kernelpress[train]'")

CLASSES = 3
RESPONSE = (compress.ResponseLoss(temperature=4),)


class Network(nn.Module):
    """A stem and two stages of these channels; `spare` never runs."""

    def __init__(self, width: int, *, classes: int = CLASSES, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stage = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, classes)
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stage(self.relu(self.bn(self.stem(x)))))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


def network(width: int = 4, **options: object) -> Network:
    torch.manual_seed(width)
    return Network(width, **options)


def images(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, CLASSES, (count,), generator=generator)
    pictures = torch.randn(count, 1, 6, 6, generator=generator)
    for picture, target in zip(pictures, targets.tolist(), strict=True):
        picture[:, 2 * target : 2 * target + 2] += 1
    return TensorDataset(pictures, targets)


def loader(**options: object) -> DataLoader:
    return DataLoader(images(), **{"batch_size": 8, "shuffle": True, **options})


def train(student: nn.Module, teacher: object, losses: object = RESPONSE, **options: object) -> compress.FinetuneResult:
    data = options.pop("loader", None) or loader()
    return compress.finetune(
        student, data, **{"epochs": 2, "progress": False, "teacher": teacher, "losses": losses, **options}
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


HINT = {"layers": {"stage": "stage"}}
EVERY_LOSS = [
    compress.ResponseLoss(),
    compress.DKDLoss(),
    compress.DISTLoss(),
    compress.HintLoss(["stem", "stage"]),
    compress.VIDLoss(["stage"], weight=30.0),
    compress.AttentionLoss(["bn", "stage"]),
    compress.SimilarityLoss(["stage"]),
    compress.RKDDistanceLoss(),
    compress.RKDAngleLoss(["stage"]),
    compress.FSPLoss(["stem", "stage"], weight=0.01),
]


class TestTheTeacherIsATeacher:
    @pytest.fixture
    def teacher(self) -> Network:
        """With BatchNorm and Dropout, in training mode but for one part, some of it frozen."""
        teacher = network(8, dropout=0.5).train()
        teacher.bn.eval()
        teacher.stem.weight.requires_grad_(False)
        return teacher

    def seen_by(self, teacher: Network, run) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []
        handle = teacher.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
        run()
        handle.remove()
        return seen

    def test_it_answers_in_evaluation_mode_and_without_a_graph(self, teacher: Network):
        seen = self.seen_by(teacher, lambda: train(network(), teacher))
        assert len(seen) == 1 + 2 * 5
        for given, output in seen:
            assert not output.requires_grad
            with torch.no_grad():
                torch.testing.assert_close(copy.deepcopy(teacher).eval()(given), output)

    def test_it_comes_back_as_it_was(self, teacher: Network):
        before, modes = state(teacher), [part.training for part in teacher.modules()]
        train(network(), teacher, [loss for loss in EVERY_LOSS if not isinstance(loss, compress.FSPLoss)])
        assert_same(before, state(teacher))
        assert [part.training for part in teacher.modules()] == modes
        assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * 10
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert not any(part._forward_hooks for part in teacher.modules())

    def test_its_mode_comes_back_after_an_exception(self, teacher: Network):
        modes, calls = [part.training for part in teacher.modules()], []

        def failing(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
            calls.append(teacher.training)
            if len(calls) == 4:
                raise InterruptedError("the power went out")
            return (student_output - teacher_output).square().mean()

        student = network().eval()
        before = state(teacher)
        with pytest.raises(InterruptedError):
            train(student, teacher, [failing, compress.HintLoss(**HINT)])
        assert calls == [False] * 4
        assert [part.training for part in teacher.modules()] == modes
        assert not any(part.training for part in student.modules())
        assert not any(part._forward_hooks for model in (student, teacher) for part in model.modules())
        assert_same(before, state(teacher))

    def test_it_is_neither_in_the_optimizer_nor_in_the_checkpoint(self, teacher: Network, tmp_path: Path):
        student = network()
        train(student, teacher, [*RESPONSE, compress.HintLoss(**HINT)], checkpoint_dir=tmp_path)
        with safe_open(tmp_path / CHECKPOINT_NAME, "pt") as file:
            names = set(file.keys())
        model = {f"model.{name}" for name in student.state_dict()}
        regressors = {f"losses.0.regressors.0.0.{name}" for name in ("weight", "bias")}
        # Nine of the student's parameters have a gradient, and two of the regressor's.
        assert {name for name in names if not name.startswith("optimizer.")} == model | regressors
        assert len([name for name in names if name.startswith("optimizer.")]) == 9 + 2
        assert student.state_dict().keys() == network().state_dict().keys()

    def test_it_may_be_the_student_itself_which_learns_from_its_weights_of_now(self):
        student = network()
        before, answers = copy.deepcopy(student).eval(), []

        def keep(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
            answers.append(teacher_output)
            return (student_output - teacher_output).square().mean()

        data = DataLoader(images(8), batch_size=8)
        train(student, student, [keep], loader=data, epochs=3)
        with torch.no_grad():
            expected = before(images(8).tensors[0])
        for answer in answers:
            torch.testing.assert_close(answer, expected)
        assert not torch.equal(student.fc.weight, before.fc.weight)

    def test_it_may_share_a_part_with_the_student(self):
        student, teacher = network(), network(5)
        teacher.fc = student.fc = nn.Linear(10, CLASSES)
        student.stage = copy.deepcopy(teacher.stage)
        student.stem, student.bn = copy.deepcopy(teacher.stem), copy.deepcopy(teacher.bn)
        seen = self.seen_by(teacher, lambda: train(student, teacher))
        assert len({output.sum().item() for given, output in seen if torch.equal(given, seen[0][0])}) == 1

    def test_it_drops_nothing_where_it_shares_a_dropout_with_the_student(self):
        student, teacher, modes = network(), network(8), []
        student.dropout = teacher.dropout = nn.Dropout(0.5)

        def look(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
            modes.append((teacher_output - answers(8)).abs().max().item())
            return (student_output - teacher_output).square().mean()

        def answers(count: int) -> Tensor:
            with torch.no_grad():
                return copy.deepcopy(teacher).eval()(images(count).tensors[0])

        train(student, teacher, [look], loader=DataLoader(images(8), batch_size=8))
        assert max(modes) < 1e-5
        assert student.dropout.training

    def test_it_may_be_an_emitted_file(self, tmp_path: Path):
        import kernelpress

        teacher = network(8).eval()
        kernelpress.emit(teacher, images().tensors[0][:2], progress=False).save(tmp_path / "teacher.pt2")
        by_file, by_module = network(), network()
        train(by_file, str(tmp_path / "teacher.pt2"), lr=0.01)
        train(by_module, teacher, lr=0.01)
        for name, value in by_file.state_dict().items():
            torch.testing.assert_close(value, by_module.state_dict()[name], rtol=1e-3, atol=1e-4)

    def test_it_may_be_an_exported_graph(self):
        teacher = network(8).eval()
        size = {"x": {0: torch.export.Dim.DYNAMIC}}
        exported = torch.export.export(teacher, (images().tensors[0][:8],), dynamic_shapes=size).module()
        by_graph, by_module = network(), network()
        train(by_graph, exported)
        train(by_module, teacher)
        for name, value in by_graph.state_dict().items():
            torch.testing.assert_close(value, by_module.state_dict()[name], rtol=1e-3, atol=1e-4)

    def test_files_and_other_things_that_are_no_teacher_are_refused(self, tmp_path: Path):
        (tmp_path / "teacher.pt2").write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"path: .*teacher\.pt2"):
            train(network(), tmp_path / "teacher.pt2")
        with pytest.raises(FileNotFoundError, match=r"absent\.pt2"):
            train(network(), tmp_path / "absent.pt2")
        with pytest.raises(TypeError, match=r"^teacher: expected a module or the path of a \.pt2 file, got function"):
            train(network(), lambda x: x)


class TestLosses:
    @pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: type(loss).__name__)
    def test_every_loss_falls_where_nothing_else_is_learnt(self, loss):
        teacher, student = network(4), network(3)
        if isinstance(loss, compress.FSPLoss):
            student = network(4)
            torch.nn.init.normal_(student.stem.weight)
        history = train(student, teacher, [loss], epochs=12, lr=0.02, target_weight=0.0).history
        assert history[-1].loss < 0.8 * history[0].loss

    def test_a_mix_is_the_weighted_sum(self):
        def first_loss(*losses: object, target_weight: float = 1.0) -> float:
            data = DataLoader(images(8), batch_size=8)
            options = {"epochs": 1, "loader": data, "target_weight": target_weight}
            return train(network(), network(8), losses, **options).history[0].loss

        response, attention = compress.ResponseLoss(2, weight=0.7), compress.AttentionLoss(["stage"], weight=30.0)
        parts = first_loss(response, target_weight=0.0) + first_loss(attention, target_weight=0.0)
        data = DataLoader(images(8), batch_size=8)
        alone = compress.finetune(network(), data, epochs=1, progress=False).history[0].loss
        assert first_loss(response, attention, target_weight=0.3) == pytest.approx(parts + 0.3 * alone, rel=1e-5)

    def test_regressors_are_trained_and_leave_the_student_as_it_is(self):
        hint, student = compress.HintLoss(**HINT), network()
        keys = student.state_dict().keys()
        train(student, network(8), [hint], epochs=1)
        after_one = state(hint)
        train(network(), network(8), [hint], epochs=2)
        assert not torch.equal(after_one["regressors.0.0.weight"], hint.regressors[0][0].weight)
        assert after_one["regressors.0.0.weight"].shape == (16, 8, 1, 1)
        assert student.state_dict().keys() == keys
        assert all(parameter.grad is not None for parameter in hint.parameters())

    def test_losses_that_are_modules_are_trained_along(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
                return (self.scale * student_output - teacher_output).square().mean()

        loss = Scaled()
        train(network(), network(8), [loss])
        assert loss.scale != 1

    def test_hints_are_what_a_layer_puts_out_whatever_happens_to_it_then(self):
        """An activation in place overwrites what the norm before it put out."""
        seen = []

        class Keep(compress.LayerLoss):
            def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
                seen.extend([student, teacher])
                return (student.mean() - teacher.mean()).square()

        train(network(), network(8), [Keep(["bn", "stage"])], epochs=1)
        assert all((features < 0).any() for features in seen)

    def test_layers_that_do_not_exist_are_named_with_a_suggestion(self):
        student = network()
        before = state(student)
        with pytest.raises(ValueError, match=r"^layers: the student \(Network\) has no layer 'stag', did .* 'stage'\?"):
            train(student, network(8), [compress.HintLoss({"stag": "stage"})])
        with pytest.raises(ValueError, match=r"^layers: the teacher .* no layer 'stage\.7'.*; its parts are stem"):
            train(student, network(8), [compress.HintLoss({"stage": "stage.7"})])
        assert_same(before, state(student))

    def test_layers_that_never_run_are_named(self):
        with pytest.raises(ValueError, match=r"^layers: 'spare' of the student did not run"):
            train(network(), network(8), [compress.HintLoss({"spare": "stage"})])
        with pytest.raises(ValueError, match=r"^layers: 'spare' of the teacher did not run"):
            train(network(), network(8), [compress.HintLoss({"stage": "spare"})])

    def test_other_class_counts_are_named_but_layers_may_be_compared(self):
        with pytest.raises(ValueError, match=r"^teacher_output: expected .* \[8, 3\], got \[8, 5\]"):
            train(network(), network(8, classes=5))
        train(network(), network(8, classes=5), [compress.HintLoss(**HINT)], epochs=1)

    def test_a_teacher_of_other_images_is_named(self):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        with pytest.raises(ValueError, match=r"^teacher: it does not take the images \[8, 1, 6, 6\]"):
            train(network(), teacher)

    def test_a_teacher_that_knows_nothing_is_named(self):
        teacher = network(8)
        nn.init.constant_(teacher.fc.bias, torch.nan)
        with pytest.raises(ValueError, match=r"^teacher: its output for the first batch is NaN"):
            train(network(), teacher)

    def test_outputs_that_are_no_tensor_are_named(self):
        class Pair(Network):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return super().forward(x), x

        with pytest.raises(TypeError, match=r"^teacher: expected one tensor as its output, got tuple"):
            train(network(), Pair(8))

    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            (
                [compress.ResponseLoss],
                r"^losses\[0\]: expected a loss, such as .*, got <class",
            ),
            ([*RESPONSE, "response"], r"^losses\[1\]: expected a loss, .* got 'response'"),
            (compress.ResponseLoss(), r"^losses: expected a list of losses, got ResponseLoss"),
            ("response", r"^losses: expected a list of losses, got 'response'"),
        ],
    )
    def test_what_is_no_loss_is_named(self, losses: object, message: str):
        with pytest.raises(TypeError, match=message):
            train(network(), network(8), losses)

    def test_losses_that_are_no_scalar_are_named(self):
        def vector(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
            return (student_output - teacher_output).square().mean(dim=1)

        with pytest.raises(ValueError, match=r"^losses\[1\]: expected a scalar tensor from .*vector, got \[8\]"):
            train(network(), network(8), [*RESPONSE, vector])

    @pytest.mark.parametrize(
        ("name", "value"), [("target_weight", -1.0), ("target_weight", torch.inf), ("cache_mb", -1)]
    )
    def test_setting_out_of_range_is_named(self, name: str, value: float):
        with pytest.raises(ValueError, match=rf"^{name}: expected zero or more"):
            train(network(), network(8), **{name: value})

    def test_nothing_to_learn_from_is_refused(self):
        with pytest.raises(ValueError, match=r"^target_weight: expected above 0 where no losses"):
            train(network(), None, (), target_weight=0.0)


class TestResumption:
    @pytest.mark.parametrize("who", ["module", "average"])
    def test_interrupted_training_goes_on_to_the_same_weights(self, tmp_path: Path, who: str):
        def run(student: nn.Module, fails: bool = False, **options: object) -> tuple[nn.Module, compress.HintLoss]:
            teacher = network(8) if who == "module" else compress.EMATeacher(0.9)
            hint, calls = compress.HintLoss(**HINT), []

            def failing(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
                calls.append(1)
                if fails and len(calls) == 1 + 2 * 5 + 3:
                    raise InterruptedError("the power went out")
                return (student_output - teacher_output).square().mean()

            train(student, teacher, [failing, hint], epochs=4, **options)
            return teacher, hint

        straight, resumed = network(), network()
        expected = run(straight)
        with pytest.raises(InterruptedError):
            run(network(), True, checkpoint_dir=tmp_path)
        found = run(resumed, checkpoint_dir=tmp_path)
        for first, second in zip((straight, *expected), (resumed, *found), strict=True):
            assert_same(state(first), state(second))

    def test_checkpoint_of_other_losses_is_refused_by_name(self, tmp_path: Path):
        train(network(), network(8), checkpoint_dir=tmp_path)
        with pytest.raises(ValueError, match=r"belongs to a training with losses = 'ResponseLoss\(temperature=4, "):
            train(network(), network(8), [compress.ResponseLoss(2)], checkpoint_dir=tmp_path)
        train(network(), network(8), [compress.HintLoss(**HINT)], checkpoint_dir=tmp_path / "hint")
        with pytest.raises(ValueError, match=r"written for another model"):
            train(network(), network(5), [compress.HintLoss(**HINT)], checkpoint_dir=tmp_path / "hint")


class TestMovingAverage:
    def test_it_is_the_average_of_the_steps(self):
        average, student = compress.EMATeacher(decay=0.6), network()
        steps: list[dict[str, Tensor]] = [state(student)]

        def keep(student_output: Tensor, teacher_output: Tensor, target: Tensor) -> Tensor:
            steps.append(state(student))
            return (student_output - teacher_output).square().mean()

        train(student, average, [keep], epochs=1)
        weights = [step["fc.weight"] for step in (*steps[2:], state(student))]  # not the trial before the training
        expected = weights[0]
        for number, weight in enumerate(weights[1:], 1):
            decay = min(1 - 1 / (number + 1), 0.6)
            expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.model.fc.weight, expected)
        assert not torch.equal(average.model.bn.running_mean, student.bn.running_mean)
        assert average.model.bn.num_batches_tracked == student.bn.num_batches_tracked
        assert not any(part.training for part in average.model.modules())
        assert not any(parameter.requires_grad for parameter in average.model.parameters())
        assert average(images().tensors[0]).shape == (40, CLASSES)

    def test_shared_weights_are_averaged_once(self):
        average, student = compress.EMATeacher(decay=0.5), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        student[1].weight = student[0].weight
        nn.init.zeros_(student[0].weight)
        average.begin(student)
        nn.init.ones_(student[0].weight)
        average.update(student)
        assert average.model[0].weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]

    def test_it_follows_a_masked_student(self):
        student = network()
        torch.nn.utils.prune.l1_unstructured(student.stem, "weight", amount=0.5)
        average = compress.EMATeacher(0.5)
        train(student, average)
        assert ((average.model.stem.weight == 0) == (student.stem.weight == 0)).all()

    def test_its_bad_uses_are_named(self):
        with pytest.raises(ValueError, match=r"^decay: expected at least 0 and below 1, got 1"):
            compress.EMATeacher(1)
        with pytest.raises(RuntimeError, match=r"EMATeacher: there is no average before a training"):
            compress.EMATeacher()(torch.zeros(1))
        with pytest.raises(ValueError, match=r"^cache_mb: expected 0 with an EMATeacher"):
            train(network(), compress.EMATeacher(), cache_mb=1)


class TestMemory:
    def asked(self, teacher: Network, **options: object) -> tuple[Network, int]:
        count = 0

        def counted(_: nn.Module, given: tuple[Tensor]) -> None:
            nonlocal count
            count += len(given[0])

        student = network()
        handle = teacher.register_forward_pre_hook(counted)
        train(student, teacher, [*RESPONSE, compress.HintLoss(**HINT)], epochs=4, **options)
        handle.remove()
        return student, count - 8  # the trial before the training

    def test_images_that_come_again_are_not_shown_again(self):
        plain, count = self.asked(network(8))
        assert count == 4 * 40
        kept, count = self.asked(network(8), cache_mb=10)
        assert count == 40
        for name, value in kept.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4)

    def test_images_that_change_are_shown_again(self):
        class Shifted(TensorDataset):
            def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
                image, target = super().__getitem__(index)
                return image + 0.01 * torch.randn(()), target

        options = {"loader": DataLoader(Shifted(*images().tensors), batch_size=8, shuffle=True)}
        plain, _ = self.asked(network(8), **options)
        kept, count = self.asked(network(8), cache_mb=10, **options)
        assert count == 4 * 40
        assert_same(state(plain), state(kept))

    def test_what_finds_no_room_is_shown_again(self):
        one = (CLASSES + 16 * 3 * 3) * 4
        _, count = self.asked(network(8), cache_mb=10.5 * one / 2**20)
        assert count == 4 * 40 - 3 * 10


def distributed(tmp_path: Path, script: str, **environment: str) -> list[dict]:
    """What two processes write."""
    file = tmp_path / "worker.py"
    file.write_text(script)
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", file, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        printed, _ = run.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == 0, printed[-4000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


WORKER = """
import json, os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from kernelpress import compress

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(1)
images = torch.randn(32, 6, generator=generator)
targets = images[:, :3].argmax(dim=1)

def network(width):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

def total(module):
    return sum(value.double().sum().item() for value in module.state_dict().values())

record, teacher = {}, network(32).train()
before = total(teacher)
for who, asked, options in (
    ("module", teacher, {"cache_mb": 1}),
    ("layers", teacher, {"target_weight": 0.0}),
    ("average", compress.EMATeacher(0.9), {}),
):
    student, hint = network(8), compress.HintLoss({"1": "1"})
    losses = [hint] if who == "layers" else [compress.ResponseLoss(2), hint]
    loader = DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
    options |= {"epochs": 6, "lr": 0.1, "teacher": asked, "losses": losses}
    result = compress.finetune(student, loader, progress=False, **options)
    # Statistics of BatchNorm follow each process's own images until the next step.
    shared = [p.double().sum().item() for p in student.parameters()]
    record[who] = [shared, total(hint), result.history[-1].loss, result.history[0].loss]
record["teacher"] = [before, total(teacher), teacher.training]
record["dtype"] = str(next(student.parameters()).dtype)
rank = os.environ["RANK"]
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(record, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_processes_learn_from_one_teacher(tmp_path: Path, precision: str) -> None:
    first, second = distributed(tmp_path, WORKER, ACCELERATE_MIXED_PRECISION=precision)
    assert first == second
    for who in ("module", "layers", "average"):
        _, _, last, start = first[who]
        assert last < 0.8 * start
    before, after, is_training = first["teacher"]
    assert before == after
    assert is_training
    assert first["dtype"] == "torch.float32"
