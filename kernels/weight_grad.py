"""Gradient of a 3x3 (or 1x1) convolution in its weight and its bias, as a product of matrices over the pixels.

Tensors are (N, H, W, C) in memory. The pixels are split; of each split a program computes BK output channels x BC input
channels of one tap, and the splits are summed from the first to the last, so that the order never changes:

.. math:: g_{ktc} = \\sum_p gy_{pk} \\, x_{p + t, c}, \\qquad b_k = \\sum_p gy_{pk}

Two routes, as in conv3x3: descriptors copy rectangles TH x TW of an image, pointers follow the pixels in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from refinenet_fast.kernels.conv3x3 import place, relu


@triton.jit
def _described(
    x,  # descriptor of (N, H, W, C), boxes (1, TH, TW, BC)
    gy,  # descriptor of (N, H, W, K), boxes (1, TH, TW, BK)
    first,
    last,
    H,
    W,
    k,
    c,
    dy,
    dx,
    PRECISION: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """(BK, BC) sums over the tiles first ... last - 1 of the pixels; outside of the tensors a box is 0."""
    across, down = tl.cdiv(W, TW), tl.cdiv(H, TH)
    total = tl.zeros((BK, BC), tl.float32)
    for tile in tl.range(first, last):
        image, top, left = tile // (across * down), tile // across % down * TH, tile % across * TW
        pixels = x.load([image, top + dy, left + dx, c]).reshape(TH * TW, BC)
        grads = gy.load([image, top, left, k]).reshape(TH * TW, BK)
        total = tl.dot(grads.T, pixels, total, input_precision=PRECISION)
    return total


@triton.jit
def _pointed(
    x,  # (N, H, W, C)
    gy,  # (N, H, W, K)
    first,
    last,
    N,
    H,
    W,
    C,
    K,
    k,
    c,
    dy,
    dx,
    RELU_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The same over pointers."""
    ks, cs = k + tl.arange(0, BK), c + tl.arange(0, BC)
    total = tl.zeros((BK, BC), tl.float32)
    for tile in tl.range(first, last):
        image, row, column, live = place(tile, N, H, W, False, 1, BP)
        pixel = (image.to(INDEX) * H + row) * W + column
        inside = live & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        at = (pixel + (dy * W + dx))[:, None] * C + cs[None, :]
        pixels = tl.load(x + at, mask=inside[:, None] & (cs < C)[None, :], other=0.0)
        if RELU_IN:
            pixels = relu(pixels)
        at = pixel[None, :] * K + ks[:, None]
        grads = tl.load(gy + at, mask=live[None, :] & (ks < K)[:, None], other=0.0)
        total = tl.dot(grads, pixels, total, input_precision=PRECISION)
    return total


@triton.jit
def weight_grad(
    x,  # (N, H, W, C), or its descriptor in boxes (1, TH, TW, BC)
    gy,  # (N, H, W, K), or its descriptor in boxes (1, TH, TW, BK)
    parts,  # (SPLITS, K, TAPS, C) float32
    N,
    H,
    W,
    C,
    K,
    TAPS: tl.constexpr,
    RELU_IN: tl.constexpr,  # over pointers only
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (blocks of K x TAPS x blocks of C, SPLITS)."""
    blocks = tl.cdiv(C, BC)
    c = tl.program_id(0) % blocks * BC
    tap = tl.program_id(0) // blocks % TAPS
    k = tl.program_id(0) // (blocks * TAPS) * BK
    side: tl.constexpr = 3 if TAPS == 9 else 1
    dy, dx = tap // side - side // 2, tap % side - side // 2
    split = tl.program_id(1)
    if DESCRIBED:
        tiles = N * tl.cdiv(H, TH) * tl.cdiv(W, TW)
    else:
        tiles = tl.cdiv(N * H * W, TH * TW)
    first, last = _share(tiles, split, SPLITS), _share(tiles, split + 1, SPLITS)
    if DESCRIBED:
        total = _described(x, gy, first, last, H, W, k, c, dy, dx, PRECISION, TH, TW, BK, BC)
    else:
        total = _pointed(
            x, gy, first, last, N, H, W, C, K, k, c, dy, dx, RELU_IN, PRECISION, TH * TW, BK, BC, INDEX
        )  # fmt: skip
    ks, cs = k + tl.arange(0, BK), c + tl.arange(0, BC)
    at = ((split * K + ks) * TAPS + tap)[:, None] * C + cs[None, :]
    tl.store(parts + at, total, mask=(ks < K)[:, None] & (cs < C)[None, :])


@triton.jit
def _share(tiles, split, SPLITS: tl.constexpr):
    """Where a split begins: shares differ by one tile at most."""
    return split * (tiles // SPLITS) + tl.minimum(split, tiles % SPLITS)


@triton.jit
def bias_grad(
    gy,  # (N, H, W, K)
    parts,  # (SPLITS, K) float32
    N,
    H,
    W,
    K,
    INDEX: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (blocks of K, SPLITS)."""
    ks = tl.program_id(0) * BK + tl.arange(0, BK)
    pixels = N * H * W
    tiles = tl.cdiv(pixels, BP)
    split = tl.program_id(1)
    total = tl.zeros((BP, BK), tl.float32)
    for tile in tl.range(_share(tiles, split, SPLITS), _share(tiles, split + 1, SPLITS)):
        p = tile * BP + tl.arange(0, BP)
        at = p.to(INDEX)[:, None] * K + ks[None, :]
        total += tl.load(gy + at, mask=(p < pixels)[:, None] & (ks < K)[None, :], other=0.0).to(tl.float32)
    tl.store(parts + split * K + ks, tl.sum(total, axis=0), mask=ks < K)


@triton.jit
def weight_grad_reduce(
    parts,  # (SPLITS, K, TAPS, C) float32
    gw,  # (K, C, TAPS) by its strides
    K,
    C,
    stride_k,
    stride_c,
    stride_tap,
    TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits' sum, from the first to the last, in the gradient's own type and strides. Grid (blocks,)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < K * TAPS * C
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * (K * TAPS * C) + element, mask=inside, other=0.0)
    k, tap, c = element // (TAPS * C), element // C % TAPS, element % C
    tl.store(gw + k * stride_k + c * stride_c + tap * stride_tap, total.to(gw.dtype.element_ty), mask=inside)
