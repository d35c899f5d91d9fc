"""Writes what models of torchvision and timm compute with random weights: `python tests/zoo_weights.py FOLDER NAME …`.

For each NAME, `torchvision:MODEL` or `timm:MODEL`, FOLDER gets `NAME.safetensors`, the model's state dict, and
`NAME.out.safetensors`, images and logits. It is a process of its own, as transformers takes a torchvision that is
imported for one whose operations are there.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import with_random_norms
from zoo import family_of, import_packages


def main(folder: Path, names: list[str]) -> None:
    """Writes both files of every model."""
    import_packages()
    importlib.import_module("timm")
    for name in names:
        library, _, model = name.partition(":")
        network = with_random_norms(family_of(library, "", model).create())
        x = torch.randn(2, 3, 96, 128)
        with torch.no_grad():
            logits = network(x)
        state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        save_file({"x": x, "logits": logits}, folder / f"{name}.out.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
