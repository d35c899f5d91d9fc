"""What layers of a model put out in a forward pass, by their paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kernelpress.files.plain import did_you_mean

__all__ = ["NothingToCompareError", "check_layers", "forward_with_features"]


def check_layers(model: nn.Module, paths: Sequence[str], role: str) -> None:
    """Raises `ValueError` for a path that no layer of `model`, the student or the teacher by `role`, has."""
    known = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if path not in known:
            parts = [name for name, _ in model.named_children()]
            raise ValueError(
                f"layers: the {role} ({type(model).__name__}) has no layer {path!r}{did_you_mean(path, known)}; "
                f"its parts are {', '.join(parts) or 'none'}"
            )


class NothingToCompareError(ValueError):
    """A layer that did not run."""


def forward_with_features(model: nn.Module, images: Tensor, paths: Sequence[str], role: str) -> dict[str, Tensor]:
    """What the layers of `model` at `paths` put out, at their last calls, and under `""` its own output.

    Copies, so that an operation in place after a layer does not change them. Raises `NothingToCompareError` for a
    layer that did not run, `TypeError` for an output that is no tensor.
    """
    features: dict[str, Any] = {}
    with _recorded(model, [path for path in paths if path], features):
        features[""] = model(images)
    for path in ("", *paths):
        if path not in features:
            raise NothingToCompareError(f"layers: {path!r} of the {role} did not run, so there is nothing to compare")
        if not isinstance(features[path], Tensor):
            at = f" at {path!r}" if path else ""
            raise TypeError(f"{role}: expected one tensor as its output{at}, got {type(features[path]).__name__}")
    return features


@contextmanager
def _recorded(model: nn.Module, paths: Sequence[str], features: dict[str, Any]) -> Iterator[None]:
    """While the block runs, writes into `features` what these layers put out."""

    def hook(path: str) -> Any:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            features[path] = output.clone() if isinstance(output, Tensor) else output

        return record

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in dict.fromkeys(paths)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
