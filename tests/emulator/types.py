"""PTX's fundamental types over NumPy (PTX ISA, 5.2), and rounding to them."""

from __future__ import annotations

import numpy as np

# How a register of a type is held.
STORAGE = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"uint{bits}").type for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": np.uint16,
    "bf16": np.uint16,
    "f32": np.uint32,
    "tf32": np.uint32,
    "u16x2": np.uint32,
    "s16x2": np.uint32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
    "f64": np.uint64,
}
# How arithmetic of a type sees it; bfloat16 is computed in float32.
ARITHMETIC = {
    **STORAGE,
    **{f"s{bits}": np.dtype(f"int{bits}").type for bits in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "tf32": np.float32,
    "f64": np.float64,
}
FLOATS = ("f16", "bf16", "tf32", "f32", "f64")
PACKED = {"u16x2": "u16", "s16x2": "s16", "f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}


def width(kind: str) -> int:
    """Bytes."""
    return int(np.dtype(STORAGE[kind]).itemsize)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """Register bits, perhaps wider than the type, as numbers; of packed types (..., 2), the low half first."""
    if kind == "pred":
        return bits
    if kind in PACKED:
        words, shift = bits.astype(np.uint64), 8 * width(PACKED[kind])
        halves = np.stack([words & np.uint64((1 << shift) - 1), words >> np.uint64(shift)], axis=-1)
        return from_bits(halves, PACKED[kind])
    bits = bits.astype(STORAGE[kind], copy=False)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(ARITHMETIC[kind])


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as the bits of a register of that type, rounded to nearest even."""
    if kind == "pred":
        return values.astype(np.bool_, copy=False)
    if kind in PACKED:
        return _packed(to_bits(values, PACKED[kind]), kind)
    if kind == "bf16":
        return bfloat16_bits(values)
    return np.ascontiguousarray(values.astype(ARITHMETIC[kind], copy=False)).view(STORAGE[kind])


def _packed(halves: np.ndarray, kind: str) -> np.ndarray:
    """(...) of the bits of halves (..., 2), the low one first."""
    wide, shift = halves.astype(np.uint64), np.uint64(8 * width(PACKED[kind]))
    return (wide[..., 0] | wide[..., 1] << shift).astype(STORAGE[kind])


NANS = {"f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x7FFFFFFF, "f32": 0x7FFFFFFF}


def to_result(values: np.ndarray, kind: str) -> np.ndarray:
    """As ``to_bits``, of a computation: NaN becomes the canonical one."""
    bits = to_bits(values, kind)
    if kind in PACKED:
        return _packed(np.stack([to_result(values[..., k], PACKED[kind]) for k in (0, 1)], axis=-1), kind)
    if kind in NANS and (nan := np.isnan(values)).any():
        return np.where(nan, bits.dtype.type(NANS[kind]), bits)
    return bits


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 or float64 to the bits of bfloat16, to nearest even; NaN becomes 0x7fff, as on the hardware."""
    bits = _to_odd(values).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """To float32, inexact results with an odd last bit: rounding those once more equals rounding once."""
    near = np.asarray(values).astype(np.float32)
    if values.dtype != np.float64:
        return near
    error = values - near.astype(np.float64)
    even = (near.view(np.uint32) & np.uint32(1)) == 0
    moved = np.nextafter(near, np.where(error > 0, np.float32(np.inf), np.float32(-np.inf)))
    return np.where((error != 0) & even & np.isfinite(near), moved, near)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, inexact results with an odd last bit, by Knuth's error-free sum."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = (np.ascontiguousarray(total).view(np.uint64) & np.uint64(1)) == 0
    fix = (error != 0) & even & np.isfinite(total)
    if not fix.any():
        return total
    return np.where(fix, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def directed(values: np.ndarray, kind: str, how: str) -> np.ndarray:
    """float64 rounded to a narrower type towards zero (rz), down (rm) or up (rp), as numbers of that type."""
    near = from_bits(to_bits(values, kind), kind)
    wide = near.astype(np.float64)
    down = (wide > values) & ((how == "rm") | ((how == "rz") & (values > 0)))
    up = (wide < values) & ((how == "rp") | ((how == "rz") & (values < 0)))
    if not (down | up).any():
        return near
    bits = to_bits(near, kind).astype(np.int64)
    sign = 1 << (8 * width(kind) - 1)
    ordered = np.where(bits >= sign, sign - bits, bits) + up.astype(np.int64) - down.astype(np.int64)
    fixed = np.where(ordered < 0, sign - ordered, ordered)
    fixed = np.where((ordered == 0) & np.signbit(values), sign, fixed)
    return from_bits(fixed.astype(STORAGE[kind]), kind)


def flushed(values: np.ndarray) -> np.ndarray:
    """float32's subnormal numbers as zeros of their sign (.ftz)."""
    small = np.abs(values) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values
