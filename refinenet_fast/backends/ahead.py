"""Compiling a launch's kernel for a GPU that need not be there: for tests and for reading machine code."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from refinenet_fast.backends.launches import Launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
}


def compile_ahead(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel, specialised as the launch itself would: ``.asm["ptx"]``, ``.asm["cubin"]``, metadata.

    Args:
        capability: 80, 90, 100, ...

    Raises:
        RuntimeError: Triton is interpreting; what it has touched cannot be compiled.
    """
    specialised = tuple(map(_specialised, launch.arguments))
    constants = tuple(launch.constants.items())
    return _compiled(launch.module, launch.kernel, specialised, constants, launch.warps, launch.stages, capability)


def _specialised(argument: Any) -> Any:
    """(Triton's type, whether it is divisible by 16), of a constant ("constexpr", its value); of a tuple those of its
    members."""
    if isinstance(argument, tuple):
        return tuple(map(_specialised, argument))
    if isinstance(argument, Tensor):
        return "*" + TYPES[argument.dtype], argument.data_ptr() % 16 == 0
    if argument is None or (isinstance(argument, int) and argument == 1):
        return "constexpr", argument
    if isinstance(argument, int):
        return "i32" if argument < 2**31 else "i64", argument % 16 == 0
    return f"tensordesc<{TYPES[argument.base.dtype]}{list(argument.block_shape)}>", False


@functools.lru_cache(maxsize=256)
def _compiled(
    module: str,
    kernel: str,
    specialised: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    warps: int,
    stages: int,
    capability: int,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"refinenet_fast.kernels.{module}"), kernel)
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("compiling needs TRITON_INTERPRET unset: what Triton interprets cannot be compiled")
    values: dict[str, Any] = dict(constants)
    signature: dict[str, Any] = dict.fromkeys(function.arg_names, "constexpr")
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def types(argument: Any, path: tuple[int, ...]) -> Any:
        if argument == () or isinstance(argument[0], tuple):
            return tuple(types(member, (*path, i)) for i, member in enumerate(argument))
        kind, value = argument
        if kind == "constexpr":
            values[function.arg_names[path[0]]] = value
        elif value:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for i, (name, argument) in enumerate(zip(function.arg_names, specialised)):
        signature[name] = types(argument, (i,))
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
