"""Emitted models in files: what comes back, what a stranger may have put in, and that nothing in there runs."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from file_kinds import Network
from torch import Tensor, nn
from torch.fx import GraphModule

import kernelpress as kp
from kernelpress.emit import EmittedModel
from kernelpress.emit.files import archive, container
from kernelpress.emit.files.archive import DESCRIPTION, _tensor_from_json, _tensor_to_json
from kernelpress.emit.files.container import MANIFEST, pack, unpack
from kernelpress.emit.files.graph_json import graph_from_json, graph_to_json
from kernelpress.files.sealed import seal, unseal
from kernelpress.runtime.torch_private import scoped_library


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[EmittedModel, Path]:
    model = kp.emit(Network().eval(), torch.randn(2, 3, 8, 8), progress=False, cost=lambda candidate: 1.0)
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    model.save(path)
    return model, path


@pytest.fixture
def entries(saved) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in unpack(saved[1].read_bytes(), "saved").items()}


@pytest.fixture
def load_with(entries, tmp_path) -> Callable[..., EmittedModel]:
    """Loads the saved model with some entries exchanged, in a file whose digests are right."""

    def load(changed: dict[str, bytes], **options: Any) -> EmittedModel:
        (tmp_path / "m.pt2").write_bytes(pack(entries | changed))
        return kp.load(tmp_path / "m.pt2", **options)

    return load


@pytest.fixture
def load_described(entries, load_with) -> Callable[..., EmittedModel]:
    """Loads the saved model with its description changed by a function."""

    def load(change: Callable[[Any], Any], **options: Any) -> EmittedModel:
        description = json.loads(entries[DESCRIPTION])
        change(description)
        return load_with({DESCRIPTION: json.dumps(description).encode()}, **options)

    return load


@pytest.fixture
def trap(tmp_path) -> Path:
    """A file that code in a file would make."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "something in a file was executed"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def bomb(path: Path) -> bytes:
    content = io.BytesIO()
    torch.save(Bomb(path), content)
    return content.getvalue()


class TestEmittedModels:
    def test_what_is_loaded_is_what_was_saved(self, saved):
        model, path = saved
        loaded = kp.load(path)
        x = torch.randn(3, 3, 8, 8)
        expected, result = model(x), loaded(x)
        assert torch.equal(result["flat"], expected["flat"])
        assert all(map(torch.equal, result["more"], expected["more"]))
        assert loaded.body.code == model.body.code
        assert loaded.record == model.record
        assert loaded.examples == model.examples
        states = [
            {k: (v.dtype, v.stride(), v.requires_grad) for k, v in m.body.state_dict().items()} for m in (model, loaded)
        ]
        assert states[0] == states[1]
        assert {k for k, _ in loaded.body.named_parameters()} == {k for k, _ in model.body.named_parameters()}

    def test_torch_reads_the_file_too(self, saved):
        model, path = saved
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(torch.export.load(path).module()(x)["flat"], model(x)["flat"])

    def test_weights_lie_in_the_file_once(self, tmp_path):
        model = kp.emit(nn.Linear(600, 600).eval(), torch.randn(2, 600), progress=False, cost=lambda candidate: 1.0)
        model.save(tmp_path / "m.pt2")
        assert (tmp_path / "m.pt2").stat().st_size < 1.2 * 600 * 600 * 4

    def test_what_torch_does_not_write_as_it_lies_is_written_beside(self, tmp_path):
        wide = torch.randn(4, 8)
        program = torch.export.export(_Reader(wide[:, ::2], wide.expand(3, 4, 8)), (torch.randn(4),))
        tensors: list[Tensor] = []
        assert len(graph_to_json(program.module(check_guards=False), tensors)["attributes"]) == 2
        for tensor in tensors:
            row, data = _tensor_to_json(tensor)
            again = _tensor_from_json(row, data)
            assert torch.equal(again, tensor)
            assert len(data) >= 4 * tensor.numel(), "nothing shares an element with another"

    def test_a_name_that_no_file_can_hold_is_refused_when_it_is_saved(self, tmp_path):
        model = nn.Sequential()
        model.add_module("it's", nn.Linear(2, 2))
        emitted = kp.emit(model.eval(), torch.randn(1, 2), progress=False, cost=lambda candidate: 1.0)
        with pytest.raises(ValueError, match=r"can have the name \"it's"):
            emitted.save(tmp_path / "m.pt2")
        assert list(tmp_path.iterdir()) == []

    def test_graphs_in_graphs(self):
        class Branch(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos(), (x,))

        module = torch.export.export(Branch(), (torch.randn(3, 4),)).module(check_guards=False)
        assert isinstance(module, GraphModule)
        described = json.loads(json.dumps(graph_to_json(module, [])))
        again = graph_from_json(described, [])
        for x in (torch.ones(3, 4), -torch.ones(3, 4)):
            assert torch.equal(again(x), module(x))

    def test_a_structure_of_its_own_comes_back_where_it_is_registered(self, tmp_path):
        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Pair:
                return Pair(2 * x, x.sum())

        x = torch.randn(2, 3)
        kp.emit(Twice(), x, progress=False, cost=lambda candidate: 1.0).save(tmp_path / "m.pt2")
        result = kp.load(tmp_path / "m.pt2")(x)
        assert isinstance(result, Pair)
        assert torch.equal(result.first, 2 * x)
        content = (tmp_path / "m.pt2").read_bytes()
        entries = {name: bytes(data) for name, data in unpack(content, "").items()}
        (tmp_path / "m.pt2").write_bytes(
            pack(entries | {DESCRIPTION: entries[DESCRIPTION].replace(b"test_saved_models.Pair", b"elsewhere.Pair")})
        )
        with pytest.raises(ValueError, match=r"'elsewhere\.Pair' is unknown: import the package that defines it"):
            kp.load(tmp_path / "m.pt2")


@dataclass
class Pair:
    """What a model returns."""

    first: Tensor
    second: Tensor


torch.export.register_dataclass(Pair, serialized_type_name="test_saved_models.Pair")


class _Reader(nn.Module):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"b{i}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() + self.b0.sum() + self.b1.sum()


class TestHostileArchives:
    """Files whose digests are right: whoever writes them can compute those."""

    def test_a_pickle_among_the_sample_inputs_is_not_read(self, load_with, entries, trap):
        (name,) = (name for name in entries if "sample_inputs" in name)
        assert isinstance(load_with({name: bomb(trap)}), EmittedModel)

    def test_a_weight_that_claims_to_be_a_pickle_is_not_read(self, load_with, entries, trap):
        (name,) = (name for name in entries if name.endswith("model_weights_config.json"))
        config = json.loads(entries[name])
        for row in config["config"].values():
            row["use_pickle"] = True
        weight = next(name for name in entries if name.endswith("weight_0"))
        load_with({name: json.dumps(config).encode()})
        with pytest.raises(ValueError, match="does not fit its"):
            load_with({name: json.dumps(config).encode(), weight: bomb(trap)})

    def test_an_expression_for_a_size_is_not_evaluated(self, load_with, entries, trap):
        (name,) = (name for name in entries if name.endswith("models/model.json"))
        program = entries[name].decode()
        assert '"expr_str": "Symbol(' in program
        attack = f"__import__('pathlib').Path('{trap}').touch()"
        load_with({name: program.replace('"expr_str": "Symbol(', f'"expr_str": "{attack} or Symbol(').encode()})

    @pytest.mark.parametrize(
        "name",
        [
            "os.system", "builtins.eval", "builtins.exec", "builtins.__import__", "operator.attrgetter",
            "operator.methodcaller", "operator.call", "torch.load", "torch.sym_max.__globals__", "math.__loader__.x",
            "aten.from_file.default", "aten.save.default", "aten.set_.source_Storage", "aten.resize_.default",
            "aten._reshape_alias.default", "aten._print.default", "aten.relu.__class__", "aten.__class__.default",
            "aten.relu.redispatch", "prim.print.default", "higher_order.print", "higher_order.call_torchbind",
            "higher_order.triton_kernel_wrapper_mutation", "kernelpress.__init__.default", "kernelpress.relu.default",
            "inductor.resize_storage_bytes_.default", "profiler._record_function_enter.default",
            "image.read_file.default",
            "torchvision.read_file.default", "", "aten", "aten.relu.default.x", "aten.relu;import os.default", 7, None,
        ],
    )  # fmt: skip
    def test_functions_that_do_more_than_compute_are_refused(self, load_described, name, trap):
        with pytest.raises(ValueError, match=r"m\.pt2 cannot be used, though it is whole: .*(operator|text)"):
            load_described(lambda description: _call(description).update(target=name))

    def test_an_operator_that_is_named_to_load_is_taken(self, load_described, tmp_path):
        with scoped_library("kernelpress_files_test", "FRAGMENT") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")

            def change(description: Any) -> None:
                _named(description, "aten.clamp.default").update(
                    target="kernelpress_files_test.twice.default", kwargs={}, args=[{"node": 0}]
                )

            with pytest.raises(
                ValueError, match=r"not among those.*load\(path, operators=\['kernelpress_files_test::t"
            ):
                load_described(change)
            assert load_described(change, operators=["kernelpress_files_test::twice"])(torch.randn(2, 3, 8, 8))
        with pytest.raises(ValueError, match=rf"unknown to torch {torch.__version__.split('+')[0]}"):
            load_described(change, operators=["kernelpress_files_test::twice"])

    @pytest.mark.parametrize(
        "target",
        [
            'x"), __import__("os").system("touch executed"), ("', "a'b", "a\nb", "a\\", "__class__.forward",
            "__class__.__base__.forward", "forward", "_modules.x", "graph", "code", "state_dict", "", "a..b", "meta",
            "\u2028", "{x}",
        ],
    )  # fmt: skip
    def test_paths_that_would_be_more_than_names_are_refused(self, load_described, target, trap):
        forward = nn.Module.forward

        def change(description: Any) -> None:
            graph = description["graph"]
            node = next(n for n in graph["nodes"] if n["op"] == "get_attr")
            graph["attributes"][target] = graph["attributes"][node["target"]]
            node["target"] = target

        with pytest.raises(ValueError, match="no attribute of a graph in a file"):
            load_described(change)
        assert nn.Module.forward is forward

    @pytest.mark.parametrize("name", ["x; import os", "x y", "x\ny", "def", "x)", "1x", "", 5, None, "x: int", "*x"])
    @pytest.mark.parametrize("place", ["node", "placeholder", "argument", "keyword"])
    def test_names_that_are_no_identifiers_are_refused(self, load_described, place, name, trap):
        def change(description: Any) -> None:
            nodes, signature = description["graph"]["nodes"], description["graph"]["signature"]
            if place == "node":
                nodes[3]["name"] = name
            elif place == "placeholder":
                next(n for n in nodes if n["op"] == "placeholder")["target"] = name
            elif place == "argument":
                signature["names"] = [name]
            else:
                _call(description)["kwargs"] = {str(name): 1}

        with pytest.raises(ValueError, match=r"expected (an identifier|a text)"):
            load_described(change)

    def test_keyword_structures_are_written_into_source_only_as_names(self, load_described, trap):
        key = "a': __import__('os').system('touch executed'), 'b"

        def change(description: Any) -> None:
            signature = description["graph"]["signature"]
            signature["inputs"] = {"tuple": [{"tuple": []}, {"dict": [[key, "*"]]}]}

        with pytest.raises(ValueError, match="expected an identifier"):
            load_described(change)

    @pytest.mark.parametrize("text", ['"', "'", "\\", "\n", "'''\"\"\"", "{0}", "\x00", "\u2028", "x'); import os #"])
    def test_texts_among_arguments_stay_texts(self, load_described, text, trap):
        def change(description: Any) -> None:
            clamp = _named(description, "aten.clamp.default")
            clamp.update(target="aten.gelu.default", args=clamp["args"][:1], kwargs={"approximate": text})

        loaded = load_described(change)
        (gelu,) = (n for n in loaded.body.graph.nodes if n.target is torch.ops.aten.gelu.default)
        assert gelu.kwargs["approximate"] == text
        with pytest.raises((RuntimeError, ValueError)):
            loaded(torch.randn(2, 3, 8, 8))

    @pytest.mark.parametrize(
        ("shape", "stride"),
        [
            ([2**40, 2**40], [1, 1]), ([2**40], [0]), ([8, 3, 3, 3], [0, 0, 0, 0]), ([8, 3, 3, 3], [27, 9, 3, 2]),
            ([8, 3, 3, 3], [-27, 9, 3, 1]), ([-8, 3, 3, 3], [27, 9, 3, 1]), ([8, 3, 3, 4], [27, 9, 3, 1]),
            ([216], [1, 1]), ([10, 207], [1, 1]),
            ([1.5], [1]), ([True], [1]), ("8", [1]), ([1] * 100, [1] * 100), ([2**70], [1]),
        ],
    )  # fmt: skip
    def test_shapes_that_do_not_fit_their_bytes_are_refused(self, load_described, shape, stride):
        def change(description: Any) -> None:
            row = next(row for row in description["tensors"] if row["shape"] == [8, 3, 3, 3])
            row.update(shape=shape, stride=stride)

        with pytest.raises(ValueError, match=r"does not fit its|expected the sizes"):
            load_described(change)

    def test_two_weights_in_one_entry_are_refused(self, load_described):
        with pytest.raises(ValueError, match="two weights have one entry"):
            load_described(lambda description: description["tensors"].extend(description["tensors"]))

    def test_graphs_beyond_all_measure_are_neither_written_nor_read(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr(archive, "LARGEST_DESCRIPTION", 1000)
        with pytest.raises(ValueError, match="bytes in a file, expected at most 1000"):
            kp.load(saved[1])
        with pytest.raises(ValueError, match="bytes in a file, expected at most 1000"):
            saved[0].save(tmp_path / "m.pt2")

    def test_bytes_that_are_no_booleans_are_refused(self, load_described, load_with, entries):
        rows = json.loads(entries[DESCRIPTION])["tensors"]
        (mask,) = (row["entry"] for row in rows if row["dtype"] == "bool")
        with pytest.raises(ValueError, match="other bytes than 0 and 1"):
            load_with({mask: b"\1\2\0"})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a CUDA device")
    def test_a_device_that_is_not_here_is_told(self, load_described):
        with pytest.raises(ValueError, match="emitted for cuda:0, and this machine has no CUDA device"):
            load_described(lambda description: description["tensors"][0].update(device="cuda:0"))

    @pytest.mark.parametrize("depth", [30, 900, 200_000])
    def test_nests_without_bottom_are_refused(self, load_with, entries, depth):
        text = entries[DESCRIPTION].decode()
        nest = "[" * depth + "]" * depth
        with pytest.raises(ValueError, match=r"too deeply|no JSON"):
            load_with({DESCRIPTION: text.replace('"args": [', f'"args": [{nest}, ', 1).encode()})

    def test_the_summary_of_a_stranger_does_not_move_the_cursor(self, load_described):
        def change(description: Any) -> None:
            description["model"]["record"]["places"][0]["name"] = "\x1b[2J\x07"

        assert "\\x1b[2J\\x07" in load_described(change).summary()

    @pytest.mark.parametrize(
        "name",
        ["../../executed", "/etc/passwd", "archive/../../x", "a", "a//b", "a/\0", "a/" + "b" * 2000, MANIFEST, "a\\b/"],
    )  # fmt: skip
    def test_entries_with_odd_names_are_neither_written_nor_read(self, entries, tmp_path, name):
        with pytest.raises(ValueError, match="entries: expected plain relative paths"):
            pack({**entries, name: b""})
        good = pack(entries)
        (tmp_path / "m.pt2").write_bytes(_with_manifest(good, lambda rows: rows.append([name, 0, 0, "0" * 64])))
        with pytest.raises(ValueError, match="impossible entries"):
            kp.load(tmp_path / "m.pt2")

    def test_a_zip_bomb_is_not_inflated(self, saved, tmp_path):
        with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(
                    name, old.read(name) if "weight_" not in name else bytes(1 << 26) if name.endswith("_0") else b""
                )
        assert (tmp_path / "m.pt2").stat().st_size < 10 << 20
        with pytest.raises(ValueError, match="damaged"):
            kp.load(tmp_path / "m.pt2")

    def test_sizes_beyond_the_file_are_told_before_anything_is_made(self, entries, tmp_path):
        def grow(rows: list[Any]) -> None:
            rows[0][1] = 2**61

        (tmp_path / "m.pt2").write_bytes(_with_manifest(pack(entries), grow))
        with pytest.raises(ValueError, match="truncated"):
            kp.load(tmp_path / "m.pt2")


def _named(description: Any, target: str) -> Any:
    return next(node for node in description["graph"]["nodes"] if node["target"] == target)


def _call(description: Any) -> Any:
    return next(node for node in description["graph"]["nodes"] if node["op"] == "call_function")


def _with_manifest(file: bytes, change: Callable[[list[Any]], None]) -> bytes:
    """The file with another manifest, sealed again."""
    start = file.index(b'{\n "kernelpress"')
    manifest = file[start : start + int.from_bytes(file[22:26], "little")]
    content = unseal(manifest, "emitted model", container.FORMAT, "")
    change(content["entries"])
    new = seal("emitted model", container.FORMAT, content)
    sizes = 2 * len(new).to_bytes(4, "little")
    return file[:18] + sizes + file[26:start] + new + file[start + len(manifest) :]


class TestContainer:
    def test_every_byte_counts(self, saved, tmp_path):
        good = saved[1].read_bytes()
        places = {*range(200), *range(len(good) - 1500, len(good)), *random.sample(range(len(good)), 300)}
        for place in places:
            changed = bytearray(good)
            changed[place] ^= 1 << random.randrange(8)
            with pytest.raises(ValueError, match=r"damaged|truncated|newer"):
                unpack(bytes(changed), "it")

    def test_every_length_but_its_own_is_told(self, saved):
        good = saved[1].read_bytes()
        for length in (*range(0, 4000, 7), *range(4000, len(good), 511), len(good) - 1):
            with pytest.raises(ValueError, match="truncated" if length > 3000 else "truncated|damaged"):
                unpack(good[:length], "it")
        with pytest.raises(ValueError, match="does not end as it was written"):
            unpack(good + b"x", "it")

    def test_a_newer_format_is_told_with_both_versions(self, saved, tmp_path):
        good = saved[1].read_bytes()
        start = good.index(b'{\n "kernelpress"')
        content = unseal(good[start : start + int.from_bytes(good[22:26], "little")], "emitted model", 2, "")
        newer = seal("emitted model", 3, content)
        (tmp_path / "m.pt2").write_bytes(good[:start] + newer + good[start + len(newer) :])
        with pytest.raises(ValueError, match=rf"newer format 3, written by kernelpress {kp.__version__}; .* reads 2"):
            kp.load(tmp_path / "m.pt2")

    def test_an_older_one_and_torch_s_are_told(self, tmp_path):
        program = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),))
        torch.export.save(program, tmp_path / "plain.pt2")
        with pytest.raises(ValueError, match=r"plain\.pt2 is a torch\.export archive, but no emitted model"):
            kp.load(tmp_path / "plain.pt2")
        torch.export.save(program, tmp_path / "old.pt2", extra_files={"kernelpress.json": '{"format": 1}'})
        with pytest.raises(ValueError, match=r"old\.pt2 is of format 1, .* emit the model and save it again"):
            kp.load(tmp_path / "old.pt2")

    def test_another_tool_s_copy_of_the_archive_is_told(self, saved, tmp_path):
        with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(tmp_path / "m.pt2", "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        with pytest.raises(ValueError, match="damaged"):
            kp.load(tmp_path / "m.pt2")

    @pytest.mark.parametrize("limit", [container._LARGEST_FIELD, 40_000, 5_000])
    def test_zip_readers_agree_with_ours_also_on_large_files(self, entries, tmp_path, monkeypatch, limit):
        monkeypatch.setattr(container, "_LARGEST_FIELD", limit)
        path = tmp_path / "m.pt2"
        path.write_bytes(pack(entries))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist() if name != MANIFEST} == entries
        assert {name: bytes(data) for name, data in unpack(path.read_bytes(), "it").items()} == entries
        assert torch.export.load(path).module()(torch.randn(2, 3, 8, 8))["flat"].shape[0] == 2
