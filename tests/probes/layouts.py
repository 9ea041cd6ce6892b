"""What the probes' expectations share: number formats, poison, and which lane and register hold which matrix element.

The layouts are the figures of the PTX ISA (9.7.14 mma, 9.7.15 wgmma), restated as index arithmetic.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

POISON = 0xC7  # every byte of it: finite, large and negative in float16, bfloat16 and float32


def poisoned(shape: int | tuple[int, ...], dtype: type | np.dtype | str) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = POISON
    return array


# ---- Formats -------------------------------------------------------------------------------------------------------


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; finite float32 input."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def f16(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float16).view(np.uint16)


def tf32(values: np.ndarray) -> np.ndarray:
    """Bits of values that tf32 holds exactly."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0x1FFF).any()
    return bits


def packed(halves: np.ndarray) -> np.ndarray:
    """(..., 2) 16-bit elements as (...) words, the first one in the low half."""
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


# Mantissa bits after the point, least exponent of a normal number, greatest exponent.
F32, F16, BF16 = (23, -126, 127), (10, -14, 15), (7, -126, 127)


def rounded(value: Fraction, form: tuple[int, int, int], mode: str = "rn") -> float:
    """A rational number in a binary format: "rn" nearest even, "rz" to zero, "rm" down, "rp" up; overflow as IEEE has
    it. Exact, however close to the middle of two numbers the value lies. Zero comes out positive.
    """
    bits, least, greatest = form
    if value == 0:
        return 0.0
    sign, size = (-1 if value < 0 else 1), abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - bits)
    steps, rest = divmod(size, unit)
    outwards = {
        "rn": rest * 2 > unit or (rest * 2 == unit and steps % 2 == 1),
        "rz": False,
        "rm": sign < 0,
        "rp": sign > 0,
    }
    result = (steps + (rest > 0 and outwards[mode])) * unit
    largest = (2 - Fraction(2) ** -bits) * Fraction(2) ** greatest
    if result > largest:
        result = float("inf") if mode == "rn" or outwards[mode] else largest
    return sign * float(result)


# ---- Fragments: each returns the rows and columns, (lanes, registers[, 2 halves]) -----------------------------------


def _grid(threads: int, registers: int, halves: int) -> list[np.ndarray]:
    """Group (row in 8) g, thread in group t, warp w, register r, half h, broadcast to (threads, registers, halves)."""
    thread, r, h = np.meshgrid(np.arange(threads), np.arange(registers), np.arange(halves), indexing="ij")
    return [thread % 32 // 4, thread % 4, thread // 32, r, h]


def fragment_a16(k: int, threads: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A (16 a warp, k), 16 bits: registers of rows g, g + 8, g, g + 8; of columns 2t, 2t + 1 and those + 8."""
    g, t, w, r, h = _grid(threads, k // 4, 2)
    return 16 * w + g + 8 * (r % 2), 2 * t + h + 8 * (r // 2)


def fragment_b16(k: int) -> tuple[np.ndarray, np.ndarray]:
    """B (k, 8), 16 bits: rows 2t, 2t + 1 and those + 8; column g."""
    g, t, _, r, h = _grid(32, k // 8, 2)
    return 2 * t + h + 8 * r, g


def fragment_a32(k: int, threads: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A (16 a warp, k), tf32: rows g, g + 8, g, g + 8; columns t, t, t + 4, t + 4."""
    g, t, w, r, _ = _grid(threads, k // 2, 1)
    return (16 * w + g + 8 * (r % 2))[..., 0], (t + 4 * (r // 2))[..., 0]


def fragment_b32(k: int) -> tuple[np.ndarray, np.ndarray]:
    """B (k, 8), tf32: rows t and t + 4; column g."""
    g, t, _, r, _ = _grid(32, k // 4, 1)
    return (t + 4 * r)[..., 0], g[..., 0]


def fragment_d(n: int, threads: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """C and D (16 a warp, n), float32: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1, and so on each 8."""
    g, t, w, r, _ = _grid(threads, n // 2, 1)
    return (16 * w + g + 8 * (r // 2 % 2))[..., 0], (8 * (r // 4) + 2 * t + r % 2)[..., 0]


def fragment_d16(n: int, threads: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """C and D (16 a warp, n) of two halves a register: rows g, g + 8; columns 2t, 2t + 1, and so on each 8."""
    g, t, w, r, h = _grid(threads, n // 4, 2)
    return 16 * w + g + 8 * (r % 2), 8 * (r // 2) + 2 * t + h


# ---- Shared memory --------------------------------------------------------------------------------------------------


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """Address of what an unswizzled layout has at `address`: units of 16 bytes are exchanged within rows of `swizzle`
    bytes, by the number of the 128-byte line: bits [4, 4 + b) ^= bits [7, 7 + b), 2^b = swizzle / 16.
    """
    units = max(swizzle // 16, 1)
    return address ^ ((address >> 7 & (units - 1)) << 4)
