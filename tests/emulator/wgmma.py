"""wgmma: products of matrices in shared memory by a warpgroup, asynchronously (PTX ISA, 9.7.15).

Results are in the registers at once, and out of bounds until the group has been waited for. Operands in shared memory
are read through the async proxy until then.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from emulator.access import operand_number
from emulator.errors import Fault
from emulator.memory import SHARED_FIRST
from emulator.parser import Immediate, Instruction, Operand, Register, Vector
from emulator.registers import Active, Lanes
from emulator.table import executes
from emulator.tensorcore import accumulators, fragment_a, fragment_c, matrix, operand, write_accumulators
from emulator.tensormap import swizzled

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor -> bytes


def _group(lanes: Lanes) -> list[int]:
    """[the open group's number] of a warpgroup."""
    found = lanes.unit.state.setdefault(("wgmma", int(lanes.threads[0])), [1])
    assert isinstance(found, list)
    return found


def _agent(lanes: Lanes) -> int:
    assert lanes.unit.clocks is not None
    key = ("wgmma", int(lanes.threads[0]))
    return lanes.unit.clocks.agent(key, f"wgmma of {lanes.unit.name(int(lanes.threads[0]))} and its warpgroup", True)


@executes("wgmma.fence", section="9.7.15.7.1", whole=128)
def _fence(at: Instruction, lanes: Lanes, active: Active) -> None:
    lanes.touched.clear()
    lanes.fenced = True


@executes("wgmma.commit_group", section="9.7.15.7.2", whole=128)
def _commit(at: Instruction, lanes: Lanes, active: Active) -> None:
    _group(lanes)[0] += 1


@executes("wgmma.wait_group", section="9.7.15.7.3", whole=128)
def _wait(at: Instruction, lanes: Lanes, active: Active) -> None:
    (pending,) = at.operands
    assert isinstance(pending, Immediate) and lanes.unit.clocks is not None
    done = _group(lanes)[0] - 1 - int(pending.value)
    lanes.flight = {name: group for name, group in lanes.flight.items() if group > done}
    lanes.inputs &= set(lanes.flight)
    lanes.unit.clocks.learn(lanes.threads, _agent(lanes), done)


@executes("wgmma.mma_async", section="9.7.15.5.2", whole=128)
def _mma_async(at: Instruction, lanes: Lanes, active: Active) -> None:
    d, a, b, scale, negate_a, negate_b, *trans = at.operands
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", at.modifiers[3])
    to, kind, other = at.modifiers[4:7]
    if shape is None or kind != other or kind not in ("f16", "bf16", "tf32") or to not in ("f32", "f16"):
        raise Fault("this shape or type of wgmma is not known")
    columns, depth = int(shape[1]), int(shape[2])
    turned = [int(t.value) for t in trans if isinstance(t, Immediate)]
    turn_b = turned[-1] if turned else 0
    assert isinstance(d, Vector)
    _ready(lanes, d, a)
    flight, lanes.flight = lanes.flight, {}  # its own registers it may use
    if isinstance(a, Vector):
        quarters, lost = matrix(lanes, a, kind, (16, depth), fragment_a(len(a.elements), 1 if kind == "tf32" else 2))
        left, bad_left = quarters.reshape(64, depth), None if lost is None else lost.reshape(64, depth)
    else:
        left, bad_left = _from_shared(lanes, active, a, kind, (64, depth), turned[0] if turned else 0, "A")
    right, bad_right = _from_shared(lanes, active, b, kind, (columns, depth), turn_b, "B")
    sign = int(negate_a.value) * int(negate_b.value)  # type: ignore[union-attr]
    values, bad = _spread(sign * (left @ right.T)), None
    if bad_left is not None or bad_right is not None:
        rows = np.zeros(64, bool) if bad_left is None else bad_left.any(axis=1)
        bad = _spread(rows[:, None] | (np.zeros(columns, bool) if bad_right is None else bad_right.any(axis=1)))
    if _accumulates(lanes, active, scale):
        before, bad_before = accumulators(lanes, d, to)
        values = before + values
        if bad_before is not None:
            bad = bad_before if bad is None else bad | bad_before
    write_accumulators(lanes, d, to, values, bad, active)
    lanes.flight = flight
    _fly(lanes, d, a)


def _spread(product: np.ndarray) -> np.ndarray:
    """(E, 128) of (64, N): every warp holds sixteen rows, as mma's accumulators."""
    rows, across = fragment_c(product.shape[1])
    return product.reshape(4, 16, -1)[:, rows, across].reshape(128, -1).T


def _accumulates(lanes: Lanes, active: Active, scale: Operand) -> bool:
    if isinstance(scale, Immediate):
        return bool(scale.value)
    holds = operand_number(scale, lanes, active, "pred")
    if holds.any() != holds.all():
        raise Fault("scale-d differs between lanes")
    return bool(holds.all())


def _ready(lanes: Lanes, d: Vector, a: Operand) -> None:
    """
    Raises:
        Fault: A register was read or written since the last wgmma.fence, or is one of an earlier wgmma in flight.
    """
    inputs = a.elements if isinstance(a, Vector) else ()
    if "registers" in lanes.unit.unchecked:
        return
    names = [r.name for r in (*d.elements, *inputs) if isinstance(r, Register)]
    if not lanes.fenced:
        raise Fault("no wgmma.fence comes before the first wgmma")
    if late := [name for name in names if name in lanes.touched]:
        raise Fault(f"register {late[0]} was read or written after the last wgmma.fence")
    for register in inputs:
        assert isinstance(register, Register)
        if register.name in lanes.flight and register.name not in lanes.inputs:
            raise Fault(f"register {register.name}, an operand, is in flight as the result of an earlier wgmma")
    for register in d.elements:
        assert isinstance(register, Register)
        if register.name in lanes.inputs:
            raise Fault(f"register {register.name}, a result, is in flight as the operand of an earlier wgmma")


def _fly(lanes: Lanes, d: Vector, a: Operand) -> None:
    """Until its group has been waited for, nobody may touch the registers."""
    if "registers" in lanes.unit.unchecked:
        return
    group = _group(lanes)[0]
    inputs = {r.name for r in a.elements if isinstance(r, Register)} if isinstance(a, Vector) else set()
    results = {r.name for r in d.elements if isinstance(r, Register)}
    lanes.inputs |= inputs
    lanes.touched -= results | inputs
    lanes.flight |= dict.fromkeys(results | inputs, group)


@functools.cache
def offsets(shape: tuple[int, int], size: int, leading: int, stride: int, swizzle: int, turned: int) -> np.ndarray:
    """(M, K) bytes from the start to each element, before swizzling (9.7.15.5.1.2, canonical layouts).

    Elements of ``size`` bytes; a chunk is 16 bytes, a row of an atom ``swizzle`` bytes. Contiguous along K, or, turned,
    along M (N of operand B).
    """
    row, k = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    chunk = 16 // size
    if not turned:
        if swizzle:
            return row // 8 * stride + row % 8 * swizzle + k * size
        return row // 8 * stride + row % 8 * 16 + k // chunk * leading + k % chunk * size
    if swizzle:
        across = swizzle // size
        return row // across * leading + row % across * size + k // 8 * stride + k % 8 * swizzle
    return row // chunk * stride + row % chunk * size + k // 8 * leading + k % 8 * 16


def _from_shared(
    lanes: Lanes, active: Active, register: Operand, kind: str, shape: tuple[int, int], turned: int, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """(M, K) and where it is undefined (None: nowhere), by a descriptor (9.7.15.5.1.2.2)."""
    unit = lanes.unit
    descriptor = lanes.uniform(register, "u64", active, f"the descriptor of {name}")
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Fault(f"a base offset in the descriptor of {name} is not modelled")
    size = 4 if kind == "tf32" else 2
    if turned and size == 4:
        raise Fault("tf32 operands have to be contiguous along K")
    swizzle = SWIZZLES[descriptor >> 62 & 3]
    where = swizzled(start + offsets(shape, size, leading, stride, swizzle, turned), swizzle)
    chunks = np.unique(where & ~15)
    assert unit.shadow is not None
    try:
        found = unit.shared.find(chunks, 16, np.full(len(chunks), lanes.block[0]), False)
    except Fault as fault:
        raise Fault(f"operand {name}: {fault}") from None
    width = unit.shadow.width
    cells = np.unique((found[:, None] + np.arange(0, 16, width)) // width)
    unit.shadow.async_load(cells, lanes.threads, _agent(lanes), _group(lanes)[0])
    index = int(lanes.block[0]) * unit.shared.size + where - SHARED_FIRST
    raw = unit.shared.data[index[..., None] + np.arange(size)].view(np.uint32 if size == 4 else np.uint16)[..., 0]
    numbers = operand(raw.astype(np.uint32), kind)[..., 0]
    if unit.shared.valid[found[:, None] + np.arange(16)].all():
        return numbers, None
    return numbers, ~unit.shared.valid[index[..., None] + np.arange(size)].all(axis=2)
