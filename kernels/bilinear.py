"""Bilinear upsample-and-add, any sizes, and its exact adjoint as a gather.

Tensors are (N, H, W, C) in memory. Indices and weights come from integer quotient and remainder, as in
csrc/common/bilinear_axis.h, so every backend has the same ones and the adjoint's range is exact. Indices are computed
in INDEX, int64 where a product of two sizes needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taps(output, IN, OUT, CORNERS: tl.constexpr):
    """(near, far, weight of far) of the inputs that an output reads; far == near at the last one, and where an axis
    keeps its size: infinity times a weight of 0 is NaN, as in PyTorch."""
    if CORNERS:
        numerator = output * (IN - 1)
        denominator = tl.maximum(output * 0 + (OUT - 1), 1)
    else:
        numerator = tl.maximum((2 * output + 1) * IN - OUT, 0)
        denominator = output * 0 + 2 * OUT
    near = numerator // denominator
    weight = tl.div_rn((numerator - near * denominator).to(tl.float32), denominator.to(tl.float32))
    return near, tl.where((IN != OUT) & (near + 1 < IN), near + 1, near), weight


@triton.jit
def _first_output(input, IN, OUT, CORNERS: tl.constexpr):
    """The first output whose near is ``input`` or more; OUT if there is none: the formula above, solved for it."""
    if CORNERS:
        numerator = input * tl.maximum(input * 0 + (OUT - 1), 1)
        denominator = tl.maximum(input * 0 + (IN - 1), 1)
    else:
        numerator = (2 * input + 1) * OUT - IN
        denominator = input * 0 + 2 * IN
    first = (tl.maximum(numerator, 0) + denominator - 1) // denominator
    return tl.where(input <= 0, 0, tl.where(input >= IN, OUT, tl.minimum(first, OUT)))


@triton.jit
def _readers(input, IN, OUT, CORNERS: tl.constexpr):
    """(begin, end) of the outputs that read an input: those whose near is it or the one before."""
    begin, end = _first_output(input - 1, IN, OUT, CORNERS), _first_output(input + 1, IN, OUT, CORNERS)
    return tl.where(IN == OUT, input, begin), tl.where(IN == OUT, input + 1, end)


@triton.jit
def bilinear_forward(
    x,  # (N, h, w, C)
    add,  # (N, H, W, C), or None
    y,  # (N, H, W, C)
    h,
    w,
    H,
    W,
    C,
    CORNERS: tl.constexpr,
    INDEX: tl.constexpr,
    BP: tl.constexpr,  # pixels of a program
    BC: tl.constexpr,
):
    """Grid (blocks of pixels x blocks of channels, N)."""
    blocks = tl.cdiv(C, BC)
    pixel = tl.program_id(0) // blocks * BP + tl.arange(0, BP)
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    mask = (pixel < H * W)[:, None] & (channels < C)[None, :]
    top, bottom, down = taps((pixel // W).to(INDEX), h, H, CORNERS)
    left, right, across = taps((pixel % W).to(INDEX), w, W, CORNERS)
    image = x + tl.program_id(1).to(tl.int64) * h * w * C + channels[None, :]
    total = tl.zeros([BP, BC], tl.float32)
    for tap in tl.static_range(4):
        row, rows = (top, 1 - down) if tap < 2 else (bottom, down)
        column, columns = (left, 1 - across) if tap % 2 == 0 else (right, across)
        at = (row * w + column).to(tl.int64)[:, None] * C
        total += (rows * columns)[:, None] * tl.load(image + at, mask=mask, other=0.0).to(tl.float32)
    at = (tl.program_id(1).to(tl.int64) * H * W + pixel)[:, None] * C + channels[None, :]
    if add is not None:
        total += tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def bilinear_backward(
    gy,  # (N, H, W, C)
    gx,  # (N, h, w, C)
    h,
    w,
    H,
    W,
    C,
    CORNERS: tl.constexpr,
    INDEX: tl.constexpr,
    BW: tl.constexpr,  # columns of a program
    BC: tl.constexpr,
):
    """Grid (blocks of columns x blocks of channels, h, N).

    gx at (v, u): the rows that read v summed in each column that reads u, then those columns; always in that order.
    """
    blocks = tl.cdiv(C, BC)
    u = (tl.program_id(0) // blocks * BW + tl.arange(0, BW)).to(INDEX)
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    v = tl.program_id(1).to(INDEX)
    image = gy + tl.program_id(2).to(tl.int64) * H * W * C + channels[None, :]
    live = (u < w)[:, None] & (channels < C)[None, :]
    first_row, last_row = _readers(v, h, H, CORNERS)
    begin, end = _readers(u, w, W, CORNERS)
    total = tl.zeros([BW, BC], tl.float32)
    for k in range(0, tl.max(tl.where(u < w, end - begin, 0), axis=0)):
        column = begin + k
        near, far, across = taps(column, w, W, CORNERS)
        received = tl.zeros([BW, BC], tl.float32)
        for row in range(first_row, last_row):
            top, bottom, down = taps(row, h, H, CORNERS)
            at = (row * W + column).to(tl.int64)[:, None] * C
            g = tl.load(image + at, mask=live & (column < end)[:, None], other=0.0).to(tl.float32)
            received += tl.where(top == v, (1 - down) * g, 0.0)
            received += tl.where(bottom == v, down * g, 0.0)
        reads = (column < end)[:, None]
        total += tl.where(reads & (near == u)[:, None], (1 - across)[:, None] * received, 0.0)
        total += tl.where(reads & (far == u)[:, None], across[:, None] * received, 0.0)
    at = ((tl.program_id(2).to(tl.int64) * h + v) * w + u)[:, None] * C + channels[None, :]
    tl.store(gx + at, total.to(gx.dtype.element_ty), mask=live)
