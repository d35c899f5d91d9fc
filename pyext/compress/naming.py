"""Modules that a caller names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

__all__ = ["layers_in"]


def layers_in(model: nn.Module, names: Iterable[str], argument: str) -> frozenset[str]:
    """The paths of the modules of these names and of all in them. Raises `ValueError`, which begins with `argument`,
    for a name that `model` does not have, with those that come near it."""
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not name:
            near = difflib.get_close_matches(str(name), [path for path in modules if path], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{argument}: {type(model).__name__} has no module named {name!r}{hint}")
    return frozenset(path for path in modules if any(path == name or path.startswith(f"{name}.") for name in names))
