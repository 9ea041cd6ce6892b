"""The ``triton`` backend's kernels in the emulator, as a backend, by the PTX that Triton compiles for a GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emulator.launch import emulate
from emulator.parser import Kernel, parse
from emulator.products import bytes_at
from emulator.tensormap import TensorMap
from emulator.unit import LOCKSTEP, Schedule
from refinenet_fast.backends.ahead import compile_ahead
from refinenet_fast.backends.configurations import A100, B200, H100, Architecture, Configuration
from refinenet_fast.backends.launches import Launch
from refinenet_fast.backends.triton import Triton

ARCHITECTURES = {80: A100, 90: H100, 100: B200}
KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # of a tensor map
SWIZZLES = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle


class EmulatedTriton(Triton):
    """The Triton backend on tensors in host memory.

    Args:
        capability: 80, 90 or 100: what Triton compiles for.
        schedule: Of 32 lanes for a warp, more for several blocks at once.
        configuration: Of every convolution and weight gradient, in place of the one that would be chosen.
    """

    name = "emulated triton"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(
        self, capability: int = 80, schedule: Schedule = LOCKSTEP, configuration: Configuration | None = None
    ) -> None:
        self.capability, self.schedule, self.configuration = capability, schedule, configuration

    def unavailable(self) -> str | None:
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def _architecture(self, device: torch.device) -> Architecture:
        return ARCHITECTURES[self.capability]

    def _configuration(self, kernel: str, x: Tensor, k: int, taps: int) -> Configuration | None:
        return self.configuration or super()._configuration(kernel, x, k, taps)

    def _run(self, *several: Launch) -> None:
        for launch in several:
            compiled = compile_ahead(launch, self.capability)
            metadata = compiled.metadata
            assert metadata.shared <= launch.room, f"{launch}: {metadata.shared} bytes of shared memory"
            maps = iter(metadata.tensordesc_meta or [])
            given = [
                parameter
                for argument in launch.arguments
                for member in (argument if isinstance(argument, tuple) else (argument,))
                for parameter in _parameters(member, maps)
            ]
            blocks = int(np.prod(launch.grid))
            for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
                given.append(np.zeros(size * blocks, np.uint8) if size else np.uint64(0))
            kernel, block = _parsed(compiled.asm["ptx"]), [32 * metadata.num_warps]
            emulate(kernel, launch.grid, block, given, shared=metadata.shared, schedule=self.schedule)


@functools.lru_cache(maxsize=64)
def _parsed(ptx: str) -> Kernel:
    (kernel,) = parse(ptx).values()
    return kernel


def _parameters(argument: Any, maps: Any) -> list[Any]:
    """Of the compiled kernel, for one argument: tests/probes/triton_launch.py says which."""
    if isinstance(argument, Tensor):
        return [_bytes(argument)]
    if argument is None or (isinstance(argument, int) and argument == 1):
        return []
    if isinstance(argument, int):
        return [np.int32(argument)]
    base, meta = argument.base, next(maps)
    size = base.element_size()
    array = _bytes(base).view({2: np.uint16, 4: np.float32}[size])
    array = np.lib.stride_tricks.as_strided(array, argument.shape, [s * size for s in argument.strides])
    tensor_map = TensorMap(array, tuple(meta["block_size"]), KINDS[base.dtype], SWIZZLES[meta["swizzle"]])
    return [tensor_map, *map(np.int32, argument.shape), *map(np.int64, argument.strides)]


def _bytes(t: Tensor) -> np.ndarray:
    return bytes_at(t.data_ptr(), t.numel() * t.element_size())
