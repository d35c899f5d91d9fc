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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
            ("mobilnet_v2", "MODEL: expected one of .*mobilenet_v2.*, got 'mobilnet_v2'"),
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

    def test_interruption_tells_how_to_go_on(self, capsys, monkeypatch):
        press = pytest.importorskip("kernelpress.press", reason="press takes kernelpress[all]")

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(press, "press", interrupted)
        assert cli.main(["press", "recipe.yaml"]) == 130
        assert "the same command goes on from the last finished stage" in capsys.readouterr().err


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


class TestProcess:
    def test_module_runs_as_a_command(self):
        done = subprocess.run(
            [sys.executable, "-m", "kernelpress", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"kernelpress {kernelpress.__version__}"

    def test_help_needs_no_torch(self):
        code = "import sys\nfrom kernelpress import cli\ncli._parser()\nassert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
