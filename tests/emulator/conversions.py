"""cvt and cvta (PTX ISA, 9.7.9.21 and 9.7.9.20)."""

from __future__ import annotations

import numpy as np

from emulator import types
from emulator.errors import Fault
from emulator.memory import FIRST, LOCAL, PARAMETERS, SHARED
from emulator.parser import Instruction
from emulator.registers import Active, Lanes
from emulator.table import executes

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
WINDOWS = {"shared": SHARED, "shared:cta": SHARED, "shared:cluster": SHARED, "local": LOCAL, "param": PARAMETERS}


@executes("cvt", section="9.7.9.21")
def _cvt(at: Instruction, lanes: Lanes, active: Active) -> None:
    """Integer to integer wraps unless ``.sat``, float to integer rounds as told and saturates."""
    to_kind, from_kind = at.modifiers[-2:]
    to, *sources = at.operands
    undefined = lanes.undefined(sources)
    values = [lanes.number(source, from_kind) for source in sources]
    if "ftz" in at.modifiers:
        values = [types.flushed(v) if v.dtype == np.float32 else v for v in values]
    if to_kind in types.PACKED:  # of two operands the second is the low half
        halves = [_converted(at, v, types.PACKED[to_kind], from_kind) for v in reversed(values)]
        bits = types.to_result(np.stack(np.broadcast_arrays(*halves), axis=-1), to_kind)
    else:
        value = _converted(at, values[0], to_kind, from_kind)
        bits = types.to_result(value, to_kind)
        if to_kind[0] == "s":  # a wider register takes the sign along
            width = np.dtype(types.STORAGE[lanes.kernel.type_of(to.name)]).itemsize  # type: ignore[union-attr]
            bits = bits.view(types.ARITHMETIC[to_kind]).astype(f"i{width}").view(f"u{width}")
    lanes.write(to, bits, active, undefined)


def _converted(at: Instruction, value: np.ndarray, to: str, source: str) -> np.ndarray:
    if to in types.FLOATS:
        return _to_float(at, value, to)
    limits = np.iinfo(types.ARITHMETIC[to])
    if source in types.FLOATS:
        (how,) = (TO_INTEGER[m] for m in at.modifiers if m in TO_INTEGER)
        # NaN becomes 0, but where 64 bits take part only the top bit.
        nan = 0 if source != "f64" and to[1:] != "64" else -(2.0**63) if limits.min else 2.0**63
        if source == "f64" and to[1:] != "64":
            nan = float(limits.min) if limits.min else float(limits.max // 2 + 1)
        whole = np.nan_to_num(how(value.astype(np.float64)), nan=nan, posinf=np.inf, neginf=-np.inf)
        # The largest 64-bit integers are no float64: clip below them and put them in by hand.
        inside = np.clip(whole, float(limits.min), np.nextafter(float(limits.max) + 1, 0))
        return np.where(whole >= float(limits.max), limits.max, inside.astype(types.ARITHMETIC[to]))
    if "sat" in at.modifiers:
        return np.clip(value.astype(object), limits.min, limits.max).astype(types.ARITHMETIC[to])
    return value.astype(types.ARITHMETIC[to])


def _to_float(at: Instruction, value: np.ndarray, to: str) -> np.ndarray:
    modifiers = at.modifiers
    if whole := [TO_INTEGER[m] for m in modifiers if m in TO_INTEGER]:
        value = whole[0](value)
    if to == "tf32":
        value = _tf32(value, modifiers)
    elif value.dtype.kind in "iu" and value.itemsize == 8 and to != "f64":
        value = types.odd_sum(
            (value & ~np.array(0xFFF, value.dtype)).astype(np.float64),
            (value & np.array(0xFFF, value.dtype)).astype(np.float64),
        )
    elif value.dtype.kind in "iu":
        value = value.astype(np.float64)
    for how in ("rz", "rm", "rp"):
        if how in modifiers and to != "tf32":
            value = types.directed(value.astype(np.float64), to, how)
    if "relu" in modifiers:
        value = np.where(np.isnan(value), value, np.maximum(value, 0))
    if "satfinite" in modifiers and to in ("f16", "bf16"):
        largest = 65504.0 if to == "f16" else float(np.uint32(0x7F7F0000).view(np.float32))
        value = np.clip(value, -largest, largest)
    if "sat" in modifiers:
        value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
    return value


def _tf32(value: np.ndarray, modifiers: tuple[str, ...]) -> np.ndarray:
    """Ten bits of mantissa: to nearest, ties away from zero (.rna) or to even (.rn), or cut (.rz)."""
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    if "rna" in modifiers:
        bits = bits + np.uint64(0x1000)
    elif "rn" in modifiers:
        bits = bits + np.uint64(0xFFF) + (bits >> np.uint64(13) & np.uint64(1))
    cut = (bits & np.uint64(0xFFFFE000)).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(value), cut, value)


@executes("cvta", section="9.7.9.20")
def _cvta(at: Instruction, lanes: Lanes, active: Active) -> None:
    """To a generic address, or back (``.to``); global addresses are generic ones."""
    to, source = at.operands
    base = next((WINDOWS[m] for m in at.modifiers if m in WINDOWS), 0)
    if "const" in at.modifiers:
        base = 0
    bits = lanes.bits(source, "u64").astype(np.uint64)
    offset = np.uint64(base)
    lanes.write(to, bits - offset if "to" in at.modifiers else bits + offset, active, lanes.undefined([source]))


@executes("isspacep", section="9.7.9.19")
def _isspacep(at: Instruction, lanes: Lanes, active: Active) -> None:
    to, source = at.operands
    addresses = lanes.number(source, "s64")
    (space,) = at.modifiers
    if space == "global":
        holds = addresses >= FIRST
    elif space in WINDOWS:
        holds = (addresses >= WINDOWS[space]) & (addresses < WINDOWS[space] + (1 << 32))
    else:
        raise Fault(f"the state space {space} is not known")
    lanes.write(to, holds, active, lanes.undefined([source]))
