"""Instructions, made ready to run: operands found, types chosen, constants converted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from emulator import types
from emulator.arithmetic import opposite
from emulator.errors import Fault
from emulator.parser import Immediate, Instruction, Kernel, Operand, Register, Vector
from emulator.registers import Active, Lanes, Wait, constant
from emulator.table import Opcode

Run = Callable[[Lanes, Active], Wait | None]
Read = Callable[[Lanes], np.ndarray]
Write = Callable[[Lanes, np.ndarray, Active, np.ndarray | None], None]


def prepared(at: Instruction, entry: Opcode | None, kernel: Kernel) -> Run:
    """What runs an instruction for the active lanes."""
    if entry is None:
        return _refuse
    if entry.execute is None:
        return _computing(at, entry, kernel)
    execute, whole = entry.execute, entry.whole
    if not whole:
        return lambda lanes, active: execute(at, lanes, active)
    return lambda lanes, active: _companions(lanes, active, whole) or execute(at, lanes, active)


def _refuse(lanes: Lanes, active: Active) -> None:
    raise Fault("this opcode is not known")


def _companions(lanes: Lanes, active: Active, size: int) -> Wait | None:
    """A wait for the other lanes of a warp (or warpgroup) that is here in part only; None where all are whole."""
    if active.full and not lanes.exited.any() and lanes.count % size == 0:
        return None
    what = "warp" if size == 32 else "warpgroup"
    if lanes.count % size:
        raise Fault(f"a block of {lanes.count} threads has no whole {what}s")
    exists = lanes.unit.exists[lanes.threads].reshape(-1, size)
    here = active.mask.reshape(-1, size)
    if (here.any(axis=1) & (lanes.exited.reshape(-1, size) & exists).any(axis=1)).any():
        raise Fault(f"lanes of the same {what} have exited")
    partial = here.any(axis=1) & (here != exists).any(axis=1)
    if not partial.any():
        return None
    parties = np.repeat(partial, size) & exists.ravel()
    wait = Wait(active.mask & parties, lambda: False, lambda: f"the other lanes of its {what}", again=True)
    wait.ready = lambda: bool((lanes.pcs[parties] == wait.pc).all())
    return wait


# -- what computes -----------------------------------------------------------------------------------------------------


def _kinds(at: Instruction, count: int) -> tuple[str, list[str]]:
    """The types of the result and of the operands."""
    kind = at.kind
    kinds = [kind] * count
    if at.opcode == "prmt":
        return "b32", ["b32"] * count
    if at.opcode == "selp":  # bits, whatever they mean
        kind = f"b{8 * types.width(kind)}"
        return kind, [kind, kind, "pred"]
    if at.opcode in ("shl", "shr", "bfe"):
        kinds[1:] = ["u32"] * (count - 1)
    elif at.opcode in ("bfi", "shf"):
        kinds[2:] = ["u32"] * (count - 2)
    elif at.opcode == "setp" and count == 3:
        kinds[2] = "pred"
    elif at.opcode == "slct":
        chosen = f"b{8 * types.width(at.modifiers[-2])}"
        return chosen, [chosen, chosen, kind]
    elif at.opcode == "set":
        return at.modifiers[-2], kinds
    if at.opcode in ("setp", "testp"):
        return "pred", kinds
    if at.opcode in ("popc", "clz", "bfind"):
        return "u32", kinds
    if "wide" in at.modifiers:
        wide = kind[0] + str(2 * int(kind[1:]))
        return wide, [*kinds[:2], *[wide] * (count - 2)]
    return kind, kinds


def _reader(operand: Operand, kind: str, kernel: Kernel) -> Read:
    """An operand's numbers: (L,), (L, 2) of packed types, without the first axis of an immediate."""
    if isinstance(operand, Immediate):
        number = types.from_bits(constant(operand.value, kind), kind)
        return lambda lanes: number
    simple = isinstance(operand, Register) and operand.name not in kernel.multiplied
    if not simple or kind in ("pred", "bf16") or kind in types.PACKED:
        return lambda lanes: lanes.number(operand, kind)
    assert isinstance(operand, Register)
    name, size, dtype = operand.name, types.width(kind), types.ARITHMETIC[kind]

    def read(lanes: Lanes) -> np.ndarray:
        held = lanes.registers.get(name)
        if held is None or lanes.flight:
            held = lanes.bits(operand, kind)
        return held.view(dtype) if held.itemsize == size else types.from_bits(held, kind)

    return read


def _writer(to: Operand, kind: str, exact: bool, kernel: Kernel) -> Write:
    """Stores a result's numbers; ``exact``: a NaN keeps its bits."""
    bits_of = types.to_bits if exact else types.to_result
    if not isinstance(to, Register) or to.name == "_" or kind in types.FLOATS or kind in types.PACKED or kind == "pred":
        return lambda lanes, values, active, undefined: lanes.write(to, bits_of(values, kind), active, undefined)
    name, storage = to.name, types.STORAGE[kernel.type_of(to.name)]
    size = np.dtype(storage).itemsize

    def write(lanes: Lanes, values: np.ndarray, active: Active, undefined: np.ndarray | None) -> None:
        if not active.full or values.itemsize != size or values.ndim == 0 or lanes.flight or undefined is not None:
            lanes.write(to, bits_of(values, kind), active, undefined)
            return
        lanes.registers[name] = values.view(storage)
        lanes.touched.add(name)
        if lanes.defined:
            lanes.defined.pop(name, None)

    return write


def _computing(at: Instruction, entry: Opcode, kernel: Kernel) -> Run:
    """What computes one result from numbers of one type, but for the operands that PTX gives another."""
    compute, modifiers = entry.compute, at.modifiers
    assert compute is not None
    to, *sources = at.operands
    out, kinds = _kinds(at, len(sources))
    readers = [_reader(s, k, kernel) for s, k in zip(sources, kinds, strict=True)]
    write = _writer(to, out, at.opcode in ("neg", "abs", "copysign"), kernel)
    ftz, chooses = "ftz" in modifiers, at.opcode == "selp"

    def run(lanes: Lanes, active: Active) -> None:
        numbers = [read(lanes) for read in readers]
        if ftz:
            numbers = [types.flushed(n) if n.dtype == np.float32 else n for n in numbers]
        result = compute(modifiers, *numbers)
        if ftz and result.dtype == np.float32:
            result = types.flushed(result)
        undefined = lanes.undefined(sources) if lanes.defined else None
        if chooses and undefined is not None:  # of what is chosen only
            undefined = _undefined_choice(lanes, sources, numbers[2])
        if isinstance(to, Vector):  # setp.p|q: of packed types one predicate of each half, else also the opposite
            both = result if result.ndim > 1 else np.stack([result, opposite(modifiers, *numbers)], axis=-1)
            for k, element in enumerate(to.elements):
                lanes.write(element, both[..., k], active, undefined)
        else:
            write(lanes, result, active, undefined)

    return run


def _undefined_choice(lanes: Lanes, sources: Sequence[Operand], p: np.ndarray) -> np.ndarray | None:
    """(L,) where a selection's predicate, or what it chooses, is undefined."""
    none = np.zeros(lanes.count, bool)
    first, second, by = (u if (u := lanes.undefined([s])) is not None else none for s in sources)
    result = np.where(p, first, second) | by
    return result if result.any() else None
