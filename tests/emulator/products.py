"""Launches of the CUDA products: host code of the convolutions' and the weight gradient's files in csrc/cuda.

Tiles, blocks, shared memory and splits come from ``csrc/cuda/plan.h`` and ``plan_sm90.h`` themselves. The rest of that
host code is here once more, in Python: which kernel it is, structs of arguments, dividers, tensor maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emulator.launch import Struct
from emulator.tensormap import TensorMap

THREADS, SUM_THREADS = 128, 256  # kProductThreads, kThreads
# kBlockThreads, kCluster, kTileRows, kTileColumns, kSlice in csrc/cuda/plan_sm90.h; what a warp stores at once there
SM90_THREADS, SM90_CLUSTER, SM90_ROWS, SM90_COLUMNS, SM90_SLICE = 384, 2, 16, 8, 64
SM90_STORED = (1, 2, 8, 32)
MOST_ADDS, TILE_EDGE = 8, 8  # kMostAdds, kTileEdge
CHUNK = 16
# By the numbers of DType in csrc/common/arguments.h: bytes of an element; its name, and its arithmetic's, as mangled.
SIZES = {0: 4, 1: 2, 2: 2}
ELEMENTS = {0: "f", 1: "13__nv_bfloat16", 2: "6__half"}
PRODUCTS = {(0, False): "4Tf32", (0, True): "6Tf32x3", 1: "8BFloat16", 2: "7Float16"}


class Plan(NamedTuple):
    """As csrc/cuda/plan.h has it."""

    tile: int
    piece: int
    blocks: int
    shared: int
    splits: int
    shares: int
    parts: int


class HopperPlan(NamedTuple):
    """As csrc/cuda/plan_sm90.h has it."""

    outs: int
    blocks: int
    shared: int
    splits: int
    parts: int


class Launch(NamedTuple):
    """Of the one kernel of ``source`` whose mangled name has ``name`` in it."""

    source: str
    name: str
    blocks: int
    threads: int
    shared: int
    arguments: tuple[object, ...]
    cluster: int = 1


def bytes_at(address: int, size: int) -> np.ndarray | int:
    """The memory there; 0 for no tensor."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if address else 0


def divider(by: int) -> tuple[int, int, int]:
    """As csrc/cuda/index.h makes it."""
    bits = (by - 1).bit_length()
    return by, -(-(1 << 31 + bits) // by), 31 + bits


def product_of(dtype: int, exact: bool) -> str:
    return PRODUCTS[dtype, exact] if dtype == 0 else PRODUCTS[dtype]


def name_of(kernel: str, dtype: int, exact: bool, relu_in: bool) -> str:
    """Of an instance, as it is mangled, up to what differs between kernels."""
    way_in = "9Rectified" if relu_in else "9Unchanged"
    return f"{kernel}INS0_{product_of(dtype, exact)}ENS0_{way_in}E"


def copied(plan: Plan) -> str:
    """What of an instance's mangled name the plan decides."""
    return f"NS0_{'10CopyChunks' if plan.piece == CHUNK else '10CopyPieces'}ELi{plan.tile}E"


def convolution(
    plan: Plan | HopperPlan,
    x: int,
    weights: int,
    parts: int,
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
    pool_in: bool,
    tile: int,
    splits: int,
    sm80_loop: bool,
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
    pixels, taps = bytes_at(x, n * h * w * c * size), bytes_at(weights, side * side * k * pitch)
    options = n, h, w, c, k, side, dtype, tile, plan.splits, exact, turned, relu_in, pool_in, sm80_loop
    sums = bytes_at(parts, plan.parts * 4)
    asked = sums, *way_out, *options
    layout = f"3Q{4 + MOST_ADDS + 1}Qqq?7xqq?7x2i?7x4qq4i5?3x"
    whole_out = k * size % CHUNK == 0 and not any(m % CHUNK for m in [*maps, parts])
    lanes = CHUNK // size if whole_out else 1
    given = Struct(f"{layout}9I4x", (0, 0, *asked, *divider(k // lanes), *divider(h), *divider(w)))
    threads = -(-n * h * w * k // lanes // SUM_THREADS)
    name = f"splits_kernelI{ELEMENTS[dtype]}Li{lanes}E"
    summed = [Launch("cuda/conv3x3_splits.cu", name, threads, SUM_THREADS, 0, (given,))] * (plan.splits > 1)
    if isinstance(plan, HopperPlan):
        stored = (0, 0) if add or low or select or summed else way_out[:2]  # is_plain()
        box, part = (1, SM90_ROWS + side // 2 * 2, SM90_COLUMNS, SM90_SLICE), plan.outs // SM90_CLUSTER
        arguments = (
            tensor_map(pixels, (n, h, w, c), box, dtype),
            tensor_map(taps, (side * side, k, c), (1, part, SM90_SLICE), dtype),
            *(tensor_map(m, (n, h, w, k), SM90_STORED, dtype) for m in stored),
            Struct(layout, (0, 0, *asked)),
        )
        name = f"{name_of('wgmma_kernel', dtype, exact, relu_in)}Li{plan.outs}E"
        source = "cuda/conv3x3_sm90.cu"
        return [Launch(source, name, plan.blocks, SM90_THREADS, plan.shared, arguments, SM90_CLUSTER), *summed]
    down, across = (-(-h // TILE_EDGE), -(-w // TILE_EDGE)) if pool_in else (h, w)
    request = Struct(
        f"{layout}IIIIII?3xi", (pixels, taps, *asked, *divider(down), *divider(across), whole_out, plan.piece)
    )
    if pool_in:
        name = f"pool_kernelINS0_{product_of(dtype, exact)}ELi{side}ELi{plan.tile}E"
        return [Launch("cuda/pool_conv3x3.cu", name, plan.blocks, THREADS, plan.shared, (request,))]
    name = name_of("conv_kernel", dtype, exact, relu_in) + copied(plan)
    return [Launch("cuda/conv3x3.cu", name, plan.blocks, THREADS, plan.shared, (request,)), *summed]


def tensor_map(memory: np.ndarray | int, shape: tuple[int, ...], box: tuple[int, ...], dtype: int) -> TensorMap | bytes:
    """As csrc/cuda/tensor_map.h has the driver make it; of no tensor, zeros."""
    if not isinstance(memory, np.ndarray):
        return bytes(128)
    return TensorMap(memory.view(np.uint16).reshape(shape), box, "bf16" if dtype == 1 else "f16", 2 * box[-1])


def weight_gradient(
    plan: Plan,
    x: int,
    gy: int,
    parts: int,
    gw: int,
    gb: int,
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
        "5Q3q4qq5i2?2xIIIIIIiii4x",
        (
            *(bytes_at(x, pixels * c * size), bytes_at(gy, pixels * k * size)),
            *(bytes_at(parts, plan.parts * 4), bytes_at(gw, elements * SIZES[gw_dtype])),
            bytes_at(gb, k * 4),
            *(*strides, n, h, w, c, k, side, splits, dtype, gw_dtype, tile, exact, relu_in),
            *(*divider(h), *divider(w), splits, plan.shares, plan.piece),
        ),
    )
    name = name_of("grad_kernel", dtype, exact, relu_in) + copied(plan)
    total = -(-(elements + (k if gb else 0)) // SUM_THREADS)
    return [
        Launch("cuda/weight_grad.cu", name, plan.blocks, THREADS, plan.shared, (request,)),
        Launch("cuda/weight_grad.cu", f"sum_kernelI{ELEMENTS[gw_dtype]}E", total, SUM_THREADS, 0, (request,)),
    ]
