"""Global buffers and parameters: exact bounds and alignment on every access (PTX ISA, 5.1, state spaces)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emulator.errors import EmulatorError

FIRST, GUARD = 1 << 40, 1 << 20  # where buffers begin, and the bytes between them that belong to none


@dataclass
class Buffer:
    name: str
    base: int
    data: np.ndarray  # uint8, contiguous: a view of the caller's array


class GlobalMemory:
    """The buffers of one launch at made-up addresses, far apart, so that no stray access hits a neighbour."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases = np.zeros(0, np.int64)

    def add(self, name: str, array: np.ndarray, misaligned: int = 0) -> int:
        """The address of a C-contiguous array, 256 bytes aligned plus ``misaligned``."""
        if not array.flags.c_contiguous:
            raise EmulatorError(f"buffer {name}: expected C-contiguous memory, got strides {array.strides}")
        last = self.buffers[-1] if self.buffers else None
        end = FIRST if last is None else last.base + last.data.size
        base = -(-(end + GUARD) // 256) * 256 + misaligned
        self.buffers.append(Buffer(name, base, array.reshape(-1).view(np.uint8)))
        self.bases = np.array([b.base for b in self.buffers], np.int64)
        return base

    def _find(self, addresses: np.ndarray, size: int, what: str) -> list[tuple[Buffer, np.ndarray]]:
        """(buffer, which of the addresses are in it) for all of them, checked."""
        if (addresses % size).any():
            bad = int(addresses[addresses % size != 0][0])
            raise EmulatorError(f"{what}: address {bad:#x} is not aligned to {size} bytes ({self._near(bad)})")
        which = np.searchsorted(self.bases, addresses, side="right") - 1
        found = []
        for index in np.unique(which):
            chosen = which == index
            if index < 0:
                raise EmulatorError(f"{what}: address {int(addresses[chosen][0]):#x} is in no buffer")
            buffer = self.buffers[index]
            beyond = addresses[chosen] + size > buffer.base + buffer.data.size
            if beyond.any():
                bad = int(addresses[chosen][beyond][0])
                raise EmulatorError(f"{what}: address {bad:#x} is out of bounds ({self._near(bad)})")
            found.append((buffer, chosen))
        return found

    def _near(self, address: int) -> str:
        index = int(np.searchsorted(self.bases, address, side="right")) - 1
        if index < 0:
            return "before all buffers"
        buffer = self.buffers[index]
        return f"byte {address - buffer.base} of buffer {buffer.name}, which has {buffer.data.size}"

    def load(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:  # (L,) int64 -> (L, size) uint8
        out = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen in self._find(addresses, size, what):
            at = (addresses[chosen] - buffer.base)[:, None] + np.arange(size)
            out[chosen] = buffer.data[at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, what: str) -> None:  # (L,) int64, (L, size) uint8
        size = values.shape[1]
        for buffer, chosen in self._find(addresses, size, what):
            mine = addresses[chosen] - buffer.base
            if len(np.unique(mine)) < len(mine) and not _agree(mine, values[chosen]):
                raise EmulatorError(f"{what}: threads write different values to one address of buffer {buffer.name}")
            buffer.data[mine[:, None] + np.arange(size)] = values[chosen]


def _agree(addresses: np.ndarray, values: np.ndarray) -> bool:
    order = np.argsort(addresses, kind="stable")
    same = addresses[order][1:] == addresses[order][:-1]
    return bool((values[order][1:][same] == values[order][:-1][same]).all())
