"""5x5 max pool, stride 1, padding 2, (ReLU first,) with a one-byte argmax; its backward as a gather.

Tensors are (N, H, W, C) in memory. The byte is ``dx | dy << 3``: the column that the pass over the output's own row
chose, and the row that the pass over five row maxima chose. The first of equals wins and the last NaN, as in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """In their type (Triton 3.6 promotes bfloat16 here); NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit
def row_maximum(x, row, columns, channels, H, W, C, INDEX: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """(BW, BC), in x's type: maxima of one row of x (H, W, C) over columns - 2 ... columns + 2; -inf outside."""
    best = tl.full([BW, BC], float("-inf"), x.dtype.element_ty)
    row = columns * 0 + row  # the interpreter's loops count in Python's integers
    for tap in tl.static_range(5):
        column = columns + tap - 2
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        at = (row * W + column).to(INDEX)[:, None] * C + channels[None, :]
        value = tl.load(x + at, mask=inside[:, None] & (channels < C)[None, :], other=float("-inf"))
        best = maximum(best, value)
    return best


@triton.jit
def column_maximum(r0, r1, r2, r3, r4):
    """Of five row maxima."""
    return maximum(maximum(maximum(r0, r1), maximum(r2, r3)), r4)


@triton.jit
def _row_max(x, row, columns, channels, H, W, C, RELU: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """(value, dx), (BW, BC) each, of one row of x (H, W, C) over columns - 2 ... columns + 2."""
    best = tl.full([BW, BC], float("-inf"), tl.float32)
    which = tl.maximum(2 - columns, 0)[:, None] + tl.zeros([BW, BC], tl.int32)  # the first column inside
    row = columns * 0 + row  # the interpreter's loops count in Python's integers
    for tap in tl.static_range(5):
        column = columns + tap - 2
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        at = (row * W + column).to(tl.int64)[:, None] * C + channels[None, :]
        value = tl.load(x + at, mask=inside[:, None] & (channels < C)[None, :], other=float("-inf")).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0.0, 0.0, value)  # NaN stays
        takes = inside[:, None] & ((value > best) | (value != value))
        best, which = tl.where(takes, value, best), tl.where(takes, tap, which)
    return best, which


@triton.jit
def _column_max(r0, r1, r2, r3, r4, row, H):
    """(value, dy) of the row maxima of rows row - 2 ... row + 2, of which some lie outside."""
    row = tl.zeros_like(r2).to(tl.int32) + row
    best = tl.where(row >= 2, r0, tl.where(row == 1, r1, r2))
    which = tl.maximum(2 - row, 0)  # the first row inside
    takes = (row >= 2) & ((r1 > best) | (r1 != r1))
    best, which = tl.where(takes, r1, best), tl.where(takes, 1, which)
    takes = (row >= 1) & ((r2 > best) | (r2 != r2))
    best, which = tl.where(takes, r2, best), tl.where(takes, 2, which)
    takes = (row + 1 < H) & ((r3 > best) | (r3 != r3))
    best, which = tl.where(takes, r3, best), tl.where(takes, 3, which)
    takes = (row + 2 < H) & ((r4 > best) | (r4 != r4))
    return tl.where(takes, r4, best), tl.where(takes, 4, which)


@triton.jit
def maxpool5_forward(
    x,  # (N, H, W, C)
    y,  # (N, H, W, C)
    argmax,  # (N, H, W, C) uint8
    H,
    W,
    C,
    RELU: tl.constexpr,
    STRIP: tl.constexpr,  # rows of a program
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    """Grid (blocks of columns x blocks of channels, strips, N).

    A program walks down its strip with the row maxima of five rows in registers: five loads an output instead of
    twenty-five, four of which the first-level cache has. Images and strips are taken from the last to the first: what
    the convolution before wrote last is still in the second-level cache, and what is written last the next one, which
    begins with the first, reads first.
    """
    blocks = tl.cdiv(C, BC)
    columns = tl.program_id(0) // blocks * BW + tl.arange(0, BW)
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * STRIP
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64) * H * W * C
    mask = (columns < W)[:, None] & (channels < C)[None, :]
    r1, _ = _row_max(x + image, begin - 2, columns, channels, H, W, C, RELU, BW, BC)
    r2, d2 = _row_max(x + image, begin - 1, columns, channels, H, W, C, RELU, BW, BC)
    r3, d3 = _row_max(x + image, begin, columns, channels, H, W, C, RELU, BW, BC)
    r4, d4 = _row_max(x + image, begin + 1, columns, channels, H, W, C, RELU, BW, BC)
    for row in range(begin, tl.minimum(begin + STRIP, H)):
        r0, r1, r2, r3 = r1, r2, r3, r4
        d2, d3 = d3, d4
        r4, d4 = _row_max(x + image, row + 2, columns, channels, H, W, C, RELU, BW, BC)
        value, dy = _column_max(r0, r1, r2, r3, r4, row, H)
        at = image + (row * W + columns).to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)
        tl.store(argmax + at, (d2 | dy << 3).to(tl.uint8), mask=mask)


@triton.jit
def maxpool5_inference(
    x,  # (N, H, W, C)
    y,  # (N, H, W, C)
    H,
    W,
    C,
    RELU: tl.constexpr,
    STRIP: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    """Without argmax; otherwise as :func:`maxpool5_forward`. ReLU and maxima change places."""
    blocks = tl.cdiv(C, BC)
    columns = tl.program_id(0) // blocks * BW + tl.arange(0, BW)
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * STRIP
    image = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64) * H * W * C
    mask = (columns < W)[:, None] & (channels < C)[None, :]
    r1 = row_maximum(x + image, begin - 2, columns, channels, H, W, C, tl.int64, BW, BC)
    r2 = row_maximum(x + image, begin - 1, columns, channels, H, W, C, tl.int64, BW, BC)
    r3 = row_maximum(x + image, begin, columns, channels, H, W, C, tl.int64, BW, BC)
    r4 = row_maximum(x + image, begin + 1, columns, channels, H, W, C, tl.int64, BW, BC)
    for row in range(begin, tl.minimum(begin + STRIP, H)):
        r0, r1, r2, r3 = r1, r2, r3, r4
        r4 = row_maximum(x + image, row + 2, columns, channels, H, W, C, tl.int64, BW, BC)
        value = column_maximum(r0, r1, r2, r3, r4)
        if RELU:
            value = maximum(value, tl.zeros_like(value))
        at = image + (row * W + columns).to(tl.int64)[:, None] * C + channels[None, :]
        tl.store(y + at, value, mask=mask)


@triton.jit
def maxpool5_backward(
    gy,  # (N, H, W, C)
    argmax,  # (N, H, W, C) uint8
    add,  # (N, H, W, C), or None
    gx,  # (N, H, W, C)
    H,
    W,
    C,
    BP: tl.constexpr,  # pixels of a program
    BC: tl.constexpr,
):
    """Grid (blocks of pixels x blocks of channels, N).

    gx at (v, u) gathers, for each column whose dx in row v points at u, what (v, that column) received through the
    column pass from those rows whose dy points at v: always in the same order.
    """
    blocks = tl.cdiv(C, BC)
    pixel = tl.program_id(0) // blocks * BP + tl.arange(0, BP)
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    image = tl.program_id(1).to(tl.int64) * H * W * C
    v, u = pixel // W, pixel % W
    mask = (pixel < H * W)[:, None] & (channels < C)[None, :]
    total = tl.zeros([BP, BC], tl.float32)
    for dx in tl.static_range(5):
        x = u - dx + 2
        inside = mask & ((x >= 0) & (x < W))[:, None]
        own = image + (v * W + x).to(tl.int64)[:, None] * C + channels[None, :]
        chosen = inside & (tl.load(argmax + own, mask=inside, other=255) & 7 == dx)
        received = tl.zeros([BP, BC], tl.float32)
        for dy in tl.static_range(5):
            y = v - dy + 2
            here = chosen & ((y >= 0) & (y < H))[:, None]
            at = image + (y * W + x).to(tl.int64)[:, None] * C + channels[None, :]
            here &= tl.load(argmax + at, mask=here, other=255) >> 3 == dy
            received += tl.load(gy + at, mask=here, other=0.0).to(tl.float32)
        total += received
    at = image + pixel.to(tl.int64)[:, None] * C + channels[None, :]
    if add is not None:
        total += tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(gx + at, total.to(gx.dtype.element_ty), mask=mask)
