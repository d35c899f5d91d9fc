"""All of Triton's private names that tests and benchmarks of kernelpress use; kernels need none.

Looked at were 3.6.0, which torch 2.10 and 2.11 ask for, and 3.9.0, which torch 2.15 does: both have all of them.
Importing this needs Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature

__all__ = ["PATCH_OF_TENSORS", "GPUTarget", "compiled", "cuobjdump", "interpreter", "set_driver", "source_of"]

set_driver = driver.set_active

PATCH_OF_TENSORS = "_patch_lang_tensor"
"""The interpreter's function that gives Triton's tensors Python's operators."""


def interpreter() -> ModuleType:
    """`triton.runtime.interpreter`, what kernels run on where TRITON_INTERPRET is set."""
    from triton.runtime import interpreter

    return interpreter


def source_of(
    kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], settings: Mapping[str, Any], target: GPUTarget
) -> tuple[Any, str]:
    """A kernel as it is compiled for a device that need not be here, specialised as a launch with these arguments would
    be, and what tells its content and the compiler from any others.

    Triton itself compiles so for the device of its driver alone; `JITFunction.warmup` too.
    """
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*arguments, **constants, **settings)
    _, signature, values, attributes = kernel._pack_args(backend, dict(settings), bound, specialization, None)
    source = ASTSource(kernel, signature, values, attributes)
    return source, repr((source.hash(), backend.hash(), target, dict(settings)))


def compiled(source: Any, settings: Mapping[str, Any], target: GPUTarget) -> Any:
    """What Triton makes of a source."""
    return compile(source, target=target, options=dict(settings))


def cuobjdump() -> str:
    """The disassembler that Triton's package carries."""
    path: str = knobs.nvidia.cuobjdump.path
    return path
