"""mma.sync: products of small matrices whose elements the lanes of a warp hold (PTX ISA, 9.7.15.5).

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
    """(32, R, H) rows and columns of A (16, K) in a lane's registers (figures of 9.7.15.5.1-8)."""
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


def accumulators(lanes: Lanes, registers: Vector, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(L, E) numbers of a lane's accumulators, of f16 two in a register, and (L, E) where they are undefined."""
    values, undefined = [], []
    for register in registers.elements:
        bits = np.broadcast_to(lanes.bits(register, "b32"), lanes.count)
        bad = lanes.undefined([register])
        numbers = types.from_bits(bits, "f16x2" if kind == "f16" else kind).reshape(lanes.count, -1)
        values.append(numbers.astype(np.float64))
        undefined.append(np.repeat((np.zeros(lanes.count, bool) if bad is None else bad)[:, None], numbers.shape[1], 1))
    return np.concatenate(values, axis=1), np.concatenate(undefined, axis=1)


def write_accumulators(
    lanes: Lanes, registers: Vector, kind: str, values: np.ndarray, undefined: np.ndarray, active: Active
) -> None:
    """(L, E) numbers into a lane's accumulators."""
    count = len(registers.elements)
    bits = types.to_bits(values.reshape(lanes.count, count, -1), "f16x2" if kind == "f16" else kind)
    bad = undefined.reshape(lanes.count, count, -1).any(axis=2)
    any_bad = bad.any(axis=0)
    bits = bits.reshape(lanes.count, count)
    for k, register in enumerate(registers.elements):
        lanes.write(register, bits[:, k], active, bad[:, k] if any_bad[k] else None)


@executes("mma.sync.aligned", section="9.7.15.5.14", whole=32)
def _mma(at: Instruction, lanes: Lanes, active: Active) -> None:
    d, a, b, c = at.operands
    shape = re.fullmatch(r"m16n8k(\d+)", at.modifiers[2])
    to, kind, other, added = at.modifiers[-4:]
    if shape is None or kind != other or kind not in ("f16", "bf16", "tf32") or "row" not in at.modifiers[3]:
        raise Fault("this shape or type of mma is not known")
    assert all(isinstance(x, Vector) for x in (d, a, b, c))
    depth, halves = int(shape[1]), 1 if kind == "tf32" else 2
    left, bad_left = _matrix(lanes, a, kind, (16, depth), fragment_a(len(a.elements), halves))
    right, bad_right = _matrix(lanes, b, kind, (depth, 8), fragment_b(len(b.elements), halves))
    rows, columns = fragment_c(8)
    products = (left @ right)[:, rows, columns].reshape(lanes.count, -1)
    bad = (bad_left.any(axis=2)[:, :, None] | bad_right.any(axis=1)[:, None, :])[:, rows, columns]
    before, bad_before = accumulators(lanes, c, added)
    write_accumulators(lanes, d, to, before + products, bad_before | bad.reshape(lanes.count, -1), active)


def _matrix(
    lanes: Lanes, registers: Vector, kind: str, shape: tuple[int, int], where: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(W, *shape) float64 of every warp, and where it is undefined."""
    warps = lanes.count // 32
    bits = np.stack([np.broadcast_to(lanes.bits(r, "b32"), lanes.count) for r in registers.elements], axis=1)
    values, undefined = np.zeros((warps, *shape)), np.zeros((warps, *shape), bool)
    values[:, where[0], where[1]] = operand(bits.reshape(warps, 32, -1), kind)
    for k, register in enumerate(registers.elements):
        bad = lanes.undefined([register])
        if bad is not None:
            undefined[:, where[0][:, k], where[1][:, k]] = bad.reshape(warps, 32, 1)
    return values, undefined
