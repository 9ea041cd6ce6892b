"""Launches of the Triton kernels: grid, arguments and constants, from tensors that need not lie on a GPU.

Whoever runs a launch (the ``triton`` backend) and whoever only compiles it (tests, ``benchmarks/machine_code.py``) gets
the same one. Tensors are (N, C, H, W) in NHWC memory, on any device, ``meta`` included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refinenet_fast.backends.base import WayOut
from refinenet_fast.backends.configurations import (
    Configuration,
    Problem,
    power_of_two,
    programs,
    shared_bytes,
    slices,
)

STRIP = 16  # rows that one program of the pool's forward walks down
VECTOR = 16  # bytes that a thread loads at once
WARPS = 4  # of the kernels that multiply no matrices
REDUCED = (32, 64)  # pixels x output channels of a program that sums a convolution's splits
ELEMENTS = 1024  # of a program that sums a weight gradient's
MOST_PIXELS = 2**31 - 2**16  # of a batch: they are counted in int32, their addresses in int64 where need be


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel of ``refinenet_fast.kernels``.

    Attributes:
        arguments: Before the constants, in the kernel's order: tensors, tuples of tensors, Triton's descriptors, None,
            integers.
        room: Bytes of shared memory that it takes at most.
    """

    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = WARPS
    stages: int = 2
    room: int = 48 << 10  # what every GPU has

    @property
    def device(self) -> torch.device:
        return next(argument.device for argument in self.arguments if isinstance(argument, Tensor))


# -- convolution -------------------------------------------------------------------------------------------------------


def problem_of(
    x: Tensor,  # (N, C, H, W)
    k: int,
    taps: int,
    tf32: bool,
) -> Problem:
    n, c, h, w = x.shape
    return Problem(n, h, w, c, k, taps, x.element_size(), exact=x.dtype == torch.float32 and not tf32)


def convolution(
    x: Tensor,  # (N, C, H, W)
    packed: Tensor,  # (TAPS, K, C), as pack() makes it
    y: Tensor,  # (N, K, H, W), written
    relued: Tensor | None,  # (N, K, H, W), written
    relu_in: bool,
    way_out: WayOut,
    configuration: Configuration,
    rotated: bool = False,
    tf32: bool = True,
) -> list[Launch]:
    """``y`` = the way out of the convolution of ``x``, and ``relued`` its ReLU. Nothing is empty."""
    taps, k, _ = packed.shape
    problem = problem_of(x, k, taps, tf32)
    n, c, h, w = x.shape
    splits = configuration.splits
    offsets = _integers(splits * y.numel(), x.numel())
    end = _Out(y, relued, way_out)
    target, now = y, end
    if splits > 1:
        target = torch.empty((splits, n, h, w, k), dtype=torch.float32, device=x.device)
        now = _Out(y, None, WayOut())
    constants = {"TAPS": problem.taps, "ROTATED": rotated, "RELU_IN": relu_in, **now.constants}
    constants |= {"PRECISION": precision(tf32), "INDEX": offsets, "DESCRIBED": configuration.described}
    constants |= {"TH": configuration.rows, "TW": configuration.columns}
    constants |= {"BN": configuration.outs, "BC": configuration.channels}
    constants |= {"SPLITS": splits, "SLICES": slices(configuration, now.others, now.low is not None)}
    operands: tuple[Any, Any] = (x, packed)
    if configuration.described:
        box = (1, configuration.rows, configuration.columns, configuration.channels)
        operands = (boxes(x, box), boxes(packed, (1, configuration.outs, configuration.channels)))
    arguments = (*operands, target, *now.pointers, n, h, w, c, k, *now.sizes)
    grid = (programs("conv3x3", problem, configuration), splits)
    room = shared_bytes("conv3x3", configuration, problem)
    shape = (configuration.warps, configuration.stages, room)
    launches = [Launch("conv3x3", "conv3x3", grid, arguments, constants, *shape)]
    if splits > 1:
        pixels, outs = REDUCED
        constants = {**end.constants, "INDEX": offsets, "SPLITS": splits, "BM": pixels, "BN": outs}
        blocks = _blocks(problem.pixels, pixels) * _blocks(k, outs)
        sums = (target, y, *end.pointers, n, h, w, k, *end.sizes)
        launches.append(Launch("conv3x3", "conv3x3_reduce", (blocks,), sums, constants))
    return launches


def pool_convolution(
    x: Tensor,  # (N, C, H, W)
    packed: Tensor,  # (1, K, C), as pack() makes it
    y: Tensor,  # (N, K, H, W), written
    relued: Tensor | None,  # (N, K, H, W), written
    relu_in: bool,
    way_out: WayOut,
    tf32: bool = True,
) -> Launch:
    """``y`` = the way out of the 1x1 convolution of the 5x5 max pool of ``x``, in one pass. Nothing is empty."""
    (n, c, h, w), k = x.shape, packed.shape[1]
    # Larger tiles do not fit in the registers.
    columns, outs, channels = min(32, power_of_two(w)), min(256, power_of_two(k)), 64 // x.element_size()
    end = _Out(y, relued, way_out)
    constants = {"RELU_IN": relu_in, **end.constants, "PRECISION": precision(tf32)}
    constants |= {"INDEX": _integers(x.numel(), y.numel()), "BW": columns, "BN": outs, "BC": channels}
    constants |= {"SLICES": 2 if outs == 256 else 1}
    grid = (_blocks(w, columns) * _blocks(k, outs), _blocks(h, 2), n)
    arguments = (x, packed, y, *end.pointers, h, w, c, k, *end.sizes)
    return Launch("pool_conv1x1", "pool_conv1x1", grid, arguments, constants, warps=8, stages=1)  # 32 KB


class _Out:
    """A way out as the kernels take it."""

    def __init__(self, y: Tensor, relued: Tensor | None, way_out: WayOut) -> None:  # (N, K, H, W) each
        self.low = way_out.upsample
        adds = (*way_out.add, *way_out.add_relu)
        self.others = len(adds) + (way_out.select is not None)
        self.pointers = (relued, way_out.bias, way_out.select, adds, self.low)
        self.sizes = (1, 1) if self.low is None else tuple(self.low.shape[2:])
        self.constants = {
            "RELU_OUT": way_out.relu,
            "RAW": len(way_out.add),
            "CORNERS": way_out.align_corners,
            "COORDINATE": _coordinates(*y.shape[2:], *self.sizes),
        }


def weight_gradient(
    x: Tensor,  # (N, C, H, W)
    gy: Tensor,  # (N, K, H, W)
    gw: Tensor,  # (K, C, R, R), written; R x R dense
    relu_in: bool,
    configuration: Configuration,
    tf32: bool = True,
) -> list[Launch]:
    """``gw`` = the gradient in the weight. Nothing is empty."""
    (n, c, h, w), k, taps = x.shape, gy.shape[1], gw.shape[2] * gw.shape[3]
    splits = configuration.splits
    problem = problem_of(x, k, taps, tf32)
    parts = torch.empty((splits, k, taps, c), dtype=torch.float32, device=x.device)
    constants = {"TAPS": taps, "RELU_IN": relu_in, "PRECISION": precision(tf32)}
    constants |= {"INDEX": _integers(x.numel(), gy.numel()), "DESCRIBED": configuration.described}
    constants |= {"TH": configuration.rows, "TW": configuration.columns}
    constants |= {"BK": configuration.outs, "BC": configuration.channels, "SPLITS": splits}
    operands: tuple[Any, Any] = (x, gy)
    if configuration.described:
        tile = (1, configuration.rows, configuration.columns)
        operands = (boxes(x, (*tile, configuration.channels)), boxes(gy, (*tile, configuration.outs)))
    grid = (programs("weight_grad", problem, configuration), splits)
    arguments = (*operands, parts, n, h, w, c, k)
    room = shared_bytes("weight_grad", configuration, problem)
    shape = (configuration.warps, configuration.stages, room)
    product = Launch("weight_grad", "weight_grad", grid, arguments, constants, *shape)
    sums = (parts, gw, k, c, gw.stride(0), gw.stride(1), gw.stride(3))
    return [product, _sum_of_splits(sums, taps, splits, gw.numel())]


def _sum_of_splits(arguments: tuple[Any, ...], taps: int, splits: int, elements: int) -> Launch:
    constants = {"TAPS": taps, "SPLITS": splits, "BLOCK": ELEMENTS}
    return Launch("weight_grad", "weight_grad_reduce", (_blocks(elements, ELEMENTS),), arguments, constants)


def bias_gradient(
    gy: Tensor,  # (N, K, H, W)
    gb: Tensor,  # (K,), written
    splits: int,
) -> list[Launch]:
    """``gb`` = the sum of ``gy`` over its pixels. Nothing is empty."""
    n, k, h, w = gy.shape
    pixels, outs = _tile(gy)
    parts = torch.empty((splits, k), dtype=torch.float32, device=gy.device)
    constants = {"INDEX": _integers(gy.numel()), "BP": pixels, "BK": outs, "SPLITS": splits}
    total = Launch("weight_grad", "bias_grad", (_blocks(k, outs), splits), (gy, parts, n, h, w, k), constants)
    return [total, _sum_of_splits((parts, gb, k, 1, 1, 0, 0), 1, splits, k)]


def boxes(
    t: Tensor,  # (N, C, H, W) in NHWC memory, or (TAPS, K, C)
    box: tuple[int, ...],  # of (N, H, W, C), or (TAPS, K, C)
) -> Any:
    """Triton's descriptor of ``t``, its dimensions in the order of memory."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = list(t.permute(0, 2, 3, 1).shape if t.dim() == 4 else t.shape)
    strides = [1]
    for size in reversed(shape[1:]):  # those of dimensions of size 1, too: multiples of 16 bytes
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(t, shape, strides, list(box))


def precision(tf32: bool) -> str:
    """Of products of float32: TF32, or three of them, as exact as float32."""
    return "tf32" if tf32 else "tf32x3"


# -- pooling and resampling --------------------------------------------------------------------------------------------


def pool(
    x: Tensor,  # (N, C, H, W)
    y: Tensor,  # (N, C, H, W), written
    argmax: Tensor | None,  # (N, C, H, W) uint8, written
    relu: bool,
) -> Launch:
    n, c, h, w = x.shape
    columns, channels = _tile(x)
    grid = (_blocks(w, columns) * _blocks(c, channels), _blocks(h, STRIP), n)
    constants = {"RELU": relu, "STRIP": STRIP, "BW": columns, "BC": channels}
    if argmax is None:
        return Launch("maxpool5", "maxpool5_inference", grid, (x, y, h, w, c), constants)
    return Launch("maxpool5", "maxpool5_forward", grid, (x, y, argmax, h, w, c), constants)


def pool_backward(
    gy: Tensor,  # (N, C, H, W)
    argmax: Tensor,  # (N, C, H, W) uint8
    add: Tensor | None,  # (N, C, H, W)
    gx: Tensor,  # (N, C, H, W), written
) -> Launch:
    n, c, h, w = gy.shape
    pixels, channels = _tile(gy)
    grid = (_blocks(h * w, pixels) * _blocks(c, channels), n)
    constants = {"BP": pixels, "BC": channels}
    return Launch("maxpool5", "maxpool5_backward", grid, (gy, argmax, add, gx, h, w, c), constants)


def upsampling(
    x: Tensor,  # (N, C, h, w)
    add: Tensor | None,  # (N, C, H, W)
    y: Tensor,  # (N, C, H, W), written; may be add
    align_corners: bool,
) -> Launch:
    n, c, *small = x.shape
    large = y.shape[2:]
    pixels, channels = _tile(x)
    grid = (_blocks(large[0] * large[1], pixels) * _blocks(c, channels), n)
    constants = {"CORNERS": align_corners, "INDEX": _coordinates(*small, *large), "BP": pixels, "BC": channels}
    return Launch("bilinear", "bilinear_forward", grid, (x, add, y, *small, *large, c), constants)


def upsampling_backward(
    gy: Tensor,  # (N, C, H, W)
    gx: Tensor,  # (N, C, h, w), written
    align_corners: bool,
) -> Launch:
    n, c, *large = gy.shape
    small = gx.shape[2:]
    columns, channels = _tile(gy)
    grid = (_blocks(small[1], columns) * _blocks(c, channels), small[0], n)
    constants = {"CORNERS": align_corners, "INDEX": _coordinates(*small, *large), "BW": columns, "BC": channels}
    return Launch("bilinear", "bilinear_backward", grid, (gy, gx, *small, *large, c), constants)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _tile(x: Tensor) -> tuple[int, int]:  # x: (N, C, H, W)
    """(pixels, channels) of a program: one vector a thread, up to 64 channels of a pixel beside each other."""
    elements = 32 * WARPS * VECTOR // x.element_size()
    channels = min(64, 1 << max(x.shape[1] - 1, 0).bit_length())
    return elements // channels, channels


def _integers(*numbers: int) -> Any:
    """The integers that hold them."""
    import triton.language as tl

    return tl.int32 if max(numbers) < 2**31 else tl.int64


def _coordinates(*sizes: int) -> Any:
    """The integers in which the products of two sizes are exact."""
    return _integers((2 * max(sizes) + 1) * max(sizes))
