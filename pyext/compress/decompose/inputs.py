"""What a model's layers read: which of them can be taken apart, at which sizes, and the second moments of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpress.compress.decompose.chains import Geometry, joined
from kernelpress.compress.decompose.factorizations import composed
from kernelpress.compress.modules import WEIGHTED
from kernelpress.compress.record import record_of
from kernelpress.preserve import evaluation
from kernelpress.runtime.torch_private import conv2d_forward, pytree

__all__ = ["Layer", "inspect", "patch_values", "second_moments"]

MOST_PATCH = 12_288
"""Values of a patch of which second moments are gathered: their matrix then has 1.2 GB."""
PROBE = 1 << 24
"""Values of a layer's input that are kept to measure on."""
CHUNK = 1 << 24
"""Values of patches at a time."""
PLAIN_ERROR = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class Layer:
    """A layer, or the chain that an earlier decomposition put in the place of one: its geometry, and what it was called
    with; `reason` is why it stays as it is."""

    path: str
    module: nn.Module
    geometry: Geometry | None = None
    reason: str = ""
    sizes: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    """Of each call: how many images, and their height and width."""
    probe: Tensor | None = None
    """The input of its first call, or a part of its images."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """The layers of a chain, or the layer."""
        return tuple(self.module) if isinstance(self.module, nn.Sequential) else (self.module,)

    @property
    def channels(self) -> int:
        """Its output channels."""
        last = self.parts[-1]
        return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)

    def weights(self) -> tuple[Tensor, ...]:
        """Of each group, that of a plain layer [outputs, inputs, kh, kw], in float64 on the CPU."""
        assert self.geometry is not None
        groups, taps = self.geometry.groups, self.geometry.is_linear
        factors = [part.weight.detach().to("cpu", torch.float64) for part in self.parts]
        factors = [factor[..., None, None] if taps else factor for factor in factors]
        return tuple(composed(parts) for parts in zip(*(factor.chunk(groups) for factor in factors), strict=True))


def inspect(model: nn.Module, inputs: tuple[Any, ...], reasons: Mapping[str, str]) -> list[Layer]:
    """All convolutions and linear layers of `model`, run at `inputs`, and the chains of earlier decompositions;
    `reasons` says for some why they stay.

    Raises `ValueError` for a weight that is not finite.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    earlier = {chain.layer for record in record_of(model) for chain in record.decomposed}
    layers: list[Layer] = []
    for path, module in model.named_modules():
        layer = Layer(path, module)
        if layers and path.startswith(f"{layers[-1].path}.") and isinstance(layers[-1].module, nn.Sequential):
            continue  # a part of the chain before
        if isinstance(module, WEIGHTED):
            layer.reason = reasons.get(path) or _unsuited(layer, uses)
            layers.append(layer)
        elif path in earlier and isinstance(module, nn.Sequential) and not _unsuited(layer, uses):
            layer.reason = reasons.get(path, "")
            layers.append(layer)
    for layer in layers:
        if not layer.reason:
            for part in layer.parts:
                if not bool(part.weight.isfinite().all()):
                    raise ValueError(f"model: {layer.path}.weight holds NaN or Inf, which no factors come near")
            layer.module.register_forward_hook(_noting(layer), with_kwargs=True)
    model(*inputs)
    for layer in layers:
        if not layer.reason and not layer.sizes:
            layer.reason = "it was not called"
    return layers


def _unsuited(layer: Layer, uses: Mapping[int, int]) -> str:
    geometries = []
    for module in layer.parts:
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            return f"no method fits {type(module).__name__}"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is computed or constant"
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        if any(uses[id(parameter)] > 1 for parameter in module._parameters.values() if parameter is not None):
            return "it shares its weight with another layer"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "it has hooks"
        if weight.numel() == 0:
            return "its weight is empty"
        if (geometry := Geometry.of(module)) is None:
            return "its padding differs between the sides"
        geometries.append(geometry)
    layer.geometry = joined(geometries)
    return ""


def _noting(layer: Layer) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if x is not None]
        if len(given) != 1 or not args or not isinstance(x := args[0], Tensor) or not isinstance(output, Tensor):
            layer.reason = "it is called with more than its input"
            return
        if layer.reason or not x.numel():
            return
        assert layer.geometry is not None
        if not _is_plain(module, x, output):
            layer.reason = f"{type(module).__name__} computes something else than a plain layer"
            return
        images = as_images(x, layer.geometry)
        layer.sizes.append((len(images), (images.shape[2], images.shape[3])))
        if layer.probe is None:
            count = max(1, PROBE // max(1, images[0].numel()))
            layer.probe = (x if layer.geometry.is_linear else images)[:count].detach().clone()

    return note


def _is_plain(module: Any, x: Tensor, output: Tensor) -> bool:
    if isinstance(module, nn.Sequential):
        return True
    if isinstance(module, nn.Linear):
        plain = F.linear(x, module.weight, module.bias)
    else:
        plain = conv2d_forward(module, x, module.weight, module.bias)
    bound = PLAIN_ERROR.get(plain.dtype, 1e-4)
    lost = (plain - output).nan_to_num() if plain.shape == output.shape else plain
    return bool(lost.norm() <= bound * plain.nan_to_num().norm())


def as_images(x: Tensor, geometry: Geometry) -> Tensor:
    """`x` as [N, C, H, W]; what a linear layer reads has one image with a pixel for each row."""
    if geometry.is_linear:
        return x.reshape(-1, x.shape[-1]).T[None, :, :, None]
    return x if x.dim() == 4 else x[None]


def second_moments(
    model: nn.Module, layers: Iterable[Layer], batches: Iterable[tuple[Any, ...]]
) -> dict[str, list[Tensor]]:
    """The sum of x · xᵀ over the input patches x of each layer, for each of its groups [C·kh·kw, C·kh·kw] in float64.

    Layers whose patches are too long are left out. Raises `ValueError` where there is no batch, or an input is not
    finite.
    """
    sums: dict[str, list[Tensor]] = {}
    gathered = [layer for layer in layers if patch_values(layer) <= MOST_PATCH]
    count = 0
    with evaluation(model), torch.no_grad():
        for layer in gathered:
            layer.module.register_forward_pre_hook(_adding(layer, sums))
        for batch in batches:
            model(*batch)
            count += 1
    if count == 0:
        raise ValueError("data: expected at least one batch, got none")
    for path, grams in sums.items():
        for gram in grams:
            if not bool(gram.isfinite().all()):
                raise ValueError(f"data: the inputs of {path} hold NaN or Inf")
            # Directions that never came would have no best approximation.
            gram.diagonal().add_(float(gram.trace()) / len(gram) * 1e-9)
    return {path: [gram.cpu() for gram in grams] for path, grams in sums.items() if all(map(torch.any, grams))}


def patch_values(layer: Layer) -> int:
    """How many values of the input a group's output depends on."""
    assert layer.geometry is not None
    _, inputs, rows, columns = layer.geometry.weight_shape
    return inputs * rows * columns


def _adding(layer: Layer, sums: dict[str, list[Tensor]]) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        geometry = layer.geometry
        assert geometry is not None
        images = as_images(args[0], geometry)
        values = max(1, geometry.groups * patch_values(layer) * images.shape[2] * images.shape[3])
        for part in images.split(max(1, CHUNK // values)):
            patches = _patches(part, geometry)
            products = (patches @ patches.mT).double()
            held = sums.setdefault(layer.path, [torch.zeros_like(product) for product in products])
            for total, product in zip(held, products, strict=True):
                total += product

    return add


def _patches(images: Tensor, geometry: Geometry) -> Tensor:
    """[groups, C·kh·kw, positions], in float32 at least."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = geometry.padding
    if any(geometry.padding):
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        images = F.pad(images, (width, width, height, height), mode=mode)
    patches = F.unfold(images, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)
    return patches.unflatten(1, (geometry.groups, -1)).movedim(0, 2).flatten(2)
