"""Every kind of file that kernelpress reads: a good one, ways to change it, and what reading it must not do."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutating
import safetensors
import torch
from mutating import Edit
from torch import Tensor, nn

import kernelpress as kp
from kernelpress import compress
from kernelpress.compress.changes import Unmasked, mask_layer, replace_layer
from kernelpress.compress.checkpoint import load_checkpoint, read_record, save_checkpoint
from kernelpress.compress.record import DecomposedLayer, PassRecord, add_record
from kernelpress.emit import EmissionRecord, EmittedModel
from kernelpress.emit.cache import LONGEST, TimingCache
from kernelpress.emit.files.archive import DESCRIPTION
from kernelpress.emit.files.container import pack, unpack
from kernelpress.emit.quantized import register_quantization
from kernelpress.emit.record import summary_table
from kernelpress.files.sealed import seal, seal_tensors, unseal, unseal_tensors
from kernelpress.measure import Promise
from kernelpress.ops.tuning import stored
from kernelpress.press import load_recipe
from kernelpress.press.folder import RunFolder

__all__ = ["MEGABYTES", "SECONDS", "Kind", "Network", "all_kinds", "harm_of"]

SECONDS = 20
"""No mutated file takes as long to refuse."""
MEGABYTES = 256
"""Nor as much memory."""

RECIPE = """\
title: tiny
data: {source: digits, image_size: 8, batch_size: 64}
model: {name: resnet20, options: &options {width: 16}}
train: &train {epochs: 1, lr: 0.1, momentum: 0.9}
compress:
  - prune_channels: {ratio: 0.4, round_to: 4}
finetune:
  <<: *train
  lr: 0.02
emit: {threads: 1}
measure: {rounds: 2, budget_seconds: 0.02, peers: [eager, emitted]}
require: {min_accuracy: 0.5, faster_than_baseline: true}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file: `read` reads the one at `path` and tells what is harmful about accepting it; `ValueError` is a
    refusal. Where there is a `document`, it is changed and sealed by `from_document`, as a stranger would do it.
    `is_sealed`: whether each byte counts."""

    name: str
    path: Path
    good: bytes
    read: Callable[[], str | None]
    document: Any = None
    from_document: Callable[[Any], bytes] | None = None
    is_sealed: bool = True

    def draw(self, draw: random.Random) -> list[Edit]:
        """Edits of the file, or of what its seal covers."""
        if self.from_document is None:
            return mutating.draw_byte_edits(draw, self.good)
        return mutating.draw_document_edits(draw, self.document)

    def mutated(self, edits: Sequence[Edit]) -> bytes | None:
        """The file after these edits; None where nothing changed, or no such file can be written."""
        if self.from_document is None:
            content = mutating.apply_to_bytes(self.good, edits)
        else:
            try:
                content = self.from_document(mutating.apply_to_document(self.document, edits))
            except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, safetensors.SafetensorError):
                return None
        return None if content == self.good else content


def _peak_megabytes() -> int:
    """The most memory that this process has held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def harm_of(kind: Kind, edits: Sequence[Edit]) -> str | None:
    """What reading the file after these edits does that it must not; None for no harm, or no such file."""
    content = kind.mutated(edits)
    return None if content is None else harm_of_content(kind, content)


def harm_of_content(kind: Kind, content: bytes) -> str | None:
    """What reading this file does that it must not."""
    kind.path.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # The highest so far is no longer the highest.
    before = _peak_megabytes()
    is_accepted, harm = True, None
    with _alarm(), _watching() as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            harm = kind.read()
        except ValueError:
            is_accepted = False
        except Exception as error:
            harm = f"{type(error).__name__} instead of a refusal: {error}"
    grown = _peak_megabytes() - before
    if events or grown > MEGABYTES:
        return f"reading it {events[0]}" if events else f"reading it took {grown} MB"
    if is_accepted and harm is None and kind.is_sealed and kind.from_document is None:
        return "it passes as good"
    return harm


def all_kinds(folder: Path, only: str = "") -> list[Kind]:
    """Every kind of file whose name has the part `only`, below `folder`, each with a good one that has been read."""
    folder.mkdir(parents=True, exist_ok=True)
    register_quantization()  # as any file may ask for it
    builders: dict[str, Callable[[Path], list[Kind]]] = {
        "emitted model, sealed description, sealed manifest; torch archive": _emitted_models,
        "compressed model, sealed; training checkpoint, sealed": _trained_models,
        "step of a run, sealed": _steps,
        "times of layers, sealed; tuned configurations, sealed": _caches,
        "recipe; record": _texts,
    }
    found = [kind for names, build in builders.items() if only in names for kind in build(folder) if only in kind.name]
    for kind in found:
        # What is imported at the first reading would count as the work of a later one.
        if kind.name != "torch archive":
            harm = kind.read()
            assert harm is None, f"{kind.name}: {harm}"
    return found


class Network(nn.Module):
    """Convolutions, sizes, constants of several types, an infinity, and a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x[:, self.order])
        flat = y.reshape(y.shape[0], -1, 2 * y.shape[3]).clamp(min=float("-inf"))
        return {"flat": flat, "more": [x[:, self.mask], y.to(torch.float64)]}


def _emitted_models(folder: Path) -> list[Kind]:
    path, plain = folder / "model.pt2", folder / "plain.pt2"
    model = kp.emit(Network().eval(), torch.randn(2, 3, 8, 8), progress=False, cost=lambda candidate: 1.0)
    model.save(path)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)), plain)
    good = path.read_bytes()
    entries = {name: bytes(data) for name, data in unpack(good, "good").items()}
    start = good.index(b'{\n "kernelpress"')
    manifest = good[start : start + int.from_bytes(good[22:26], "little")]

    def read() -> str | None:
        return _harm_of_model(kp.load(path))

    def read_plain() -> str | None:
        kp.load(plain)
        return None

    return [
        Kind("emitted model", path, good, read),
        Kind(
            "emitted model, sealed description",
            path,
            good,
            read,
            json.loads(entries[DESCRIPTION]),
            lambda changed: pack({**entries, DESCRIPTION: json.dumps(changed).encode()}),
        ),
        Kind(
            "emitted model, sealed manifest",
            path,
            good,
            read,
            unseal(manifest, "emitted model", 2, ""),
            lambda changed: good.replace(manifest, seal("emitted model", 2, changed)),
        ),
        Kind("torch archive", plain, plain.read_bytes(), read_plain),
    ]


_CALLS = re.compile(
    r"torch\.ops\.(aten|kernelpress|quantized_decomposed|higher_order)\.\w+(\.\w+)?|torch\.sym_\w+|math_\w+|_operator_\w+"
    r"|builtins_\w+|slice|device|fx_pytree\.tree_flatten_spec|pytree\.tree_unflatten|abs|max|min|round"
)


def _harm_of_model(model: EmittedModel) -> str | None:
    """Something in a graph's source that calls no operator, or a summary that is more than text."""
    for module in model.body.modules():
        for node in ast.walk(ast.parse(str(getattr(module, "code", "")).strip())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_read = name == "getattr" and isinstance(node.args[1], ast.Constant)
                if not is_read and not _CALLS.fullmatch(name):
                    return f"the graph calls {name}"
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.Lambda, ast.Global, ast.ClassDef)):
                return f"the graph has a {type(node).__name__}"
    return "the summary moves the cursor" if "\x1b" in model.summary() else None


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))


def _trained_models(folder: Path) -> list[Kind]:
    path, state = folder / "model.safetensors", folder / "finetune.safetensors"
    student = compress.Rebuilt("resnet8", {"num_classes": 4, "in_channels": 3, "width": 8})
    add_record(built := student.build(), PassRecord("distill", {}, 9, 8, 7, 6, (student,)))
    small = compress.prune_channels(built, (torch.randn(2, 3, 8, 8),), ratio=0.4, round_to=4)
    width = small.conv1.out_channels
    replaced = replace_layer(small, "conv1", nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, width, 1))
    masked = mask_layer(small, "fc", (torch.rand_like(small.fc.weight) > 0.5).float())
    bias = mask_layer(small, "fc", (torch.rand_like(small.fc.bias) > 0.5).float(), "bias")
    unmasked = Unmasked("fc", "bias")
    unmasked.apply(small)
    promises = (Promise("fc", density=0.5), Promise("conv1", is_int8=True))
    chains = (DecomposedLayer("conv1", "svd", (3,), 0.1, 0.2, 9, 8, 7, 6, (2.0, 1.0), is_whitened=True),)
    changes = (replaced, masked, bias, unmasked)
    add_record(small, PassRecord("others", {"ratio": 0.5}, 9, 8, 7, 6, changes, promises=promises, decomposed=chains))
    compress.save(small, path)
    trained = _network()
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    save_checkpoint(state, trained, optimizer, {"settings": {"lr": 0.1}, "history": [{"epoch": 0, "loss": 1.0}]})

    def read_compressed() -> str | None:
        model = _network()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            compress.load(path, model)
        except ValueError:
            after = model.state_dict()
            is_same = before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items())
            if is_same and repr(model) == repr(_network()) and not model[0]._forward_pre_hooks:
                raise
            return "a refusal changed the model"
        return "the record moves the cursor" if "\x1b" in "".join(map(str, compress.record_of(model))) else None

    def read_checkpoint() -> str | None:
        model = _network()
        read_record(state)
        load_checkpoint(state, model, torch.optim.AdamW(model.parameters()))
        return None

    return [
        *_kinds_of_tensors("compressed model", 2, path, read_compressed),
        *_kinds_of_tensors("training checkpoint", 1, state, read_checkpoint),
    ]


def _kinds_of_tensors(name: str, format: int, path: Path, read: Callable[[], str | None]) -> list[Kind]:
    good = path.read_bytes()
    tensors, content = unseal_tensors(good, name, format, "good")
    listed = {key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]} for key, tensor in tensors.items()}

    def from_document(changed: Any) -> bytes:
        made = {
            key: torch.zeros([size % 64 for size in row["shape"]], dtype=getattr(torch, row["dtype"]))
            for key, row in changed["tensors"].items()
        }
        return seal_tensors(name, format, made, changed["content"])

    document = {"tensors": listed, "content": content}
    return [Kind(name, path, good, read), Kind(f"{name}, sealed", path, good, read, document, from_document)]


def _steps(folder: Path) -> list[Kind]:
    run = RunFolder(folder / "run")
    run.create()
    run.write("weights", b"0123456789")
    run.finish("train", "key", {"accuracy": 0.5, "history": [{"epoch": 0}]}, ("weights",), 1.0)

    def read() -> str | None:
        if isinstance(found := run.finished("train", "key"), str):
            raise ValueError(found)
        return None

    return _kinds_of_json("step of a run", run.path / "steps" / "train.json", read)


def _caches(folder: Path) -> list[Kind]:
    os.environ["KERNELPRESS_CACHE"] = str(folder)
    cache = TimingCache(torch.device("cpu"))
    for i in range(5):
        cache.put(f"aten.conv2d.default(%{i})", 0.25 * (i + 1))
    cache.save()
    tiles = stored.path_of("a device")
    chosen = {"device": "a device", "configurations": {f"depthwise_conv2d: {i}": f"tile{i}" for i in range(5)}}
    tiles.write_bytes(seal("tuned configurations", 1, chosen))

    def read_times() -> str | None:
        found = cache._read()
        if not all(isinstance(time, (int, float)) and 0 < time <= LONGEST for time in found.values()):
            return f"absurd times are taken: {found}"
        return _if_any(found)

    def read_tiles() -> str | None:
        return _if_any(dict(stored._read.__wrapped__(tiles, "a device")))

    return [
        *_kinds_of_json("times of layers", next(folder.glob("timings-*.json")), read_times),
        *_kinds_of_json("tuned configurations", tiles, read_tiles),
    ]


def _if_any(found: dict[str, Any]) -> None:
    """A cache that counts as empty is one that was refused."""
    if not found:
        raise ValueError("nothing in it")


def _kinds_of_json(name: str, path: Path, read: Callable[[], str | None]) -> list[Kind]:
    good = path.read_bytes()
    document = unseal(good, name, 1, "good")
    by_stranger = Kind(f"{name}, sealed", path, good, read, document, lambda changed: seal(name, 1, changed))
    return [Kind(name, path, good, read), by_stranger]


def _texts(folder: Path) -> list[Kind]:
    recipe, record = folder / "recipe.yaml", folder / "record.json"
    recipe.write_text(RECIPE)
    emitted = kp.emit(nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 4, 4), progress=False, cost=lambda candidate: 1.0)
    document = json.loads(json.dumps(emitted.record.to_json()))
    record.write_text(json.dumps(document))

    def read_recipe() -> str | None:
        load_recipe(recipe)
        return None

    def read_record() -> str | None:
        found = EmissionRecord.from_json(json.loads(record.read_bytes()))
        return "the summary moves the cursor" if "\x1b" in summary_table(found) else None

    return [
        Kind("recipe", recipe, recipe.read_bytes(), read_recipe, is_sealed=False),
        Kind("record", record, record.read_bytes(), read_record, document, lambda new: json.dumps(new).encode()),
    ]


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Stops what takes too long; what does not listen is killed by whoever waits for this process."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


_FORBIDDEN = re.compile(
    r"pickle\.find_class|marshal\.|subprocess\.Popen|socket\.|ctypes\.|shutil\.|import$|webbrowser|urllib|code\.__new__"
    r"|os\.(system|exec|posix_spawn|spawn|fork|remove|rename|rmdir|mkdir|chmod|symlink|link|truncate|putenv)"
)


@contextlib.contextmanager
def _watching() -> Iterator[list[str]]:
    """What Python's audit hooks tell of code that is run, processes that are started and files that are written."""
    events: list[str] = []
    _watchers.append(events)
    try:
        yield events
    finally:
        _watchers.remove(events)


_watchers: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    if event == "open":
        _, mode, flags = arguments
        is_harmful = any(letter in str(mode) for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
    elif event in ("compile", "exec"):
        # fx compiles the source that it makes of a graph, which `_harm_of_model` then parses.
        code = arguments[1] if event == "compile" else getattr(arguments[0], "co_filename", "")
        is_harmful = not str(code).startswith("<eval_with_key>") and (event, code) != ("compile", "<unknown>")
    else:
        is_harmful = _FORBIDDEN.match(event) is not None
    if is_harmful:
        _watchers[-1].append(f"runs {event} {str(arguments)[:200]}")


sys.addaudithook(_audit)
