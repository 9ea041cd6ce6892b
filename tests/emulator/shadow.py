"""The race shadow of shared memory: who last wrote and who has since read each granule, and at what time.

An access is a race when another agent's earlier one is not known to the accessing thread by its vector clock, whatever
the order in which this run happened to execute them. The async proxy in addition needs what threads wrote to have
passed a proxy fence. What a thread reads through the generic proxy needs none before the async proxy overwrites it:
the read has its value when the thread arrives at the barrier that orders them.
"""

from __future__ import annotations

import numpy as np

from emulator.clocks import Clocks
from emulator.errors import Fault

Granules = np.ndarray  # (L, K) int64: K granules of each of L lanes


class Shadow:
    """Of ``granules`` granules of ``width`` bytes, of blocks of ``stride`` granules each."""

    def __init__(self, clocks: Clocks, granules: int, width: int, stride: int) -> None:
        self.clocks, self.width, self.stride = clocks, width, stride
        self.writer = np.full(granules, -1, np.int32)
        self.written = np.zeros(granules, np.int32)  # the writer's time
        self.write_place = np.zeros(granules, np.int32)  # an instruction's number
        self.strong = np.zeros(granules, bool)  # written by an atomic or the like
        warps = clocks.threads // 32
        self.slots: dict[int, int] = {}  # agents that are not threads -> their column, after those of warps
        self.read = np.zeros((granules, warps), np.int32)  # (G, S) time of the last read
        self.readers = np.zeros((granules, warps), np.uint32)  # (G, S) lanes that read then
        self.past = np.zeros((granules, warps), np.int32)  # (G, S) the same of lanes that read earlier, or at least
        self.past_readers = np.zeros((granules, warps), np.uint32)  # the least of their times
        self.plain = np.zeros((granules, warps), bool)  # (G, S) not all of those reads were strong
        self.read_place = np.zeros(granules, np.int32)
        self.proxies = True  # whether a missing proxy fence is a fault
        self.place = 0  # of the instruction that runs
        self.describe = lambda place: f"instruction {place}"

    # -- the generic proxy --------------------------------------------------------------------------------------------

    def load(self, granules: Granules, threads: np.ndarray, strong: bool = False) -> None:
        """Threads (L,) read; ``strong``: accesses of that sort may meet each other without a race."""
        self._ordered_writes(granules, threads[:, None], "reads", strong)
        flat = granules.ravel()
        slots = np.repeat(threads >> 5, granules.shape[1])
        bits = np.repeat(np.uint32(1) << (threads & 31).astype(np.uint32), granules.shape[1])
        now = self.clocks.now[slots]
        stale = self.read[flat, slots] != now
        if stale.any():
            self._age(flat[stale], slots[stale])
        self.read[flat, slots] = now
        np.bitwise_or.at(self.readers, (flat, slots), bits)
        if not strong:
            self.plain[flat, slots] = True
        self.read_place[flat] = self.place

    def _age(self, flat: np.ndarray, slots: np.ndarray) -> None:
        """Reads become earlier ones. Lanes that have read since need not be remembered, others keep a time."""
        time, lanes = self.read[flat, slots], self.readers[flat, slots]
        before, others = self.past[flat, slots], self.past_readers[flat, slots]
        kept = (others & ~lanes) != 0
        self.past[flat, slots] = np.where(kept, np.minimum(before, time), time)
        self.past_readers[flat, slots] = np.where(kept, others | lanes, lanes)
        self.readers[flat, slots] = 0
        self.plain[flat, slots] &= time > 0

    def store(
        self,
        granules: Granules,
        threads: np.ndarray,
        same: np.ndarray | None = None,
        agents: np.ndarray | None = None,
        times: np.ndarray | None = None,
        strong: bool = False,
    ) -> None:
        """Threads (L,) write, or start a copy that writes as ``agents`` (L,) at ``times`` (L,).

        Args:
            same: (L, K) where the value that is there already is written again: two threads then do not race.
            strong: Accesses of that sort may meet each other without a race.
        """
        self._ordered_writes(granules, threads[:, None], "writes", strong, same)
        self._ordered_reads(granules, threads, strong)
        times = self.clocks.now[threads >> 5] if times is None else times
        self._wrote(granules, (threads if agents is None else agents)[:, None], times[:, None], strong)

    # -- the async proxy ----------------------------------------------------------------------------------------------

    def async_load(self, granules: np.ndarray, threads: np.ndarray, agent: int, time: int) -> None:
        """An operation that threads (R,) started together reads granules (K,) until ``agent`` has reached ``time``."""
        self._async_writes(granules, threads, "reads")
        slot = self.slots.get(agent)
        if slot is None:
            slot = self.slots[agent] = self.read.shape[1]
            for name in ("read", "readers", "past", "past_readers", "plain"):
                held = getattr(self, name)
                setattr(self, name, np.hstack([held, np.zeros((len(held), 1), held.dtype)]))
        self.read[granules, slot], self.plain[granules, slot] = time, True
        self.read_place[granules] = self.place

    def async_store(self, granules: np.ndarray, thread: int, agent: int, time: int) -> None:
        """A copy that a thread started writes granules (K,), for others once they know ``agent``'s ``time``."""
        threads = np.array([thread])
        self._async_writes(granules, threads, "overwrites")
        self._ordered_reads(granules[None], threads)
        self._wrote(granules, np.int32(agent), np.int32(time))

    # -- the rules ----------------------------------------------------------------------------------------------------

    def _wrote(self, granules: np.ndarray, agents: np.ndarray, times: np.ndarray, strong: bool = False) -> None:
        self.writer[granules], self.written[granules], self.strong[granules] = agents, times, strong
        self.write_place[granules] = self.place
        self.read[granules] = self.past[granules] = 0
        self.readers[granules] = self.past_readers[granules] = 0
        self.plain[granules] = False

    def _ordered_writes(
        self, granules: Granules, threads: np.ndarray, verb: str, strong: bool, same: np.ndarray | None = None
    ) -> None:
        writers = self.writer[granules]
        bad = (writers >= 0) & (self.clocks.seen[threads, writers] < self.written[granules])
        if same is not None:
            bad &= ~(same & (writers < self.clocks.threads))
        if strong:
            bad &= ~self.strong[granules]
        if bad.any():
            lane, k = np.argwhere(bad)[0]
            self._race(int(lane), int(granules[lane, k]), verb, written=True)

    def _async_writes(self, granules: np.ndarray, threads: np.ndarray, verb: str) -> None:
        clocks = self.clocks
        writers, times = self.writer[granules], self.written[granules]
        late = (writers >= 0) & (clocks.seen[threads].min(axis=0)[writers] < times)
        if late.any():
            self._race(0, int(granules[late][0]), verb, written=True)
        unseen = (writers >= 0) & ~clocks.asynchronous[writers]
        unseen &= clocks.proxied[threads].min(axis=0)[writers] < times
        if self.proxies and unseen.any():
            granule = int(granules[unseen][0])
            raise Fault(
                f"{verb} {self._where(granule)} through the async proxy, which {self._wrote_it(granule)} through the "
                f"generic proxy, and no proxy fence (fence.proxy.async) lies between"
            )

    def _ordered_reads(self, granules: Granules, threads: np.ndarray, strong: bool = False) -> None:
        """Every read since the last write has to be known to the one that writes now."""
        if not self.read[granules].any():
            return
        clocks, warps = self.clocks, self.clocks.threads // 32
        known = np.empty((len(threads), self.read.shape[1]), np.int32)  # (L, S) of all that a slot stands for
        known[:, :warps] = clocks.warps_known(threads)
        for agent, slot in self.slots.items():
            known[:, slot] = clocks.seen[threads, agent]
        for times, lanes in ((self.read, self.readers), (self.past, self.past_readers)):
            late = times[granules] > known[:, None, :]
            if strong:
                late &= self.plain[granules]
            for lane, k, slot in np.argwhere(late):
                granule = int(granules[lane, k])
                reader = self._unknown_reader(int(threads[lane]), slot, int(times[granule, slot]), lanes[granule, slot])
                if reader is not None:
                    self._race(int(lane), granule, "writes", reader=reader)

    def _unknown_reader(self, thread: int, slot: int, time: int, lanes: int) -> int | None:
        """Of the agents that read at a time, one whose reading the thread does not know of."""
        if slot >= self.clocks.threads // 32:
            return next(agent for agent, s in self.slots.items() if s == slot)
        readers = np.flatnonzero(int(lanes) >> np.arange(32) & 1) + 32 * slot
        late = readers[self.clocks.seen[thread, readers] < time]
        return int(late[0]) if len(late) else None

    def _race(self, lane: int, granule: int, verb: str, written: bool = False, reader: int = 0) -> None:
        if written:
            other = self._wrote_it(granule)
            waits = int(self.writer[granule]) >= self.clocks.threads
        else:
            other = f"{self.clocks.text(reader)} reads at {self.describe(int(self.read_place[granule]))}"
            waits = reader >= self.clocks.threads
        why = "may still be in flight: it has not been waited for" if waits else "nothing orders the two"
        raise Fault(f"race: {verb} {self._where(granule)}, which {other}; {why}", lane)

    def _wrote_it(self, granule: int) -> str:
        place = self.describe(int(self.write_place[granule]))
        return f"{self.clocks.text(int(self.writer[granule]))} wrote at {place}"

    def _where(self, granule: int) -> str:
        block, inside = divmod(granule, self.stride)
        return f"byte {inside * self.width} of shared memory" + (f" of the cluster's block {block}" if block else "")
