"""Data movement: mov, loads and stores, atomics, matrices of shared memory (PTX ISA, 9.7.9, 9.7.13, 9.7.14)."""

from __future__ import annotations

import numpy as np

from emulator import types
from emulator.access import (
    addresses,
    count_of,
    granules,
    is_strong,
    load,
    locations,
    operand_number,
    scatter,
    shared,
    space_of,
    store,
    store_shared,
    values_of,
)
from emulator.clocks import Clock
from emulator.errors import Fault
from emulator.memory import RANK_SHIFT, SHARED, span
from emulator.parser import Address, Instruction, Register, Vector
from emulator.registers import Active, Lanes
from emulator.table import executes


@executes("mov", section="9.7.9.3")
def _mov(at: Instruction, lanes: Lanes, active: Active) -> None:
    """Of a vector the elements come from the lowest bits on.

    An element that no instruction writes stands for bits that the compiler knows nobody will look at; they are ones, a
    NaN, and the others make the result defined or not.
    """
    to, source = at.operands
    if isinstance(source, Vector):
        part = 8 * types.width(at.kind) // len(source.elements)
        total = np.zeros(lanes.count, np.uint64)
        filled = [e for e in source.elements if not isinstance(e, Register) or e.name in lanes.kernel.written]
        for k, element in enumerate(source.elements):
            bits = lanes.bits(element, f"b{part}") if element in filled or not filled else np.uint64((1 << part) - 1)
            total |= bits.astype(np.uint64) << np.uint64(k * part)
        lanes.write(to, total, active, lanes.undefined(filled or source.elements))
    elif isinstance(to, Vector):
        part = 8 * types.width(at.kind) // len(to.elements)
        bits = lanes.bits(source, at.kind).astype(np.uint64)
        undefined = lanes.undefined([source])
        for k, element in enumerate(to.elements):
            piece = bits >> np.uint64(k * part) & np.uint64((1 << part) - 1)
            lanes.write(element, piece, active, undefined)
    else:
        _move(to, source, at.kind, lanes, active)


def _move(to: object, source: object, kind: str, lanes: Lanes, active: Active) -> None:
    """One register to another: its state with wgmma goes along, since the compiler will make both one register."""
    assert isinstance(to, Register)
    held = isinstance(source, Register) and source.name in lanes.registers
    if held and active.full and source.name in lanes.flight:
        lanes.registers[to.name], lanes.flight[to.name] = lanes.registers[source.name], lanes.flight[source.name]
        lanes.defined.pop(to.name, None)
        return
    clean = held and source.name not in lanes.touched
    bits = lanes.bits(source, kind)
    lanes.write(to, bits, active, lanes.undefined([source]) if lanes.defined else None)
    if clean:
        lanes.touched -= {to.name, source.name}


@executes("ldu", section="9.7.9.10")
@executes("ld", section="9.7.9.8")
def _ld(at: Instruction, lanes: Lanes, active: Active) -> None:
    kind, count = at.kind, count_of(at)
    size = types.width(kind) * count
    to, address, *_ = at.operands
    targets = to.elements if isinstance(to, Vector) else (to,)
    if space_of(at).startswith("param") and isinstance(address, Address) and isinstance(address.base, str):
        offset, length = lanes.kernel.parameters[address.base]
        if address.offset + size > length:
            raise Fault(f"reads past the parameter's {length} bytes")
        first = offset + address.offset
        raw = np.broadcast_to(lanes.unit.parameters[first : first + size], (lanes.count, size))
        undefined = None
    else:
        where = addresses(address, lanes, active)
        loaded, valid = load(at, lanes, active, where, size)
        raw = scatter(lanes, active, loaded)
        undefined = None if valid.all() else scatter(lanes, active, ~valid)
        if is_strong(at):
            _acquire(at, lanes, active, where)
            lanes.yielded = True
    for k, target in enumerate(targets):
        part = slice(k * types.width(kind), (k + 1) * types.width(kind))
        number = np.ascontiguousarray(raw[:, part]).view(
            types.ARITHMETIC[kind] if kind[0] == "s" else types.STORAGE[kind]
        )
        assert isinstance(target, Register)
        if target.name != "_":
            bits = number[:, 0].astype(types.STORAGE[lanes.kernel.type_of(target.name)])
            lanes.write(target, bits, active, None if undefined is None else undefined[:, part].any(axis=1))


@executes("st", section="9.7.9.11")
def _st(at: Instruction, lanes: Lanes, active: Active) -> None:
    address, value, *_ = at.operands
    sources = list(value.elements) if isinstance(value, Vector) else [value]
    values = values_of(lanes, sources, at.kind, active)
    where = addresses(address, lanes, active)
    if is_strong(at):
        _release(at, lanes, active, where)
    store(at, lanes, active, where, values)


# -- atomics (9.7.13) --------------------------------------------------------------------------------------------------

ATOMIC = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}


@executes("atom", section="9.7.13.5")
def _atom(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, *rest = at.operands
    old = _atomic(at, lanes, active, rest)
    assert isinstance(to, Register)
    lanes.write(to, scatter(lanes, active, old), active)


@executes("red", section="9.7.13.6")
def _red(at: Instruction, lanes: Lanes, active: Active) -> None:
    _atomic(at, lanes, active, list(at.operands))


def _atomic(at: Instruction, lanes: Lanes, active: Active, operands: list) -> np.ndarray:
    """One lane after another, in an order that the seed shuffles; the values before, as bits (A,)."""
    address, *given = operands
    where = addresses(address, lanes, active)
    _release(at, lanes, active, where)
    size = types.width(at.kind)
    numbers = [operand_number(g, lanes, active, at.kind) for g in given[:2]]
    before = np.zeros(len(where), types.STORAGE[at.kind])
    ids = np.flatnonzero(active.mask)
    for k in lanes.unit.rng.permutation(len(where)):
        one = np.zeros(lanes.count, bool)
        one[ids[k]] = True
        alone = Active(one, False)
        raw, valid = load(at, lanes, alone, where[k : k + 1], size)
        if not valid.all():
            raise Fault("uninitialised shared memory takes part in an atomic operation", int(k))
        bits = np.ascontiguousarray(raw).view(types.STORAGE[at.kind])[:, 0]
        new = _updated(at, types.from_bits(bits, at.kind), [n[k : k + 1] for n in numbers])
        before[k] = bits[0]
        stored = np.ascontiguousarray(types.to_bits(new, at.kind).astype(types.STORAGE[at.kind]))
        store(at, lanes, alone, where[k : k + 1], stored[:, None].view(np.uint8).reshape(1, size))
    _acquire(at, lanes, active, where)
    lanes.yielded = True
    return before


def _updated(at: Instruction, old: np.ndarray, given: list[np.ndarray]) -> np.ndarray:
    if "cas" in at.modifiers:
        return np.where(old == given[0], given[1], old)
    (how,) = (ATOMIC[m] for m in at.modifiers if m in ATOMIC)
    return np.asarray(how(old, given[0]))


def _release(at: Instruction, lanes: Lanes, active: Active, where: np.ndarray) -> None:
    """What the threads know, or knew at their last fence, travels with the value that they write."""
    unit = lanes.unit
    if unit.clocks is None:
        return
    releases = any(m in ("release", "acq_rel") for m in at.modifiers)
    clock = unit.clocks.release(lanes.all_of(active)) if releases else None
    for thread, place in zip(lanes.all_of(active), locations(at, lanes, active, where), strict=True):
        carried = clock or unit.state.get(("fenced", int(thread)))
        if isinstance(carried, Clock):
            held = unit.state.setdefault(("flag", *place), Clock())
            assert isinstance(held, Clock)
            held.join(carried)


def _acquire(at: Instruction, lanes: Lanes, active: Active, where: np.ndarray) -> None:
    """The threads learn what came with the value, or will at their next fence."""
    unit = lanes.unit
    if unit.clocks is None:
        return
    acquires = any(m in ("acquire", "acq_rel") for m in at.modifiers)
    for thread, place in zip(lanes.all_of(active), locations(at, lanes, active, where), strict=True):
        held = unit.state.get(("flag", *place))
        if isinstance(held, Clock) and acquires:
            unit.clocks.acquire(np.array([thread]), held)
        elif isinstance(held, Clock):
            collected = unit.state.setdefault(("collected", int(thread)), Clock())
            assert isinstance(collected, Clock)
            collected.join(held)


# -- matrices in shared memory (9.7.14.5.15 ldmatrix, .16 stmatrix, .17 movmatrix) -------------------------------------

MATRICES = {"x1": 1, "x2": 2, "x4": 4}


def _matrix_rows(at: Instruction, address: object, lanes: Lanes, active: Active) -> tuple[np.ndarray, np.ndarray, int]:
    """Indices (W * 8 * count,) of rows of 16 bytes, the threads that name them, and the number of matrices."""
    if "b16" not in at.modifiers or "m8n8" not in at.modifiers:
        raise Fault("only matrices of 8x8 elements of 16 bits are known")
    count = next(MATRICES[m] for m in at.modifiers if m in MATRICES)
    naming = np.zeros((lanes.count // 32, 32), bool)
    naming[:, : 8 * count] = True
    ids = np.flatnonzero(naming.ravel() & active.mask)
    where = addresses(address, lanes, Active(naming.ravel() & active.mask, False))
    if space_of(at) == "generic":
        where = where - SHARED
    return shared(lanes, ids, where, 16, False), lanes.threads[ids], count


def _elements(trans: bool) -> np.ndarray:
    """(32, 2) of 64 row-major elements of a matrix, those that a lane holds: two of its row, or of its column."""
    lane, half = np.arange(32)[:, None], np.arange(2)
    row, column = lane // 4, 2 * (lane % 4) + half
    return column * 8 + row if trans else row * 8 + column


@executes("ldmatrix", section="9.7.14.5.15", whole=32)
def _ldmatrix(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, address = at.operands
    rows, threads, count = _matrix_rows(at, address, lanes, active)
    unit = lanes.unit
    if unit.shadow is not None:
        unit.shadow.load(granules(lanes, rows, 16), threads)
    bytes_at = span(rows, 16)
    chosen = _elements("trans" in at.modifiers)
    pairs = unit.shared.data[bytes_at].view(np.uint16).reshape(-1, count, 64)[:, :, chosen].astype(np.uint32)
    words = pairs[..., 0] | pairs[..., 1] << np.uint32(16)  # (W, count, 32), of the active warps
    valid, lost = unit.shared.valid[bytes_at], None
    if not valid.all():
        lost = ~valid.reshape(-1, count, 64, 2).all(axis=3)[:, :, chosen].all(axis=3)
    for k, target in enumerate(to.elements if isinstance(to, Vector) else (to,)):
        undefined = None if lost is None else scatter(lanes, active, lost[:, k].ravel())
        lanes.write(target, scatter(lanes, active, words[:, k].ravel()), active, undefined)


@executes("stmatrix", section="9.7.14.5.16", whole=32)
def _stmatrix(at: Instruction, lanes: Lanes, active: Active) -> None:
    address, source = at.operands
    rows, threads, count = _matrix_rows(at, address, lanes, active)
    sources = list(source.elements) if isinstance(source, Vector) else [source]
    lanes.need(sources, active, "the stored value")
    warps = active.mask[::32]
    values = np.zeros((int(warps.sum()), count, 64), np.uint16)
    chosen = _elements("trans" in at.modifiers)
    for k, register in enumerate(sources):
        words = np.broadcast_to(lanes.bits(register, "b32"), lanes.count).reshape(-1, 32)[warps]
        values[:, k, chosen[:, 0]] = words & np.uint32(0xFFFF)
        values[:, k, chosen[:, 1]] = words >> np.uint32(16)
    store_shared(lanes, rows, values.view(np.uint8).reshape(len(rows), 16), threads, False)


@executes("movmatrix", section="9.7.14.5.17", whole=32)
def _movmatrix(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, source = at.operands
    words = lanes.bits(source, "b32").reshape(-1, 32)
    matrix = np.zeros((len(words), 64), np.uint32)
    plain, turned = _elements(False), _elements(True)
    matrix[:, plain[:, 0]], matrix[:, plain[:, 1]] = words & np.uint32(0xFFFF), words >> np.uint32(16)
    out = matrix[:, turned[:, 0]] | matrix[:, turned[:, 1]] << np.uint32(16)
    undefined = lanes.undefined([source])
    if undefined is not None:
        undefined = np.repeat(undefined.reshape(-1, 32).any(axis=1), 32)
    lanes.write(to, out.ravel(), active, undefined)


# -- addresses of a cluster (9.7.9.23, 9.7.9.24), hints ----------------------------------------------------------------


@executes("mapa", section="9.7.9.23")
def _mapa(at: Instruction, lanes: Lanes, active: Active) -> None:
    """The address of the same variable in the block of a rank."""
    to, source, rank = at.operands
    if isinstance(source, Address):
        raise Fault("mapa of a variable's name is not known")
    own = lanes.number(source, at.kind).astype(np.int64)
    ranks = lanes.number(rank, "u32").astype(np.int64)
    size = len(lanes.unit.shared.gone)
    if (np.broadcast_to(ranks, lanes.count)[active.mask] >= size).any():
        raise Fault(f"rank {int(ranks.max())} in a cluster of {size} blocks")
    base = 0 if any(m.startswith("shared") for m in at.modifiers) else SHARED
    inside = (own - base) & ((1 << RANK_SHIFT) - 1)
    lanes.write(to, base + inside + (ranks + 1 << RANK_SHIFT), active, lanes.undefined([source, rank]))


@executes("getctarank", section="9.7.9.24")
def _getctarank(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, source = at.operands
    ranks = (lanes.number(source, at.kind).astype(np.int64) & 0xFFFFFFFF) >> RANK_SHIFT
    lanes.write(to, np.where(ranks > 0, ranks - 1, lanes.block), active, lanes.undefined([source]))


@executes(
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "nanosleep",
    "griddepcontrol",
    "pmevent",
    section="9.7.9, 9.7.19",
)
@executes("cp.async.bulk.prefetch", section="9.7.9.25.4.3")
def _hint(at: Instruction, lanes: Lanes, active: Active) -> None:
    """Changes nothing that can be seen here."""


@executes("createpolicy", section="9.7.9.18")
def _createpolicy(at: Instruction, lanes: Lanes, active: Active) -> None:
    lanes.write(at.operands[0], np.zeros(lanes.count, np.uint64), active)


@executes("trap", "brkpt", section="9.7.19")
def _trap(at: Instruction, lanes: Lanes, active: Active) -> None:
    raise Fault("traps")
