"""Barriers of warps, blocks and clusters, and fences (PTX ISA, 9.7.13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from emulator.clocks import Clock
from emulator.errors import Fault
from emulator.parser import Immediate, Instruction, Operand
from emulator.registers import Active, Lanes, Wait
from emulator.table import executes
from emulator.unit import Unit
from emulator.warps import meeting


@dataclass(eq=False)
class Barrier:
    """One use of one of a block's sixteen barriers; the next use is another object."""

    unit: Unit
    key: tuple[str, int, int]  # "bar", block, number
    expected: int | None  # threads, whole warps; None: all that have not exited
    arrived: int = 0
    clock: Clock = field(default_factory=Clock)
    members: list[np.ndarray] = field(default_factory=list)  # threads that have arrived
    times: list[np.ndarray] = field(default_factory=list)  # of their arrivals
    votes: list[np.ndarray] = field(default_factory=list)
    done: bool = False

    def complete(self) -> bool:
        if not self.done:
            target = self.unit.alive(self.key[1]) if self.expected is None else self.expected
            if self.arrived > target:
                raise Fault(f"{self.arrived} threads arrive at barrier {self.key[2]}, which expects {target}")
            self.done = self.arrived == target
            if self.done:
                del self.unit.state[self.key]
                self.unit.state[("before", *self.key)] = np.concatenate(self.members), np.concatenate(self.times)
        return self.done

    def __str__(self) -> str:
        target = self.unit.alive(self.key[1]) if self.expected is None else self.expected
        return f"barrier {self.key[2]}, where {self.arrived} of {target} threads have arrived"


def _alike(lanes: Lanes, active: Active, operands: Sequence[Operand]) -> Active:
    """The lanes whose numbers are those of the first one: warps may meet at different barriers."""
    lanes.need(operands, active, "the barrier's number or count")
    mask = active.mask.copy()
    for operand in operands:
        values = np.broadcast_to(lanes.number(operand, "u32"), lanes.count)
        mask &= values == values[int(mask.argmax())]
    return active if (mask == active.mask).all() else Active(mask, False)


def _arrive(lanes: Lanes, active: Active, number: Operand, count: Operand | None) -> Barrier:
    unit, block = lanes.unit, int(lanes.block[0])
    which = lanes.uniform(number, "u32", active, "the barrier's number")
    if which > 15:
        raise Fault(f"barrier {which}: a block has 16")
    expected = None if count is None else lanes.uniform(count, "u32", active, "the barrier's count")
    if expected is not None and (expected % 32 or expected == 0):
        raise Fault(f"a count of {expected} threads is not one of whole warps")
    key = ("bar", block, which)
    barrier = unit.state.setdefault(key, Barrier(unit, key, expected))
    assert isinstance(barrier, Barrier)
    if (barrier.expected or unit.alive(block)) != (expected or unit.alive(block)):
        raise Fault(f"barrier {which} is waited for with counts {barrier.expected} and {expected}")
    threads = lanes.all_of(active)
    _own_turn(barrier, threads)
    barrier.arrived += len(threads) if expected is None else 32 * len(np.unique(threads >> 5))
    assert unit.clocks is not None
    barrier.clock.join(unit.clocks.release(threads))
    return barrier


def _own_turn(barrier: Barrier, threads: np.ndarray) -> None:
    """
    Raises:
        Fault: Threads arrive for one use of a barrier and do not know that the use before is over: on another run they
            might take part in that one.
    """
    clocks = barrier.unit.clocks
    assert clocks is not None
    before, times = barrier.unit.state.get(("before", *barrier.key), (threads[:0], threads[:0]))  # type: ignore[misc]
    late = clocks.seen[threads][:, before] < times
    if late.any():
        position, other = np.argwhere(late)[0]
        raise Fault(
            f"race: arrives at barrier {barrier.key[2]}, which {barrier.unit.name(int(before[other]))} has used, and "
            "does not know that use to be over",
            int(position),
        )
    barrier.members.append(threads)
    barrier.times.append(clocks.now[threads >> 5].copy())


def _sync(lanes: Lanes, active: Active, barrier: Barrier) -> Wait:
    """Until everyone has arrived; then all know what all knew."""
    barrier.complete()

    def wake(mask: np.ndarray) -> None:
        assert lanes.unit.clocks is not None
        lanes.unit.clocks.acquire(lanes.threads[mask], barrier.clock)

    return Wait(active.mask, barrier.complete, lambda: str(barrier), wake, rest=True)


@executes("bar.sync", "bar.cta.sync", "barrier.sync.aligned", "barrier.cta.sync.aligned", section="9.7.13.1", whole=32)
@executes("barrier.sync", "barrier.cta.sync", section="9.7.13.1", blocks=True)
def _bar_sync(at: Instruction, lanes: Lanes, active: Active) -> Wait:
    number, count = (*at.operands, None)[:2]
    alike = _alike(lanes, active, at.operands)
    return _sync(lanes, alike, _arrive(lanes, alike, number, count))


@executes(
    "bar.arrive", "bar.cta.arrive", "barrier.arrive.aligned", "barrier.cta.arrive.aligned", section="9.7.13.1", whole=32
)
@executes("barrier.arrive", "barrier.cta.arrive", section="9.7.13.1", blocks=True)
def _bar_arrive(at: Instruction, lanes: Lanes, active: Active) -> None:
    number, count = at.operands
    rest = active
    while rest.mask.any():
        alike = _alike(lanes, rest, at.operands)
        _arrive(lanes, alike, number, count).complete()
        rest = Active(rest.mask & ~alike.mask, False)


@executes("bar.red", "bar.cta.red", section="9.7.13.1", whole=32)
@executes("barrier.red", "barrier.cta.red", section="9.7.13.1", blocks=True)
def _bar_red(at: Instruction, lanes: Lanes, active: Active) -> Wait:
    """All threads' predicates counted, or joined by and, or."""
    to, number, *count, vote = at.operands
    active = _alike(lanes, active, [number, *count])
    lanes.need([vote], active, "the predicate")
    holds = np.broadcast_to(lanes.bits(vote, "pred"), lanes.count)[active.mask]
    barrier = _arrive(lanes, active, number, count[0] if count else None)
    barrier.votes.append(holds)
    wait = _sync(lanes, active, barrier)
    learn = wait.wake

    def wake(mask: np.ndarray) -> None:
        assert learn is not None
        learn(mask)
        votes = np.concatenate(barrier.votes)
        results = {"popc": np.uint32(votes.sum()), "and": votes.all(), "or": votes.any()}
        result = next(results[m] for m in at.modifiers if m in results)
        lanes.write(to, np.full(lanes.count, result), Active(mask, bool((mask | lanes.exited).all())))

    wait.wake = wake
    return wait


@executes("bar.warp.sync", section="9.7.13.2", blocks=True)
def _bar_warp_sync(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    if (wait := meeting(at, at.operands[0], lanes, active)) is not None:
        return wait
    clocks = lanes.unit.clocks
    assert clocks is not None
    for warp in np.flatnonzero(active.mask.reshape(-1, 32).any(axis=1)):
        inside = np.zeros(lanes.count, bool)
        inside[32 * warp : 32 * warp + 32] = active.mask[32 * warp : 32 * warp + 32]
        clocks.acquire(lanes.threads[inside], clocks.release(lanes.threads[inside]))
    return None


# -- clusters (9.7.13.3) -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ClusterBarrier:
    """Phases are counted per thread: one is over when every thread that has not exited has arrived for it."""

    unit: Unit
    arrived: np.ndarray  # (T,) phases
    waited: np.ndarray  # (T,)
    clocks: dict[int, Clock] = field(default_factory=dict)  # of each phase

    def complete(self, phase: int) -> bool:
        return not any((~g.exited & (self.arrived[g.threads] < phase)).any() for g in self.unit.groups)


def _cluster(unit: Unit) -> ClusterBarrier:
    count = len(unit.threads)
    barrier = unit.state.get("cluster barrier")
    if barrier is None:
        barrier = unit.state["cluster barrier"] = ClusterBarrier(unit, np.zeros(count, int), np.zeros(count, int))
    assert isinstance(barrier, ClusterBarrier)
    return barrier


@executes("barrier.cluster.arrive", section="9.7.13.3", whole=32)
def _cluster_arrive(at: Instruction, lanes: Lanes, active: Active) -> None:
    barrier, threads = _cluster(lanes.unit), lanes.all_of(active)
    if (barrier.arrived[threads] > barrier.waited[threads]).any():
        raise Fault("arrives at the cluster's barrier twice without waiting")
    barrier.arrived[threads] += 1
    clocks = lanes.unit.clocks
    assert clocks is not None
    for phase in np.unique(barrier.arrived[threads]):
        mine = threads[barrier.arrived[threads] == phase]
        clock = _initialisations(lanes.unit, mine) if "relaxed" in at.modifiers else clocks.release(mine)
        barrier.clocks.setdefault(int(phase), Clock()).join(clock)


def _initialisations(unit: Unit, threads: np.ndarray) -> Clock:
    """What a relaxed arrival makes known: mbarriers initialised before fence.mbarrier_init.release."""
    fenced = unit.state.get("mbarrier_init", {})
    assert isinstance(fenced, dict) and unit.clocks is not None
    clock = Clock(*np.zeros((2, unit.clocks.count), np.int32))
    for thread in threads:
        clock.seen[thread] = fenced.get(int(thread), 0)
    return clock


@executes("barrier.cluster.wait", section="9.7.13.3", whole=32)
def _cluster_wait(at: Instruction, lanes: Lanes, active: Active) -> Wait:
    barrier, threads = _cluster(lanes.unit), lanes.all_of(active)
    if (barrier.arrived[threads] == barrier.waited[threads]).any():
        raise Fault("waits at the cluster's barrier without having arrived")
    barrier.waited[threads] += 1
    phase = int(barrier.waited[threads].max())

    def wake(mask: np.ndarray) -> None:
        assert lanes.unit.clocks is not None
        lanes.unit.clocks.acquire(lanes.threads[mask], barrier.clocks.get(phase, Clock()))

    return Wait(active.mask, lambda: barrier.complete(phase), lambda: "the cluster's barrier", wake)


# -- fences (9.7.13.4), registers (9.7.19.5) -------------------------------------------------------------------------


@executes("membar", "fence", section="9.7.13.4")
def _fence(at: Instruction, lanes: Lanes, active: Active) -> None:
    """Makes a later relaxed write a release, and an earlier relaxed read an acquire (8.7, 8.8)."""
    clocks, unit = lanes.unit.clocks, lanes.unit
    if clocks is None:
        return
    for thread in lanes.all_of(active):
        one = np.array([thread])
        collected = unit.state.pop(("collected", int(thread)), None)
        if isinstance(collected, Clock):
            clocks.acquire(one, collected)
        unit.state["fenced", int(thread)] = clocks.release(one)


@executes("fence.proxy.async", section="9.7.13.4")
def _fence_proxy_async(at: Instruction, lanes: Lanes, active: Active) -> None:
    if "global" not in at.modifiers and lanes.unit.clocks is not None:
        lanes.unit.clocks.fence_proxy(lanes.all_of(active))


@executes("fence.mbarrier_init", section="9.7.13.4")
def _fence_mbarrier_init(at: Instruction, lanes: Lanes, active: Active) -> None:
    """What the thread initialised, the cluster and the async proxy may use."""
    assert lanes.unit.clocks is not None
    fenced = lanes.unit.state.setdefault("mbarrier_init", {})
    assert isinstance(fenced, dict)
    for thread in lanes.all_of(active):
        fenced[int(thread)] = int(lanes.unit.clocks.now[thread >> 5])


@executes("setmaxnreg", section="9.7.19.5", whole=128)
def _setmaxnreg(at: Instruction, lanes: Lanes, active: Active) -> None:
    (count,) = at.operands
    if not isinstance(count, Immediate) or count.value % 8 or not 24 <= count.value <= 256:
        raise Fault(f"expected registers from 24 to 256 in eights, got {count}")
