"""A unit: the blocks that run together because they can meet: a block, or the blocks of a cluster.

Blocks of a kernel that neither shares memory nor waits cannot meet, so several of those make a unit too, of one group
of lanes; nothing but speed changes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from emulator.clocks import Clocks
from emulator.errors import EmulatorError, Fault
from emulator.memory import GlobalMemory, SharedMemory
from emulator.registers import Lanes
from emulator.shadow import Shadow


@dataclass(frozen=True)
class Schedule:
    """In which order things happen that a GPU may do in any.

    Attributes:
        lanes: Threads that run in lockstep: 32, a warp; 128, a warpgroup (the least, where wgmma is); 1024, a block.
        seed: Of the order in which such groups, and blocks, take their turns.
        completion: When asynchronous copies land: "early", at once; "late", the last one first and only when a thread
            cannot go on without; "shuffled".
    """

    lanes: int = 1024
    seed: int = 0
    completion: str = "early"

    def __post_init__(self) -> None:
        if self.lanes not in (32, 64, 128, 256, 512, 1024):
            raise EmulatorError(f"lanes: expected a power of two from 32 to 1024, got {self.lanes}")
        if self.completion not in ("early", "late", "shuffled"):
            raise EmulatorError(f"completion: expected early, late or shuffled, got {self.completion!r}")


LOCKSTEP = Schedule()


@dataclass(eq=False)
class Copy:
    """An asynchronous copy that has not landed; one from shared memory may have ``read`` its bytes before that."""

    land: Callable[[], None]
    text: str
    landed: bool = False
    read: Callable[[], None] | None = None


@dataclass
class Unit:
    """
    Attributes:
        threads: (T, 6) of each thread ctaid.xyz, tid.xyz; every block padded to whole warps.
        exists: (T,) bool; False for padding.
        sizes: grid, block and cluster, three numbers each.
    """

    threads: np.ndarray
    exists: np.ndarray
    block_of: np.ndarray  # (T,)
    sizes: Sequence[tuple[int, ...]]
    memory: GlobalMemory
    parameters: np.ndarray  # (bytes,) uint8
    shared: SharedMemory
    schedule: Schedule
    rng: np.random.Generator
    clocks: Clocks | None = None  # of a unit that can race
    shadow: Shadow | None = None
    special: dict[str, np.ndarray] = field(default_factory=dict)  # "%tid.x" -> (T,)
    groups: list[Lanes] = field(default_factory=list)
    pending: list[Copy] = field(default_factory=list)
    state: dict[object, object] = field(default_factory=dict)  # of barriers and copies, by their modules
    unchecked: Collection[str] = ()  # rules not to be enforced: "proxies", "registers"
    at_end: list[Callable[[], None]] = field(default_factory=list)  # checks when all threads have exited

    def __post_init__(self) -> None:
        grid, block, cluster = self.sizes
        x, y, z = self.threads[:, :3].astype(np.int64).T
        self.grid_block = (x + grid[0] * (y + grid[1] * z)).astype(np.int32)  # (T,) the number of its block
        count = len(self.threads)
        linear = self.threads[:, 3] + block[0] * (self.threads[:, 4] + block[1] * self.threads[:, 5])
        inside = self.threads[:, :3] % np.array(cluster, np.uint32)
        rank = inside[:, 0] + cluster[0] * (inside[:, 1] + cluster[1] * inside[:, 2])
        size = int(np.prod(cluster))
        lane = linear & 31
        special = {
            "%laneid": lane,
            "%warpid": linear >> 5,
            "%nwarpid": np.full(count, -(-int(np.prod(block)) // 32)),
            "%smid": self.block_of,
            "%nsmid": np.full(count, 132),
            "%cluster_ctarank": rank,
            "%cluster_nctarank": np.full(count, size),
            "%dynamic_smem_size": np.full(count, self.shared.used),
            "%total_smem_size": np.full(count, self.shared.used),
            "%lanemask_eq": 1 << lane,
            "%lanemask_lt": (1 << lane) - 1,
            "%lanemask_le": (2 << lane.astype(np.int64)) - 1,
            "%lanemask_gt": ~((2 << lane.astype(np.int64)) - 1),
            "%lanemask_ge": ~((1 << lane) - 1),
        }
        for k, axis in enumerate("xyz"):
            special[f"%ctaid.{axis}"], special[f"%tid.{axis}"] = self.threads[:, k], self.threads[:, 3 + k]
            special[f"%clusterid.{axis}"] = self.threads[:, k] // cluster[k]
            special[f"%cluster_ctaid.{axis}"] = inside[:, k]
            numbers = {"nctaid": grid[k], "ntid": block[k], "cluster_nctaid": cluster[k]}
            numbers["nclusterid"] = -(-grid[k] // cluster[k])
            special |= {f"%{name}.{axis}": np.full(count, number) for name, number in numbers.items()}
        self.special = {
            name: (values.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32) for name, values in special.items()
        }
        self.special["%is_explicit_cluster"] = np.full(count, size > 1)

    def name(self, thread: int) -> str:
        """ "block (0, 0, 0), thread (3, 0, 0)"."""
        numbers = self.threads[thread]
        return f"block {tuple(map(int, numbers[:3]))}, thread {tuple(map(int, numbers[3:]))}"

    def alive(self, block: int | None = None) -> int:
        """Threads that have not exited, of one block or of all (where blocks can meet, a group lies in one)."""
        return sum(g.live for g in self.groups if block is None or g.block[0] == block)

    def start(self, copy: Copy) -> None:
        """An asynchronous copy begins; it lands when the schedule says."""
        if self.schedule.completion == "early":
            self.finish(copy)
        else:
            self.pending.append(copy)

    def finish(self, copy: Copy) -> None:
        if not copy.landed:
            copy.landed = True
            if copy in self.pending:
                self.pending.remove(copy)
            try:
                copy.land()
            except Fault as fault:
                raise Fault(f"{copy.text}: {fault}") from None

    def finish_all(self, copies: Sequence[Copy]) -> None:
        """Copies that a thread has waited for, in any order."""
        for index in self.rng.permutation(len(copies)):
            self.finish(copies[index])

    def finish_one(self) -> None:
        """Nothing else can go on, or the schedule lets a copy land."""
        last = len(self.pending) - 1
        self.finish(self.pending[last if self.schedule.completion == "late" else int(self.rng.integers(last + 1))])
