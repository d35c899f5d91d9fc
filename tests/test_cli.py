"""The command line: what it prints, its exit statuses, and errors in one line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import kernelpress
from kernelpress import cli

pytest.importorskip("rich", reason="the command line takes rich: pip install 'kernelpress[cli]'")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def factory_module(tmp_path, monkeypatch):
    """A module `small_networks` in the current folder, with factories good and bad."""
    (tmp_path / "small_networks.py").write_text(
        "from torch import nn\n"
        "def good():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
        "def bad():\n    return 3\n"
        "broken = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "small_networks"
    sys.modules.pop("small_networks", None)


def refusal(capsys, *arguments: str) -> str:
    """The one line on standard error with which a command line is refused."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kernelpress: error: ")
    return lines[0]


class TestProfile:
    def test_factory_is_profiled_per_layer(self, capsys, factory_module):
        assert cli.main(["profile", f"{factory_module}:good", "--size", "16", "--batch", "2", "--per-layer"]) == 0
        out = capsys.readouterr().out
        assert "images 2×3×16×16" in out
        assert "eager *" in out
        assert "channels_last" in out
        assert "Conv2d" in out
        assert 2 * 2 * 4 * 27 * 14 * 14 == 84672
        assert "84.7 k" in out

    def test_saved_model_is_profiled_captured(self, capsys, tmp_path):
        emitted = kernelpress.emit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 12, 12))
        emitted.save(tmp_path / "m.pt2")
        assert cli.main(["profile", str(tmp_path / "m.pt2"), "--per-layer"]) == 0
        out = capsys.readouterr().out
        assert "images 1×3×12×12" in out
        assert "captured" in out
        assert "places" in out

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("mobilnet_v2", "model: expected one of .*mobilenet_v2.*, got 'mobilnet_v2'"),
            ("absent.pt2", "absent.pt2 does not exist"),
            ("no_such_module_here:f", "cannot import no_such_module_here"),
            ("small_networks:absent", "has no function 'absent'"),
            ("small_networks:broken", "has no function 'broken'"),
            ("small_networks:bad", "to return an nn.Module, got int"),
        ],
    )
    def test_what_is_no_model_is_refused(self, capsys, factory_module, model, message):
        assert re.search(message, refusal(capsys, "profile", model))

    def test_file_that_is_no_archive_is_refused(self, capsys, tmp_path):
        (tmp_path / "m.pt2").write_bytes(b"not an archive")
        assert "m.pt2" in refusal(capsys, "profile", str(tmp_path / "m.pt2"))

    def test_batch_of_zero_is_refused(self, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["profile", "resnet20", "--batch", "0"])
        assert caught.value.code == 2
        assert "expected a positive integer, got '0'" in capsys.readouterr().err


class TestPress:
    def test_unreadable_recipe_is_refused(self, capsys, tmp_path):
        pytest.importorskip("pydantic", reason="recipes take pydantic: pip install 'kernelpress[all]'")
        assert "nowhere.yaml: the recipe cannot be read" in refusal(capsys, "press", str(tmp_path / "nowhere.yaml"))

    def test_options_are_set(self, monkeypatch, request):
        press = pytest.importorskip("kernelpress.press", reason="press takes kernelpress[all]")
        seen = []

        def stopped(recipe, **_):
            seen.append(recipe)
            raise KeyboardInterrupt

        monkeypatch.setattr(press, "press", stopped)
        command = ["press", str(request.config.rootpath / "recipes" / "sparse.yaml"), "--set", "data.image_size=16"]
        assert cli.main([*command, "--set", "steps.1.prune_weights.sparsity=0.5"]) == 130
        (recipe,) = seen
        assert (recipe.data.image_size, recipe.steps[1].section.sparsity) == (16, 0.5)

    def test_interruption_tells_how_to_go_on(self, capsys, monkeypatch, request):
        press = pytest.importorskip("kernelpress.press", reason="press takes kernelpress[all]")

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(press, "press", interrupted)
        assert cli.main(["press", str(request.config.rootpath / "recipes" / "sparse.yaml")]) == 130
        assert "the same command goes on from the last finished step" in capsys.readouterr().err


class TestDoctor:
    def test_every_section_is_examined(self, capsys):
        assert cli.main(["doctor"]) == 0
        out = capsys.readouterr().out
        sections = ("processor", "native kernels", "backends", "GPU", "energy counters", "peers", "timings cache")
        facts = ("depthwise_conv2d", "CUDA", "Triton", "RAPL", "NVML", "onnxruntime", f"torch {torch.__version__}")
        for expected in (*sections, *facts):
            assert expected in out

    def test_what_is_missing_has_a_reason(self):
        from kernelpress.doctor import examine

        findings = examine()
        assert all(finding.detail for finding in findings)
        rapl = next(finding for finding in findings if finding.name.startswith("RAPL"))
        assert (rapl.detail == "readable") == rapl.is_ok

    def test_the_triton_backend_is_reported_with_its_version_and_the_reason_against_it(self, monkeypatch):
        from kernelpress import doctor
        from kernelpress.ops.backends import triton

        def finding():
            return next(finding for finding in doctor.examine() if finding.name == "Triton kernels")

        monkeypatch.setattr(doctor, "version_of", lambda package: "3.9.0")
        with triton.TARGET.changed(reason=lambda index: None):
            assert (finding().is_ok, finding().detail) == (True, "3.9.0")
        with triton.TARGET.changed(reason=lambda index: "no device"):
            assert (finding().is_ok, finding().detail) == (False, "3.9.0; no device")
        monkeypatch.setattr(doctor, "version_of", lambda package: None)
        with triton.TARGET.changed(reason=lambda index: "triton is not installed: pip ..."):
            assert (finding().is_ok, finding().detail) == (False, "triton is not installed: pip ...")

    @pytest.mark.parametrize(
        ("value", "is_ok", "detail"),
        [
            ("", None, "as measured before"),
            ("0", None, "by heuristic"),
            ("1", None, "at first call"),
            ("x", False, "got 'x'"),
        ],
    )
    def test_how_kernels_are_tuned_is_reported(self, monkeypatch, value, is_ok, detail):
        from kernelpress.doctor import examine

        monkeypatch.setenv("KERNELPRESS_AUTOTUNE", value)
        found = next(finding for finding in examine() if finding.name == "tile configurations")
        assert found.is_ok is is_ok
        assert detail in found.detail

    def test_unwritable_cache_is_reported(self, monkeypatch):
        from kernelpress import doctor

        monkeypatch.setattr(doctor.os, "access", lambda *_: False)
        finding = next(finding for finding in doctor.examine() if finding.section == "timings cache")
        assert finding.is_ok is False
        assert "not writable" in finding.detail


class TestBench:
    def test_unknown_family_is_refused(self, capsys):
        assert "family" in refusal(capsys, "bench", "--family", "recurrent")

    def test_unknown_device_is_refused(self, capsys):
        assert "device: expected one of cpu" in refusal(capsys, "bench", "--family", "depthwise", "--device", "abacus")

    def test_backends_stand_side_by_side(self, capsys, monkeypatch):
        from kernelpress import bench
        from kernelpress.bench import backends

        few = bench.layers("depthwise", batch=2)[-1:]
        monkeypatch.setattr(backends, "layers", lambda family, batch: few if batch == 2 else ())
        command = ("bench", "--family", "depthwise", "--backends", "cpu, reference", "--batch", "2", "--threads", "1")
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        for expected in (few[0].label, "cpu", "reference", "vs cpu", "GB/s", "fp32"):
            assert expected in out

    def test_families_that_a_backend_cannot_run_are_left_out_of_all(self, capsys, monkeypatch):
        from kernelpress import bench
        from kernelpress.bench import backends

        few = {family: bench.layers(family)[-1:] for family in bench.ALL_FAMILIES}
        monkeypatch.setattr(backends, "layers", lambda family, batch: few[family])
        assert cli.main(("bench", "--backends", "onednn,reference", "--threads", "1")) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "depthwise on cpu, fp32" in out
        assert "left out: backends: 'onednn' cannot run sparse on cpu in fp32: sparse_matmul has no impl" in out
        assert "onednn" in refusal(capsys, "bench", "--backends", "onednn", "--family", "sparse")

    def test_families_without_peers_on_the_cpu_take_backends(self, capsys):
        assert "family: sparse takes --backends" in refusal(capsys, "bench", "--family", "sparse")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--backends", "cpu,rocket"), "backends: expected some of cuda, .*reference, got rocket"),
            (("--backends", "cpu", "--dtype", "fp8"), "dtype: expected one of fp32, fp16, bf16, got 'fp8'"),
            (("--dtype", "bf16"), "dtype: takes --backends"),
            (("--backends", "cpu", "--peers"), "peers: not with --backends"),
        ],
    )
    def test_what_backends_cannot_do_is_refused(self, capsys, arguments, message):
        assert re.search(message, refusal(capsys, "bench", "--family", "depthwise", *arguments))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device; one without runs it")
    def test_without_a_device_its_benchmark_says_so(self, capsys):
        text = refusal(capsys, "bench", "--family", "depthwise", "--device", "cuda")
        assert "torch.cuda.is_available() is False" in text
        assert text == refusal(capsys, "bench", "--family", "depthwise", "--backends", "cuda,triton")
        text = refusal(capsys, "bench", "--family", "depthwise", "--backends", "cpu,cuda")
        assert "backends: 'cuda' cannot run depthwise on cpu in fp32: " in text


class TestProcess:
    def test_module_runs_as_a_command(self):
        done = subprocess.run(
            [sys.executable, "-m", "kernelpress", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"kernelpress {kernelpress.__version__}"

    def test_help_needs_no_torch(self):
        code = "import sys\nfrom kernelpress import cli\ncli._parser()\nassert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
