"""What makes a probe of a launch, in few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from probes import Argument, Probe
from probes.layouts import poisoned

FULL = 2**32 - 1


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, np.uint32)


def empty(*shape: int) -> np.ndarray:
    return poisoned(shape, np.uint32)


def probe(
    name: str,
    source: str,
    kernel: str,
    arguments: Callable[[np.random.Generator], list[Argument]],
    expected: Callable[..., Sequence[np.ndarray] | np.ndarray],
    outputs: tuple[int, ...] = (-1,),
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (32,),
    cluster: tuple[int, ...] = (1,),
    shared: int = 0,
    arch: str = "sm_80",
) -> Probe:
    """`expected` takes the arguments apart; negative outputs count from the last argument."""
    count = len(arguments(np.random.default_rng(0)))

    def results(arguments: list[Argument]) -> list[np.ndarray]:
        result = expected(*arguments)
        return [result] if isinstance(result, np.ndarray) else list(result)

    outputs = tuple(o % count for o in outputs)
    return Probe(name, source, kernel, arguments, results, outputs, grid, block, cluster, shared, arch)


def random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, np.uint8)


def integral(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-1000, 1000, shape).astype(np.float32)
