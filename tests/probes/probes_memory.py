"""Probes of loads, stores, atomic operations and cp.async."""

from __future__ import annotations

import numpy as np

from probes import Argument, Probe
from probes.launches import FULL, empty, integral, probe, random_bytes, words
from probes.layouts import poisoned

# ---- cp.async -------------------------------------------------------------------------------------------------------

PIECES = np.repeat([4, 8, 16, 16], 32)  # bytes


def given(rng: np.random.Generator) -> np.ndarray:
    counts = rng.integers(0, PIECES + 1).astype(np.uint32)
    counts[::32], counts[1::32] = 0, PIECES[::32]
    return counts.reshape(4, 32)


def filled(data: np.ndarray, given: np.ndarray, _: Argument) -> np.ndarray:
    place = np.concatenate([np.arange(size) for size in PIECES])
    return np.where(place < np.repeat(given.reshape(-1), PIECES), data, 0).astype(np.uint8)


def reversed_plus_one(a: np.ndarray, *_: Argument) -> np.ndarray:
    return a[..., ::-1] + np.float32(1)


def pipeline(stages: int, tiles: int) -> Probe:
    return probe(
        f"cp_async_pipeline_{stages}_{tiles}",
        "cp_async.cu",
        f"pipeline_{stages}",
        lambda rng: [integral(rng, tiles, 128), np.uint32(tiles), poisoned((tiles, 128), np.float32)],
        reversed_plus_one,
    )


def arrive(kernel: str) -> Probe:
    return probe(
        f"cp_async_{kernel}",
        "cp_async.cu",
        kernel,
        lambda rng: [integral(rng, 128), poisoned(128, np.float32)],
        reversed_plus_one,
    )


CP_ASYNC = (
    probe(
        "cp_async_sizes",
        "cp_async.cu",
        "sizes",
        lambda rng: [random_bytes(rng, 1408), given(rng), poisoned(1408, np.uint8)],
        filled,
    ),
    probe(
        "cp_async_whole",
        "cp_async.cu",
        "whole",
        lambda rng: [random_bytes(rng, 1408), poisoned(1408, np.uint8)],
        lambda data, _: data.copy(),
    ),
    *(pipeline(stages, tiles) for stages in (2, 3) for tiles in (1, 2, 7)),
    *map(arrive, ("arrive_noinc", "arrive_inc")),
)

# ---- Loads, stores, atomic operations --------------------------------------------------------------------------------


def extends(data: np.ndarray, *_: Argument) -> tuple[np.ndarray, np.ndarray]:
    word = data.view(np.uint32)[:, 0]
    high = data.view(np.uint16)[:, 1]
    signed = [
        data[:, 0].view(np.int8).astype(np.int32).view(np.uint32),
        high.view(np.int16).astype(np.int32).view(np.uint32),
    ]
    columns = [data[:, 0].astype(np.uint32), signed[0], high.astype(np.uint32), signed[1], word]
    return np.stack(columns, axis=1), (word >> 4).astype(np.uint8)


def local_constant(a: np.ndarray, _: Argument) -> np.ndarray:
    table = [2, 3, 5, 7, 11, 13, 17, 19]
    result = []
    for i, value in enumerate(map(int, a)):
        mine = [16 * i + j for j in range(16)]
        for j in range(4):
            mine[(value + j) % 16] += table[(value >> 4) % 8] * (j + 1)
        total = 0
        for element in mine:
            total = total * 3 + element
        result.append(total & FULL)
    return np.array(result, np.uint32)


def shared_kinds(a: np.ndarray, _: Argument) -> np.ndarray:
    i, mirrored = np.arange(64), a[::-1]
    value = np.where(i % 3 == 0, mirrored, np.where(i % 3 == 1, mirrored ^ 0xFFFF, a))
    return (value + (mirrored >> 8 & 255)).astype(np.uint32)


def atomics(a: np.ndarray, d: np.ndarray, _: Argument, total: np.ndarray) -> tuple[np.ndarray, ...]:
    def signed(x: np.ndarray) -> np.ndarray:
        return x.view(np.int32)

    after = d.copy()
    after[0] += a.sum(dtype=np.uint32)
    after[1], after[2] = min(d[1], a.min()), max(d[2], a.max())
    signed(after)[3], signed(after)[4] = min(signed(d)[3], signed(a).min()), max(signed(d)[4], signed(a).max())
    after[5], after[6] = d[5] | np.bitwise_or.reduce(a), d[6] ^ np.bitwise_xor.reduce(a)
    after[7:] = 1, 1, sum(range(65)), 0
    return after, after, total + (a % 1024).sum().astype(np.float32)


def atomics_arguments(rng: np.random.Generator) -> list[Argument]:
    d = np.array([5, FULL, 0, 2**31 - 1, 2**31, 1, 3, 0, 0, 0, 0], np.uint32)
    return [words(rng, 64), d, empty(11), np.array([0.5], np.float32)]


def tickets_expected(*_: Argument) -> tuple[np.ndarray, ...]:
    return np.array([128], np.uint32), np.ones(128, np.uint32)


def wide_atomics(a: np.ndarray, d: np.ndarray, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = a.astype(np.uint64)
    added = halves + np.array([(a % 8).sum(), -float((a % 4).sum())], np.float16)
    return np.array([d[0] + (wide << np.uint64(20)).sum(), (wide << np.uint64(32)).max()], np.uint64), added


def wide_vectors(a: np.ndarray, _: Argument, b: np.ndarray, __: Argument) -> tuple[np.ndarray, np.ndarray]:
    return a[::-1, ::-1].copy(), b[::-1, ::-1].copy()


MEMORY = (
    probe(
        "memory_vectors",
        "memory.cu",
        "vectors",
        lambda rng: [random_bytes(rng, 32, 16), poisoned((32, 16), np.uint8)],
        lambda a, _: a.copy(),
    ),
    probe(
        "memory_wide_vectors",
        "memory.cu",
        "wide_vectors",
        lambda rng: [
            integral(rng, 32, 4),
            poisoned((32, 4), np.float32),
            rng.integers(0, 2**64, (32, 2), np.uint64),
            poisoned((32, 2), np.uint64),
        ],
        wide_vectors,
        (1, 3),
    ),
    probe(
        "memory_extends",
        "memory.cu",
        "extends",
        lambda rng: [random_bytes(rng, 32, 4), empty(32, 5), poisoned(32, np.uint8)],
        extends,
        (1, 2),
    ),
    probe(
        "memory_local_constant",
        "memory.cu",
        "local_constant",
        lambda rng: [words(rng, 64), empty(64)],
        local_constant,
        block=(64,),
    ),
    probe(
        "memory_shared_kinds",
        "memory.cu",
        "shared_kinds",
        lambda rng: [words(rng, 64), empty(64)],
        shared_kinds,
        block=(64,),
        shared=256,
    ),
    probe("memory_atomics", "memory.cu", "atomics", atomics_arguments, atomics, (1, 2, 3), block=(64,)),
    probe(
        "memory_tickets",
        "memory.cu",
        "tickets",
        lambda rng: [np.zeros(n, np.uint32) for n in (1, 128)],
        tickets_expected,
        (0, 1),
        (4,),
    ),
    probe(
        "memory_last_block",
        "memory.cu",
        "last_block",
        lambda rng: [words(rng, 5, 64), empty(5), empty(1), np.zeros(1, np.uint32)],
        lambda a, *_: (a.sum(1, dtype=np.uint32), a.sum(dtype=np.uint32, keepdims=True)[0], np.zeros(1, np.uint32)),
        (1, 2, 3),
        (5,),
        (64,),
    ),
    probe(
        "memory_wide_atomics",
        "memory.cu",
        "wide_atomics",
        lambda rng: [words(rng, 32), np.array([9, 0], np.uint64), np.array([0.5, 1], np.float16)],
        wide_atomics,
        (1, 2),
    ),
)

PROBES: tuple[Probe, ...] = (*CP_ASYNC, *MEMORY)
