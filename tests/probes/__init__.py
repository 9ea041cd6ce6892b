"""Small kernels, each for a few instructions, with what they must compute: run by the emulator and by real GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulator.tensormap import TensorMap

# Device buffers (changed in place), scalars (np.uint32(3), np.float32(1.5): as wide as the kernel's parameter), maps.
Argument = np.ndarray | np.generic | TensorMap


@dataclass(frozen=True)
class Probe:
    """A launch of one kernel of ``tests/probes/<source>``, ``extern "C" __global__``.

    Attributes:
        arguments: Makes the kernel's arguments, outputs poisoned; an array may stand in several places, as a pointer
            and under tensor maps.
        expected: From arguments as ``arguments`` makes them, what each array of ``outputs`` has to be, exactly or in
            float64.
        outputs: Positions of the arguments that the kernel writes (an array, or a tensor map's).
        shared: Bytes of dynamic shared memory.
        arch: The least architecture it compiles for: "sm_80" or "sm_90a".
        tolerance: Of the relative L2 error; 0: the same bits.
    """

    name: str
    source: str
    kernel: str
    arguments: Callable[[np.random.Generator], list[Argument]]
    expected: Callable[[list[Argument]], list[np.ndarray]]
    outputs: tuple[int, ...]
    grid: tuple[int, ...] = (1,)
    block: tuple[int, ...] = (32,)
    cluster: tuple[int, ...] = (1,)
    shared: int = 0
    arch: str = "sm_80"
    tolerance: float = 0.0
