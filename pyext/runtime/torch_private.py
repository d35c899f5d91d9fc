"""All of torch's private names that kernelpress uses, each with the versions that have it and what takes its place.

Looked at were 2.10.0, 2.11.0, 2.12.1, 2.13.0, 2.14.1 and 2.15.0. Where no version stands beside a name, all of them
have it and mean the same by it, and where no other way is told, there is no public one. What stands on the way of a
call is bound here once, so that using it costs what the private name does.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import compiler, nn
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import profiler
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.library import _scoped_library as scoped_library
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

__all__ = [
    "ATTRIBUTES",
    "LATER",
    "AutoDispatchBelowAutograd",
    "BatchNorm",
    "DisableTorchFunction",
    "DispatchKey",
    "DispatchKeySet",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorBase",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TensorBase",
    "TorchDispatchMode",
    "addmm_activation",
    "after_autograd_keyset",
    "any_requires_grad",
    "assert_async",
    "check_value",
    "conv2d_forward",
    "current_raw_stream",
    "define_quantized_ops",
    "disable_current_modes",
    "dispatch_modes",
    "efficient_zero_tensor",
    "fp32_precision",
    "function_modes",
    "global_forward_hooks",
    "global_forward_pre_hooks",
    "int_mm",
    "is_exporting",
    "neg_view",
    "optimization_hint",
    "profiler",
    "pytree",
    "scoped_library",
    "sleep",
    "tracing_state",
    "transform_level",
]

# How ops are registered. `torch.library.register_autograd` puts Python of its own into every call.
DispatchKey = torch._C.DispatchKey
DispatchKeySet = torch._C.DispatchKeySet
AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd
after_autograd_keyset = torch._C._after_autograd_keyset

# Whether anything takes part in a call.
any_requires_grad = torch._C._any_requires_grad  # any(t.requires_grad for t in tensors), in C
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
transform_level = torch._C._functorch.maybe_current_level
tracing_state = torch._C._get_tracing_state
global_forward_hooks = nn.modules.module._global_forward_hooks
global_forward_pre_hooks = nn.modules.module._global_forward_pre_hooks

check_value = torch._check_value  # torch._check, which the documentation has, as ValueError
sleep = torch.cuda._sleep  # keeps a stream busy for a number of cycles

# The handle of a device's current stream, which torch.cuda.current_stream wraps; absent where torch has no CUDA.
current_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# ("cuda", "conv") → "tf32", "ieee" or "none". The public torch.backends.cudnn.allow_tf32 cannot be read once somebody
# has set what took its place, and that does not tell what allow_tf32 was set to.
fp32_precision = torch._C._get_fp32_precision_getter

assert_async = torch._assert_async  # raises once the tensor is known to be zero

# Kinds of tensors and modules that tests ask for, and products that benchmarks measure beside ours.
BatchNorm = nn.modules.batchnorm._BatchNorm
conv2d_forward = nn.Conv2d._conv_forward
TensorBase = torch._C.TensorBase
DisableTorchFunction = torch._C.DisableTorchFunction  # no function modes within
neg_view = torch._neg_view
efficient_zero_tensor = torch._efficientzerotensor
addmm_activation = torch._addmm_activation
int_mm = torch._int_mm

LATER = {
    "ShapeEnv": "torch.fx.experimental.symbolic_shapes:ShapeEnv",
    "aot_autograd": "torch._dynamo.backends.common:aot_autograd",
    "aoti_compile_and_package": "torch._inductor:aoti_compile_and_package",  # as torch's documentation calls it
    "aoti_load_package": "torch._inductor:aoti_load_package",
    "associative_scan": "torch._higher_order_ops.associative_scan:associative_scan",
    "bsr_dense_addmm": "torch.sparse._triton_ops:bsr_dense_addmm",
    "custom_triton_ops_decomposition_disabled": "torch.export._trace:custom_triton_ops_decomposition_disabled",
    "inductor_config": "torch._inductor.config",  # `freezing` is ignored among the options of torch.compile
    "kernel_side_table": "torch._higher_order_ops.triton_kernel_wrap:kernel_side_table",
    "map_rows": "torch._higher_order_ops.map:map",
    "mark_dynamic": "torch._dynamo:mark_dynamic",  # as torch's documentation calls it
    "scan": "torch._higher_order_ops.scan:scan",
    "triton_kernel_wrapper_functional": "torch._higher_order_ops.triton_kernel_wrap:triton_kernel_wrapper_functional",
    "while_loop": "torch._higher_order_ops.while_loop:while_loop",
}
"""Names whose home takes long to import: fetched from this module at their first use."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, attribute = LATER[name].partition(":")
    module = import_module(home)
    value = globals()[name] = getattr(module, attribute) if attribute else module
    return value


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which dynamo of 2.10 and 2.11 takes for true in all that it compiles."""
    return compiler._is_exporting_flag


def define_quantized_ops() -> None:
    """Registers `torch.ops.quantized_decomposed`, if this torch brings it."""
    with suppress(ImportError):
        import_module("torch.ao.quantization.fx._decomposed")


UNBACKED_SIZE = 8192
"""What torch takes for a size that only the data tell: `torch._inductor.config.unbacked_symint_fallback`."""


def optimization_hint(size: torch.SymInt | int) -> int:
    """The number that a symbolic size stands for in the example; no guard is set on it."""
    if isinstance(size, int):
        return size
    shapes = import_module("torch.fx.experimental.symbolic_shapes")
    if hasattr(shapes, "optimization_hint"):  # 2.12 on
        return int(shapes.optimization_hint(size))
    return int(size.node.require_hint(UNBACKED_SIZE))


ATTRIBUTES = {
    "_backward_hooks": nn.Module,
    "_backward_pre_hooks": nn.Module,
    "_buffers": nn.Module,  # `named_buffers(recurse=False)` makes a list at each call
    "_cdata": torch.UntypedStorage,  # the storage itself; `data_ptr()` is 0 for every empty one
    "_conv_forward": nn.Conv2d,  # what other layers share with it
    "_code": torch.fx.GraphModule,  # `code`, without a call
    "_codegen": torch.fx.Graph,  # `set_codegen` is public, its getter is not
    "_forward_hooks": nn.Module,
    "_forward_pre_hooks": nn.Module,
    "_graph_namespace": torch.fx.Graph,
    "_in_spec": torch.fx.GraphModule,
    "_is_profiler_enabled": profiler,
    "_load_from_state_dict": nn.Module,  # torch's documentation has it as what a module may override
    "_modules": nn.Module,
    "_opname": OpOverload,
    "_out_spec": torch.fx.GraphModule,
    "_overloadname": OpOverload,
    "_parameters": nn.Module,
    "_schema": OpOverload,  # of the public `name()` and `tags`, neither tells arguments
    "_tensor_name": prune.BasePruningMethod,
    "_version": torch.Tensor,  # counts writes
}
"""Private attributes → whose they are. They are read where they are needed."""
