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


NOBODY, SEVERAL = -1, -2  # in place of a block's number


@dataclass(eq=False)
class Buffer:
    name: str
    base: int
    data: np.ndarray  # (bytes,) uint8, contiguous: a view of the caller's array

    def watch(self) -> None:
        """From now on: which blocks read and write."""
        self.writer = np.full(self.data.size, NOBODY, np.int32)  # the block that wrote a byte
        self.reader = np.full(self.data.size, NOBODY, np.int32)

    def read(self, at: np.ndarray, blocks: np.ndarray) -> None:
        """Blocks (A,) read bytes (A, size): what another block has written in this launch may come before or after."""
        writers = self.writer[at]
        self._alone((writers != NOBODY) & (writers != blocks[:, None]), at, writers, "reads", "wrote")
        readers = self.reader[at]
        self.reader[at] = np.where((readers == NOBODY) | (readers == blocks[:, None]), blocks[:, None], SEVERAL)

    def write(self, at: np.ndarray, blocks: np.ndarray, values: np.ndarray) -> None:
        """Two blocks may write the same value; what one has read no other may write."""
        writers, readers = self.writer[at], self.reader[at]
        differ = self.data[at] != values
        self._alone((writers != NOBODY) & (writers != blocks[:, None]) & differ, at, writers, "writes", "wrote too")
        self._alone((readers != NOBODY) & (readers != blocks[:, None]), at, readers, "writes", "read")
        self.writer[at] = blocks[:, None]

    def _alone(self, bad: np.ndarray, at: np.ndarray, others: np.ndarray, verb: str, did: str) -> None:
        if bad.any():
            lane, k = np.argwhere(bad)[0]
            other = int(others[lane, k])
            who = "several blocks" if other == SEVERAL else f"block {other} of the grid"
            where = f"byte {int(at[lane, k])} of buffer {self.name}"
            raise Fault(f"race: {verb} {where}, which {who} {did}; nothing orders blocks", int(lane))


class GlobalMemory:
    """The buffers of one launch, far apart, so that no stray access hits a neighbour.

    Attributes:
        watched: Races between blocks are looked for: not in kernels whose blocks talk to each other by atomics, nor
            where only some of the blocks run.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases = np.zeros(0, np.int64)
        self.watched = False

    def begin(self, watched: bool) -> None:
        """Of a launch: what earlier ones did is over."""
        self.watched = watched
        for buffer in self.buffers if watched else ():
            buffer.watch()

    def add(self, name: str, array: np.ndarray) -> int:
        """The address of a C-contiguous array; the same again for the same.

        A multiple of 256 bytes, or as far behind one as the array is behind a multiple of 16 in the host's memory.
        """
        if not array.flags.c_contiguous:
            raise EmulatorError(f"buffer {name}: expected C-contiguous memory, got strides {array.strides}")
        data = array.reshape(-1).view(np.uint8)
        for buffer in self.buffers:
            if data.size and buffer.data.ctypes.data == data.ctypes.data and buffer.data.size == data.size:
                return buffer.base
        last = self.buffers[-1] if self.buffers else None
        end = FIRST if last is None else last.base + last.data.size
        base = -(-(end + GUARD) // 256) * 256 + data.ctypes.data % 16
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
                raise Fault(f"address {int(addresses[at]):#x} is out of bounds (in no buffer)", at)
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

    def load(self, addresses: np.ndarray, size: int, blocks: np.ndarray | None = None) -> np.ndarray:
        """(A, size) uint8 at addresses (A,) int64, for blocks (A,) of the grid; None: it cannot race."""
        out = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen in self._find(addresses, size):
            at = (addresses[chosen] - buffer.base)[:, None] + np.arange(size)
            if self.watched and blocks is not None:
                buffer.read(at, blocks[chosen])
            out[chosen] = buffer.data[at]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray, blocks: np.ndarray | None = None) -> None:
        """Values (A, size) uint8 at addresses (A,) int64, by blocks (A,) of the grid; None: it cannot race."""
        size = values.shape[1]
        for buffer, chosen in self._find(addresses, size):
            mine = addresses[chosen] - buffer.base
            agree(mine, values[chosen], f"buffer {buffer.name}")
            at = mine[:, None] + np.arange(size)
            if self.watched and blocks is not None:
                buffer.write(at, blocks[chosen], values[chosen])
            buffer.data[at] = values[chosen]


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

    def find(
        self, addresses: np.ndarray, size: int, own: np.ndarray, cluster: bool, opaque: bool = False
    ) -> np.ndarray:
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
