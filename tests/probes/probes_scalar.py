"""Probes of one thread's arithmetic, conversions and bit operations: bits exactly as IEEE 754 or the PTX ISA has them.

Inputs have the canonical NaN only: which other one an operation hands on is not documented.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from probes import Argument, Probe
from probes.layouts import BF16, F16, F32, from_bf16, poisoned, rounded

THREADS = 512
FULL = 2**32 - 1
Draw = Callable[[np.random.Generator], np.ndarray]  # (3, THREADS) words
# ---- Numbers and their bits -----------------------------------------------------------------------------------------


def value(bits: int, form: tuple[int, int, int] = F32) -> float:
    if form is F16:
        return float(np.uint16(bits).view(np.float16))
    return float(from_bf16(np.uint16(bits)) if form is BF16 else np.uint32(bits).view(np.float32))


def bits_of(number: float, form: tuple[int, int, int] = F32) -> int:
    """Of a number that the format holds."""
    if math.isnan(number):
        return 0x7FFFFFFF if form is F32 else 0x7FFF
    if form is F16:
        return int(np.float16(number).view(np.uint16))
    word = int(np.float32(number).view(np.uint32))
    return word >> 16 if form is BF16 else word


def signed(word: int, width: int = 32) -> int:
    word &= (1 << width) - 1
    return word - (word >> width - 1 << width)


# ---- Arithmetic, rounded once ---------------------------------------------------------------------------------------


def narrowed(x: float, form: tuple[int, int, int], mode: str = "rn") -> float:
    return rounded(Fraction(x), form, mode) if x and math.isfinite(x) else x


def fma(x: float, y: float, z: float, form: tuple[int, int, int] = F32, mode: str = "rn") -> float:
    if not all(map(math.isfinite, (x, y, z))):
        with np.errstate(invalid="ignore"):
            return float(np.float64(x) * np.float64(y) + np.float64(z))
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact:
        return rounded(exact, form, mode)
    signs = {math.copysign(1, x) * math.copysign(1, y), math.copysign(1, z)}
    return math.copysign(0, signs.pop()) if len(signs) == 1 else -0.0 if mode == "rm" else 0.0


def add(x: float, y: float, form: tuple[int, int, int] = F32, mode: str = "rn") -> float:
    return fma(x, 1.0, y, form, mode)


def mul(x: float, y: float, form: tuple[int, int, int] = F32, mode: str = "rn") -> float:
    return fma(x, y, math.copysign(0, x) * math.copysign(1, y), form, mode)


def div(x: float, y: float) -> float:
    if x and y and math.isfinite(x) and math.isfinite(y):
        return rounded(Fraction(x) / Fraction(y), F32)
    with np.errstate(all="ignore"):
        return float(np.float64(x) / np.float64(y))


def root(x: float) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.sqrt(np.float32(x)))


def extreme(x: float, y: float, largest: bool, keep_nan: bool = False) -> float:
    """+0 counts as greater than -0."""
    if math.isnan(x) or math.isnan(y):
        return math.nan if keep_nan else y if math.isnan(x) else x
    pairs = sorted([(x, math.copysign(1, x)), (y, math.copysign(1, y))])
    return pairs[largest][0]


def flushed(x: float) -> float:
    return math.copysign(0, x) if abs(x) < 2.0**-126 else x


def saturated(x: float) -> float:
    return min(max(x, 0.0), 1.0)


INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def integer(x: float, mode: str, low: int, high: int) -> int:
    """Clamped; NaN becomes 0, or in 64 bits the least."""
    if math.isnan(x):
        return low if high >= 2**63 - 1 else 0
    return min(max(INTEGRAL[mode](x), low), high) if math.isfinite(x) else (low if x < 0 else high)


def integral(x: float, mode: str) -> float:
    return math.copysign(INTEGRAL[mode](x), x) if math.isfinite(x) else x


# ---- Inputs ---------------------------------------------------------------------------------------------------------

SPECIAL = {
    F32: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x3F800000, 0xBF800000, 1, 0x80000001, 0x7FFFFF, 0x800000,
          0x7F7FFFFF, 0x3F000000, 0x40200000, 0xC0600000, 0x3F7FFFFE, 0x34000000, 0x4F000000, 0xCF000000, 0x477FF000],
    F16: [0, 0x8000, 0x7C00, 0xFC00, 0x7FFF, 0x3C00, 0xBC00, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0x3800, 0x3C01],
    BF16: [0, 0x8000, 0x7F80, 0xFF80, 0x7FFF, 0x3F80, 0xBF80, 1, 0x8001, 0x7F, 0x80, 0x7F7F, 0x3F00, 0x3F81],
}  # fmt: skip


def numbers(rng: np.random.Generator, form: tuple[int, int, int], count: int) -> np.ndarray:
    """(3, count) of bits: special values, arbitrary ones and normally distributed ones, shuffled."""
    kind, word = (np.uint32, 32) if form is F32 else (np.uint16, 16)
    normal = rng.standard_normal((3, count)) * 2.0 ** rng.integers(-4, 5, (3, count))
    choices = [
        rng.choice(np.array(SPECIAL[form], kind), (3, count)),
        rng.integers(0, 2**word, (3, count), kind),
        np.vectorize(lambda x: bits_of(rounded(Fraction(x), form), form), otypes=[kind])(normal),
    ]
    bits = np.choose(rng.integers(0, 3, (3, count)), choices).astype(kind)
    infinite = SPECIAL[form][2]
    magnitude = bits & (2 ** (word - 1) - 1)
    return np.where(magnitude > infinite, SPECIAL[form][4], bits).astype(kind)


def floats(rng: np.random.Generator) -> np.ndarray:
    return numbers(rng, F32, THREADS)


def halves(form: tuple[int, int, int], nan: bool = True) -> Draw:
    def draw(rng: np.random.Generator) -> np.ndarray:
        bits = numbers(rng, form, 2 * THREADS)
        return (bits if nan else np.where(bits == 0x7FFF, 0x1234, bits).astype(np.uint16)).view(np.uint32)

    return draw


def moderate(low: float, high: float) -> Draw:
    return lambda rng: rng.uniform(low, high, (3, THREADS)).astype(np.float32).view(np.uint32)


def whole(rng: np.random.Generator) -> np.ndarray:
    """Integers of every size; a third of z, and of y, has small fields in its bytes: positions and lengths."""
    words = rng.integers(0, 2**32, (3, THREADS), np.uint32) >> rng.integers(0, 32, (3, THREADS), np.uint32)
    words ^= np.where(rng.random((3, THREADS)) < 0.3, FULL, 0).astype(np.uint32)
    words[0, :6] = words[1, 2:8] = words[2, 1:7] = [0, 1, 2**31 - 1, 2**31 + 1, FULL, 0x80]
    fields = rng.integers(0, 40, (2, THREADS, 4), np.uint8).view(np.uint32)[..., 0]
    words[1:] = np.where(rng.random((2, THREADS)) < 0.3, fields, words[1:])
    return words


# ---- What the kernels compute, in the order of packed.cu -------------------------------------------------------------

Row = Callable[[int, int, int], list[int]]  # of three words


def on_floats(*functions: Callable[[float, float, float], float]) -> Row:
    return lambda *words: [bits_of(f(*map(value, words))) for f in functions]


def on_halves(form: tuple[int, int, int], *functions: Callable[[float, float, float], float]) -> Row:
    def row(*words: int) -> list[int]:
        low, high = ([value(w >> shift & 0xFFFF, form) for w in words] for shift in (0, 16))
        return [bits_of(f(*low), form) | bits_of(f(*high), form) << 16 for f in functions]

    return row


def arithmetic(form: tuple[int, int, int]) -> list[Callable[[float, float, float], float]]:
    return [
        lambda x, y, z: add(x, y, form),
        lambda x, y, z: add(x, -y, form),
        lambda x, y, z: mul(x, y, form),
        lambda x, y, z: fma(x, y, z, form),
    ]


EXTREMES = [
    lambda x, y, z: extreme(x, y, True),
    lambda x, y, z: extreme(x, y, False),
    lambda x, y, z: extreme(x, y, True, True),
    lambda x, y, z: extreme(x, y, False, True),
]


def signs(x: int, y: int, z: int) -> list[int]:
    return [x ^ 0x80008000, x & 0x7FFF7FFF] * 2


def pair(x: float, y: float, form: tuple[int, int, int], mode: str = "rn") -> int:
    """x in the high half, y in the low one."""
    return bits_of(narrowed(x, form, mode), form) << 16 | bits_of(narrowed(y, form, mode), form)


def clamped(*words: int) -> list[int]:
    x, y, z = map(value, words)
    a, b = max(x, 0.0), max(y, 0.0)
    sums = [fma(x, y, z), add(x, y), mul(x, z, mode="rz")]
    return [pair(a, b, BF16), pair(a, b, F16), pair(0, a, BF16), *(bits_of(saturated(s)) for s in sums)]


def to_half(*words: int) -> list[int]:
    x, y, _ = map(value, words)
    tf32 = 0x7FFFE000 if math.isnan(x) else words[0] + 0x1000 & 0xFFFFE000
    pairs = [pair(x, y, form, mode) for form in (BF16, F16) for mode in ("rn", "rz")]
    return [*pairs, pair(0, x, BF16), pair(0, x, F16), pair(0, x, F16, "rz"), tf32]


S32, U32 = (-(2**31), 2**31 - 1), (0, FULL)


def from_half(x: int, *_: int) -> list[int]:
    low, high = value(x & 0xFFFF, F16), value(x >> 16, F16)
    cast = [integer(low, "rni", *S32), integer(low, "rzi", *U32), integer(low, "rmi", *S32)]
    return [bits_of(low), bits_of(high), *cast]


def from_bf16_words(x: int, *_: int) -> list[int]:
    return [x << 16, x & 0xFFFF0000]


def float_to_int(word: int, *_: int) -> list[int]:
    x = value(word)
    wide = integer(x, "rzi", -(2**63), 2**63 - 1)
    return [
        *(integer(x, mode, *S32) for mode in ("rni", "rzi", "rmi", "rpi")),
        *(integer(x, mode, *U32) for mode in ("rni", "rzi")),
        integer(x, "rni", -128, 127),
        integer(x, "rni", 0, 255),
        *(bits_of(integral(x, mode)) for mode in ("rni", "rzi", "rmi", "rpi")),
        wide,
        wide >> 32,
    ]


def int_to_any(x: int, y: int, _: int) -> list[int]:
    to_f32 = [(signed(x), "rn"), (signed(x), "rz"), (x, "rn"), (x, "rz"), (x, "rp"), (signed(x), "rm")]
    return [
        *(bits_of(rounded(Fraction(number), F32, mode)) for number, mode in to_f32),
        min(max(signed(x), -128), 127),
        min(max(signed(x), 0), 255),
        signed(x, 8),
        x & 255,
        min(max(signed(x), 0), 65535),
        min(x, 32767),
        bits_of(rounded(Fraction(signed(x)), F16), F16),
        bits_of(rounded(Fraction(y), F16, "rz"), F16),
        bits_of(float(signed(y, 8))),
    ]


FLOATS = on_floats(
    *(lambda x, y, z, m=m: add(x, y, mode=m) for m in ("rn", "rz", "rm", "rp")),
    lambda x, y, z: add(x, -y),
    *(lambda x, y, z, m=m: mul(x, y, mode=m) for m in ("rn", "rz", "rp")),
    *(lambda x, y, z, m=m: fma(x, y, z, mode=m) for m in ("rn", "rz", "rm")),
    lambda x, y, z: div(x, y),
    lambda x, y, z: div(1.0, x),
    lambda x, y, z: root(y),
    *EXTREMES,
    lambda x, y, z: flushed(add(flushed(x), flushed(y))),
    lambda x, y, z: flushed(mul(flushed(x), flushed(y))),
)


def compares(*words: int) -> list[int]:
    (x, y, z), (a, b, c) = map(value, words), words
    ordered = [x == y, x < y or x > y, x < y, x <= y, x > y, x >= y]
    unordered = math.isnan(x) or math.isnan(y)
    i, j = signed(a), signed(b)
    return [
        *ordered,
        *(unordered or ordered[k] for k in range(6)),
        not unordered,
        unordered,
        i < j,
        *(a < b, a < b, a <= b, a > b, a >= b),
        FULL * (x < y),
        bits_of(float(i >= j)),
        FULL * (unordered or x > y),
        a if signed(c) >= 0 else b,
        a if z >= 0 else b,
        (i > j and i < 0) + 2 * (i <= j and i < 0),
        5 if (i < 0) == (j < 0) else 6,
    ]


PERMUTATIONS = {  # bytes of y:x, most significant first, for each selector
    "f4e": [(3, 2, 1, 0), (4, 3, 2, 1), (5, 4, 3, 2), (6, 5, 4, 3)],
    "b4e": [(5, 6, 7, 0), (6, 7, 0, 1), (7, 0, 1, 2), (0, 1, 2, 3)],
    "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
    "ecl": [(3, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 1, 0), (3, 2, 1, 0)],
    "rc16": [(1, 0, 1, 0), (3, 2, 3, 2), (1, 0, 1, 0), (3, 2, 3, 2)],
}


def permuted(x: int, y: int, selector: int) -> int:
    data, result = (y << 32 | x).to_bytes(8, "little"), []
    for nibble in (selector >> shift & 15 for shift in (0, 4, 8, 12)):
        byte = data[nibble & 7]
        result.append(255 * (byte >> 7) if nibble & 8 else byte)
    return int.from_bytes(result, "little")


def field(x: int, position: int, length: int, extend: bool) -> int:
    position, length = position & 255, length & 255
    sign = x >> min(position + length - 1, 31) & 1 if extend and length else 0
    return sum((x >> position + i & 1 if i < length and position + i <= 31 else sign) << i for i in range(32))


def inserted(x: int, y: int, position: int, length: int) -> int:
    for i in range(min(length & 255, 32)):
        if (place := (position & 255) + i) <= 31:
            y = y & ~(1 << place) | (x >> i & 1) << place
    return y


def looked_up(x: int, y: int, z: int, table: int) -> int:
    return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32))


def bits(x: int, y: int, z: int) -> list[int]:
    both, small = y << 32 | x, z & 63
    wrap, clamp = z & 31, min(z, 32)
    highest = x.bit_length() - 1
    return [
        permuted(x, y, z),
        *(permuted(x, y, sum(byte << 4 * i for i, byte in enumerate(reversed(table[z & 3]))))
          for table in PERMUTATIONS.values()),
        field(x, y, z, False),
        field(x, y, z, True),
        inserted(x, y, z, z >> 8),
        *(looked_up(x, y, z, table) for table in (0x96, 0xCA, 0x1D)),
        both << wrap >> 32,
        both << clamp >> 32,
        both >> wrap,
        both >> clamp,
        x << small,
        x >> small,
        signed(x) >> small,
        bin(x).count("1"),
        32 - x.bit_length(),
        int(f"{x:032b}"[::-1], 2),
        highest,
        (signed(x) if signed(x) >= 0 else ~signed(x)).bit_length() - 1,
        31 - highest if x else -1,
    ]  # fmt: skip


def dot(x: int, y: int, z: int, signed_x: bool, signed_y: bool) -> int:
    pairs = [(x >> shift & 255, y >> shift & 255) for shift in (0, 8, 16, 24)]
    return z + sum((signed(a, 8) if signed_x else a) * (signed(b, 8) if signed_y else b) for a, b in pairs)


def integers(x: int, y: int, z: int) -> list[int]:
    a, b, c = map(signed, (x, y, z))
    odd_y, odd_z = y | 1, signed(z | 1)
    quotient = abs(a) // abs(odd_z) * (1 if (a < 0) == (odd_z < 0) else -1)
    low_x, low_y = signed(x, 24), signed(y, 24)
    unsigned, product = x * y, a * b
    return [
        *(unsigned, unsigned >> 32, product >> 32, product + c, (unsigned >> 32) + z),
        *((x & 0xFFFFFF) * (y & 0xFFFFFF), low_x * low_y, low_x * low_y + c),
        *(dot(x, y, z, *kinds) for kinds in [(True, True), (False, False), (False, True)]),
        *(min(a, b), max(a, b), min(x, y), max(x, y), z + abs(x - y), z + abs(a - b)),
        *(-a, abs(b), not x & 1, x // odd_y, x % odd_y, quotient, a - quotient * odd_z),
        *(min(max(s, S32[0]), S32[1]) for s in (a + b, a - b)),
        *(~x, unsigned, unsigned >> 32, product, product >> 32),
    ]


def wide(x: int, y: int, z: int) -> list[int]:
    p, q = y << 32 | x, z << 32 | y
    i, j, shift = signed(p, 64), signed(q, 64), z & 127
    results = [p + q, p - q, p * q, p * q >> 64, i * j >> 64, x * z + q, signed(x) * signed(z) + q]
    results += [p << shift, p >> shift, i >> shift, min(i, j), max(p, q), int(f"{p:064b}"[::-1], 2), p ^ q]
    carry = (x + y & FULL) ^ (y + z + (x + y >> 32))
    borrow = (x - y & FULL) ^ (y - z - (x < y) & FULL)
    words = [word for result in results for word in (result, result >> 32)]
    return [*words, bin(p).count("1"), 64 - (p >> (z & 63)).bit_length(), carry, borrow, y - x]


# ---- Probes ---------------------------------------------------------------------------------------------------------


def exact(kernel: str, draw: Draw, row: Row, arch: str = "sm_80") -> Probe:
    def results(arguments: list[Argument]) -> list[np.ndarray]:
        rows = [row(*map(int, words)) for words in zip(*arguments[:3])]
        return [np.array([[int(word) & FULL for word in words] for words in rows], np.uint32)]

    columns = len(row(1, 2, 3))
    return Probe(
        f"scalar_{kernel}",
        "packed.cu",
        kernel,
        lambda rng: [*np.ascontiguousarray(draw(rng)), poisoned((THREADS, columns), np.uint32)],
        results,
        (3,),
        (4,),
        (128,),
        arch=arch,
    )


def close(kernel: str, draw: Draw, row: Callable[..., list[np.ndarray]], tolerance: float) -> Probe:
    def results(arguments: list[Argument]) -> list[np.ndarray]:
        return [np.stack(row(*(a.view(np.float32).astype(np.float64) for a in arguments[:2])), axis=1)]

    columns = len(row(np.ones(1), np.ones(1)))
    return Probe(
        f"scalar_{kernel}",
        "packed.cu",
        kernel,
        lambda rng: [*np.ascontiguousarray(draw(rng)), poisoned((THREADS, columns), np.float32)],
        results,
        (3,),
        (4,),
        (128,),
        tolerance=tolerance,
    )


def approximate(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [np.exp2(x), np.exp2(y), np.log2(x), 1 / y, 1 / np.sqrt(x), np.sqrt(y)]


def coarse(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [np.tanh(x), np.sin(x), np.cos(y), x / y]


PROBES: tuple[Probe, ...] = (
    exact("f16x2", halves(F16), on_halves(F16, *arithmetic(F16), *EXTREMES)),
    exact("bf16x2", halves(BF16), on_halves(BF16, arithmetic(BF16)[3], *EXTREMES)),
    exact("bf16x2_arithmetic", halves(BF16), on_halves(BF16, *arithmetic(BF16)[:3]), "sm_90a"),
    exact("signs", lambda rng: rng.integers(0, 2**32, (3, THREADS), np.uint32) & 0xBBFFBBFF, signs),
    exact("clamped", moderate(-2, 2), clamped),
    exact("to_half", floats, to_half),
    exact("from_half", halves(F16, nan=False), from_half),
    exact("from_bf16", halves(BF16, nan=False), from_bf16_words, "sm_90a"),
    exact("float_to_int", floats, float_to_int),
    exact("int_to_any", whole, int_to_any),
    exact("floats", floats, FLOATS),
    exact("compares", floats, compares),
    exact("bits", whole, bits),
    exact("integers", whole, integers),
    exact("wide", whole, wide),
    close("approximate", moderate(0.25, 4), approximate, 1e-6),
    close("coarse", moderate(0.5, 3), coarse, 1e-3),
)
