"""Which tile, how many warps and stages a Triton convolution takes: short lists, and a choice that measures nothing.

A list holds what makes sense on an architecture and why; :func:`choose` is a pure function of (kernel, architecture,
dtype, shape), so that ranks, captured graphs and resumed runs agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Architecture:
    """A GPU as far as the choice depends on it.

    Attributes:
        capability: 80, 90, 100, ...
        processors: Streaming multiprocessors.
        shared: Bytes of shared memory that one block may have.
    """

    capability: int
    processors: int
    shared: int

    @property
    def family(self) -> str:
        """Of the tables."""
        return f"sm_{self.capability}"

    @property
    def has_descriptors(self) -> bool:
        """Whether boxes of a tensor are copied in bulk (TMA)."""
        return self.capability >= 90


A100, H100, B200 = Architecture(80, 108, 166_912), Architecture(90, 132, 232_448), Architecture(100, 148, 232_448)


@functools.lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """Of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", A100.shared if found.major == 8 and not found.minor else 0)
    return Architecture(found.major * 10 + found.minor, found.multi_processor_count, shared or 101_376)


@dataclass(frozen=True)
class Configuration:
    """Of one launch of ``conv3x3`` or ``weight_grad``.

    Attributes:
        described: Over descriptors; else over pointers.
        rows, columns: The tile of pixels: a rectangle of an image over descriptors, rows = 1 over pointers.
        outs: Output channels of a program: BN of the convolution, BK of the weight gradient.
        channels: Input channels of a step (BC of the convolution), or of a program (BC of the weight gradient).
        warps, stages: Of Triton's launch.
        splits: Of the input channels (convolution), or of the pixels (weight gradient).
        speed: Expected, relative to the fastest tile of the list, where the tile is filled.
    """

    described: bool
    rows: int
    columns: int
    outs: int
    channels: int
    warps: int
    stages: int
    splits: int = 1
    speed: float = 1.0

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Problem:
    """The sizes of a convolution: x (n, h, w, c), y (n, h, w, k), taps 9 or 1, bytes of an element of x."""

    n: int
    h: int
    w: int
    c: int
    k: int
    taps: int
    size: int

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """As tables have it."""
        return self.n, self.h, self.w, self.c, self.k, self.taps


@functools.lru_cache(maxsize=4096)
def choose(kernel: str, architecture: Architecture, problem: Problem) -> Configuration:
    """The configuration of least expected time, over descriptors where there are some.

    Args:
        kernel: ``"conv3x3"`` or ``"weight_grad"``.
    """
    described = architecture.has_descriptors and describable(kernel, problem)
    known = candidates(kernel, architecture, problem, described)
    return min(known, key=lambda configuration: cost(kernel, architecture, problem, configuration))


def describable(kernel: str, problem: Problem) -> bool:
    """Whether tensor maps can be made of what it reads: strides are multiples of 16 bytes."""
    return all(c * problem.size % 16 == 0 for c in ([problem.c] if kernel == "conv3x3" else [problem.c, problem.k]))


def fitted(
    kernel: str, architecture: Architecture, problem: Problem, configuration: Configuration
) -> Configuration | None:
    """A configuration that was found best for another problem, cut to this one; None where it cannot run it."""
    cut = _cut(kernel, configuration, problem)
    described = architecture.has_descriptors and describable(kernel, problem)
    fits = shared_bytes(kernel, cut, problem.size) <= architecture.shared
    return cut if fits and (described or not cut.described) else None


@functools.lru_cache(maxsize=4096)
def candidates(kernel: str, architecture: Architecture, problem: Problem, described: bool) -> tuple[Configuration, ...]:
    """What may be launched, cut to the problem's channels; all fit in shared memory."""
    listed = _convolutions if kernel == "conv3x3" else _weight_grads
    found = []
    for configuration in listed(architecture, problem, described):
        cut = _cut(kernel, configuration, problem)
        if shared_bytes(kernel, cut, problem.size) <= architecture.shared:
            found += [replace(cut, splits=splits) for splits in _splits(kernel, architecture, problem, cut)]
    return tuple(dict.fromkeys(found))


def _convolutions(architecture: Architecture, problem: Problem, described: bool) -> Iterator[Configuration]:
    step = 128 // problem.size  # channels that make one row of a 128-byte swizzle
    if described:
        # One row of pixels keeps both operands in shared memory.
        yield Configuration(True, 1, 128, 256, step, warps=8, stages=4)
        # Two blocks on one multiprocessor: one computes while the other writes.
        yield Configuration(True, 1, 64, 256, step, warps=4, stages=3, speed=0.9)
        yield Configuration(True, 1, 128, 128, step, warps=8, stages=4, speed=0.85)
        yield Configuration(True, 1, 64, 128, step, warps=4, stages=4, speed=0.75)
        # Maps narrower than a row: the pixels pass through registers.
        for columns in (32, 16, 8):
            yield Configuration(True, 64 // columns, columns, 128, step, warps=4, stages=4, speed=0.6)
            yield Configuration(True, 128 // columns, columns, 256, step, warps=8, stages=3, speed=0.7)
    elif architecture.capability >= 90:
        yield Configuration(False, 1, 128, 128, step, warps=8, stages=3, speed=0.8)
        yield Configuration(False, 1, 64, 128, step, warps=4, stages=3, speed=0.6)
    else:
        # mma.sync takes its operands from registers: 64 x 32 of a warp read each of them least.
        yield Configuration(False, 1, 128, 128, step, warps=8, stages=3)
        yield Configuration(False, 1, 64, 128, step, warps=4, stages=3, speed=0.85)
        yield Configuration(False, 1, 64, 64, step, warps=4, stages=4, speed=0.7)


def _weight_grads(architecture: Architecture, problem: Problem, described: bool) -> Iterator[Configuration]:
    step = 128 // problem.size  # pixels of a step
    if described:
        wide = 256 if problem.size == 2 else 128  # transposed by wgmma where elements have 16 bits, else by threads
        for columns in (64, 32, 16, 8):
            if columns <= step:
                speed = 1.0 if columns == step else 0.7  # through registers
                yield Configuration(True, step // columns, columns, 128, wide, warps=8, stages=4, speed=speed)
                yield Configuration(True, step // columns, columns, 128, 128, warps=8, stages=4, speed=speed * 0.8)
    else:
        yield Configuration(False, 1, 32, 128, 128, warps=8, stages=3)
        yield Configuration(False, 1, 32, 64, 64, warps=4, stages=3, speed=0.7)


def _cut(kernel: str, configuration: Configuration, problem: Problem) -> Configuration:
    """Blocks of channels no larger than need be."""
    outs = min(configuration.outs, power_of_two(problem.k))
    channels = min(configuration.channels, power_of_two(problem.c))
    return replace(configuration, outs=outs, channels=channels)


def power_of_two(size: int) -> int:
    """That holds ``size``, 16 at least: what a tensor core takes."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def _splits(kernel: str, architecture: Architecture, problem: Problem, configuration: Configuration) -> tuple[int, ...]:
    """Where programs are fewer than the multiprocessors: as many splits as fill them once."""
    room = max(1, architecture.processors // programs(kernel, problem, configuration))
    if kernel == "conv3x3":
        steps = problem.taps * -(-problem.c // configuration.channels)
        return tuple(s for s in (1, 2, 4, 8) if s <= room and s <= max(1, steps // 4))
    most = max(1, (64 << 20) // (4 * problem.k * problem.c * problem.taps))  # 64 MB of partial sums
    return (min(room, most, max(1, tiles(problem, configuration))),)


def tiles(problem: Problem, configuration: Configuration) -> int:
    """Of pixels."""
    if not configuration.described:
        return -(-problem.pixels // configuration.pixels)
    return problem.n * -(-problem.h // configuration.rows) * -(-problem.w // configuration.columns)


def programs(kernel: str, problem: Problem, configuration: Configuration) -> int:
    """Of one split."""
    outs = -(-problem.k // configuration.outs)
    if kernel == "conv3x3":
        return outs * tiles(problem, configuration)
    return outs * problem.taps * -(-problem.c // configuration.channels)


def shared_bytes(kernel: str, configuration: Configuration, size: int) -> int:
    """Shared memory that a launch takes at most: the stages, and what the way out moves through it besides."""
    if kernel == "conv3x3":
        stage = (configuration.pixels + configuration.outs) * configuration.channels * size
        # A slice of the result, of at most 128 output channels, goes where the stages were.
        out = configuration.pixels * min(configuration.outs, 128) * 4
    else:
        stage = (configuration.outs + configuration.channels) * configuration.pixels * size
        out = configuration.outs * configuration.channels * 4
    return max(configuration.stages * stage, out) + 1024


def slices(configuration: Configuration, upsamples: bool) -> int:
    """In how many parts a program's output channels go the way out: registers and shared memory for 128, or half."""
    return min(4, max(1, configuration.outs // 128) * (2 if upsamples else 1))


def cost(kernel: str, architecture: Architecture, problem: Problem, configuration: Configuration) -> float:
    """Expected time, in multiplications of one multiprocessor: for comparison only."""
    share = programs(kernel, problem, configuration) * configuration.splits
    resident = 2 if configuration.warps == 4 else 1
    waves = math.ceil(share / (architecture.processors * resident)) * resident
    block = configuration.outs * configuration.channels
    if kernel == "conv3x3":
        steps = problem.taps * -(-problem.c // configuration.channels)
        work = configuration.pixels * block * (steps / configuration.splits + 4)  # filling the pipeline, the way out
    else:
        work = configuration.pixels * block * (tiles(problem, configuration) / configuration.splits + 8)
    # Partial sums are written and read once, at about a thousand operations a word.
    words = problem.pixels * problem.k if kernel == "conv3x3" else problem.k * problem.c * problem.taps
    partial = 0 if configuration.splits == 1 else 1000 * words * configuration.splits / architecture.processors
    return waves * work / configuration.speed + partial
