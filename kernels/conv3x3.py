"""3x3 (and 1x1) convolution, stride 1, zero padding, with its ways in and out, as an implicit product of matrices.

Tensors are (N, H, W, C) in memory, weights (TAPS, K, C), TAPS = 9 or 1. A program computes BM pixels x BN output
channels and walks over the taps of one block of BC input channels after another:

.. math:: y_{pk} = \\sum_{c, t} x_{p + t, c} \\, w_{tkc}

Two routes. Over descriptors (sm_90 and later) BM pixels are a rectangle TH x TW of one image, copied in bulk, zeros
outside; a rectangle of one row (TH = 1) stays in shared memory, where wgmma reads it, others pass through registers.
Over pointers BM pixels follow each other in memory, across rows and images, and nothing is wasted on ragged sizes.

The input gradient is the same convolution of the result's gradient, with weights packed (TAPS, C, K) and ROTATED.
"""

from __future__ import annotations

import triton
import triton.language as tl
from refinenet_fast.kernels.bilinear import taps
from refinenet_fast.kernels.maxpool5 import maximum


@triton.jit
def relu(x):
    """In the type of ``x``; NaN stays."""
    return maximum(x, tl.zeros_like(x))


@triton.jit
def upsampled(low, image, row, column, outs, inside, h, w, H, W, K, CORNERS: tl.constexpr, COORDINATE: tl.constexpr):
    """(BM, BN) of low (N, h, w, K) at rows and columns of its bilinear upsampling to H x W, in float32."""
    top, bottom, down = taps(row.to(COORDINATE), h, H, CORNERS)
    left, right, across = taps(column.to(COORDINATE), w, W, CORNERS)
    total = tl.zeros(inside.shape, tl.float32)
    for tap in tl.static_range(4):
        near, rows = (top, 1 - down) if tap < 2 else (bottom, down)
        side, columns = (left, 1 - across) if tap % 2 == 0 else (right, across)
        at = ((image.to(tl.int64) * h + near) * w + side)[:, None] * K + outs[None, :]
        total += (rows * columns)[:, None] * tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def way_out(
    total,  # (BM, BN) float32
    image,  # (BM,)
    row,  # (BM,)
    column,  # (BM,)
    live,  # (BM,)
    outs,  # (BN,)
    y,  # (N, H, W, K)
    relued,  # (N, H, W, K), or None
    bias,  # (K,), or None
    select,  # (N, H, W, K), or None
    adds,  # a tuple of (N, H, W, K)
    low,  # (N, h, w, K), or None
    H,
    W,
    K,
    h,
    w,
    RELU: tl.constexpr,
    RAW: tl.constexpr,  # how many of adds are added as they are; of the others the ReLU
    CORNERS: tl.constexpr,
    COORDINATE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Bias, ReLU, selection, sums, upsampled sum, in this order; then y, and its ReLU where it is wanted."""
    inside = live[:, None] & (outs < K)[None, :]
    at = ((image.to(INDEX) * H + row) * W + column)[:, None] * K + outs[None, :]
    if bias is not None:
        total += tl.load(bias + outs, mask=outs < K, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = relu(total)
    if select is not None:
        total = tl.where(tl.load(select + at, mask=inside, other=0.0).to(tl.float32) <= 0.0, 0.0, total)
    for i in tl.static_range(len(adds)):
        other = tl.load(adds[i] + at, mask=inside, other=0.0).to(tl.float32)
        if i >= RAW:
            other = relu(other)
        total += other
    if low is not None:
        total += upsampled(low, image, row, column, outs, inside, h, w, H, W, K, CORNERS, COORDINATE)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
    if relued is not None:
        tl.store(relued + at, relu(total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def place(tile, N, H, W, DESCRIBED: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """(image, row, column, live), (BM,) each, of a tile's pixels."""
    m = tl.arange(0, TH * TW)
    if DESCRIBED:
        across, down = tl.cdiv(W, TW), tl.cdiv(H, TH)
        image = tile // (across * down) + m * 0
        row = tile // across % down * TH + m // TW
        column = tile % across * TW + m % TW
        return image, row, column, (row < H) & (column < W)
    pixel = tile * (TH * TW) + m
    return pixel // (W * H), pixel // W % H, pixel % W, pixel // (W * H) < N


@triton.jit
def halves(total):
    """(BM, BN) as its left and right half."""
    return tl.split(total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def sliced(total, SLICES: tl.constexpr):
    """(BM, BN) as a tuple of 1, 2 or 4 parts of its columns: for the way out, which then needs less at once."""
    parts = (total,)
    if SLICES >= 2:
        parts = halves(total)
    if SLICES == 4:
        parts = halves(parts[0]) + halves(parts[1])
    return parts


@triton.jit
def _tap(step, TAPS: tl.constexpr, BC: tl.constexpr, ROTATED: tl.constexpr):
    """(dy, dx, tap of the weights, first channel) of a step: all taps of BC channels, then the next BC."""
    tap = step % TAPS
    side: tl.constexpr = 3 if TAPS == 9 else 1
    return tap // side - side // 2, tap % side - side // 2, TAPS - 1 - tap if ROTATED else tap, step // TAPS * BC


@triton.jit
def _described(
    x,  # descriptor of (N, H, W, C), boxes (1, TH, TW, BC)
    w,  # descriptor of (TAPS, K, C), boxes (1, BN, BC)
    image,
    top,
    left,
    out,
    first,
    last,
    TAPS: tl.constexpr,
    ROTATED: tl.constexpr,
    RELU_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """(BM, BN) sums over the steps first ... last - 1; outside of the tensors a box is 0."""
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(first, last):
        dy, dx, tap, channel = _tap(step, TAPS, BC, ROTATED)
        pixels = x.load([image, top + dy, left + dx, channel]).reshape(BM, BC)
        if RELU_IN:
            pixels = relu(pixels)
        weights = w.load([tap, out, channel]).reshape(BN, BC).T
        total = tl.dot(pixels, weights, total, input_precision=PRECISION)
    return total


@triton.jit
def _pointed(
    x,  # (N, H, W, C)
    w,  # (TAPS, K, C)
    image,  # (BM,)
    row,  # (BM,)
    column,  # (BM,)
    live,  # (BM,)
    out,
    first,
    last,
    H,
    W,
    C,
    K,
    TAPS: tl.constexpr,
    ROTATED: tl.constexpr,
    RELU_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The same over pointers."""
    outs = out + tl.arange(0, BN)
    channels = tl.arange(0, BC)
    own = x + (((image.to(INDEX) * H + row) * W + column) * C)[:, None] + channels[None, :]
    weight = w + (outs * C)[None, :] + channels[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(first, last):
        dy, dx, tap, channel = _tap(step, TAPS, BC, ROTATED)
        inside = live & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        there = channels + channel < C
        pixels = tl.load(own + ((dy * W + dx) * C + channel), mask=inside[:, None] & there[None, :], other=0.0)
        if RELU_IN:
            pixels = relu(pixels)
        weights = tl.load(weight + (tap * K * C + channel), mask=(outs < K)[None, :] & there[:, None], other=0.0)
        total = tl.dot(pixels, weights, total, input_precision=PRECISION)
    return total


@triton.jit
def conv3x3(
    x,  # (N, H, W, C), or its descriptor in boxes (1, TH, TW, BC)
    w,  # (TAPS, K, C), or its descriptor in boxes (1, BN, BC)
    y,  # (N, H, W, K); of several splits (SPLITS, N, H, W, K) float32, and no way out
    relued,  # (N, H, W, K), or None
    bias,  # (K,), or None
    select,  # (N, H, W, K), or None
    adds,  # a tuple of (N, H, W, K)
    low,  # (N, h, w, K), or None
    N,
    H,
    W,
    C,
    K,
    h,
    low_w,  # w of low: this function's w are the weights
    TAPS: tl.constexpr,
    ROTATED: tl.constexpr,
    RELU_IN: tl.constexpr,
    RELU_OUT: tl.constexpr,
    RAW: tl.constexpr,
    CORNERS: tl.constexpr,
    PRECISION: tl.constexpr,
    COORDINATE: tl.constexpr,
    INDEX: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,  # of the output channels on the way out: 2 halve the shared memory that it takes
):
    """Grid (tiles of pixels x blocks of output channels, SPLITS); see :func:`way_out` for what else the names mean."""
    BM: tl.constexpr = TH * TW
    blocks = tl.cdiv(K, BN)
    tile, out = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    steps = tl.cdiv(C, BC) * TAPS
    split = tl.program_id(1)
    first, last = steps * split // SPLITS, steps * (split + 1) // SPLITS
    if DESCRIBED:
        across, down = tl.cdiv(W, TW), tl.cdiv(H, TH)
        image, top, left = tile // (across * down), tile // across % down * TH, tile % across * TW
        total = _described(x, w, image, top, left, out, first, last, TAPS, ROTATED, RELU_IN, PRECISION, BM, BN, BC)
    else:
        images, row, column, live = place(tile, N, H, W, DESCRIBED, TH, TW)
        total = _pointed(
            x, w, images, row, column, live, out, first, last, H, W, C, K,
            TAPS, ROTATED, RELU_IN, PRECISION, BM, BN, BC, INDEX,
        )  # fmt: skip
    images, row, column, live = place(tile, N, H, W, DESCRIBED, TH, TW)
    WIDTH: tl.constexpr = BN // SLICES
    parts = sliced(total, SLICES)
    for slice in tl.static_range(SLICES):
        outs = out + slice * WIDTH + tl.arange(0, WIDTH)
        if SPLITS > 1:
            at = (((split.to(INDEX) * N + images) * H + row) * W + column)[:, None] * K + outs[None, :]
            tl.store(y + at, parts[slice], mask=live[:, None] & (outs < K)[None, :])
        else:
            way_out(
                parts[slice], images, row, column, live, outs, y, relued, bias, select, adds, low,
                H, W, K, h, low_w, RELU_OUT, RAW, CORNERS, COORDINATE, INDEX,
            )  # fmt: skip


@triton.jit
def conv3x3_reduce(
    parts,  # (SPLITS, N, H, W, K) float32
    y,  # (N, H, W, K)
    relued,  # (N, H, W, K), or None
    bias,  # (K,), or None
    select,  # (N, H, W, K), or None
    adds,  # a tuple of (N, H, W, K)
    low,  # (N, h, w, K), or None
    N,
    H,
    W,
    K,
    h,
    low_w,
    RELU_OUT: tl.constexpr,
    RAW: tl.constexpr,
    CORNERS: tl.constexpr,
    COORDINATE: tl.constexpr,
    INDEX: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The splits' sum, from the first to the last, and the way out. Grid (blocks of pixels x blocks of K,)."""
    blocks = tl.cdiv(K, BN)
    tile, out = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    images, row, column, live = place(tile, N, H, W, False, 1, BM)
    outs = out + tl.arange(0, BN)
    at = ((images.to(INDEX) * H + row) * W + column)[:, None] * K + outs[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(
            parts + tl.full((), split, INDEX) * N * H * W * K + at, mask=live[:, None] & (outs < K)[None, :], other=0.0
        )
    way_out(
        total, images, row, column, live, outs, y, relued, bias, select, adds, low,
        H, W, K, h, low_w, RELU_OUT, RAW, CORNERS, COORDINATE, INDEX,
    )  # fmt: skip
