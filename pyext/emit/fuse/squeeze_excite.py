"""Squeeze-and-excitation: the mean over all pixels, and two pointwise convolutions of it."""

from __future__ import annotations

from collections.abc import Iterator

from kernelpress.emit.fuse.match import Match
from kernelpress.emit.fuse.pools import averaged_image
from kernelpress.emit.fuse.stages import Stage
from kernelpress.emit.graph import only_user, shape

__all__ = ["squeeze_excites"]


def squeeze_excites(stages: list[Stage]) -> Iterator[Match]:
    """expand(reduce(mean(x))) where nobody else reads what lies between, whatever the result is used for."""
    plain = [s for s in stages if s.kind == "pointwise_conv2d" and s.residual is None and s.input_scale is None]
    by_output = {stage.output: stage for stage in plain}
    for expand in plain:
        reduce = by_output.get(expand.x)
        if reduce is None or only_user(expand.x) is None or only_user(reduce.x) is None:
            continue
        x = averaged_image(reduce.x)
        if x is None or (shape(reduce.x) or ())[2:] != (1, 1):
            continue
        given = {
            "x": x,
            "reduce_weight": reduce.weight,
            "reduce_bias": reduce.bias,
            "expand_weight": expand.weight,
            "expand_bias": expand.bias,
            "reduce_activation": reduce.activation,
            "activation": expand.activation,
        }
        nodes = reduce.nodes | expand.nodes | {reduce.x}
        yield Match("squeeze_excite", nodes, expand.output, given, parts=3)
