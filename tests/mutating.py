"""Damage and malice: edits of bytes and of JSON documents, drawn from a random generator, that can be told and undone.

A mutation is a list of edits that can be applied again without the generator, so that the smallest one that still does
harm can be found by leaving edits out.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Edit", "apply_to_bytes", "apply_to_document", "draw_byte_edits", "draw_document_edits", "smallest"]

Edit = tuple[Any, ...]

CODE = "__import__('pathlib').Path('executed').touch()"
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."
SNIPPETS: tuple[bytes, ...] = (
    b"", b"\0", b"\xff" * 9, b"{", b"]", b'"', b"\\", b"NaN", b"-Infinity", b"1e999", b"-1", b"99999999999999999999",
    b"[" * 3000, b'{"a":' * 3000, b"true", b"null", PICKLE, CODE.encode(), b'"use_pickle": true', b"../../executed",
    b"PK\3\4", b"PK\5\6", b"*a", b"&a [*a, *a]", b"!!python/object/apply:os.system ['touch executed']", b"<<: *a",
    b"? ", b"2001-99-99", b"1:" * 2000 + b"1", b"\xc3", b"\xe2\x80\xa8", b'"sha256": "' + b"0" * 64 + b'"',
    b"torch.ops.aten.from_file.default", b"9" * 5000, b"\t", b"\r\n", b"%YAML 9.9\n", b"---\n", b"\xef\xbb\xbf",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, float("nan"), float("inf"), 1e300, -1e-300, "",
    "a", CODE, 'x"), __import__("os").system("touch executed"), ("', "os.system", "builtins.eval", "builtins.exec",
    "operator.attrgetter", "operator.methodcaller", "torch.load", "torch.hub.load", "aten.from_file.default",
    "aten.save.default", "aten._print.default", "aten.resize_.default", "aten.set_.source_Storage", "aten.add.Tensor",
    "aten.relu.default", "prim.print.default", "higher_order.print", "higher_order.cond", "higher_order.call_torchbind",
    "kernelpress.conv2d.default", "kernelpress.__class__.default", "aten.relu.__class__", "operator.getitem",
    "math.factorial", "builtins.pow", "torch.sym_max", "__class__", "__class__.__base__.forward", "forward", "_modules",
    "weight", "conv.weight", "a.b.c", "lambda: 0", "x\ny", "x; import os", "def", "é", "None", "self", "torch",
    "placeholder", "get_attr", "call_function", "call_module", "call_method", "output", "archive/../../executed",
    "/etc/passwd", "float64", "bool", "int8", "complex128", "cpu", "cuda:0", "cpu; rm", "\x1b]0;title\x07", "\ud800",
    [], {}, [[]], [1, 2, 3], [2**40, 2**40], [-1], {"node": 0}, {"node": 10**6}, {"node": -1}, {"tuple": []},
    {"slice": [None, 1, 2]}, {"slice": [1, 2, 3, 4]}, {"float": "nan"}, {"dtype": "load"}, {"dtype": "float16"},
    {"device": "cpu"}, {"memory_format": "channels_last"}, {"layout": "strided"}, {"graph": {}},
    {"type": "builtins.eval"}, {"type": "collections.defaultdict", "context": [], "children": []},
    {"dict": [["a", "*"], ["a", "*"]]},
    {"dict": [["a': exec('') or '", "*"]]}, {"tuple": ["*", "*"]}, "*",
)  # fmt: skip


def draw_byte_edits(draw: random.Random, content: bytes) -> list[Edit]:
    """One to four edits of a file."""
    return [_byte_edit(draw, len(content)) for _ in range(draw.choice((1, 1, 1, 2, 4)))]


def _byte_edit(draw: random.Random, size: int) -> Edit:
    at = draw.randrange(max(size, 1))
    length = min(draw.choice((1, 2, 4, 8, 64, 1000)), size)
    kind = draw.choice(("flip", "flip", "set", "delete", "insert", "replace", "cut", "zero", "copy", "append"))
    payload: Any = {
        "flip": draw.randrange(8),
        "set": draw.randrange(256),
        "insert": draw.choice(SNIPPETS),
        "replace": draw.choice(SNIPPETS),
        "append": draw.choice(SNIPPETS),
        "copy": draw.randrange(max(size, 1)),
    }.get(kind)
    return kind, at, length, payload


def apply_to_bytes(content: bytes, edits: Sequence[Edit]) -> bytes:
    """`content` after these edits."""
    changed = bytearray(content)
    for kind, at, length, payload in edits:
        if kind in ("flip", "set") and at < len(changed):
            changed[at] = changed[at] ^ (1 << payload) if kind == "flip" else payload
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = payload
        elif kind == "replace":
            changed[at : at + len(payload)] = payload
        elif kind == "cut":
            del changed[at:]
        elif kind == "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == "copy":
            changed[at:at] = changed[payload : payload + length]
        elif kind == "append":
            changed += payload
    return bytes(changed)


def draw_document_edits(draw: random.Random, document: Any) -> list[Edit]:
    """One to four edits of a nest of dicts and lists."""
    places = list(_places(document))
    return [_document_edit(draw, places) for _ in range(draw.choice((1, 1, 1, 2, 4)))]


def _document_edit(draw: random.Random, places: Sequence[tuple[Any, ...]]) -> Edit:
    kind = draw.choice(("set", "set", "set", "delete", "double", "rename", "move", "nest", "nudge"))
    payload: Any = {
        "set": draw.choice(VALUES),
        "rename": draw.choice([value for value in VALUES if isinstance(value, str)]),
        "move": draw.choice(places),
        "nest": draw.choice((1, 30, 400)),
        "nudge": draw.choice((-1, 1, 2**40)),
    }.get(kind)
    return kind, draw.choice(places), payload


def _places(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    found = [(*above, key) for key, _ in items]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return found + [place for key, value in items for place in _places(value, (*above, key))]


def apply_to_document(document: Any, edits: Sequence[Edit]) -> Any:
    """A copy of `document` after these edits; one whose place is gone does nothing."""
    changed = copy.deepcopy(document)
    for kind, place, payload in edits:
        with contextlib.suppress(LookupError, TypeError):
            _apply(changed, kind, place, payload)
    return changed


def _apply(document: Any, kind: str, place: tuple[Any, ...], payload: Any) -> None:
    owner, key = _at(document, place[:-1]), place[-1]
    value = owner[key]
    if kind == "set":
        owner[key] = copy.deepcopy(payload)
    elif kind == "delete":
        del owner[key]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(value))
    elif kind in ("rename", "double") and isinstance(owner, dict):
        owner[payload or f"{key}_"] = value if kind == "double" else owner.pop(key)
    elif kind == "move":
        owner[key] = copy.deepcopy(_at(document, payload))
    elif kind == "nest":
        for _ in range(payload):
            value = [value]
        owner[key] = value
    elif kind == "nudge":
        owner[key] = value + payload


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


def smallest(edits: Sequence[Edit], does_harm: Callable[[Sequence[Edit]], bool]) -> Sequence[Edit]:
    """The edits without those that the harm does not need."""
    for index in range(len(edits) - 1, -1, -1):
        fewer = [*edits[:index], *edits[index + 1 :]]
        if fewer and does_harm(fewer):
            edits = fewer
    return edits
