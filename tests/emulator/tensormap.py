"""A tensor map: how a bulk tensor copy finds boxes of a tensor in global memory (CUtensorMap; PTX ISA, 5.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from emulator.memory import GlobalMemory

SIZES = {"u8": 1, "u16": 2, "f16": 2, "bf16": 2, "u32": 4, "f32": 4, "tf32": 4, "u64": 8, "f64": 8}


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tiled tensor map over an array, dimensions in NumPy's order: the innermost, contiguous one last.

    Attributes:
        array: (D1, ..., Dr), 1 <= r <= 5, of elements as wide as ``kind``'s (bfloat16 as uint16).
        box: (B1, ..., Br) elements that one copy moves, at most 256 in each dimension.
        kind: A key of ``SIZES``.
        swizzle: 0, 32, 64 or 128 bytes; the box's innermost dimension has at most as many.
        nan_fill: What lies outside the tensor reads as NaN instead of 0.
    """

    array: np.ndarray
    box: tuple[int, ...]
    kind: str
    swizzle: int = 0
    nan_fill: bool = False

    def address(self, memory: GlobalMemory) -> int:
        """Of the array's first element: the array may be a part of a larger one."""
        whole = self.array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        offset = self.array.ctypes.data - whole.ctypes.data
        return memory.add(f"{self.kind} tensor", whole) + offset


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Byte addresses with bits 4 to 6 exclusive-or'ed by bits 7 to 9, as many as chunks of 16 bytes span ``span``."""
    return addresses ^ (addresses >> 3 & {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[span])
