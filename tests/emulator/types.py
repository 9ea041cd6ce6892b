"""PTX's fundamental types over NumPy (PTX ISA, 5.2.1)."""

from __future__ import annotations

import numpy as np

# How a register of a type is held.
STORAGE = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"uint{bits}").type for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": np.uint16,
    "bf16": np.uint16,
    "f32": np.uint32,
    "f64": np.uint64,
}
# How arithmetic of a type sees it; bfloat16 is computed in float32.
ARITHMETIC = {
    **STORAGE,
    **{f"s{bits}": np.dtype(f"int{bits}").type for bits in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def width(kind: str) -> int:
    """Bytes."""
    return int(np.dtype(STORAGE[kind]).itemsize)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """Register bits, perhaps wider than the type, as numbers."""
    if kind == "pred":
        return bits
    bits = bits.astype(STORAGE[kind], copy=False)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(ARITHMETIC[kind])


def to_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers as the bits of a register of that type."""
    if kind == "pred":
        return values.astype(np.bool_, copy=False)
    if kind == "bf16":
        return bfloat16_bits(values.astype(np.float32, copy=False))
    return np.ascontiguousarray(values.astype(ARITHMETIC[kind], copy=False)).view(STORAGE[kind])


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16: round to nearest, ties to even; NaN becomes 0x7fff, as on the hardware."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
