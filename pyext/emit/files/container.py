"""The archive of an emitted model: a zip file in which every byte follows from its entries' names, sizes and contents.

    manifest (sealed: name, size, CRC, SHA-256 of each entry) │ entry │ entry │ … │ central directory

Entries are stored as they are, each at a multiple of 64 bytes. Reading does not interpret the zip structure: the
manifest, which comes first, says what the whole file must look like, and each byte is compared with that or hashed.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernelpress.files.sealed import seal, unseal

__all__ = ["FORMAT", "MANIFEST", "pack", "unpack"]

KIND = "emitted model"
FORMAT = 2
MANIFEST = "archive/extra/kernelpress.manifest.json"
"""The readers of `torch.export` take the first part of the first name for the folder of all."""

_ALIGNMENT = 64
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_DATE = 0x21
"""The first of January 1980."""
_LARGEST_FIELD = 0xFFFFFFFE
"""Sizes and offsets above it take the fields of zip64."""


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    crc: int


def pack(entries: Mapping[str, bytes | memoryview]) -> bytes:
    """The file of these entries. Raises `ValueError` for a name that is no plain relative path."""
    listed = [[name, len(data), zlib.crc32(data), hashlib.sha256(data).hexdigest()] for name, data in entries.items()]
    manifest = seal(KIND, FORMAT, {"entries": listed})
    if bad := [name for name in entries if not _is_plain(name)]:
        raise ValueError(f"entries: expected plain relative paths, got {bad[0]!r}")
    contents = {MANIFEST: manifest, **entries}
    pieces, tail = _frame([_Entry(name, len(data), zlib.crc32(data)) for name, data in contents.items()])
    parts = [part for (head, _), data in zip(pieces, contents.values(), strict=True) for part in (head, data)]
    return b"".join((*parts, tail))


def unpack(file: bytes, name: str) -> dict[str, memoryview]:
    """The contents of the entries of what `pack` wrote, by their names; the file `name` stands before errors.

    Raises `ValueError` that says whether the file is damaged, truncated, of another format or none of ours.
    """
    lead = _LOCAL.size + len(MANIFEST)
    if len(file) < lead or file[_LOCAL.size : lead] != MANIFEST.encode():
        raise ValueError(f"{name} {_what_else(file)}")
    size = _LOCAL.unpack_from(file)[8]
    ((head, start),), _ = _frame([_Entry(MANIFEST, size, 0)])
    view = memoryview(file)
    if start + size > len(file):
        raise ValueError(f"{name} is truncated, or its first bytes are damaged")
    manifest = bytes(view[start : start + size])
    content = unseal(manifest, KIND, FORMAT, name)
    entries, digests = _listed(content, name)
    whole = [_Entry(MANIFEST, size, zlib.crc32(manifest)), *entries]
    if (least := sum(entry.size for entry in whole)) > len(file):
        raise ValueError(f"{name} is truncated: {len(file)} bytes of more than {least}")
    pieces, tail = _frame(whole)
    end = pieces[-1][1] + whole[-1].size
    if len(file) < end + len(tail):
        raise ValueError(f"{name} is truncated: {len(file)} bytes of {end + len(tail)}")
    if view[end:] != tail:
        raise ValueError(f"{name} is damaged: it does not end as it was written")
    found: dict[str, memoryview] = {}
    for entry, (head, start), digest in zip(whole, pieces, ("", *digests), strict=True):
        data = view[start : start + entry.size]
        if view[start - len(head) : start] != head or (digest and hashlib.sha256(data).hexdigest() != digest):
            raise ValueError(f"{name} is damaged: its entry {entry.name} is not as it was written")
        found[entry.name] = data
    del found[MANIFEST]
    return found


def _is_plain(name: str) -> bool:
    return len(name) < 1000 and bool(_NAME.fullmatch(name)) and ".." not in name and name != MANIFEST


def _listed(content: Mapping[str, Any], name: str) -> tuple[list[_Entry], list[str]]:
    """What the manifest says of the other entries."""
    rows = content.get("entries")
    wanted = (str, int, int, str)
    is_list = isinstance(rows, list) and all(
        isinstance(row, list) and [type(cell) for cell in row] == [*wanted] for row in rows
    )
    if not is_list or not rows or len({row[0] for row in rows}) != len(rows):
        raise ValueError(f"{name} was not written by kernelpress: its manifest is no list of entries")
    if not all(_is_plain(row[0]) and 0 <= row[1] < 2**62 and 0 <= row[2] < 2**32 for row in rows):
        raise ValueError(f"{name} was not written by kernelpress: its manifest has impossible entries")
    return [_Entry(*row[:3]) for row in rows], [row[3] for row in rows]


def _frame(entries: Sequence[_Entry]) -> tuple[list[tuple[bytes, int]], bytes]:
    """What stands before each entry's data with the offset of these, and what stands after the last one."""
    pieces: list[tuple[bytes, int]] = []
    directory: list[bytes] = []
    offset = 0
    for entry in entries:
        name = entry.name.encode()
        is_large = entry.size > _LARGEST_FIELD
        size = 0xFFFFFFFF if is_large else entry.size
        extra = struct.pack("<2H2Q", 1, 16, entry.size, entry.size) if is_large else b""
        padding = -(offset + _LOCAL.size + len(name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + bytes(padding)
        common = (45 if is_large else 20, 0, 0, 0, _DATE, entry.crc, size, size, len(name))
        head = _LOCAL.pack(b"PK\3\4", *common, len(extra)) + name + extra
        far = 0xFFFFFFFF if offset > _LARGEST_FIELD else offset
        sizes = [entry.size] * 2 * is_large + [offset] * (far != offset)
        more = struct.pack(f"<2H{len(sizes)}Q", 1, 8 * len(sizes), *sizes) if sizes else b""
        version = 45 if sizes else 20
        directory.append(
            _CENTRAL.pack(b"PK\1\2", version, version, *common[1:], len(more), 0, 0, 0, 0, far) + name + more
        )
        pieces.append((head, offset + len(head)))
        offset += len(head) + entry.size
    body, count = b"".join(directory), len(entries)
    closing = b""
    if offset > _LARGEST_FIELD or len(body) > _LARGEST_FIELD or count > 0xFFFE:
        end = _END_64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(body), offset)
        closing = end + _LOCATOR.pack(b"PK\6\7", 0, offset + len(body), 1)
    short = (min(count, 0xFFFF), min(count, 0xFFFF), min(len(body), 0xFFFFFFFF), min(offset, 0xFFFFFFFF))
    return pieces, body + closing + _END.pack(b"PK\5\6", 0, 0, *short, 0)


def _what_else(file: bytes) -> str:
    """What a file is that does not start as ours do."""
    if MANIFEST.encode() in file:
        return "is damaged, or another program has rewritten it: its manifest is not its first entry"
    if b"/extra/kernelpress.json" in file:
        return "is of format 1, which has no checksums: emit the model and save it again"
    if b"archive_format" in file and b"models/" in file:
        return "is a torch.export archive, but no emitted model: it has no kernelpress.json"
    return "is damaged or no model archive: it does not start as EmittedModel.save writes"
