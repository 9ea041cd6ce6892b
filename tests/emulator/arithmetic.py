"""What instructions compute, a table by opcode with the section of "PTX ISA 9.0" that defines each.

A function takes the modifiers and the operands' numbers, one array over lanes each, and gives the result's numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Compute = Callable[..., np.ndarray]
TABLE: dict[str, tuple[str, Compute]] = {}


def opcode(name: str, section: str) -> Callable[[Compute], Compute]:
    def enter(function: Compute) -> Compute:
        TABLE[name] = section, function
        return function

    return enter


def simple(name: str, section: str, function: Callable[..., np.ndarray]) -> None:
    TABLE[name] = section, lambda modifiers, *operands: function(*operands)


# -- integer and floating (9.7.1, 9.7.3) -------------------------------------------------------------------------------

simple("add", "9.7.1.1, 9.7.3", np.add)
simple("sub", "9.7.1.2, 9.7.3", np.subtract)
simple("neg", "9.7.1.11, 9.7.3", np.negative)
simple("abs", "9.7.1.10, 9.7.3", np.abs)


@opcode("mul", "9.7.1.3, 9.7.3")
def _mul(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if "wide" in modifiers:
        wide = {2: np.int32, 4: np.int64} if a.dtype.kind == "i" else {2: np.uint32, 4: np.uint64}
        return a.astype(wide[a.itemsize]) * b.astype(wide[a.itemsize])
    if "hi" in modifiers:
        if a.itemsize == 8:
            product = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
            return np.array(product, object).astype(a.dtype)
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(a.dtype)
    return a * b


@opcode("mad", "9.7.1.4")
def _mad(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _mul(modifiers, a, b) + c


@opcode("fma", "9.7.3")
def _fma(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # The product is exact in float64; the sum is rounded twice, which differs from once in one case of 2^29.
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


@opcode("div", "9.7.1.8, 9.7.3")
def _div(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    return _quotient(a, b)[0]


@opcode("rem", "9.7.1.9")
def _rem(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _quotient(a, b)[1]


def _quotient(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Towards zero; by zero, which PTX leaves open, all ones."""
    divisor = np.where(b == 0, np.array(1, b.dtype), b)
    quotient = a // divisor
    remainder = a - quotient * divisor
    if a.dtype.kind == "i":
        fix = (remainder != 0) & ((a < 0) != (divisor < 0))
        quotient, remainder = quotient + fix, remainder - np.where(fix, divisor, 0)
    ones = np.array(-1, np.int64).astype(a.dtype)
    return np.where(b == 0, ones, quotient).astype(a.dtype), np.where(b == 0, a, remainder).astype(a.dtype)


@opcode("max", "9.7.1.13, 9.7.3")
def _max(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _extreme(modifiers, a, b, np.maximum, np.fmax)


@opcode("min", "9.7.1.12, 9.7.3")
def _min(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _extreme(modifiers, a, b, np.minimum, np.fmin)


def _extreme(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, strict: Compute, lenient: Compute) -> np.ndarray:
    """NaN loses unless ``.NaN`` says that it wins."""
    return strict(a, b) if a.dtype.kind != "f" or "NaN" in modifiers else lenient(a, b)


@opcode("bfe", "9.7.1.19")
def _bfe(modifiers: tuple[str, ...], a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``length`` bits from ``position`` on; a signed type extends the sign."""
    bits = 8 * a.itemsize
    shifted = _shr((), a, position & 0xFF)
    left = bits - np.minimum(length & 0xFF, bits)
    return np.where(left == bits, np.array(0, a.dtype), np.right_shift(_shl((), shifted, left), left.astype(a.dtype)))


# -- comparison and selection (9.7.6) ----------------------------------------------------------------------------------

COMPARE: dict[str, Compute] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,  # false where one is NaN
    **dict(zip(("lt", "le", "gt", "ge"), (np.less, np.less_equal, np.greater, np.greater_equal), strict=True)),
    **dict(zip(("lo", "ls", "hi", "hs"), (np.less, np.less_equal, np.greater, np.greater_equal), strict=True)),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@opcode("setp", "9.7.6")
def _setp(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
    result = COMPARE[modifiers[0]](a, b)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return result if p is None else combine[modifiers[1]](result, p)


@opcode("selp", "9.7.6")
def _selp(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(p, a, b)


# -- logic and shifts (9.7.8) ------------------------------------------------------------------------------------------

simple("and", "9.7.8", np.bitwise_and)
simple("or", "9.7.8", np.bitwise_or)
simple("xor", "9.7.8", np.bitwise_xor)
simple("not", "9.7.8", np.invert)


@opcode("shl", "9.7.8")
def _shl(modifiers: tuple[str, ...], a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = np.left_shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    return np.where(count >= bits, np.array(0, a.dtype), shifted)


@opcode("shr", "9.7.8")
def _shr(modifiers: tuple[str, ...], a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = np.right_shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, np.array(0, a.dtype), shifted)


# -- data movement and conversion (9.7.9) ------------------------------------------------------------------------------

simple("mov", "9.7.9", lambda a: a)
simple("cvta", "9.7.9", lambda a: a)  # one address space here: global addresses are generic ones


@opcode("prmt", "9.7.9")
def _prmt(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of {b, a}; the top bit of a nibble replicates the sign of its byte."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for byte in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * byte) & np.uint64(15)
        value = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8) != 0, sign, value) << np.uint64(8 * byte)
    return result.astype(np.uint32)
