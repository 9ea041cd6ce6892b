"""How lanes reach memory: addresses to state spaces, with the race shadow and what is initialised kept on the way."""

from __future__ import annotations

import numpy as np

from emulator.errors import Fault
from emulator.memory import FIRST, LOCAL, PARAMETERS, SHARED, agree, aligned, span
from emulator.parser import Address, Immediate, Instruction, Kernel, Register
from emulator.registers import Active, Lanes
from emulator.types import STORAGE, from_bits, width

SPACES = ("global", "shared", "shared:cta", "shared:cluster", "local", "const", "param", "param:entry")
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
ACCESSES = ("ld", "st", "atom", "red")


def space_of(at: Instruction) -> str:
    """ "generic" where the instruction does not say."""
    return next((m for m in at.modifiers if m in SPACES), "generic")


def count_of(at: Instruction) -> int:
    """Elements of a vector access."""
    return next((VECTORS[m] for m in at.modifiers if m in VECTORS), 1)


def granule(kernel: Kernel) -> int:
    """The bytes that every access to shared memory is a multiple of, at most 16."""
    least = 16
    for at in kernel.instructions:
        if at.opcode in ACCESSES and space_of(at) in ("generic", "shared", "shared:cta", "shared:cluster"):
            least = min(least, width(at.kind) * count_of(at) if at.kind in STORAGE else 16)
        elif at.name.startswith("cp.async.c") or at.opcode == "mbarrier":
            least = min(least, 4 if at.name.startswith("cp.async.ca") else 8)
        elif at.name.startswith("st.async"):
            least = min(least, 4)
    return least


def addresses(address: object, lanes: Lanes, active: Active) -> np.ndarray:
    """(A,) int64, of the active lanes."""
    assert isinstance(address, Address)
    count = int(active.mask.sum())
    if address.base is None:
        return np.full(count, address.offset, np.int64)
    if not isinstance(address.base, Register):
        raise Fault(f"the variable {address.base} is not known")
    lanes.need([address.base], active, "the address")
    return lanes.number(address.base, "s64")[active.mask] + address.offset


def spaces(at: Instruction, where: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(state space, which of the active lanes (A,), their addresses in it), of generic addresses by windows."""
    named = space_of(at)
    if named != "generic":
        space = named.split(":")[0] if named in ("shared:cta", "param:entry") else named
        return [("global" if space == "const" else space, np.ones(len(where), bool), where)]
    found = []
    for space, low, high in (
        ("shared:cluster", SHARED, LOCAL),
        ("local", LOCAL, PARAMETERS),
        ("param", PARAMETERS, FIRST >> 1),
    ):
        chosen = (where >= low) & (where < high)
        if chosen.any():
            found.append((space, chosen, where - low))
    rest = ~np.logical_or.reduce([c for _, c, _ in found]) if found else np.ones(len(where), bool)
    if rest.any():
        found.append(("global", rest, where))
    return found


def load(at: Instruction, lanes: Lanes, active: Active, where: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, size) bytes of the active lanes, and which of them have been written before."""
    raw, valid = np.zeros((len(where), size), np.uint8), np.ones((len(where), size), bool)
    ids = np.flatnonzero(active.mask)
    for space, chosen, inside in spaces(at, where):
        if space == "global":
            blocks = None if is_strong(at) else lanes.grid_block[ids[chosen]]
            raw[chosen] = lanes.unit.memory.load(inside[chosen], size, blocks)
        elif space == "param":
            if ((inside < 0) | (inside + size > len(lanes.unit.parameters)))[chosen].any():
                raise Fault(f"reads past the kernel's {len(lanes.unit.parameters)} bytes of parameters")
            raw[chosen] = lanes.unit.parameters[span(inside[chosen], size)]
        elif space == "local":
            cells = ids[chosen][:, None], span(inside[chosen], size)
            raw[chosen] = _local(lanes, inside[chosen], size)[cells]
            valid[chosen] = lanes.local_valid[cells]
        else:
            found = shared(lanes, ids[chosen], inside[chosen], size, space == "shared:cluster")
            if lanes.unit.shadow is not None:
                lanes.unit.shadow.load(granules(lanes, found, size), lanes.threads[ids[chosen]], is_strong(at))
            raw[chosen] = lanes.unit.shared.data[span(found, size)]
            valid[chosen] = lanes.unit.shared.valid[span(found, size)]
    return raw, valid


def locations(at: Instruction, lanes: Lanes, active: Active, where: np.ndarray) -> list[tuple[str, int]]:
    """Where the addresses of the active lanes lie, the same for one place however it was reached."""
    found: list[tuple[str, int]] = [("", 0)] * len(where)
    ids = np.flatnonzero(active.mask)
    for space, chosen, inside in spaces(at, where):
        places = inside[chosen]
        if space.startswith("shared"):
            places = shared(lanes, ids[chosen], places, 1, space == "shared:cluster")
        for k, place in zip(np.flatnonzero(chosen), places, strict=True):
            found[k] = space.split(":")[0], int(place)
    return found


def store(at: Instruction, lanes: Lanes, active: Active, where: np.ndarray, values: np.ndarray) -> None:
    """(A, size) bytes of the active lanes."""
    size = values.shape[1]
    ids = np.flatnonzero(active.mask)
    for space, chosen, inside in spaces(at, where):
        if space == "global":
            blocks = None if is_strong(at) else lanes.grid_block[ids[chosen]]
            lanes.unit.memory.store(inside[chosen], values[chosen], blocks)
        elif space == "local":
            cells = ids[chosen][:, None], span(inside[chosen], size)
            _local(lanes, inside[chosen], size)[cells] = values[chosen]
            lanes.local_valid[cells] = True
        elif space == "param":
            raise Fault("writes to a parameter")
        else:
            found = shared(lanes, ids[chosen], inside[chosen], size, space == "shared:cluster")
            store_shared(lanes, found, values[chosen], lanes.threads[ids[chosen]], is_strong(at))


def shared(
    lanes: Lanes, ids: np.ndarray, where: np.ndarray, size: int, cluster: bool, opaque: bool = False
) -> np.ndarray:
    """(A,) indices into the unit's shared memory."""
    return lanes.unit.shared.find(where, size, lanes.block[ids], cluster, opaque)


def store_shared(lanes: Lanes, found: np.ndarray, values: np.ndarray, threads: np.ndarray, strong: bool) -> None:
    """Bytes (A, size) at indices (A,) by threads (A,)."""
    size, unit = values.shape[1], lanes.unit
    at = span(found, size)
    agree(found, values, "shared memory")
    if unit.shadow is not None:
        cells = granules(lanes, found, size)
        same = unit.shared.valid[at] & (unit.shared.data[at] == values)
        same = same.reshape(len(found), cells.shape[1], -1).all(axis=2)
        unit.shadow.store(cells, threads, same, strong=strong)
    unit.shared.data[at], unit.shared.valid[at] = values, True


def granules(lanes: Lanes, found: np.ndarray, size: int) -> np.ndarray:
    """(A, size / width) the shadow's granules of accesses at indices (A,)."""
    assert lanes.unit.shadow is not None
    step = lanes.unit.shadow.width
    return (found // step)[:, None] + np.arange(max(1, size // step))


def is_strong(at: Instruction) -> bool:
    """Accesses that may meet others without a race: volatile, relaxed, acquire, release and atomic ones (8.2.1)."""
    return at.opcode in ("atom", "red") or any(
        m in ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio") for m in at.modifiers
    )


def values_of(lanes: Lanes, sources: list, kind: str, active: Active) -> np.ndarray:
    """(A, bytes) what the active lanes' registers hold, one after another."""
    lanes.need(sources, active, "the stored value")
    parts = []
    for source in sources:
        bits = np.broadcast_to(lanes.bits(source, kind), lanes.count).astype(STORAGE[kind])[active.mask]
        parts.append(np.ascontiguousarray(bits)[:, None].view(np.uint8).reshape(len(bits), -1))
    return np.concatenate(parts, axis=1)


def scatter(lanes: Lanes, active: Active, values: np.ndarray) -> np.ndarray:
    """(L, ...) of the active lanes' (A, ...)."""
    if len(values) == lanes.count:
        return values
    full = np.zeros((lanes.count, *values.shape[1:]), values.dtype)
    full[active.mask] = values
    return full


def _local(lanes: Lanes, where: np.ndarray, size: int) -> np.ndarray:
    held = lanes.locals
    aligned(where, size, lambda address: f"local byte {address}")
    if held is None or ((where < 0) | (where + size > held.shape[1])).any():
        raise Fault(f"local address is out of bounds of {0 if held is None else held.shape[1]} bytes")
    return held


def operand_number(operand: object, lanes: Lanes, active: Active, kind: str) -> np.ndarray:
    """(A,) a number operand of the active lanes."""
    assert isinstance(operand, (Register, Immediate))
    lanes.need([operand], active, "an operand")
    return from_bits(np.broadcast_to(lanes.bits(operand, kind), lanes.count)[active.mask], kind)
