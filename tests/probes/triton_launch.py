"""How a Triton probe is compiled, and how its PTX is launched.

**The parameters of a compiled kernel** (Triton 3.6 to 3.9, ``backends/nvidia/driver.py``), in the order of the Python
parameters that are no ``tl.constexpr``:

- a pointer: ``.u64 .ptr .global``; an ``i32``: ``.u32``; an integer that is 1 at launch is compiled in and left out;
- a host ``TensorDescriptor`` of rank r, compiled for sm_90: ``.align 64 .b8 [128]``, the CUtensorMap by value; then its
  r sizes, ``.u32`` each, then its r strides in elements, ``.u64`` each, outermost first, the last 1. PTX declares them
  all; code for a tensor map seldom reads them;
- the same where no tensor map is used (sm_80): the base ``.u64``, r sizes ``.u64``, r strides ``.u64``, whether outside
  reads as NaN (``.u8``, a bool); after 3.6 whether float32 is rounded to TF32 (likewise); then sizes and strides as
  above;
- last, hidden, always: global scratch and profile scratch, ``.u64`` pointers, null where the metadata's
  ``global_scratch_size`` and ``profile_scratch_size`` are 0 (else that many bytes for each block of the grid).

The block is ``32 * num_warps`` threads, dynamic shared memory is ``metadata["shared"]``; with ``num_ctas`` > 1 the grid
has that many times as many blocks in x, in clusters of that many. Each descriptor's swizzle and box are what
``metadata["tensordesc_meta"]`` says: a box with an innermost dimension over 128 bytes is copied in parts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from emulator.tensormap import TensorMap
from probes import Argument, triton_kernels

TYPES = {"float32": "fp32", "float16": "fp16", "uint16": "bf16", "int32": "i32", "int8": "i8"}
DESCRIBED = {"f32": "fp32", "tf32": "fp32", "f16": "fp16", "bf16": "bf16"}  # a tensor map's kinds


@dataclass(frozen=True)
class TritonProbe:
    """A launch of a Triton kernel, for every architecture of ``archs``.

    Attributes:
        kernel: Its name in ``triton_kernels``.
        arguments: Makes the arguments that are no constexpr, in order, outputs poisoned; a TensorMap, its box as the
            kernel was written and unswizzled, stands for a host TensorDescriptor, bfloat16 is uint16.
        expected: From arguments as ``arguments`` makes them, what each array of ``outputs`` has to be, in float64.
        outputs: Positions of the arguments that the kernel writes.
        options: ``num_warps`` and the like.
        tolerance: Of the relative L2 error; 0: equal.
        since: The version of Triton that compiles it first.
    """

    name: str
    kernel: str
    arguments: Callable[[np.random.Generator], list[Argument]]
    expected: Callable[[list[Argument]], list[np.ndarray]]
    outputs: tuple[int, ...]
    constexprs: dict[str, Any]
    grid: tuple[int, ...] = (1,)
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    archs: tuple[int, ...] = (80, 90)
    tolerance: float = 0.0
    since: str = "3.6"

    @property
    def function(self) -> triton.JITFunction:
        return getattr(triton_kernels, self.kernel)

    @functools.cached_property
    def signature(self) -> dict[str, str]:
        """Triton's type of every parameter, as a launch with ``arguments`` specialises it."""
        names = [name for name in self.function.arg_names if name not in self.constexprs]
        types = dict(zip(names, map(_type, self.arguments(np.random.default_rng(0)))))
        return {name: types.get(name, "constexpr") for name in self.function.arg_names}


def _type(argument: Argument) -> str:
    if isinstance(argument, TensorMap):
        return f"tensordesc<{DESCRIBED[argument.kind]}{list(argument.box)}>"
    if isinstance(argument, np.ndarray):
        return "*" + TYPES[argument.dtype.name]
    return "constexpr" if argument == 1 else TYPES[argument.dtype.name]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def runs_with(probe: TritonProbe, version: str) -> bool:
    """Whether that version of Triton compiles the probe."""
    return _version(version) >= _version(probe.since)


def compile_ptx(probe: TritonProbe, arch: int) -> tuple[str, dict[str, Any]]:
    """PTX and what a launch needs to know: "name", "shared", "num_warps", "num_ctas", "tensordesc_meta", scratch sizes.

    Arguments are specialised as a launch does: pointers, and integers that are multiples of 16, are "divisible by 16".
    """
    names, constexprs, attributes = probe.function.arg_names, dict(probe.constexprs), {}
    values = iter(probe.arguments(np.random.default_rng(0)))
    for position, name in enumerate(names):
        if name in probe.constexprs:
            continue
        value = next(values)
        if isinstance(value, np.generic) and value == 1:
            constexprs[name] = 1
        elif isinstance(value, np.ndarray) or (isinstance(value, np.integer) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(probe.function, dict(probe.signature), constexprs, attributes)
    options = {"enable_fp_fusion": True, **probe.options}  # 3.6's default, from 3.10 on not Triton's
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    keys = ["name", "shared", "num_warps", "num_ctas", "global_scratch_size", "profile_scratch_size", "triton_version"]
    metadata = {key: getattr(compiled.metadata, key) for key in keys}
    metadata["tensordesc_meta"] = [dict(meta) for meta in compiled.metadata.tensordesc_meta or []]
    return compiled.asm["ptx"], metadata


def launch_arguments(probe: TritonProbe, metadata: dict[str, Any], arguments: list[Argument]) -> list[Argument]:
    """The PTX kernel's parameters from a probe's arguments: this module's docstring says which."""
    maps = iter(metadata["tensordesc_meta"])
    parameters: list[Argument] = []
    for argument in arguments:
        if isinstance(argument, TensorMap):
            parameters += _descriptor(argument, next(maps, None), metadata["triton_version"])
        elif isinstance(argument, np.ndarray) or argument != 1:
            parameters.append(argument)
    blocks = int(np.prod(probe.grid)) * metadata["num_ctas"]
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        size = metadata[scratch] * blocks
        parameters.append(np.zeros(size, np.uint8) if size else np.uint64(0))
    return parameters


def launch_shape(probe: TritonProbe, metadata: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Grid, block and cluster."""
    clusters = metadata["num_ctas"]
    return (probe.grid[0] * clusters, *probe.grid[1:]), (32 * metadata["num_warps"],), (clusters,)


def _descriptor(described: TensorMap, meta: dict[str, Any] | None, version: str) -> list[Argument]:
    array = described.array
    sizes = array.shape
    strides = [stride // array.itemsize for stride in array.strides]
    after = [*map(np.int32, sizes), *map(np.int64, strides)]
    if meta is None:
        nan = [np.bool_(described.nan_fill)]
        tf32 = [np.bool_(described.kind == "tf32")] if _version(version) > (3, 6) else []
        return [array, *map(np.int64, [*sizes, *strides]), *nan, *tf32, *after]
    if meta["fp4_padded"] or meta["elem_size"] != array.itemsize:
        raise ValueError(f"expected elements of {array.itemsize} bytes, got {meta}")
    swizzle = (0, 32, 64, 128)[meta["swizzle"]]  # CUtensorMapSwizzle
    return [dataclasses.replace(described, box=tuple(meta["block_size"]), swizzle=swizzle), *after]
