"""Triton kernels for the probes: what a decoder needs of Triton, each small. Images are NHWC; sizes may be ragged."""

from __future__ import annotations

import triton
import triton.language as tl

# -- products of matrices ----------------------------------------------------------------------------------------------


@triton.jit
def matmul_pointers(a, b, c, M, N, K, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (M, N) = a (M, K) b (K, N); grid (M / BM, N / BN), rounded up."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = start + k
        rows = tl.load(a + m[:, None] * K + inner[None, :], mask=(m < M)[:, None] & (inner < K)[None, :], other=0.0)
        columns = tl.load(b + inner[:, None] * N + n[None, :], mask=(inner < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(rows, columns, total, input_precision=PRECISION)
    result = total.to(c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_descriptors(
    a,
    b,
    c,
    K,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c (M, N) = a b: descriptors of a (M, K), transposed (K, M), of b (K, N), transposed (N, K), and of c.

    An operand whose innermost dimension is not K is "MN-major" to wgmma.
    """
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if A_TRANSPOSED:
            rows = a.load([k, m]).T
        else:
            rows = a.load([m, k])
        if B_TRANSPOSED:
            columns = b.load([n, k]).T
        else:
            columns = b.load([k, n])
        total = tl.dot(rows, columns, total)
    c.store([m, n], total.to(c.dtype))


# -- convolutions ------------------------------------------------------------------------------------------------------


@triton.jit
def conv3x3_pointers(
    x, w, bias, y, N, H, W, C, K, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """y (N, H, W, K): 3x3, zero padding, of x (N, H, W, C) with w (K, 3, 3, C), bias (K,) in float32.

    An implicit product: BM pixels x BN output channels a program; grid (N * H * W / BM, K / BN), rounded up.
    """
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    out = tl.program_id(1) * BN + tl.arange(0, BN)
    image = pixel // (H * W)
    row = pixel // W % H
    column = pixel % W
    steps = tl.cdiv(C, BC)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(9 * steps):
        tap = step // steps
        channel = step % steps * BC + tl.arange(0, BC)
        i = row + tap // 3 - 1
        j = column + tap % 3 - 1
        inside = (pixel < N * H * W) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        at = x + ((image * H + i) * W + j)[:, None] * C + channel[None, :]
        rows = tl.load(at, mask=inside[:, None] & (channel < C)[None, :], other=0.0)
        at = w + (out * 9 + tap)[None, :] * C + channel[:, None]
        columns = tl.load(at, mask=(out < K)[None, :] & (channel < C)[:, None], other=0.0)
        total = tl.dot(rows, columns, total, input_precision=PRECISION)
    total += tl.load(bias + out, mask=out < K, other=0.0)[None, :]
    mask = (pixel < N * H * W)[:, None] & (out < K)[None, :]
    tl.store(y + pixel[:, None] * K + out[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def conv3x3_descriptors(
    x,
    w,
    bias,
    y,
    H,
    W,
    C,
    K,
    TAPS: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """The same over descriptors: boxes of x (N, H, W, C) are (1, TH, TW, BC), of y (N, H, W, K) (1, TH, TW, BN).

    w is (9, K, C) in boxes (1, BN, BC) with TAPS = 3, its rank; with TAPS = 2 it is (9 * C, K) in boxes (BC, BN), which
    reach into the next tap where C is ragged: x is zero there. Grid (W / TW, N * (H / TH), K / BN), each rounded up.
    """
    left = tl.program_id(0) * TW
    bands = tl.cdiv(H, TH)
    image = tl.program_id(1) // bands
    top = tl.program_id(1) % bands * TH
    out = tl.program_id(2) * BN
    steps = tl.cdiv(C, BC)
    total = tl.zeros((TH * TW, BN), tl.float32)
    for step in range(9 * steps):
        tap = step // steps
        channel = step % steps * BC
        rows = x.load([image, top + tap // 3 - 1, left + tap % 3 - 1, channel]).reshape(TH * TW, BC)
        if TAPS == 3:
            columns = w.load([tap, out, channel]).reshape(BN, BC).T
        else:
            columns = w.load([tap * C + channel, out])
        total = tl.dot(rows, columns, total)
    outs = out + tl.arange(0, BN)
    total += tl.load(bias + outs, mask=outs < K, other=0.0)[None, :]
    y.store([image, top, left, out], total.to(y.dtype).reshape(1, TH, TW, BN))


@triton.jit
def maxpool3_descriptors(x, y, H, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """y: 3x3 maxima of x, both (N, H, W, C) in boxes (1, TH, TW, BC); x padded with NaN, which maxima ignore.

    Grid (W / TW, N * (H / TH), C / BC), each rounded up.
    """
    left = tl.program_id(0) * TW
    bands = tl.cdiv(H, TH)
    image = tl.program_id(1) // bands
    top = tl.program_id(1) % bands * TH
    channel = tl.program_id(2) * BC
    best = x.load([image, top, left, channel])
    for tap in range(9):
        tapped = x.load([image, top + tap // 3 - 1, left + tap % 3 - 1, channel])
        best = tl.maximum(best, tapped).to(x.dtype)  # on bfloat16 a maximum may be float32
    y.store([image, top, left, channel], best)


# -- reductions and scans ----------------------------------------------------------------------------------------------


@triton.jit
def softmax(x, y, N, BN: tl.constexpr):
    """y (M, N): softmax of each row of x, N <= BN; grid (M,): a row's lanes are of several warps."""
    n = tl.arange(0, BN)
    row = tl.program_id(0) * N
    value = tl.load(x + row + n, mask=n < N, other=-float("inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, axis=0))
    tl.store(y + row + n, (power / tl.sum(power, axis=0)).to(y.dtype.element_ty), mask=n < N)


@triton.jit
def reduce(x, largest, argmax, total, running, columns, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Of x (M, N), M <= BM, N <= BN: row maxima, which and where, row sums, sums so far (M, N), column maxima (N,)."""
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    value = tl.load(x + at, mask=inside, other=-float("inf")).to(tl.float32)
    tl.store(largest + m, tl.max(value, axis=1), mask=m < M)
    tl.store(argmax + m, tl.argmax(value, axis=1), mask=m < M)
    tl.store(columns + n, tl.max(value, axis=0), mask=n < N)
    value = tl.where(inside, value, 0.0)
    tl.store(total + m, tl.sum(value, axis=1), mask=m < M)
    tl.store(running + at, tl.cumsum(value, axis=1), mask=inside)


# -- one element at a time ---------------------------------------------------------------------------------------------


@triton.jit
def arithmetic(a, b, y, n, BLOCK: tl.constexpr):
    """y (n,) = a * b + max(a, b) where a > b, else min(a, b) - a, in a's type."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(a + at, mask=at < n, other=0.0)
    right = tl.load(b + at, mask=at < n, other=0.0)
    value = tl.where(left > right, left * right + tl.maximum(left, right), tl.minimum(left, right) - left)
    tl.store(y + at, value, mask=at < n)


@triton.jit
def functions(x, y, n, BLOCK: tl.constexpr):
    """y (5, n): exp, sigmoid, log, square root and tanh of x (n,), positive."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = tl.load(x + at, mask=mask, other=1.0).to(tl.float32)
    tl.store(y + at, tl.exp(value).to(y.dtype.element_ty), mask=mask)
    tl.store(y + n + at, tl.sigmoid(value).to(y.dtype.element_ty), mask=mask)
    tl.store(y + 2 * n + at, tl.log(value).to(y.dtype.element_ty), mask=mask)
    tl.store(y + 3 * n + at, tl.sqrt(value).to(y.dtype.element_ty), mask=mask)
    tl.store(y + 4 * n + at, (2 * tl.sigmoid(2 * value) - 1).to(y.dtype.element_ty), mask=mask)


@triton.jit
def casts(x, half, brain, byte, back, n, BLOCK: tl.constexpr):
    """x (n,) in float32, to float16, bfloat16, int8 (of 16 x, clamped to +-127, towards zero); back: their sum."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value = tl.load(x + at, mask=mask, other=0.0)
    tl.store(half + at, value.to(tl.float16), mask=mask)
    tl.store(brain + at, value.to(tl.bfloat16), mask=mask)
    quantised = tl.minimum(tl.maximum(value * 16.0, -127.0), 127.0).to(tl.int8)
    tl.store(byte + at, quantised, mask=mask)
    total = value.to(tl.float16).to(tl.float32) + value.to(tl.bfloat16).to(tl.float32) + quantised.to(tl.float32)
    tl.store(back + at, total, mask=mask)


# -- moving data -------------------------------------------------------------------------------------------------------


@triton.jit
def transpose(x, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """y (N, M) = x (M, N) transposed: loads along rows, stores along columns; grid (M / BM, N / BN), rounded up."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    value = tl.load(x + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
    tl.store(y + n[:, None] * M + m[None, :], value.T, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def transpose_descriptors(x, y, BM: tl.constexpr, BN: tl.constexpr):
    """The same, x in boxes (BM, BN) and y in boxes (BN, BM)."""
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    y.store([n, m], x.load([m, n]).T)


@triton.jit
def gather_atomic(table, index, value, total, count, largest, claimed, before, n, BLOCK: tl.constexpr):
    """For each of n entries: total[index] += value * table[index]; count[index] += 1; largest[index] = its number, if
    larger. claimed[entry] becomes 7 where it was 0, before[entry] what it was."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    where = tl.load(index + at, mask=mask, other=0)
    product = tl.load(value + at, mask=mask, other=0.0) * tl.load(table + where, mask=mask, other=0.0)
    tl.atomic_add(total + where, product, mask=mask)
    tl.atomic_add(count + where, 1, mask=mask)
    tl.atomic_max(largest + where, at, mask=mask)
    # atomic_cas takes no mask: claimed and before have a whole number of blocks
    seen = tl.atomic_cas(claimed + at, tl.full((BLOCK,), 0, tl.int32), tl.full((BLOCK,), 7, tl.int32))
    tl.store(before + at, seen)
