"""Triton kernels, one file a family: the portable GPU backend, and the readable twin of each CUDA kernel.

A family's file has for every op the kernel, a function of the op's name that launches it into `y`, and
`<op>_configurations`, the tile configurations worth trying, the best guess first. Both take `y` and the op's operands
(weights packed as `kernelpress.ops` does it), then the op's options by name; images lie in channels_last memory.
Everything was checked a floor above.
"""
