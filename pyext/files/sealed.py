"""Files that say what they are and tell whether they are as they were written: JSON, and tensors in safetensors.

The digest of a file covers all of its bytes but its own. Nothing here runs anything that a file holds. A file that
cannot be used raises `ValueError` that says whether it is damaged, truncated, of a newer format or none of ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import kernelpress
from kernelpress.files.plain import printable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["parse_json", "seal", "seal_tensors", "unseal", "unseal_tensors"]

_DIGEST = re.compile(rb'\\?"sha256\\?": \\?"([0-9a-f]{64})\\?"')
"""Where a text states its digest, be it JSON or JSON in a text of JSON."""
_NO_DIGEST = "0" * 64
_HEADER = "kernelpress"


def parse_json(text: bytes | str, name: str) -> Any:
    """The JSON `text` of the file or entry `name`; `ValueError` for damage, keys that stand twice, too deep a nest."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: no JSON ({error})") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def seal(kind: str, format: int, content: Mapping[str, Any]) -> bytes:
    """A JSON text of `content`, plain values, that says what it is, `kind` in version `format`, and has a digest."""
    text = (json.dumps(_sealed(kind, format, content), indent=1) + "\n").encode()
    return _with_digest(text, _digest_of(text))


def _sealed(kind: str, format: int, content: Mapping[str, Any]) -> dict[str, Any]:
    envelope = {"kernelpress": kind, "format": format, "version": kernelpress.__version__, "sha256": _NO_DIGEST}
    return envelope | dict(content)


def unseal(text: bytes, kind: str, format: int, name: str) -> dict[str, Any]:
    """The content of what `seal` wrote; `name` stands before the error. Raises `ValueError` for anything else."""
    if text.startswith(b'{\n "kernelpress"') and not text.endswith(b"\n}\n"):
        raise ValueError(f"{name} is truncated or damaged at its end")
    return _unsealed(parse_json(text, name), _is_as_written(text), kind, format, name)


def seal_tensors(kind: str, format: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> bytes:
    """A safetensors file of `tensors` whose header holds `content`, plain values, and what `seal` states."""
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    file = save(copies, metadata={_HEADER: json.dumps(_sealed(kind, format, content))})
    return _with_digest(file, _digest_of(file))


def unseal_tensors(file: bytes, kind: str, format: int, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the content of what `seal_tensors` wrote. Raises `ValueError` for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    end = 8 + int.from_bytes(file[:8], "little")
    if len(file) < 8 or end > len(file):
        raise ValueError(f"{name}: not a readable safetensors file: truncated, damaged or of another kind")
    header = parse_json(file[8:end], name)
    try:
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        stated = header.get("__metadata__", {}).get(_HEADER)
        whole = end + max(ends, default=0)
        is_short = whole > len(file)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} is damaged: no header of a safetensors file") from error
    if is_short:
        raise ValueError(f"{name} is truncated: {len(file)} bytes of {whole}")
    if not isinstance(stated, str):
        raise ValueError(f"{name} is a safetensors file, but not sealed by this kernelpress: make and save it again")
    content = _unsealed(parse_json(stated, name), _is_as_written(file, end), kind, format, name)
    try:
        return load(file), content
    except SafetensorError as error:
        raise ValueError(f"{name} was not written by kernelpress, though its digest is right ({error})") from error


def _unsealed(found: Any, is_as_written: bool, kind: str, format: int, name: str) -> dict[str, Any]:
    """What `_sealed` was given, once the rest is as it must be."""
    if not isinstance(found, dict) or not isinstance(found.get("kernelpress"), str):
        raise ValueError(f"{name} is damaged, or not sealed by kernelpress: made elsewhere or by an older version")
    its_kind, its_format = printable(found["kernelpress"][:40]), found.get("format")
    if its_kind == kind and type(its_format) is int and format < its_format < 10**6:
        doubt = "" if is_as_written else ", unless it is damaged"
        raise ValueError(
            f"{name} is of the newer format {its_format}, written by kernelpress "
            f"{printable(str(found.get('version'))[:20])}{doubt}; kernelpress {kernelpress.__version__} reads {format}"
        )
    if not is_as_written:
        raise ValueError(f"{name} is damaged: its bytes do not have the digest that it states")
    if (its_kind, its_format) != (kind, format):
        raise ValueError(
            f"{name} holds a {its_kind!r} in format {str(its_format)[:20]}, expected a {kind!r} in format {format}"
        )
    return {key: value for key, value in found.items() if key not in ("kernelpress", "format", "version", "sha256")}


def _is_as_written(file: bytes, end: int | None = None) -> bool:
    """Whether the digest that stands before `end` is that of the file."""
    found = _DIGEST.search(file, 0, len(file) if end is None else end)
    return found is not None and _digest_of(file).encode() == found[1]


def _digest_of(file: bytes) -> str:
    """The digest of a file with zeros where it states its own."""
    digest, found = hashlib.sha256(), _DIGEST.search(file)
    assert found is not None
    start, end = found.span(1)
    view = memoryview(file)
    for part in (view[:start], _NO_DIGEST.encode(), view[end:]):
        digest.update(part)
    return digest.hexdigest()


def _with_digest(file: bytes, digest: str) -> bytes:
    found = _DIGEST.search(file)
    assert found is not None
    start, end = found.span(1)
    return b"".join((memoryview(file)[:start], digest.encode(), memoryview(file)[end:]))
