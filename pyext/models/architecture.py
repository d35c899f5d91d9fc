"""What is known of a network beside its code: how it is built, what its paper says of it, whose weights fit it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Architecture", "KeyMap", "Published", "numbered"]


@dataclass(frozen=True)
class Published:
    """What is published of a network at 224×224, as far as its source gives digits.

    parameters, multiply_adds: of one image; those of pooling, normalisation and activations do not count.
    accuracy: ImageNet top-1 in %, of one crop; `options` make the variant that this is about. None is what nobody
    published.
    """

    paper: str
    parameters: float | None
    multiply_adds: float | None
    source: str
    accuracy: float | None = None
    accuracy_source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMap:
    """Whose state dict this is about, and how its keys become ours.

    rules: (pattern, replacement) of `re.sub`, one after the other on every key.
    options: of the network that computes what theirs does with these weights.
    """

    name: str
    rules: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def ours(self, key: str) -> str:
        """Our name of their entry."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


@dataclass(frozen=True)
class Architecture:
    """A network by name: what makes it, what is published of it (the default options first), whose weights fit it."""

    name: str
    build: Callable[..., nn.Module]
    published: tuple[Published, ...]
    maps: tuple[KeyMap, ...] = (KeyMap("kernelpress"),)


def numbered(stages: tuple[int, ...], block: str, first: int = 0) -> tuple[tuple[str, str], ...]:
    """Rules for blocks that others number within stages, `blocks.STAGE.INDEX.`, and we in one row, by `block` with
    a `{}`, from `first` on; `stages` are their depths."""
    places = [(stage, index) for stage, depth in enumerate(stages) for index in range(depth)]
    return tuple(
        (rf"^blocks\.{stage}\.{index}\.", block.format(number)) for number, (stage, index) in enumerate(places, first)
    )
