"""Seals, and what is sealed: records, caches and compressed models that were damaged or are of another format."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernelpress as kp
from kernelpress import compress
from kernelpress.emit import EmissionRecord
from kernelpress.emit.cache import TimingCache
from kernelpress.emit.record import summary_table
from kernelpress.files.plain import from_plain
from kernelpress.files.sealed import parse_json, seal, seal_tensors, unseal, unseal_tensors
from kernelpress.ops.tuning import stored

CONTENT = {"a": [1, 2.5, None, "é\u2028\x1b"], "b": {"c": float("inf")}}


class TestSeals:
    def test_content_comes_back(self):
        assert unseal(seal("thing", 1, CONTENT), "thing", 1, "it") == CONTENT

    def test_every_byte_and_every_length_counts(self):
        good = seal("thing", 1, CONTENT)
        for place in range(len(good)):
            for bit in range(8):
                changed = bytearray(good)
                changed[place] ^= 1 << bit
                with pytest.raises(ValueError, match=r"it is|it was"):
                    unseal(bytes(changed), "thing", 1, "it")
            with pytest.raises(ValueError, match="truncated" if place > 16 else "damaged"):
                unseal(good[:place], "thing", 1, "it")

    def test_what_it_is_is_told(self):
        with pytest.raises(ValueError, match=r"newer format 3, written by kernelpress .*; kernelpress .* reads 2"):
            unseal(seal("thing", 3, {}), "thing", 2, "it")
        with pytest.raises(ValueError, match="holds a 'thing' in format 1, expected a 'thing' in format 2"):
            unseal(seal("thing", 1, {}), "thing", 2, "it")
        with pytest.raises(ValueError, match="holds a 'thing' in format 1, expected a 'other' in format 1"):
            unseal(seal("thing", 1, {}), "other", 1, "it")
        with pytest.raises(ValueError, match="not sealed"):
            unseal(b'{"a": 1}', "thing", 1, "it")

    def test_tensors_come_back_and_every_byte_counts(self):
        tensors = {"x": torch.randn(3, 2), "empty": torch.empty(0, 4), "i": torch.arange(5)}
        good = seal_tensors("thing", 1, tensors, CONTENT)
        found, content = unseal_tensors(good, "thing", 1, "it")
        assert content == CONTENT
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert seal_tensors("thing", 1, tensors, CONTENT) == good, "the same tensors make the same file"
        for place in range(len(good)):
            changed = bytearray(good)
            changed[place] ^= 1 << random.randrange(8)
            with pytest.raises(ValueError, match=r"^it"):
                unseal_tensors(bytes(changed), "thing", 1, "it")
        with pytest.raises(ValueError, match="truncated: "):
            unseal_tensors(good[:-1], "thing", 1, "it")
        with pytest.raises(ValueError, match="newer format 2"):
            unseal_tensors(seal_tensors("thing", 2, tensors, {}), "thing", 1, "it")

    @pytest.mark.parametrize(
        "text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"9" * 10_000, b"\xff", b""]
    )
    def test_json_of_a_stranger_is_refused_by_name(self, text):
        with pytest.raises(ValueError, match="it is damaged: no JSON"):
            parse_json(text, "it")


class TestRecords:
    def test_types_are_checked_to_the_bottom(self):
        record = kp.emit(
            nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 4, 4), progress=False, cost=lambda candidate: 1.0
        ).record
        stored = json.loads(json.dumps(record.to_json()))
        assert EmissionRecord.from_json(stored) == record
        for place, value, reason in (
            (("device",), 5, r"record\.device: expected str, got 5"),
            (("places",), {}, r"record\.places: expected"),
            (("places", 0, "flops"), "7", r"record\.places\[0\]\.flops: expected int"),
            (("places", 0, "flops"), 2**64, r"flops: expected int"),
            (("places", 0, "flops"), True, r"flops: expected int"),
            (("places", 0, "shape"), [1, "x"], r"shape\[1\]: expected int"),
            (("places", 0, "candidates", 0, "name"), None, r"candidates\[0\]\.name: expected str"),
            (("places", 0, "more"), 1, "unknown or missing in a PlaceRecord: more"),
            (("emitted_milliseconds",), 0.0, "above zero"),
        ):
            changed = json.loads(json.dumps(stored))
            owner: Any = changed
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = value
            with pytest.raises(ValueError, match=reason):
                EmissionRecord.from_json(changed)
        with pytest.raises(ValueError, match="expected the fields of a EmissionRecord, got"):
            from_plain(EmissionRecord, [], "record")
        assert "\x1b" not in summary_table(EmissionRecord.from_json({**stored, "device": "\x1b[2J"}))


class TestCaches:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("KERNELPRESS_CACHE", str(tmp_path))
        stored.forget()
        return tmp_path

    @pytest.mark.parametrize("damage", ["cut", "flipped", "text", "older"])
    def test_a_damaged_cache_of_times_is_told_and_replaced(self, folder, damage):
        cpu = torch.device("cpu")
        cache = TimingCache(cpu)
        cache.put("layer", 1.0)
        cache.save()
        (file,) = folder.iterdir()
        good = file.read_bytes()
        older = json.dumps({"device": cache._key, "milliseconds": {"layer": 1.0}}).encode()
        damaged = {"cut": good[:-9], "flipped": good.replace(b"1.0", b"1.5"), "text": b"hello", "older": older}
        file.write_bytes(damaged[damage])
        with pytest.warns(UserWarning, match=rf"{file.name} is .*timed anew"):
            again = TimingCache(cpu)
        assert again.get("layer") is None
        again.put("layer", 2.0)
        with pytest.warns(UserWarning, match="timed anew"):
            again.save()
        assert TimingCache(cpu).get("layer") == 2.0

    @pytest.mark.parametrize("time", [math.nan, math.inf, -1.0, 0.0, 1e300, "1.0", None, True, [1.0], 10**400])
    def test_absurd_times_are_not_taken(self, folder, time):
        cpu = torch.device("cpu")
        cache = TimingCache(cpu)
        cache.put("layer", 1.0)
        cache.save()
        (file,) = folder.iterdir()
        content = {"device": cache._key, "milliseconds": {"layer": time, "other": 1.0}}
        file.write_bytes(seal("times of layers", 1, content))
        with pytest.warns(UserWarning, match="timed anew"):
            assert TimingCache(cpu)._times == {}

    def test_a_damaged_cache_of_tiles_is_told(self, folder):
        file = stored.path_of("device")
        file.write_bytes(seal("tuned configurations", 1, {"device": "device", "configurations": {"a": "b"}})[:-5])
        with pytest.warns(UserWarning, match="what was tuned before is forgotten"):
            assert stored._read(file, "device") == {}


class TestCompressedModels:
    def test_a_file_without_a_seal_and_a_newer_one_are_told(self, tmp_path):
        from safetensors.torch import save_file

        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        save_file(model.state_dict(), tmp_path / "plain.safetensors", metadata={"kernelpress.compress": "{}"})
        with pytest.raises(ValueError, match=r"plain\.safetensors is a safetensors file, but not sealed"):
            compress.load(tmp_path / "plain.safetensors", model)
        (tmp_path / "new.safetensors").write_bytes(seal_tensors("compressed model", 3, model.state_dict(), {}))
        with pytest.raises(ValueError, match=r"new\.safetensors is of the newer format 3"):
            compress.load(tmp_path / "new.safetensors", model)
