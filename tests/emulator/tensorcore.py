"""mma.sync: products of small matrices whose elements the lanes of a warp hold (PTX ISA, 9.7.14.5).

Products are exact and sums are taken in float64, then rounded once: the hardware's own rounding inside is its secret.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from emulator import types
from emulator.errors import Fault
from emulator.parser import Instruction, Vector
from emulator.registers import Active, Lanes
from emulator.table import executes

LANE = np.arange(32)[:, None, None]


def operand(bits: np.ndarray, kind: str) -> np.ndarray:
    """(..., H) float64 of registers (...): two halves of 16-bit types, one number of tf32, whose low bits are cut."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    return types.from_bits(bits, f"{kind}x2").astype(np.float64)


@functools.cache
def fragment_a(registers: int, halves: int) -> tuple[np.ndarray, np.ndarray]:
    """(32, R, H) rows and columns of A (16, K) in a lane's registers (figures of 9.7.14.5.1-8)."""
    r, half = np.arange(registers)[:, None], np.arange(halves)
    step = 8 if halves == 2 else 4
    rows = LANE // 4 + 8 * (r & 1) + 0 * half
    return rows, halves * (LANE % 4) + half + step * (r >> 1)


@functools.cache
def fragment_b(registers: int, halves: int) -> tuple[np.ndarray, np.ndarray]:
    """(32, R, H) rows and columns of B (K, 8)."""
    r, half = np.arange(registers)[:, None], np.arange(halves)
    step = 8 if halves == 2 else 4
    return halves * (LANE % 4) + half + step * r, LANE // 4 + 0 * r + 0 * half


@functools.cache
def fragment_c(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(32, columns / 2) rows and columns of the accumulators (16, columns): pairs of a row, then the row 8 further."""
    index = np.arange(columns // 2)
    lane = np.arange(32)[:, None]
    return lane // 4 + 8 * (index >> 1 & 1), 8 * (index >> 2) + 2 * (lane % 4) + (index & 1)


def accumulators(lanes: Lanes, registers: Vector, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(E, L) numbers of the lanes' accumulators, of f16 two in a register, and where they are undefined."""
    bits = lanes.columns(registers.elements, "b32")
    if kind == "f16":
        numbers = types.from_bits(bits, "f16x2").transpose(0, 2, 1).reshape(-1, lanes.count)
    else:
        numbers = types.from_bits(bits, kind)
    bad = undefined(lanes, registers)
    return numbers.astype(np.float64), None if bad is None else np.repeat(bad, len(numbers) // len(bits), axis=0)


def undefined(lanes: Lanes, registers: Vector) -> np.ndarray | None:
    """(R, L) where registers are undefined; None: nowhere."""
    found = [lanes.undefined([register]) for register in registers.elements] if lanes.defined else []
    if all(bad is None for bad in found):
        return None
    return np.array([np.zeros(lanes.count, bool) if bad is None else bad for bad in found])


def write_accumulators(
    lanes: Lanes, registers: Vector, kind: str, values: np.ndarray, bad: np.ndarray | None, active: Active
) -> None:
    """(E, L) numbers into the lanes' accumulators, undefined where ``bad``."""
    count = len(registers.elements)
    if kind == "f16":
        bits = types.to_bits(values.reshape(count, 2, -1).transpose(0, 2, 1), "f16x2")
        bad = None if bad is None else bad.reshape(count, 2, -1).any(axis=1)
    else:
        bits = types.to_bits(values, kind)
    for k, register in enumerate(registers.elements):
        lanes.write(register, bits[k], active, bad[k] if bad is not None and bad[k].any() else None)


@executes("mma.sync.aligned", section="9.7.14.5.14", whole=32)
def _mma(at: Instruction, lanes: Lanes, active: Active) -> None:
    d, a, b, c = at.operands
    shape = re.fullmatch(r"m16n8k(\d+)", at.modifiers[2])
    to, kind, other, added = at.modifiers[-4:]
    if shape is None or kind != other or kind not in ("f16", "bf16", "tf32") or "row" not in at.modifiers[3]:
        raise Fault("this shape or type of mma is not known")
    assert all(isinstance(x, Vector) for x in (d, a, b, c))
    depth, halves = int(shape[1]), 1 if kind == "tf32" else 2
    left, bad_left = matrix(lanes, a, kind, (16, depth), fragment_a(len(a.elements), halves))
    right, bad_right = matrix(lanes, b, kind, (depth, 8), fragment_b(len(b.elements), halves))
    rows, columns = fragment_c(8)
    before, bad = accumulators(lanes, c, added)
    products = (left @ right)[:, rows, columns].reshape(lanes.count, -1).T
    if bad_left is not None or bad_right is not None:
        lost = np.zeros((len(left), 16, 8), bool)
        if bad_left is not None:
            lost |= bad_left.any(axis=2)[:, :, None]
        if bad_right is not None:
            lost |= bad_right.any(axis=1)[:, None, :]
        spread = lost[:, rows, columns].reshape(lanes.count, -1).T
        bad = spread if bad is None else bad | spread
    write_accumulators(lanes, d, to, before + products, bad, active)


def matrix(
    lanes: Lanes, registers: Vector, kind: str, shape: tuple[int, int], where: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None]:
    """(W, *shape) float64 of every warp, and where it is undefined; None: nowhere."""
    warps, count = lanes.count // 32, len(registers.elements)
    numbers = operand(lanes.columns(registers.elements, "b32"), kind).reshape(count, warps, 32, -1)
    values = np.empty((warps, *shape))
    values[:, where[0], where[1]] = numbers.transpose(1, 2, 0, 3)
    bad = undefined(lanes, registers)
    if bad is None:
        return values, None
    lost = np.zeros((warps, *shape), bool)
    lost[:, where[0], where[1]] = bad.reshape(count, warps, 32, 1).transpose(1, 2, 0, 3)
    return values, lost
