"""Checkpoints in safetensors, of our own networks or of other libraries' by a map of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelpress.models.architecture import Architecture, KeyMap

__all__ = ["LoadedWeights", "create_with_weights", "weights_of"]

_ATTRIBUTE = "_kernelpress_weights"
_SHOWN = 3
"""Keys that an error names."""
_COUNTER = "num_batches_tracked"
"""What BatchNorms count and inference does not need; some files leave it out."""


@dataclass(frozen=True)
class LoadedWeights:
    """The file that a network's weights were read from, and the map that its keys went through."""

    file: str
    map: str


def weights_of(network: nn.Module) -> LoadedWeights | None:
    """What `create(…, weights=…)` loaded into `network`; None for one that began at random."""
    return getattr(network, _ATTRIBUTE, None)


def create_with_weights(architecture: Architecture, file: str | Path, options: Mapping[str, Any]) -> nn.Module:
    """The network with the weights of a safetensors file whose keys one of the architecture's maps knows; it is built
    with what that map asks for, such as the `eps` of its norms.

    Raises `FileNotFoundError`, and `ValueError` for a file that is damaged or holds another model, naming the first
    keys that differ; for `small_input`, as checkpoints are of 224×224; for an option that the map excludes.
    """
    if options.get("small_input"):
        raise ValueError(
            "weights: checkpoints are of networks for images of 224×224, which small_input=True changes; "
            "load weights of your own by load_state_dict"
        )
    tensors = _read(Path(file))
    with torch.device("meta"):
        expected = architecture.build(**options).state_dict()
    found: list[tuple[KeyMap, list[str]]] = []
    for key_map in architecture.maps:
        differences = _differences({key_map.ours(key): tensor for key, tensor in tensors.items()}, expected)
        if not differences:
            return _loaded(architecture, key_map, file, tensors, options)
        found.append((key_map, differences))
    nearest, differences = min(found, key=lambda pair: len(pair[1]))
    raise ValueError(
        f"weights: {file} is no checkpoint of {architecture.name} with these options; as one of {nearest.name}, "
        f"it differs in {len(differences)} keys, the first of them: {'; '.join(differences[:_SHOWN])}"
    )


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"weights: {path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"weights: {path} is no readable safetensors file ({error}); safetensors.torch.save_file makes one of a "
            "state dict"
        ) from error


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What a state dict has otherwise than expected, in the order of the network, then what is of no use to it."""
    differences = []
    for key, tensor in expected.items():
        if key not in given:
            if not key.endswith(_COUNTER):
                differences.append(f"{key} {list(tensor.shape)} is missing")
        elif not _fits(given[key], tensor):
            differences.append(f"{key} is {list(given[key].shape)}, expected {list(tensor.shape)}")
    unknown = [
        f"{key} {list(tensor.shape)} is unknown"
        for key, tensor in given.items()
        if key not in expected and not key.endswith(_COUNTER)
    ]
    # One of each kind first: what is there in place of what is missing tells most.
    return [*differences[:1], *unknown[:1], *differences[1:], *unknown[1:]]


def _fits(given: Tensor, expected: Tensor) -> bool:
    """Whether the shapes are the same; a 1×1 convolution on a single pixel is a linear layer."""
    shapes = [tuple(tensor.shape) for tensor in (given, expected)]
    matrices = [shape[:2] if shape[2:] == (1, 1) else shape for shape in shapes]
    return shapes[0] == shapes[1] or (len(matrices[0]) == 2 and matrices[0] == matrices[1])


def _loaded(
    architecture: Architecture,
    key_map: KeyMap,
    file: str | Path,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> nn.Module:
    for option, value in key_map.options.items():
        if options.get(option, value) != value:
            raise ValueError(
                f"{option}: expected {value!r}, with which {key_map.name}'s weights compute, got {options[option]!r}"
            )
    network = architecture.build(**{**key_map.options, **options})
    state = network.state_dict()
    for key, tensor in tensors.items():
        if (ours := key_map.ours(key)) in state:
            state[ours] = tensor.reshape(state[ours].shape)
    network.load_state_dict(state)
    setattr(network, _ATTRIBUTE, LoadedWeights(str(file), key_map.name))
    return network
