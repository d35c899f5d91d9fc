"""Weight decomposition: a layer becomes a chain of smaller ones of low rank."""

from kernelpress.compress.decompose.apply import decompose

__all__ = ["decompose"]
