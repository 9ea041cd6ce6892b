"""The hand-made convolutions of conv_sm80.cu and conv_sm90.cu at small, mostly ragged sizes."""

from __future__ import annotations

from math import ceil

import numpy as np

from emulator.tensormap import TensorMap
from probes import Argument, Probe
from probes.layouts import bf16, from_bf16, poisoned

TOLERANCE = 4e-3  # rounding to bfloat16 alone makes 1.7e-3
SHARED = 115776  # of conv_sm90.cu
# Of the arguments: the outputs' positions.
SM80_Y, SM90_Y = 4, 2


def _random(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """bfloat16 bits."""
    return bf16(scale * rng.standard_normal(shape))


def _exact(bits: np.ndarray) -> np.ndarray:
    return from_bf16(bits).astype(np.float64)


def conv3x3(
    x: np.ndarray,  # (N, H, W, C), bfloat16 bits
    w: np.ndarray,  # (K, 3, 3, C) or (K, 9, C), bfloat16 bits
    bias: np.ndarray,  # (K,)
    residual: np.ndarray | None = None,  # (N, H, W, K), bfloat16 bits
) -> np.ndarray:
    """The convolution in float64, (N, H, W, K): stride 1, zero padding 1."""
    n, height, width, c = x.shape
    padded = np.pad(_exact(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    weights = _exact(w).reshape(len(w), 3, 3, c)
    y = np.zeros((n, height, width, len(w))) + bias
    for dy in range(3):
        for dx in range(3):
            y += padded[:, dy : dy + height, dx : dx + width] @ weights[:, dy, dx].T
    return y if residual is None else y + _exact(residual)


def _inputs(rng: np.random.Generator, n: int, h: int, w: int, c: int, k: int) -> tuple[np.ndarray, ...]:
    x = _random(rng, n, h, w, c)
    weights = _random(rng, k, 3, 3, c, scale=(9 * c) ** -0.5)
    bias = rng.standard_normal(k).astype(np.float32)
    return x, weights, bias, poisoned((n, h, w, k), np.uint16)


def _sizes(*sizes: int) -> list[Argument]:
    return [np.int32(size) for size in sizes]


def _sm80(n: int, h: int, w: int, c: int, k: int, residual: bool = False) -> Probe:
    def arguments(rng: np.random.Generator) -> list[Argument]:
        x, weights, bias, y = _inputs(rng, n, h, w, c, k)
        added = _random(rng, *y.shape) if residual else np.uint64(0)
        return [x, weights, bias, added, y, *_sizes(n, h, w, c, k)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        x, weights, bias, added = arguments[:4]
        return [conv3x3(x, weights, bias, added if residual else None)]

    return Probe(
        f"conv3x3_sm80_{n}x{h}x{w}x{c}_{k}" + "_residual" * residual,
        "conv_sm80.cu",
        "conv3x3_sm80",
        arguments,
        expected,
        (SM80_Y,),
        grid=(ceil(n * h * w / 64), ceil(k / 64)),
        block=(128,),
        tolerance=TOLERANCE,
    )


def _sm90(n: int, h: int, w: int, c: int, k: int, blocks: int, cluster: int = 1) -> Probe:
    def arguments(rng: np.random.Generator) -> list[Argument]:
        x, weights, bias, y = _inputs(rng, n, h, w, c, k)
        maps = [
            TensorMap(x, (1, 16, 8, 64), "bf16", 128),
            TensorMap(weights.reshape(k, 9, c), (64 // cluster, 1, 64), "bf16", 128),
            TensorMap(y, (1, 8, 8, 64), "bf16", 128),
        ]
        return [*maps, bias, *_sizes(n, h, w, c, k)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        x_map, w_map, _, bias = arguments[:4]
        return [conv3x3(x_map.array, w_map.array, bias)]

    kernel = "conv3x3_sm90_cluster" if cluster > 1 else "conv3x3_sm90"
    return Probe(
        f"{kernel}_{n}x{h}x{w}x{c}_{k}",
        "conv_sm90.cu",
        kernel,
        arguments,
        expected,
        (SM90_Y,),
        grid=(blocks,),
        block=(384,),
        cluster=(cluster,),
        shared=SHARED,
        arch="sm_90a",
        tolerance=TOLERANCE,
    )


PROBES: tuple[Probe, ...] = (
    _sm80(1, 5, 7, 64, 64),  # one block, half of its pixels beyond the image
    _sm80(2, 5, 7, 40, 72, residual=True),  # a tile over two images; both channels end within a tile
    _sm80(1, 8, 8, 128, 64, residual=True),  # nothing ragged
    _sm80(1, 9, 16, 72, 24),
    _sm80(3, 1, 1, 8, 8),  # images all border, a slice nearly all zeros
    # Two tiles a block, 18 steps: more than four laps of the ring, the second tile's starting within a lap.
    _sm90(1, 9, 16, 64, 128, blocks=2),
    _sm90(2, 5, 7, 72, 72, blocks=1),  # four tiles; a second slice of 8 channels, a second tile of 8 output channels
    _sm90(1, 8, 8, 128, 64, blocks=3),  # two blocks without work, a warpgroup all below the image
    _sm90(1, 9, 16, 64, 128, blocks=2, cluster=2),
    _sm90(3, 5, 7, 72, 72, blocks=4, cluster=2),  # two clusters; an odd number of tiles of pixels
)
