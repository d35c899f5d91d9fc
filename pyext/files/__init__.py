"""Files that are either the old one or the new one, never half of either; and the folder of those that save time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_atomically"]


def cache_folder() -> Path:
    """`KERNELPRESS_CACHE` if set, else `kernelpress` in `XDG_CACHE_HOME`, else in `~/.cache`."""
    if chosen := os.environ.get("KERNELPRESS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernelpress"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` beside `path` and moves it there once it is whole.

    Raises `OSError` that names `path` if the folder is missing or the disk is full; a file that was there stays as it
    was.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}{kept}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
