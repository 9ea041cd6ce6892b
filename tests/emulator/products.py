"""Launches of the CUDA backend's convolution and weight gradient: the host code of csrc/cuda/{conv3x3,weight_grad}.cu.

What they are made of, tiles, blocks and shared memory, comes from ``csrc/cuda/plan.h`` itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emulator.launch import Struct

THREADS, SUM_THREADS = 128, 256  # kProductThreads, kThreads
MOST_ADDS = 8
CHUNK = 16
# By the numbers of DType in csrc/common/arguments.h: bytes of an element; its name, and its arithmetic's, as mangled.
SIZES = {0: 4, 1: 2, 2: 2}
ELEMENTS = {0: "f", 1: "13__nv_bfloat16", 2: "6__half"}
PRODUCTS = {(0, False): "4Tf32", (0, True): "6Tf32x3", 1: "8BFloat16", 2: "7Float16"}


class Plan(NamedTuple):
    """As csrc/cuda/plan.h has it."""

    tile: int
    whole_chunks: bool
    blocks: int
    shared: int
    splits: int


class Launch(NamedTuple):
    """Of the one kernel of ``source`` whose mangled name has ``name`` in it."""

    source: str
    name: str
    blocks: int
    threads: int
    shared: int
    request: Struct


def bytes_at(address: int, size: int) -> np.ndarray | int:
    """The memory there; 0 for no tensor."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if address else 0


def divider(by: int) -> tuple[int, int, int]:
    """As csrc/cuda/index.h makes it."""
    bits = (by - 1).bit_length()
    return by, -(-(1 << 31 + bits) // by), 31 + bits


def name_of(kernel: str, plan: Plan, dtype: int, exact: bool, relu_in: bool) -> str:
    """Of an instance, as it is mangled."""
    product = PRODUCTS[dtype, exact] if dtype == 0 else PRODUCTS[dtype]
    way_in = "9Rectified" if relu_in else "9Unchanged"
    copy = "10CopyChunks" if plan.whole_chunks else "12CopyElements"
    return f"{kernel}INS0_{product}ENS0_{way_in}ENS0_{copy}ELi{plan.tile}E"


def convolution(
    plan: Plan,
    x: int,
    weights: int,
    y: int,
    relued: int,
    bias: int,
    select: int,
    add: Sequence[int],
    raw_adds: int,
    low: int,
    low_h: int,
    low_w: int,
    corners: bool,
    relu_out: bool,
    sizes: tuple[int, int, int, int, int],
    side: int,
    dtype: int,
    exact: bool,
    turned: bool,
    relu_in: bool,
    tile: int,
) -> list[Launch]:
    """Of ``_C.cuda_conv3x3``."""
    (n, h, w, c, k), size = sizes, SIZES[dtype]
    maps = [y, relued, select, *add, low]
    outs = n * h * w * k * size
    adds = [bytes_at(a, outs) for a in add]
    way_out = (
        *(bytes_at(y, outs), bytes_at(relued, outs), bytes_at(bias, 4 * k), bytes_at(select, outs)),
        *(*adds, *[0] * (MOST_ADDS - len(adds)), bytes_at(low, n * low_h * low_w * k * size)),
        *(low_h, h, corners, low_w, w, corners, len(adds), raw_adds, relu_out),
    )
    pitch = -(-c * size // CHUNK) * CHUNK
    request = Struct(
        f"2Q{4 + MOST_ADDS + 1}Qqq?7xqq?7x2i?7x4qq3i3?xIIIIII?7x",
        (
            *(bytes_at(x, n * h * w * c * size), bytes_at(weights, side * side * k * pitch)),
            *(*way_out, n, h, w, c, k, side, dtype, tile, exact, turned, relu_in),
            *(*divider(h), *divider(w), k * size % CHUNK == 0 and not any(m % CHUNK for m in maps)),
        ),
    )
    name = name_of("conv_kernel", plan, dtype, exact, relu_in)
    return [Launch("cuda/conv3x3.cu", name, plan.blocks, THREADS, plan.shared, request)]


def weight_gradient(
    plan: Plan,
    x: int,
    gy: int,
    parts: int,
    gw: int,
    strides: tuple[int, int, int],
    sizes: tuple[int, int, int, int, int],
    side: int,
    splits: int,
    dtype: int,
    gw_dtype: int,
    exact: bool,
    relu_in: bool,
    tile: int,
) -> list[Launch]:
    """Of ``_C.cuda_weight_grad``."""
    (n, h, w, c, k), size, elements = sizes, SIZES[dtype], side * side * sizes[3] * sizes[4]
    pixels = n * h * w
    request = Struct(
        "4Q3q4qq5i2?2xIIIIIIi4x",
        (
            *(bytes_at(x, pixels * c * size), bytes_at(gy, pixels * k * size)),
            *(bytes_at(parts, splits * elements * 4), bytes_at(gw, elements * SIZES[gw_dtype])),
            *(*strides, n, h, w, c, k, side, splits, dtype, gw_dtype, tile, exact, relu_in),
            *(*divider(h), *divider(w), splits),
        ),
    )
    name = name_of("grad_kernel", plan, dtype, exact, relu_in)
    total = -(-elements // SUM_THREADS)
    return [
        Launch("cuda/weight_grad.cu", name, plan.blocks, THREADS, plan.shared, request),
        Launch("cuda/weight_grad.cu", f"sum_kernelI{ELEMENTS[gw_dtype]}E", total, SUM_THREADS, 0, request),
    ]
