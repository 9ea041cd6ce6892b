"""Bulk copies between global and shared memory, through the async proxy (PTX ISA, 9.7.9.25.4 and 9.7.9.25.6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.access import addresses, operand_number, shared, values_of
from emulator.copies import groups_of
from emulator.data import ATOMIC
from emulator.errors import Fault
from emulator.mbarrier import MBarrier, at_index, locate
from emulator.memory import span
from emulator.parser import Immediate, Instruction, Operand, Vector
from emulator.registers import Active, Lanes
from emulator.table import executes
from emulator.types import from_bits, to_bits
from emulator.unit import Copy, Unit


def each_lane(active: Active, count: int) -> list[tuple[int, Active]]:
    """(lane, it alone)."""
    found = []
    for lane in np.flatnonzero(active.mask):
        one = np.zeros(count, bool)
        one[lane] = True
        found.append((int(lane), Active(one, False)))
    return found


@executes("cp.async.bulk", section="9.7.9.25.4.1", blocks=True)
def _bulk(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, source, size, *rest = at.operands
    for lane, alone in each_lane(active, lanes.count):
        count = int(operand_number(size, lanes, alone, "u32")[0])
        if count % 16 or count == 0:
            raise Fault(f"copies {count} bytes, no multiple of 16")
        if at.modifiers[2] == "global":
            _store_linear(at, lanes, lane, alone, to, source, count)
        else:
            _load_linear(at, lanes, lane, alone, to, source, count, rest)


def _load_linear(
    at: Instruction,
    lanes: Lanes,
    lane: int,
    alone: Active,
    to: Operand,
    source: Operand,
    count: int,
    rest: list[Operand],
) -> None:
    """Into shared memory, from global memory or from shared memory of this block."""
    unit, thread = lanes.unit, int(lanes.threads[lane])
    where = addresses(source, lanes, alone)
    if int(where[0]) % 16:
        raise Fault(f"address {int(where[0]):#x} is not aligned to 16 bytes")
    if at.modifiers[3] == "global":
        unit.memory.load(where[0] + np.arange(0, count, 16), 16)  # bounds

        def fetch() -> np.ndarray:
            return _linear(unit, int(where[0]), count, thread)
    else:
        inside = rows(lanes, lane, int(where[0]), count, False)

        def fetch() -> np.ndarray:
            return unit.shared.data[inside]

    for offset, barrier in destinations(at, lanes, lane, alone, to, rest, count):
        source_cells = None
        if at.modifiers[3] != "global":
            assert unit.shadow is not None
            source_cells = np.unique(inside // unit.shadow.width)
            unit.shadow.async_load(source_cells, np.array([thread]), barrier.agent(), barrier.phase + 1)
            barrier.outstanding.append((source_cells, True))
        fill(unit, thread, barrier, offset + np.arange(count), fetch, source_cells)


def _linear(unit: Unit, first: int, count: int, thread: int) -> np.ndarray:
    """(count,) bytes of global memory from an address on, for a thread's copy."""
    where = first + np.arange(0, count, 16)
    return unit.memory.load(where, 16, np.full(len(where), unit.grid_block[thread])).ravel()


def destinations(
    at: Instruction, lanes: Lanes, lane: int, alone: Active, to: Operand, rest: list[Operand], count: int
) -> list[tuple[int, MBarrier]]:
    """(index in shared memory, the mbarrier to signal) of each block that a copy goes to."""
    signal, *more = rest
    unit = lanes.unit
    first = int(addresses(to, lanes, alone)[0])
    data = int(rows(lanes, lane, first, count, True)[0])
    barrier = int(locate(signal, lanes, alone, True)[0])
    if not any(m.startswith("multicast") for m in at.modifiers):
        return [(data, _usable(unit, barrier, int(lanes.threads[lane])))]
    mask = int(operand_number(more[0], lanes, alone, "u16")[0])
    size, blocks = unit.shared.size, len(unit.shared.gone)
    if mask >> blocks or not mask:
        raise Fault(f"multicast mask {mask:#x} in a cluster of {blocks} blocks")
    ranks = [rank for rank in range(blocks) if mask >> rank & 1]
    if gone := [rank for rank in ranks if unit.shared.gone[rank]]:
        raise Fault(f"multicast to block {gone[0]} of the cluster, which has exited")
    thread = int(lanes.threads[lane])
    return [(r * size + data % size, _usable(unit, r * size + barrier % size, thread)) for r in ranks]


def _usable(unit: Unit, index: int, thread: int) -> MBarrier:
    """A barrier whose initialisation a thread's copy can see; another block's needs fence.mbarrier_init for it."""
    barrier, clocks = at_index(unit, index), unit.clocks
    fenced = unit.state.get("mbarrier_init", {})
    assert clocks is not None and isinstance(fenced, dict)
    known = clocks.seen[thread, barrier.thread] >= barrier.time
    visible = fenced.get(barrier.thread, 0) >= barrier.time or clocks.proxied[thread, barrier.thread] >= barrier.time
    foreign = index // unit.shared.size != unit.block_of[thread]
    if not known or (foreign and not visible):
        raise Fault(
            f"signals the mbarrier at byte {index % unit.shared.size}, which {unit.name(barrier.thread)} initialised: "
            "race: no barrier lies between, or no proxy fence (fence.mbarrier_init)"
        )
    return barrier


def fill(
    unit: Unit,
    thread: int,
    barrier: MBarrier,
    at: np.ndarray,
    fetch: Callable[[], np.ndarray],
    source: np.ndarray | None = None,
) -> None:
    """Bytes (K,) of shared memory, when the copy lands; then the barrier gets to know of them.

    Args:
        source: Granules of shared memory that the copy reads until the barrier's phase is over.
    """
    assert unit.shadow is not None
    cells = np.unique(at // unit.shadow.width)
    unit.shadow.async_store(cells, thread, barrier.agent(), barrier.phase + 1)
    unit.shared.valid[at] = True
    barrier.outstanding.append((cells, False))
    _watch(unit)

    def land() -> None:
        unit.shared.data[at] = fetch()
        barrier.outstanding = [o for o in barrier.outstanding if o[0] is not cells and o[0] is not source]
        barrier.expect(-len(at))
        barrier.settle()

    unit.start(Copy(land, f"a bulk copy of {unit.name(thread)}"))


def _watch(unit: Unit) -> None:
    """At the end every copy into shared memory has been waited for, and every copy from it has read."""
    if "watch" in unit.state:
        return
    unit.state["watch"] = True

    def check() -> None:
        clocks, shadow = unit.clocks, unit.shadow
        assert clocks is not None and shadow is not None
        for key, column in clocks.columns.items():
            if isinstance(key, tuple) and key[0] == "mbarrier":
                last = shadow.written[shadow.writer == column].max(initial=0)
                if clocks.seen[:, column].max() < last:
                    raise Fault("a bulk copy into shared memory is in flight: nobody has waited for it")
            elif isinstance(key, tuple) and key[0] == "bulk":
                last = shadow.read[:, shadow.slots[column]].max() if column in shadow.slots else 0
                if clocks.seen[key[1], column] < last:
                    who = unit.name(key[1])
                    raise Fault(f"a bulk copy from shared memory is in flight: {who} has not waited for its group")

    unit.at_end.append(check)


# -- from shared memory ------------------------------------------------------------------------------------------------


def rows(lanes: Lanes, lane: int, first: int, count: int, cluster: bool) -> np.ndarray:
    """(count,) indices into shared memory of the bytes from an address on."""
    if first % 16:
        raise Fault(f"shared address {first:#x} is not aligned to 16 bytes")
    where = first + np.arange(0, count, 16)
    return span(shared(lanes, np.full(len(where), lane), where, 16, cluster), 16).ravel()


def _read_async(unit: Unit, at: np.ndarray, thread: int) -> None:
    """A thread's bulk copy reads bytes (K,) until its group has been waited for."""
    assert unit.clocks is not None and unit.shadow is not None
    agent = unit.clocks.agent(("bulk", thread), f"a bulk copy of {unit.name(thread)}", True)
    group = int(groups_of(unit, "bulk").group[thread])
    unit.shadow.async_load(np.unique(at // unit.shadow.width), np.array([thread]), agent, group)
    _watch(unit)


def begin_store(
    unit: Unit,
    inside: np.ndarray,
    thread: int,
    store: Callable[[np.ndarray], None],
    used: np.ndarray | None = None,
) -> None:
    """A thread's copy of bytes (K,) of shared memory, of which ``used`` arrive in global memory, in its open group."""
    if not unit.shared.valid[inside if used is None else used].all():
        raise Fault("copies uninitialised shared memory")
    _read_async(unit, inside, thread)
    held: list[np.ndarray] = []

    def read() -> None:
        if not held:
            held.append(unit.shared.data[inside])

    def land() -> None:
        read()
        store(held[0])

    copy = Copy(land, f"a bulk copy of {unit.name(thread)}", read=read)
    groups = groups_of(unit, "bulk")
    groups.copies.append((copy, np.array([thread]), groups.group[[thread]].copy()))
    unit.start(copy)


def _store_linear(
    at: Instruction, lanes: Lanes, lane: int, alone: Active, to: Operand, source: Operand, count: int
) -> None:
    unit = lanes.unit
    inside = rows(lanes, lane, int(addresses(source, lanes, alone)[0]), count, False)
    first = int(addresses(to, lanes, alone)[0])
    where = first + np.arange(0, count, 16)
    unit.memory.load(where, 16)  # bounds
    reduces, thread = "reduce" in at.modifiers, int(lanes.threads[lane])

    def store(values: np.ndarray) -> None:
        if reduces:
            values = _reduced(at, unit.memory.load(where, 16).ravel(), values)
        blocks = None if reduces else np.full(len(where), unit.grid_block[thread])
        unit.memory.store(where, values.reshape(-1, 16), blocks)

    begin_store(unit, inside, thread, store)


def _reduced(at: Instruction, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Bytes with ``new`` added (or the like) to ``old``."""
    kind = at.kind
    (how,) = (ATOMIC[m] for m in at.modifiers if m in ATOMIC)
    bits = [np.ascontiguousarray(x).view(to_bits(np.zeros(1), kind).dtype) for x in (old, new)]
    return np.ascontiguousarray(to_bits(how(*(from_bits(b, kind) for b in bits)), kind)).view(np.uint8)


@executes("cp.reduce.async.bulk", section="9.7.9.25.4.2", blocks=True)
def _reduce_bulk(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, source, size, *_ = at.operands
    if at.modifiers[3] != "global":
        raise Fault("a bulk reduction into shared memory is not known")
    for lane, alone in each_lane(active, lanes.count):
        count = int(operand_number(size, lanes, alone, "u32")[0])
        _store_linear(at, lanes, lane, alone, to, source, count)


@executes("cp.async.bulk.commit_group", section="9.7.9.25.6.1")
def _bulk_commit(at: Instruction, lanes: Lanes, active: Active) -> None:
    groups_of(lanes.unit, "bulk").commit(lanes.all_of(active))


@executes("cp.async.bulk.wait_group", section="9.7.9.25.6.2", blocks=True)
def _bulk_wait(at: Instruction, lanes: Lanes, active: Active) -> None:
    unit, threads = lanes.unit, lanes.all_of(active)
    (pending,) = at.operands
    assert isinstance(pending, Immediate) and unit.clocks is not None
    groups = groups_of(unit, "bulk")
    done = groups.group[threads] - 1 - int(pending.value)
    groups.settle(unit, threads, done, reading="read" in at.modifiers)
    for thread, group in zip(threads, done, strict=True):
        if ("bulk", int(thread)) in unit.clocks.columns:
            unit.clocks.learn(np.array([thread]), unit.clocks.columns["bulk", int(thread)], int(group))


@executes("st.async", section="9.7.9.12", blocks=True)
def _st_async(at: Instruction, lanes: Lanes, active: Active) -> None:
    """A store into a block of the cluster that signals an mbarrier there."""
    to, value, signal = at.operands
    sources = list(value.elements) if isinstance(value, Vector) else [value]
    for lane, alone in each_lane(active, lanes.count):
        values = values_of(lanes, sources, at.kind, alone)
        index = shared(lanes, np.array([lane]), addresses(to, lanes, alone), values.shape[1], True)
        barrier = _usable(lanes.unit, int(locate(signal, lanes, alone, True)[0]), int(lanes.threads[lane]))
        fill(
            lanes.unit, int(lanes.threads[lane]), barrier, index[0] + np.arange(values.shape[1]), lambda v=values: v[0]
        )
