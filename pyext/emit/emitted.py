"""`EmittedModel`: the module that emission returns."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from kernelpress.emit.direct import Direct
from kernelpress.emit.examples import Example
from kernelpress.emit.files.portable import Portable
from kernelpress.emit.record import EmissionRecord, summary_table
from kernelpress.runtime.torch_private import pytree
from kernelpress.trace.contract import Contract
from kernelpress.trace.regions import mark_written

__all__ = ["EmittedModel"]


class EmittedModel(nn.Module):
    """A model whose graph consists of kernelpress layers and of the operations that were faster as they came.

    Takes and returns what the original does: same arguments, by position or name, same output structure. Sizes, dtypes
    and values that are no tensors are those of the example inputs, but for the batch (`contract`, told by `summary`);
    images may come in any memory format. Weights are frozen parameters of `body`, in memory of its own; they may be
    written to, as those of `kernelpress.layers` may, and the model computes with the present ones. Gradients reach the
    inputs.
    """

    def __init__(
        self, body: GraphModule, record: EmissionRecord, examples: tuple[Example, ...], contract: Contract
    ) -> None:
        """`body`: the graph; `examples`: the form of its flat inputs; `contract`: the calls it answers."""
        super().__init__()
        self.body = body
        self.record = record
        self.examples = examples
        self.contract = contract
        self._direct: Direct | None = None
        mark_written(body.graph)
        self.eval()

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """The model's outputs for `inputs`. Raises `ValueError`, naming the argument, for calls that the model might
        answer in another way than the graph does."""
        if named_inputs:
            inputs = self.contract.positional(inputs, named_inputs)
        if torch.compiler.is_compiling():
            self.contract.require(inputs)
            return self.body(*inputs)
        self.contract.check(inputs)
        direct = self._direct
        if direct is None or not direct.serves(self.body):
            direct = self._direct = Direct.of(self.body)
        if direct.may_run(inputs):
            return direct.forward(self.body, *inputs)
        return self.body(*inputs)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and shallow copies bind to their parameters anew."""
        return {**self.__dict__, "_modules": {**self._modules, "body": Portable(self.body)}, "_direct": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state["_modules"]
        super().__setstate__({**state, "_modules": {**modules, "body": modules["body"].module}})
        mark_written(self.body.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmittedModel:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in twin.__dict__.items()})
        return twin

    def train(self, mode: bool = True) -> EmittedModel:
        """Emission fixes inference behaviour: raises `RuntimeError` for `mode=True`."""
        if mode:
            raise RuntimeError("an emitted model is for inference: train the original model and emit it again")
        return super().train(False)

    def summary(self) -> str:
        """A table of places: what runs there, how long it took, and why it was chosen; then the sizes it takes."""
        return f"{summary_table(self.record)}\n{self.contract.describe()}"

    @property
    def dynamic_batch(self) -> bool:
        """Whether it takes several batch sizes."""
        return self.contract.dynamic_batch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `torch.export` archive (`.pt2`) that `kernelpress.load` reads; see `emit.archive.save`."""
        from kernelpress.emit.files.archive import save

        save(self, path)

    def example_inputs(self) -> tuple[Any, ...]:
        """Random inputs of the form that the model was emitted for, as `forward` takes them."""
        flat = [example.random() for example in self.examples]
        args, _ = pytree.tree_unflatten(flat, self.body._in_spec)
        return tuple(args)

    def extra_repr(self) -> str:
        """The number of places and the device."""
        return f"{len(self.record.places)} places, on {self.record.device}"
