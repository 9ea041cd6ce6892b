"""What the lanes of a warp do with each other: shuffles, votes, elections (PTX ISA, 9.7.9.6, 9.7.13)."""

from __future__ import annotations

import numpy as np

from emulator.errors import Fault
from emulator.parser import Instruction, Operand, Vector
from emulator.registers import Active, Lanes, Wait
from emulator.table import executes


def meeting(at: Instruction, members: Operand, lanes: Lanes, active: Active) -> Wait | None:
    """A wait until all lanes that a member mask names are here.

    Raises:
        Fault: A lane is here and not named, or named and gone.
    """
    if active.full and not lanes.exited.any() and np.all(lanes.number(members, "u32") == 0xFFFFFFFF):
        return None
    lanes.need([members], active, "the member mask")
    masks = np.broadcast_to(lanes.number(members, "u32"), lanes.count).reshape(-1, 32)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)
    here = active.mask.reshape(-1, 32)
    exists = lanes.unit.exists[lanes.threads].reshape(-1, 32)
    if (here & (masks & bit == 0)).any():
        raise Fault("a lane runs it that the member mask does not name", int((masks & bit == 0)[here].argmax()))
    named = np.zeros_like(here)
    for warp in np.flatnonzero(here.any(axis=1)):
        named[warp] = np.bitwise_or.reduce(masks[warp][here[warp]]) & bit != 0
    named &= exists
    if (named & lanes.exited.reshape(-1, 32)).any():
        raise Fault("the member mask names lanes that have exited")
    missing = named & ~here
    if not missing.any():
        return None
    late = np.repeat(missing.any(axis=1), 32)
    wait = Wait(active.mask & late, lambda: False, lambda: "the lanes that its member mask names", again=True)
    parties = late & named.ravel()
    wait.ready = lambda: bool((lanes.pcs[parties] == wait.pc).all())
    return wait


def by_warp(values: np.ndarray, lanes: Lanes) -> np.ndarray:
    """(W, 32) of (L,) or ()."""
    return np.broadcast_to(values, lanes.count).reshape(-1, 32)


@executes("shfl.sync", section="9.7.9.6", blocks=True)
def _shfl(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    """The source lane's value where that lies in the segment, else the own; the predicate says which."""
    to, source, b, c, members = at.operands
    if (wait := meeting(at, members, lanes, active)) is not None:
        return wait
    value = by_warp(lanes.bits(source, "b32"), lanes)
    b, c = (
        by_warp(lanes.number(b, "u32"), lanes).astype(np.int64),
        by_warp(lanes.number(c, "u32"), lanes).astype(np.int64),
    )
    lane, mode = np.arange(32), at.modifiers[1]
    segment, clamp = c >> 8 & 31, c & 31
    last, first = (lane & segment) | (clamp & ~segment), lane & segment
    origin, limit = {
        "up": (lane - (b & 31), None),
        "down": (lane + (b & 31), last),
        "bfly": (lane ^ (b & 31), last),
        "idx": (first | (b & 31 & ~segment), last),
    }[mode]
    inside = origin >= last if mode == "up" else origin <= limit
    origin = np.where(inside, origin, lane)
    active_here = active.mask.reshape(-1, 32)
    asks = np.take_along_axis(active_here, origin, axis=1)
    if (active_here & ~asks).any():
        raise Fault("reads the value of a lane that does not take part", int((~asks)[active_here].argmax()))
    undefined = lanes.undefined([source])
    if undefined is not None:
        undefined = np.take_along_axis(undefined.reshape(-1, 32), origin, axis=1).ravel()
    targets = to.elements if isinstance(to, Vector) else (to,)
    lanes.write(targets[0], np.take_along_axis(value, origin, axis=1).ravel(), active, undefined)
    if len(targets) > 1:
        lanes.write(targets[1], np.broadcast_to(inside, value.shape).ravel(), active)
    return None


@executes("vote.sync", section="9.7.13.9", blocks=True)
def _vote(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    to, source, members = at.operands
    if (wait := meeting(at, members, lanes, active)) is not None:
        return wait
    lanes.need([source], active, "the predicate")
    here = active.mask.reshape(-1, 32)
    holds = by_warp(lanes.bits(source, "pred"), lanes) & here
    everyone, anyone = (holds | ~here).all(axis=1), holds.any(axis=1)
    ballot = (holds.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
    result = {"all": everyone, "any": anyone, "uni": everyone | ~anyone, "ballot": ballot}[at.modifiers[1]]
    lanes.write(to, np.repeat(result, 32), active)
    return None


@executes("match.any.sync", "match.all.sync", section="9.7.13.10", blocks=True)
def _match(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    to, source, members = at.operands
    if (wait := meeting(at, members, lanes, active)) is not None:
        return wait
    lanes.need([source], active, "the value")
    here = active.mask.reshape(-1, 32)
    value = by_warp(lanes.bits(source, at.kind), lanes)
    same = (value[:, :, None] == value[:, None, :]) & here[:, None, :]
    masks = (same.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=2).astype(np.uint32)
    targets = to.elements if isinstance(to, Vector) else (to,)
    if "all" in at.modifiers:
        agreed = (same | ~here[:, None, :]).all(axis=2)
        masks = np.where(agreed, masks, np.uint32(0))
        if len(targets) > 1:
            lanes.write(targets[1], agreed.ravel(), active)
    lanes.write(targets[0], masks.ravel(), active)
    return None


@executes("activemask", section="9.7.13.11")
def _activemask(at: Instruction, lanes: Lanes, active: Active) -> None:
    here = active.mask.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    lanes.write(at.operands[0], np.repeat(here.sum(axis=1).astype(np.uint32), 32), active)


@executes("redux.sync", section="9.7.13.12", blocks=True)
def _redux(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    to, source, members = at.operands
    if (wait := meeting(at, members, lanes, active)) is not None:
        return wait
    lanes.need([source], active, "the value")
    value = by_warp(lanes.number(source, at.kind), lanes)
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[at.modifiers[1]]
    here = active.mask.reshape(-1, 32)
    result = np.zeros(len(here), value.dtype)
    for warp in np.flatnonzero(here.any(axis=1)):
        result[warp] = reduce.reduce(value[warp][here[warp]], dtype=value.dtype)
    lanes.write(to, np.repeat(result, 32).view(np.uint32), active)
    return None


@executes("elect.sync", section="9.7.13.14", blocks=True)
def _elect(at: Instruction, lanes: Lanes, active: Active) -> Wait | None:
    """One lane of those named: the lowest, as hardware does; PTX leaves it open."""
    to, members = at.operands
    if (wait := meeting(at, members, lanes, active)) is not None:
        return wait
    here = active.mask.reshape(-1, 32)
    leader = here.argmax(axis=1)
    assert isinstance(to, Vector)
    lanes.write(to.elements[0], np.repeat(leader.astype(np.uint32), 32), active)
    lanes.write(to.elements[1], (np.arange(32) == leader[:, None]).ravel(), active)
    return None
