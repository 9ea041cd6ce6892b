"""Which tile, how many warps and stages a Triton convolution takes: short lists, and a choice that measures nothing.

A list holds what makes sense on an architecture and why; :func:`choose` is a pure function of (kernel, architecture,
dtype, shape), so that ranks, captured graphs and resumed runs agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

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
    """The sizes of a convolution: x (n, h, w, c), y (n, h, w, k), taps 9 or 1, bytes of an element of x.

    Attributes:
        exact: Products of float32 as three of TF32 each, not one.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    taps: int
    size: int
    exact: bool = False

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """As tables have it."""
        return self.n, self.h, self.w, self.c, self.k, self.taps


@functools.lru_cache(maxsize=4096)
def choose(kernel: str, architecture: Architecture, problem: Problem) -> Configuration:
    """The configuration of least expected time.

    Args:
        kernel: ``"conv3x3"`` or ``"weight_grad"``.
    """
    known = candidates(kernel, architecture, problem)
    return min(known, key=lambda configuration: cost(kernel, architecture, problem, configuration))


def describable(kernel: str, problem: Problem) -> bool:
    """Whether tensor maps can be made of what it reads: strides are multiples of 16 bytes."""
    return all(c * problem.size % 16 == 0 for c in ([problem.c] if kernel == "conv3x3" else [problem.c, problem.k]))


def fitted(kernel: str, architecture: Architecture, problem: Problem, choice: dict[str, Any]) -> Configuration | None:
    """A table's choice, found best for another problem, cut to this one; None where it is none or cannot run this."""
    kinds = {field.name: str(field.type) for field in fields(Configuration)}
    if set(choice) != set(kinds) or not all(_is_a(kinds[name], value) for name, value in choice.items()):
        return None
    configuration = Configuration(**choice)
    tile = (configuration.pixels, configuration.outs, configuration.channels, configuration.warps)
    if any(size & (size - 1) for size in tile) or min(tile[:3]) < 16 or configuration.columns & 7:
        return None
    cut = _cut(kernel, configuration, problem)
    described = architecture.has_descriptors and describable(kernel, problem)
    fits = shared_bytes(kernel, cut, problem) <= architecture.shared and not _overflows(architecture, problem, cut)
    return cut if fits and (described or not cut.described) else None


def _is_a(kind: str, value: Any) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, bool) if kind == "bool" else isinstance(value, int | float) and value > 0


@functools.lru_cache(maxsize=4096)
def candidates(kernel: str, architecture: Architecture, problem: Problem) -> tuple[Configuration, ...]:
    """What may be launched, cut to the problem's channels; all fit in shared memory. One at least."""
    listed = _convolutions if kernel == "conv3x3" else _weight_grads
    described = architecture.has_descriptors and describable(kernel, problem)
    found = []
    for configuration in listed(architecture, problem):
        cut = _cut(kernel, configuration, problem)
        if cut.described and not described:
            continue
        if shared_bytes(kernel, cut, problem) <= architecture.shared and not _overflows(architecture, problem, cut):
            found += [replace(cut, splits=splits) for splits in _splits(kernel, architecture, problem, cut)]
    return tuple(dict.fromkeys(found))


def _overflows(architecture: Architecture, problem: Problem, configuration: Configuration) -> bool:
    """Whether three products in tensor memory, from sm_100 on, take more than its 512 columns."""
    return architecture.capability >= 100 and problem.exact and configuration.outs > 128


def _convolutions(architecture: Architecture, problem: Problem) -> Iterator[Configuration]:
    step = 128 // problem.size  # channels that make one row of a 128-byte swizzle
    # One row of pixels keeps both operands in shared memory.
    if not problem.exact:
        yield Configuration(True, 1, 128, 256, step, warps=8, stages=4)
        # Two blocks on one multiprocessor: one computes while the other writes.
        yield Configuration(True, 1, 64, 256, step, warps=4, stages=3, speed=0.9)
        yield Configuration(True, 1, 128, 128, step, warps=8, stages=4, speed=0.85)
        yield Configuration(True, 1, 64, 128, step, warps=4, stages=4, speed=0.75)
    yield Configuration(True, 1, 128, 128, step, warps=8, stages=3, speed=0.7)
    if architecture.capability >= 100:
        # Maps narrower than a row. On sm_90 boxes pass through registers, and wgmma waits for each.
        for columns in (32, 16, 8):
            yield Configuration(True, 128 // columns, columns, 128, step, warps=8, stages=3, speed=0.7)
    # Triton copies asynchronously where rows are multiples of 16 elements; others pass through registers one by one.
    aligned = problem.c % 16 == 0 and problem.k % 16 == 0
    if problem.exact or not aligned:  # three products, too, need registers
        yield Configuration(False, 1, 128, 64, 32, warps=8, stages=3, speed=0.4)
        yield Configuration(False, 1, 64, 64, 32 if problem.exact else 16, warps=4, stages=3, speed=0.3)
        return
    # Over pointers nothing is wasted at the borders; threads compute addresses instead of TMA.
    slower = 0.8 if architecture.has_descriptors else 1.0
    yield Configuration(False, 1, 128, 128, step, warps=8, stages=3, speed=slower)
    yield Configuration(False, 1, 64, 128, step, warps=4, stages=3, speed=0.85 * slower)
    yield Configuration(False, 1, 64, 64, step, warps=4, stages=3, speed=0.7 * slower)


def _weight_grads(architecture: Architecture, problem: Problem) -> Iterator[Configuration]:
    step = 128 // problem.size  # pixels of a step
    # Transposed by wgmma where elements have 16 bits, else by threads.
    for wide in (256, 128) if problem.size == 2 else (128,):
        for columns in (64, 32, 16, 8):
            if columns <= step:
                speed = (1.0 if columns == step else 0.7) * (1.0 if wide == 256 else 0.8)  # or through registers
                yield Configuration(True, step // columns, columns, 128, wide, warps=8, stages=4, speed=speed)
    if not problem.exact:
        yield Configuration(False, 1, 32, 128, 128, warps=8, stages=3, speed=0.7)
    yield Configuration(False, 1, 32, 64, 64, warps=4, stages=3, speed=0.5)


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


def shared_bytes(kernel: str, configuration: Configuration, problem: Problem) -> int:
    """Shared memory that a launch takes at most: the stages, and what the way out moves through it besides."""
    if kernel == "conv3x3":
        stage = (configuration.pixels + configuration.outs) * configuration.channels * problem.size
        # A slice of the result, of at most 128 output channels, goes where the stages were.
        out = configuration.pixels * min(configuration.outs, 128) * 4
    else:
        stage = (configuration.outs + configuration.channels) * configuration.pixels * problem.size
        out = configuration.outs * configuration.channels * 4
    # Three products read what is left of their operands by rounding, too.
    return max((configuration.stages + problem.exact) * stage, out) + 1024


def slices(configuration: Configuration, others: int, upsamples: bool) -> int:
    """In how many parts a program's output channels go the way out, so that registers and shared memory suffice.

    Args:
        others: How many tensors of the result's size are read on the way.
    """
    return min(4, max(1, configuration.outs // 128) * (2 if upsamples or others > 2 else 1))


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
