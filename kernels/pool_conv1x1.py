"""A link of the light-weight chained residual pooling: 5x5 max pool and 1x1 convolution in one pass over memory.

Tensors are (N, H, W, C) in memory, weights (K, C). The pooled map is never written: a program reads the rows around its
own (the caches hold them: six rows for two), pools BC channels of them in registers, and multiplies. Every program
computes all output channels it can, BN, since it would pool again for others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from refinenet_fast.kernels.conv3x3 import relu, sliced, way_out
from refinenet_fast.kernels.maxpool5 import maximum, row_maximum


@triton.jit
def pool_conv1x1(
    x,  # (N, H, W, C)
    w,  # (K, C)
    y,  # (N, H, W, K)
    relued,  # (N, H, W, K), or None
    bias,  # (K,), or None
    select,  # (N, H, W, K), or None
    adds,  # a tuple of (N, H, W, K)
    low,  # (N, h, w, K), or None
    H,
    W,
    C,
    K,
    h,
    low_w,
    RELU_IN: tl.constexpr,
    RELU_OUT: tl.constexpr,
    RAW: tl.constexpr,
    CORNERS: tl.constexpr,
    PRECISION: tl.constexpr,
    COORDINATE: tl.constexpr,
    INDEX: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Grid (blocks of columns x blocks of K, pairs of rows, N); see :func:`conv3x3.way_out` for the other names."""
    blocks = tl.cdiv(K, BN)
    begin, row = tl.program_id(0) // blocks * BW, tl.program_id(1) * 2
    columns = begin + tl.arange(0, BW)
    outs = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    pixels = x + tl.program_id(2).to(tl.int64) * H * W * C
    total = tl.zeros((2 * BW, BN), tl.float32)
    for first in range(0, C, BC):
        channels = first + tl.arange(0, BC)
        r0 = row_maximum(pixels, row - 2, columns, channels, H, W, C, INDEX, BW, BC)
        r1 = row_maximum(pixels, row - 1, columns, channels, H, W, C, INDEX, BW, BC)
        r2 = row_maximum(pixels, row, columns, channels, H, W, C, INDEX, BW, BC)
        r3 = row_maximum(pixels, row + 1, columns, channels, H, W, C, INDEX, BW, BC)
        r4 = row_maximum(pixels, row + 2, columns, channels, H, W, C, INDEX, BW, BC)
        r5 = row_maximum(pixels, row + 3, columns, channels, H, W, C, INDEX, BW, BC)
        middle = maximum(maximum(r1, r2), maximum(r3, r4))
        # A pool without a pixel is -inf, which no product must see: outside of the image, beyond the channels.
        real = (columns < W)[:, None] & (channels < C)[None, :]
        above = tl.where(real, maximum(r0, middle), tl.zeros_like(middle))
        below = tl.where(real & (row + 1 < H), maximum(middle, r5), tl.zeros_like(middle))
        pooled = tl.join(above, below).permute(2, 0, 1).reshape(2 * BW, BC)
        if RELU_IN:
            pooled = relu(pooled)
        at = outs[None, :] * C + channels[:, None]
        weights = tl.load(w + at, mask=(outs < K)[None, :] & (channels < C)[:, None], other=0.0)
        total = tl.dot(pooled, weights, total, input_precision=PRECISION)
    m = tl.arange(0, 2 * BW)
    image, rows, columns = m * 0 + tl.program_id(2), row + m // BW, begin + m % BW
    parts = sliced(total, SLICES)
    WIDTH: tl.constexpr = BN // SLICES
    for slice in tl.static_range(SLICES):
        outs = tl.program_id(0) % blocks * BN + slice * WIDTH + tl.arange(0, WIDTH)
        way_out(
            parts[slice], image, rows, columns, (columns < W) & (rows < H), outs, y, relued, bias, select, adds, low,
            H, W, K, h, low_w, RELU_OUT, RAW, CORNERS, COORDINATE, INDEX,
        )  # fmt: skip
