"""mbarrier objects: phases that end when all arrivals and all expected bytes have come (PTX ISA, 9.7.13.15)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from emulator.access import addresses, granules, operand_number, scatter, shared, space_of
from emulator.clocks import Clock
from emulator.errors import Fault
from emulator.memory import SHARED
from emulator.parser import Address, Instruction, Operand
from emulator.registers import Active, Lanes, Wait
from emulator.table import executes
from emulator.unit import Unit

LARGEST = (1 << 20) - 1  # of counts of arrivals and of bytes


@dataclass(eq=False)
class MBarrier:
    """
    Attributes:
        phase: The number of the phase that is not over; its parity is that of the phase.
        outstanding: Granules of copies that will signal it and have not landed, and whether those read them.
    """

    unit: Unit
    index: int  # in the unit's shared memory
    count: int
    thread: int  # that initialised it
    time: int
    serial: int  # another object at the same place is another agent
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    collecting: Clock = field(default_factory=Clock)
    over: Clock = field(default_factory=Clock)  # of the last phase that is
    outstanding: list[tuple[np.ndarray, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = self.count

    def __str__(self) -> str:
        return (
            f"phase {self.phase} of the mbarrier at byte {self.index % self.unit.shared.size}: "
            f"{self.pending} arrivals and {self.bytes} bytes are missing"
        )

    def agent(self) -> int:
        """The copies that signal it, as an agent; its time is the number of phases."""
        assert self.unit.clocks is not None
        return self.unit.clocks.agent(("mbarrier", self.serial), "a bulk copy into shared memory", True)

    def arrive(self, count: int, clock: Clock | None) -> None:
        if count > self.pending:
            raise Fault(f"{count} arrivals at an mbarrier whose phase expects {self.pending} more")
        self.pending -= count
        if clock is not None:
            self.collecting.join(clock)
        self.settle()

    def expect(self, count: int) -> None:
        self.bytes += count
        if not -LARGEST <= self.bytes <= LARGEST:
            raise Fault(f"an mbarrier's bytes are {self.bytes}, beyond {LARGEST}")

    def settle(self) -> None:
        """End the phase where nothing is missing. Copies that are still on their way belong to the next one."""
        if self.pending or self.bytes:
            return
        self.phase += 1
        self.pending, self.over, self.collecting = self.count, self.collecting, Clock()
        shadow = self.unit.shadow
        for cells, reads in self.outstanding:
            assert shadow is not None
            if reads:
                shadow.read[cells, shadow.slots[self.agent()]] = self.phase + 1
            else:
                shadow.written[cells[shadow.writer[cells] == self.agent()]] = self.phase + 1

    def has_ended(self, wanted: int, parity: bool) -> bool:
        """Whether the phase of a parity, or of a state that an arrival returned, is over."""
        return self.phase % 2 != wanted % 2 if parity else self.phase > wanted


def locate(address: Operand, lanes: Lanes, active: Active, cluster: bool, generic: bool = False) -> np.ndarray:
    """(A,) indices of barrier objects in the unit's shared memory."""
    where = addresses(address, lanes, active) - (SHARED if generic else 0)
    return shared(lanes, np.flatnonzero(active.mask), where, 8, cluster, opaque=True)


def at_index(unit: Unit, index: int) -> MBarrier:
    barrier = unit.state.get(("mbarrier", index))
    if not isinstance(barrier, MBarrier):
        raise Fault(f"there is no mbarrier at byte {index % unit.shared.size} of shared memory: it is uninitialised")
    return barrier


def named(at: Instruction, address: Operand, lanes: Lanes, active: Active) -> np.ndarray:
    """(A,) indices of an instruction's objects; using one has to be ordered after its initialisation."""
    space = space_of(at)
    found = locate(address, lanes, active, space in ("shared:cluster", "generic"), space == "generic")
    for index in np.unique(found):
        at_index(lanes.unit, int(index))
    assert lanes.unit.shadow is not None
    lanes.unit.shadow.load(granules(lanes, found, 8), lanes.all_of(active))
    return found


def _address_first(at: Instruction) -> tuple[Operand | None, Operand, list[Operand]]:
    """(result or None, address, the other operands)."""
    first, *rest = at.operands
    return (None, first, rest) if isinstance(first, Address) else (first, rest[0], rest[1:])


@executes("mbarrier.init", section="9.7.13.15.9")
def _init(at: Instruction, lanes: Lanes, active: Active) -> None:
    address, count = at.operands
    unit, counts = lanes.unit, operand_number(count, lanes, active, "u32")
    found = locate(address, lanes, active, False, space_of(at) == "generic")
    assert unit.shadow is not None and unit.clocks is not None
    unit.shadow.store(granules(lanes, found, 8), lanes.all_of(active))
    for index, number, thread in zip(map(int, found), map(int, counts), lanes.all_of(active), strict=True):
        if not 1 <= number <= LARGEST:
            raise Fault(f"expected a count from 1 to {LARGEST}, got {number}")
        if ("mbarrier", index) in unit.state:
            raise Fault(f"initialises the mbarrier at byte {index % unit.shared.size} of shared memory a second time")
        time = int(unit.clocks.now[thread >> 5])
        serial = unit.state["mbarriers"] = int(unit.state.get("mbarriers", 0)) + 1  # type: ignore[call-overload]
        unit.state["mbarrier", index] = MBarrier(unit, index, number, int(thread), time, serial)
        unit.shared.barriers[index : index + 8] = unit.shared.valid[index : index + 8] = True


@executes("mbarrier.inval", section="9.7.13.15.10")
def _inval(at: Instruction, lanes: Lanes, active: Active) -> None:
    unit = lanes.unit
    found = locate(at.operands[0], lanes, active, False, space_of(at) == "generic")
    assert unit.shadow is not None
    unit.shadow.store(granules(lanes, found, 8), lanes.all_of(active))
    for index in map(int, found):
        if at_index(unit, index).outstanding:
            raise Fault("invalidates an mbarrier that copies in flight will signal")
        del unit.state["mbarrier", index]
        unit.shared.barriers[index : index + 8] = unit.shared.valid[index : index + 8] = False


@executes("mbarrier.arrive", section="9.7.13.15.13", blocks=True)
@executes("mbarrier.arrive_drop", section="9.7.13.15.14", blocks=True)
def _arrive(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, address, rest = _address_first(at)
    unit = lanes.unit
    assert unit.clocks is not None
    found, threads = named(at, address, lanes, active), lanes.all_of(active)
    expects = "expect_tx" in at.modifiers
    numbers = operand_number(rest[0], lanes, active, "u32").astype(np.int64) if rest else np.ones(len(found), np.int64)
    states = np.zeros(len(found), np.uint64)
    for index in np.unique(found):
        mine = found == index
        barrier = at_index(unit, int(index))
        states[mine] = barrier.phase
        if expects:
            barrier.expect(int(numbers[mine].sum()))
        if at.opcode == "mbarrier" and "arrive_drop" in at.modifiers:
            barrier.count -= int(mine.sum() if expects else numbers[mine].sum())
        clock = None if "relaxed" in at.modifiers else unit.clocks.release(threads[mine])
        barrier.arrive(int(mine.sum() if expects else numbers[mine].sum()), clock)
    if to is not None:
        lanes.write(to, scatter(lanes, active, states), active)


@executes("mbarrier.expect_tx", section="9.7.13.15.11")
@executes("mbarrier.complete_tx", section="9.7.13.15.12", blocks=True)
def _tx(at: Instruction, lanes: Lanes, active: Active) -> None:
    address, count = at.operands
    sign = 1 if "expect_tx" in at.modifiers else -1
    for index, number in zip(
        named(at, address, lanes, active), operand_number(count, lanes, active, "u32"), strict=True
    ):
        barrier = at_index(lanes.unit, int(index))
        barrier.expect(sign * int(number))
        if sign < 0:
            barrier.settle()


@executes("mbarrier.test_wait", "mbarrier.try_wait", section="9.7.13.15.16", blocks=True)
def _wait(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    """Whether a phase is over. ``try_wait`` may also say no after a while: the schedule does so at times."""
    to, address, wanted, *_ = at.operands
    unit, parity = lanes.unit, "parity" in at.modifiers
    assert unit.clocks is not None
    found = named(at, address, lanes, active)
    phases = operand_number(wanted, lanes, active, "u32" if parity else "u64").astype(np.int64)

    def ended() -> np.ndarray:
        return np.array(
            [at_index(unit, int(i)).has_ended(int(p), parity) for i, p in zip(found, phases, strict=True)], bool
        )

    over = ended()
    if (
        not over.any()
        and "try_wait" in at.modifiers
        and (unit.schedule.completion == "early" or unit.rng.random() < 0.75)
    ):

        def text() -> str:
            texts = ", ".join(dict.fromkeys(str(at_index(unit, int(index))) for index in found))
            return texts + (f" (waits for parity {int(phases[0])})" if parity else "")

        return Wait(active.mask, lambda: bool(ended().any()), text, again=True)
    for index in np.unique(found[over]):
        barrier, threads = at_index(unit, int(index)), lanes.all_of(active)[over & (found == index)]
        if "relaxed" not in at.modifiers:
            unit.clocks.acquire(threads, barrier.over)
        if ("mbarrier", barrier.serial) in unit.clocks.columns:
            unit.clocks.learn(threads, barrier.agent(), barrier.phase)
    if not over.all():
        lanes.yielded = True
    lanes.write(to, scatter(lanes, active, over), active)
    return None
