"""Memory: buffers in global memory, and the shared memory of blocks; exact bounds and alignment on every access.

Addresses are made up (PTX ISA, 5.1): a generic address tells by its value which state space it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emulator.errors import EmulatorError, Fault

FIRST, GUARD = 1 << 40, 1 << 20  # where buffers begin, and the bytes between them that belong to none
SHARED, LOCAL, PARAMETERS = 1 << 36, 1 << 37, 1 << 38  # where the windows of generic addresses begin
SHARED_FIRST = 1024  # the first address of a block's shared memory
RANK_SHIFT = 24  # a cluster's shared addresses: (rank + 1) << RANK_SHIFT | own address


@dataclass
class Buffer:
    name: str
    base: int
    data: np.ndarray  # uint8, contiguous: a view of the caller's array


class GlobalMemory:
    """The buffers of one launch, far apart, so that no stray access hits a neighbour."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases = np.zeros(0, np.int64)

    def add(self, name: str, array: np.ndarray, misaligned: int = 0) -> int:
        """The address of a C-contiguous array, 256 bytes aligned plus ``misaligned``; the same again for the same."""
        if not array.flags.c_contiguous:
            raise EmulatorError(f"buffer {name}: expected C-contiguous memory, got strides {array.strides}")
        data = array.reshape(-1).view(np.uint8)
        for buffer in self.buffers:
            if data.size and buffer.data.ctypes.data == data.ctypes.data and buffer.data.size == data.size:
                return buffer.base
        last = self.buffers[-1] if self.buffers else None
        end = FIRST if last is None else last.base + last.data.size
        base = -(-(end + GUARD) // 256) * 256 + misaligned
        self.buffers.append(Buffer(name, base, data))
        self.bases = np.array([b.base for b in self.buffers], np.int64)
        return base

    def _find(self, addresses: np.ndarray, size: int) -> list[tuple[Buffer, np.ndarray]]:
        """(buffer, which of the addresses are in it) for all of them, checked."""
        aligned(addresses, size, self.near)
        which = np.searchsorted(self.bases, addresses, side="right") - 1
        found = []
        for index in np.unique(which):
            chosen = which == index
            at = int(chosen.argmax())
            if index < 0:
                raise Fault(f"address {int(addresses[at]):#x} is in no buffer", at)
            buffer = self.buffers[index]
            beyond = chosen & (addresses + size > buffer.base + buffer.data.size)
            if beyond.any():
                at = int(beyond.argmax())
                bad = int(addresses[at])
                raise Fault(f"address {bad:#x} is out of bounds ({self.near(bad)})", at)
            found.append((buffer, chosen))
        return found

    def near(self, address: int) -> str:
        index = int(np.searchsorted(self.bases, address, side="right")) - 1
        if index < 0:
            return "before all buffers"
        buffer = self.buffers[index]
        return f"byte {address - buffer.base} of buffer {buffer.name}, which has {buffer.data.size}"

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:  # (L,) int64 -> (L, size) uint8
        out = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen in self._find(addresses, size):
            at = (addresses[chosen] - buffer.base)[:, None] + np.arange(size)
            out[chosen] = buffer.data[at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:  # (L,) int64, (L, size) uint8
        size = values.shape[1]
        for buffer, chosen in self._find(addresses, size):
            mine = addresses[chosen] - buffer.base
            agree(mine, values[chosen], f"buffer {buffer.name}")
            buffer.data[mine[:, None] + np.arange(size)] = values[chosen]


class SharedMemory:
    """Of the blocks of a unit, one after another in ``data``: (blocks * size,) bytes, ``valid`` where written.

    A barrier object (mbarrier) is opaque: ``barriers`` marks its bytes, which ordinary accesses must not touch.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        self.used = size
        self.data = np.zeros(blocks * self.size, np.uint8)
        self.valid = np.zeros(blocks * self.size, bool)
        self.barriers = np.zeros(blocks * self.size, bool)
        self.gone = np.zeros(blocks, bool)  # blocks all of whose threads have exited

    def find(self, addresses: np.ndarray, size: int, own: np.ndarray, cluster: bool, opaque: bool = False) -> np.ndarray:
        """Indices (L,) into ``data`` of addresses (L,) as lanes of the blocks ``own`` (L,) see them.

        Args:
            cluster: Other blocks' memory may be meant (``.shared::cluster``).
            opaque: A barrier object is meant.
        """
        ranks = (addresses >> RANK_SHIFT) - 1
        inside = (addresses & ((1 << RANK_SHIFT) - 1)) - SHARED_FIRST
        blocks = np.where(ranks < 0, own, ranks)
        aligned(addresses, size, lambda a: f"shared address {a:#x}")
        count = len(self.gone)
        bad = (inside < 0) | (inside + size > self.used) | (blocks >= count) | (addresses < 0)
        if bad.any():
            at = int(bad.argmax())
            raise Fault(
                f"shared address {int(addresses[at]):#x} is out of bounds: byte {int(inside[at])} of {self.used}", at
            )
        if not cluster and (blocks != own).any():
            at = int((blocks != own).argmax())
            raise Fault(f"shared address {int(addresses[at]):#x} is another block's: .shared::cluster reaches it", at)
        if self.gone.any() and self.gone[blocks].any():
            at = int(self.gone[blocks].argmax())
            raise Fault(f"shared address {int(addresses[at]):#x} lies in a block that has exited", at)
        found = blocks.astype(np.int64) * self.size + inside
        if self.barriers.any() and not opaque and (hit := self.barriers[span(found, size)].any(axis=1)).any():
            at = int(hit.argmax())
            raise Fault(f"shared address {int(addresses[at]):#x} holds an mbarrier, which is opaque", at)
        return found


def span(first: np.ndarray, size: int, step: int = 1) -> np.ndarray:
    """(L, size / step) of (L,): the indices of each access's bytes, or of every ``step``-th."""
    return first[:, None] + np.arange(0, size, step)


def aligned(addresses: np.ndarray, size: int, near) -> None:
    if (addresses & (size - 1)).any() if size & (size - 1) == 0 else (addresses % size).any():
        at = int((addresses % size != 0).argmax())
        raise Fault(f"address {int(addresses[at]):#x} is not aligned to {size} bytes ({near(int(addresses[at]))})", at)


def agree(at: np.ndarray, values: np.ndarray, what: str) -> None:
    """
    Raises:
        Fault: Different values go to the same place.
    """
    if len(np.unique(at)) == len(at):
        return
    order = np.argsort(at, kind="stable")
    same = at[order][1:] == at[order][:-1]
    if (values[order][1:][same] != values[order][:-1][same]).any():
        raise Fault(f"threads write different values to one address of {what}")
