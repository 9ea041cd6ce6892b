"""cp.async: copies of a few bytes by each thread, in groups that it waits for (PTX ISA, 9.7.9.25.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from emulator.access import addresses, granules, operand_number, shared
from emulator.clocks import Clock
from emulator.errors import Fault
from emulator.mbarrier import MBarrier, at_index, named
from emulator.memory import span
from emulator.parser import Immediate, Instruction, Operand, Register
from emulator.registers import Active, Lanes
from emulator.table import executes
from emulator.unit import Copy, Unit


@dataclass
class Groups:
    """Copies that threads have started and not waited for, in groups; the open one is number ``group[t]``.

    To the race shadow, a thread's copies are numbered one by one: ``ends[t, g]`` is the number of the last one in group
    g. An arrival on an mbarrier covers copies and not groups.
    """

    group: np.ndarray  # (T,)
    copies: list[tuple[Copy, np.ndarray, np.ndarray]] = field(default_factory=list)  # threads (R,), groups (R,)

    def __post_init__(self) -> None:
        self.number = np.zeros(len(self.group), np.int32)  # (T,) of the thread's last copy
        self.ends = np.zeros((len(self.group), 64), np.int32)

    def commit(self, threads: np.ndarray) -> None:
        """The open groups of threads (R,) end."""
        if self.group[threads].max() >= self.ends.shape[1]:
            self.ends = np.hstack([self.ends, np.zeros_like(self.ends)])
        self.ends[threads, self.group[threads]] = self.number[threads]
        self.group[threads] += 1

    def settle(self, unit: Unit, threads: np.ndarray, done: np.ndarray, reading: bool = False) -> None:
        """Threads (R,) have waited up to groups (R,): what belongs to those has landed, or has been read only."""
        limit = np.zeros(len(self.group), np.int64)
        limit[threads] = done
        due = [c for c in self.copies if (c[2] <= limit[c[1]]).any()]
        if reading:
            for copy, *_ in due:
                if copy.read is not None and not copy.landed:
                    copy.read()
            return
        self.copies = [c for c in self.copies if not (c[2] <= limit[c[1]]).any()]
        unit.finish_all([c[0] for c in due])


def groups_of(unit: Unit, key: str) -> Groups:
    groups = unit.state.setdefault(key, Groups(np.ones(len(unit.threads), np.int64)))
    assert isinstance(groups, Groups)
    return groups


def _own_copies(unit: Unit) -> int:
    """The column of the first thread's cp.async copies."""
    assert unit.clocks is not None
    return unit.clocks.agent("cp.async", "cp.async", False, unit.clocks.threads)


@executes("cp.async.ca", "cp.async.cg", section="9.7.9.25.3.1")
def _cp_async(at: Instruction, lanes: Lanes, active: Active) -> None:
    """16, 8 or 4 bytes a lane, the source's first ones and zeros after."""
    to, source, size, *given = at.operands
    assert isinstance(size, Immediate)
    unit, bytes_, ids = lanes.unit, int(size.value), np.flatnonzero(active.mask)
    if bytes_ not in ((16,) if "cg" in at.modifiers else (4, 8, 16)):
        raise Fault(f"copies {bytes_} bytes")
    # A predicate says whether to ignore the source, a number how much of it to take, 64 bits are a cache policy.
    amounts = np.full(len(ids), bytes_, np.int64)
    hinted = any(m.endswith("cache_hint") for m in at.modifiers)
    if len(given) > hinted:
        amounts = _amounts(given[0], lanes, active, bytes_)
    found = shared(lanes, ids, addresses(to, lanes, active), bytes_, False)
    where, blocks = addresses(source, lanes, active), lanes.grid_block[ids]

    def fetch() -> np.ndarray:
        values = np.zeros((len(ids), bytes_), np.uint8)
        for amount in np.unique(amounts[amounts > 0]):
            mine = amounts == amount
            if amount == bytes_:
                values[mine] = unit.memory.load(where[mine], bytes_, blocks[mine])
            else:
                values[mine, :amount] = _prefix(unit, where[mine], int(amount), bytes_)
        return values

    fetch()  # bounds are checked now, the bytes are those of when it lands
    if len(np.unique(found)) < len(found):
        raise Fault("race: two lanes copy to one shared address")
    groups, first, threads = groups_of(unit, "cp.async"), _own_copies(unit), lanes.all_of(active)
    groups.number[threads] += 1
    assert unit.shadow is not None
    cells = granules(lanes, found, bytes_)
    unit.shadow.store(cells, threads, agents=first + threads, times=groups.number[threads])

    def land() -> None:
        unit.shared.data[span(found, bytes_)] = fetch()

    unit.shared.valid[span(found, bytes_)] = True  # the shadow lets nobody read them before they have landed
    copy = Copy(land, f"cp.async of {unit.name(int(threads[0]))}")
    groups.copies.append((copy, threads, groups.group[threads].copy()))
    unit.start(copy)


def _amounts(given: Operand, lanes: Lanes, active: Active, size: int) -> np.ndarray:
    if isinstance(given, Register) and lanes.kernel.type_of(given.name) == "pred":
        return np.where(operand_number(given, lanes, active, "pred"), 0, size).astype(np.int64)
    amounts = operand_number(given, lanes, active, "u32").astype(np.int64)
    if (amounts > size).any():
        raise Fault(f"takes {int(amounts.max())} bytes of the source into {size}", int((amounts > size).argmax()))
    return amounts


def _prefix(unit: Unit, where: np.ndarray, amount: int, size: int) -> np.ndarray:
    """The first bytes only: what follows may lie out of bounds, the alignment is that of the whole."""
    if (where % size).any():
        raise Fault(f"address {int(where[where % size != 0][0]):#x} is not aligned to {size} bytes")
    return np.concatenate([unit.memory.load(where + k, 1) for k in range(amount)], axis=1)


@executes("cp.async.commit_group", section="9.7.9.25.3.2")
def _commit(at: Instruction, lanes: Lanes, active: Active) -> None:
    groups_of(lanes.unit, "cp.async").commit(lanes.all_of(active))


@executes("cp.async.wait_group", "cp.async.wait_all", section="9.7.9.25.3.3", blocks=True)
def _wait_group(at: Instruction, lanes: Lanes, active: Active) -> None:
    unit, threads = lanes.unit, lanes.all_of(active)
    groups, first = groups_of(unit, "cp.async"), _own_copies(unit)
    if "wait_all" in at.modifiers:
        groups.commit(threads)
        done = groups.group[threads] - 1
    else:
        (pending,) = at.operands
        assert isinstance(pending, Immediate)
        done = groups.group[threads] - 1 - int(pending.value)
    groups.settle(unit, threads, done)
    assert unit.clocks is not None
    unit.clocks.learn(threads, first + threads, groups.ends[threads, np.maximum(done, 0)])


@executes("cp.async.mbarrier.arrive", section="9.7.13.15.15", blocks=True)
def _arrive_after_copies(at: Instruction, lanes: Lanes, active: Active) -> None:
    """An arrival when all of the thread's copies so far have landed; unless ``.noinc``, one more is expected first."""
    unit, threads = lanes.unit, lanes.all_of(active)
    groups, first = groups_of(unit, "cp.async"), _own_copies(unit)
    assert unit.clocks is not None
    for index, thread in zip(named(at, at.operands[0], lanes, active), threads, strict=True):
        barrier = at_index(unit, int(index))
        clock = Clock(np.zeros(unit.clocks.count, np.int32), np.zeros(unit.clocks.count, np.int32))
        clock.seen[first + thread] = groups.number[thread]
        if "noinc" not in at.modifiers:
            barrier.pending += 1
        mine = [c for c in groups.copies if thread in c[1]]

        def land(barrier: MBarrier = barrier, clock: Clock = clock, mine: list = mine) -> None:
            unit.finish_all([c[0] for c in mine])
            barrier.arrive(1, clock)

        unit.start(Copy(land, f"cp.async.mbarrier.arrive of {unit.name(int(thread))}"))
