"""Files of every kind, mutated at random: each is refused, says why, and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from file_kinds import Kind, all_kinds, harm_of, harm_of_content

MUTATIONS = 200

KIND_NAMES = [
    "emitted model", "emitted model, sealed description", "emitted model, sealed manifest", "torch archive",
    "compressed model", "compressed model, sealed", "training checkpoint", "training checkpoint, sealed",
    "step of a run", "step of a run, sealed", "times of layers", "times of layers, sealed",
    "tuned configurations", "tuned configurations, sealed", "recipe", "record",
]  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELPRESS_CACHE", "put back afterwards")
        yield {kind.name: kind for kind in all_kinds(tmp_path_factory.mktemp("kinds"))}


class TestMutations:
    """A few of the mutations that `make fuzz` tries by the thousand, others in each run."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", KIND_NAMES)
    def test_no_mutated_file_runs_code_crashes_hangs_or_passes(self, kinds, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        seed = int(os.environ.get("KERNELPRESS_TEST_SEED", "0"))
        for index in range(MUTATIONS):
            edits = kinds[name].draw(random.Random(f"{seed} {name} {index}"))
            assert harm_of(kinds[name], edits) is None, f"file {index} of seed {seed}, after {edits}"
        assert list(tmp_path.iterdir()) == []

    def test_every_kind_is_tried(self, kinds):
        assert list(kinds) == KIND_NAMES

    @pytest.mark.parametrize(
        ("read", "harm"),
        [
            (lambda path: pickle.loads(pickle.dumps(Path("x"))), r"runs pickle\.find_class"),
            (lambda path: eval("1 + 1"), "runs compile"),
            (lambda path: path.with_name("other").write_text("x"), "runs open"),
            (lambda path: subprocess.run(["true"]), "runs subprocess.Popen|runs os.posix_spawn"),
            (lambda path: {}["x"], "KeyError instead of a refusal"),
            (lambda path: None, "passes as good"),
            (lambda path: bytearray(400 << 20).count(b"x"), "reading it took"),
        ],
    )
    def test_harm_is_seen(self, tmp_path, read, harm):
        kind = Kind("toy", tmp_path / "file", b"good", lambda: read(tmp_path / "file") and None)
        assert (found := harm_of_content(kind, b"bad")) is not None
        assert any(part in found for part in harm.replace("\\", "").split("|"))

    @pytest.mark.slow
    def test_the_script_goes_on_where_it_stopped_and_prints_the_smallest_mutation(self, tmp_path):
        script, state = Path(__file__).with_name("fuzz_files.py"), tmp_path / "state.json"
        program = f"""
import pathlib, sys
sys.path.insert(0, {str(script.parent)!r})
sys.argv = ["fuzz_files.py", "--count", "60", "--only", "times"]
import fuzz_files
from kernelpress.files import sealed
fuzz_files.STATE = pathlib.Path({str(state)!r})
assert fuzz_files.main() == 0 and not fuzz_files.STATE.exists()
sealed._is_as_written = lambda *_: True
sys.exit(fuzz_files.main())
"""
        state.write_text('{"seed": 5, "times of layers": 40}')
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        whole, _, blind = done.stdout.partition("no harm")
        assert "seed 5" in whole
        assert "times of layers, sealed: 60 refused or harmless" in whole
        assert "it passes as good\n  after [(" in blind
        assert json.loads(state.read_text()).keys() == {"seed"}
