"""Arithmetic, comparison, logic and shifts, on integers and (where PTX has one opcode for both) on floating point."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator import types
from emulator.errors import Fault
from emulator.parser import Instruction
from emulator.registers import Active, Lanes
from emulator.table import computes, executes, simple

DIRECTED = ("rz", "rm", "rp")


def is_float(a: np.ndarray) -> bool:
    return a.dtype.kind == "f"


def rounded(modifiers: tuple[str, ...], exact: np.ndarray, *terms: np.ndarray) -> np.ndarray:
    """float64 results, sums of ``terms`` if those are given, as numbers of the type, rounded as the modifiers say."""
    if "rm" in modifiers and terms:  # downwards, what cancels is -0
        exact = np.where((exact == 0) & (np.signbit(terms[0]) | np.signbit(terms[1])), -0.0, exact)
    kind = types.PACKED.get(modifiers[-1], modifiers[-1])
    how = next((m for m in modifiers if m in DIRECTED), None)
    values = types.directed(exact, kind, how) if how else types.from_bits(types.to_bits(exact, kind), kind)
    if "sat" in modifiers:
        values = np.clip(np.nan_to_num(values, nan=0.0), 0, 1)  # NaN becomes +0
    return np.maximum(values, 0) if "relu" in modifiers else values


def _is_plain(modifiers: tuple[str, ...]) -> bool:
    return not any(m in ("sat", "relu", *DIRECTED) for m in modifiers)


def _sum(name: str, section: str, plain: Callable[..., np.ndarray]) -> None:
    """add or sub."""

    def compute(modifiers: tuple[str, ...], *operands: np.ndarray) -> np.ndarray:
        if not is_float(operands[0]):
            if "sat" in modifiers:
                limits = np.iinfo(np.int32)
                return np.clip(plain(*(o.astype(np.int64) for o in operands)), limits.min, limits.max).astype(np.int32)
            return plain(*operands)
        if _is_plain(modifiers):
            return plain(*operands)
        terms = [o.astype(np.float64) for o in operands]
        if name == "sub":
            terms[1] = -terms[1]
        return rounded(modifiers, types.odd_sum(*terms), *terms)

    computes(name, section)(compute)


# -- integer and floating point (9.7.1, 9.7.3, 9.7.4) ------------------------------------------------------------------

_sum("add", "9.7.1.1, 9.7.3.3, 9.7.4.1", np.add)
_sum("sub", "9.7.1.2, 9.7.3.4, 9.7.4.2", np.subtract)
simple("neg", "9.7.1.11, 9.7.3.10, 9.7.4.5", np.negative)
simple("abs", "9.7.1.10, 9.7.3.9, 9.7.4.6", np.abs)


@computes("mul", "9.7.1.3, 9.7.3.5, 9.7.4.3")
def _mul(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if is_float(a):
        return a * b if _is_plain(modifiers) else rounded(modifiers, a.astype(np.float64) * b.astype(np.float64))
    if "wide" in modifiers:
        wide = {2: np.int32, 4: np.int64} if a.dtype.kind == "i" else {2: np.uint32, 4: np.uint64}
        return a.astype(wide[a.itemsize]) * b.astype(wide[a.itemsize])
    if "hi" in modifiers:
        if a.itemsize == 8:
            product = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
            bits = np.array([p & (2**64 - 1) for p in product], np.uint64)
            return bits.view(a.dtype)
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(a.dtype)
    return a * b


@computes("mad", "9.7.1.4")
def _mad(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return fma(modifiers, a, b, c) if is_float(a) else _mul(modifiers, a, b) + c


@computes("mul24", "9.7.1.5")
def _mul24(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    left = a.dtype.type(8)  # the low 24 bits, with their sign
    product = (a << left >> left).astype(wide) * (b << left >> left).astype(wide)
    return (product >> wide(16) if "hi" in modifiers else product).astype(a.dtype)


@computes("mad24", "9.7.1.6")
def _mad24(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _mul24(modifiers, a, b) + c


@computes("fma", "9.7.3.6, 9.7.4.4")
def fma(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product of two narrower numbers is exact in float64, their sum is rounded to odd there, then once more."""
    if a.dtype == np.float64:
        raise Fault("fma of float64, whose products are not exact here, is not modelled")
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    return rounded(modifiers, types.odd_sum(product, addend), product, addend)


@computes("div", "9.7.1.8, 9.7.3.8")
def _div(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not is_float(a):
        return _quotient(a, b)[0]
    return a / b if _is_plain(modifiers) else rounded(modifiers, a.astype(np.float64) / b.astype(np.float64))


@computes("rem", "9.7.1.9")
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


@computes("max", "9.7.1.13, 9.7.3.12, 9.7.4.8")
def _max(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
    result = _extreme(modifiers, a, b, np.maximum, np.fmax)
    return _max(modifiers, result, *more) if more else result


@computes("min", "9.7.1.12, 9.7.3.11, 9.7.4.7")
def _min(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
    result = _extreme(modifiers, a, b, np.minimum, np.fmin)
    return _min(modifiers, result, *more) if more else result


def _extreme(
    modifiers: tuple[str, ...],
    a: np.ndarray,
    b: np.ndarray,
    strict: Callable[..., np.ndarray],
    lenient: Callable[..., np.ndarray],
) -> np.ndarray:
    """NaN loses unless ``.NaN`` says that it wins; -0 is smaller than +0."""
    if not is_float(a):
        result = strict(a, b)
        return np.maximum(result, a.dtype.type(0)) if "relu" in modifiers else result
    result = (strict if "NaN" in modifiers else lenient)(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        negative = np.signbit(a) & np.signbit(b) if strict is np.maximum else np.signbit(a) | np.signbit(b)
        result = np.where(zeros, np.where(negative, -0.0, 0.0).astype(a.dtype), result)
    return result


@computes("sad", "9.7.1.7")
def _sad(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return c + np.where(a < b, b - a, a - b)


simple("popc", "9.7.1.14", lambda a: np.bitwise_count(a).astype(np.uint32))


@computes("clz", "9.7.1.15")
def _clz(modifiers: tuple[str, ...], a: np.ndarray) -> np.ndarray:
    return (8 * a.itemsize - _bit_length(a)).astype(np.uint32)


@computes("bfind", "9.7.1.16")
def _bfind(modifiers: tuple[str, ...], a: np.ndarray) -> np.ndarray:
    """The highest bit that differs from the sign's; 0xffffffff where there is none."""
    magnitude = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    length = _bit_length(magnitude.view(types.STORAGE[f"u{8 * a.itemsize}"]))
    at = 8 * a.itemsize - length if "shiftamt" in modifiers else length - 1
    return np.where(length == 0, np.uint32(0xFFFFFFFF), at.astype(np.uint32))


def _bit_length(a: np.ndarray) -> np.ndarray:
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < 8 * a.itemsize:
            a = a | a >> a.dtype.type(shift)
    return np.bitwise_count(a).astype(np.int64)


@computes("brev", "9.7.1.18")
def _brev(modifiers: tuple[str, ...], a: np.ndarray) -> np.ndarray:
    octets = np.ascontiguousarray(a)[..., None].view(np.uint8)
    return np.ascontiguousarray(np.packbits(np.unpackbits(octets, axis=-1)[..., ::-1], axis=-1)).view(a.dtype)[..., 0]


@computes("bfe", "9.7.1.19")
def _bfe(modifiers: tuple[str, ...], a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``length`` bits from ``position`` on; a signed type extends the sign."""
    bits = 8 * a.itemsize
    shifted = _shr((), a, position & 0xFF)
    left = bits - np.minimum(length & 0xFF, bits)
    extended = np.right_shift(_shl((), shifted, left), np.minimum(left, bits - 1).astype(a.dtype))
    past = (position & 0xFF) + (length & 0xFF) > bits  # a field that reaches past the sign is the shifted value
    value = np.where(past, shifted, extended) if a.dtype.kind == "i" else extended
    return np.where(left == bits, np.array(0, a.dtype), value)


@computes("bfi", "9.7.1.20")
def _bfi(
    modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """``b`` with ``length`` bits of ``a`` from ``position`` on."""
    ones = ~_shl((), np.full_like(np.asarray(b), -1 & (2 ** (8 * b.itemsize) - 1)), length & 0xFF)
    mask = _shl((), ones, position & 0xFF)
    return b & ~mask | _shl((), a, position & 0xFF) & mask


@computes("dp4a", "9.7.1.23")
def _dp4a(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    total = c.astype(np.int64)
    for byte in range(4):
        left, right = (
            (x.astype(np.int64) >> 8 * byte & 255).astype(np.uint8).view(np.int8 if k[0] == "s" else np.uint8)
            for x, k in ((a, modifiers[0]), (b, modifiers[1]))
        )
        total = total + left.astype(np.int64) * right.astype(np.int64)
    return (total & 0xFFFFFFFF).astype(np.uint32)


@executes("add.cc", "addc", "sub.cc", "subc", section="9.7.2")
def _carry(at: Instruction, lanes: Lanes, active: Active) -> None:
    """With the carry (or borrow) of a lane going in (addc, subc) and out (.cc)."""
    to, *sources = at.operands
    bits = 8 * types.width(at.kind)
    a, b = (np.broadcast_to(lanes.number(s, f"u{bits}"), lanes.count).astype(object) for s in sources)
    flag = lanes.carry.astype(object) if at.opcode in ("addc", "subc") else 0
    total = a + b + flag if at.opcode.startswith("add") else a - b - flag
    wrapped = np.array([int(t) & (1 << bits) - 1 for t in total], f"uint{bits}")
    if "cc" in at.modifiers:
        carry = np.array([not 0 <= int(t) < 1 << bits for t in total], bool)
        lanes.carry = np.where(active.mask, carry, lanes.carry)
    lanes.write(to, wrapped, active, lanes.undefined(sources))


# -- comparison and selection (9.7.6) ----------------------------------------------------------------------------------

COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if is_float(a) else a != b,  # false where one is NaN
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
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@computes("setp", "9.7.6.2, 9.7.7.2")
def _setp(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
    result = COMPARE[modifiers[0]](a, b)
    return result if p is None else COMBINE[modifiers[1]](result, p)


def opposite(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
    """The second result of setp: the comparison's opposite, combined likewise."""
    result = ~COMPARE[modifiers[0]](a, b)
    return result if p is None else COMBINE[modifiers[1]](result, p)


@computes("set", "9.7.6.1, 9.7.7.1")
def _set(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All ones, or 1.0, where it holds."""
    holds = COMPARE[modifiers[0]](a, b)
    to = types.PACKED.get(modifiers[-2], modifiers[-2])
    one = 1 if to in types.FLOATS else -1
    return np.where(holds, one, 0).astype(types.ARITHMETIC[to] if to != "bf16" else np.float32)


@computes("selp", "9.7.6.3")
def _selp(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(p, a, b)


@computes("slct", "9.7.6.4")
def _slct(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.where(c >= 0, a, b)


# -- logic and shifts (9.7.8) ------------------------------------------------------------------------------------------

simple("and", "9.7.8.1", np.bitwise_and)
simple("or", "9.7.8.2", np.bitwise_or)
simple("xor", "9.7.8.3", np.bitwise_xor)
simple("not", "9.7.8.4", np.invert)
simple("cnot", "9.7.8.5", lambda a: (a == 0).astype(a.dtype))


@computes("lop3", "9.7.8.6")
def _lop3(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit i of ``table`` is the result where the bits of a, b and c spell i."""
    result = np.zeros_like(a | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


@computes("shf", "9.7.8.7")
def _shf(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, count: np.ndarray) -> np.ndarray:
    """{b, a}, 64 bits, shifted: the upper half to the left, the lower half to the right."""
    count = (np.minimum(count, 32) if "clamp" in modifiers else count & 31).astype(np.uint64)
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    if "l" in modifiers:
        return (both << count >> np.uint64(32)).astype(np.uint32)
    return (both >> count).astype(np.uint32)


@computes("shl", "9.7.8.8")
def _shl(modifiers: tuple[str, ...], a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = np.left_shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    return np.where(count >= bits, np.array(0, a.dtype), shifted)


@computes("shr", "9.7.8.9")
def _shr(modifiers: tuple[str, ...], a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = np.right_shift(a, np.minimum(count, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, np.array(0, a.dtype), shifted)


# -- bytes (9.7.9) -----------------------------------------------------------------------------------------------------


@computes("prmt", "9.7.9.7")
def _prmt(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of {b, a}; the top bit of a nibble replicates the sign of its byte."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both | selector)
    for byte in range(4):
        nibble = _prmt_nibble(modifiers, selector.astype(np.uint64), byte)
        value = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
        result |= np.where(nibble & np.uint64(8) != 0, sign, value) << np.uint64(8 * byte)
    return result.astype(np.uint32)


def _prmt_nibble(modifiers: tuple[str, ...], selector: np.ndarray, byte: int) -> np.ndarray:
    """What selects a byte of the result: the selector's own nibble, or what a mode makes of its two low bits."""
    low = selector & np.uint64(3)
    tables = {  # PTX ISA's table by mode; rows: the selector's value, from the lowest byte of the result on
        "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
        "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
        "rc8": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
        "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
        "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
        "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
    }
    for mode, table in tables.items():
        if mode in modifiers:
            return np.array(table, np.uint64)[low.astype(np.int64), byte]
    return selector >> np.uint64(4 * byte) & np.uint64(15)
