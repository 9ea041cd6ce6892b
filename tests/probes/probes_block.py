"""Probes of what the threads of a warp, a block and a cluster do together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from probes import Argument, Probe
from probes.launches import FULL, empty, integral, probe, words

LANES = np.arange(32)


# ---- Warps ----------------------------------------------------------------------------------------------------------


def shuffle(mode: str, width: int) -> Probe:
    """PTX ISA, shfl.sync: c holds the clamp value in bits 0 to 4 and in bits 8 to 12 those that name the segment."""
    segment = 32 - width
    c = segment << 8 | (0 if mode == "up" else 31)

    def expected(a: np.ndarray, b: np.ndarray, *_: Argument) -> np.ndarray:
        d = empty(32, 2)
        for lane in range(32):
            operand = int(b[lane]) & 31
            first, last = lane & segment, lane & segment | 31 & ~segment
            if mode == "up":
                source = lane - operand
                inside = source >= first
            else:
                source = {"idx": first | operand & ~segment, "down": lane + operand, "bfly": lane ^ operand}[mode]
                inside = source <= last
            d[lane] = a[source if inside else lane], inside
        return d

    def arguments(rng: np.random.Generator) -> list[Argument]:
        return [words(rng, 32), rng.integers(0, 12 if width == 8 else 32, 32, np.uint32), np.uint32(c), empty(32, 2)]

    return probe(f"shuffle_{mode}_{width}", "warp.cu", f"shuffle_{mode}", arguments, expected)


def bits(where: np.ndarray) -> int:
    return sum(1 << int(lane) for lane in np.flatnonzero(where))


def votes(name: str, lanes: int, values: Callable[[np.random.Generator], np.ndarray]) -> Probe:
    def expected(a: np.ndarray, _: Argument, d: np.ndarray) -> np.ndarray:
        d, part, mask = d.copy(), a[:lanes], (1 << lanes) - 1
        same = [bits(part == value) for value in part]
        d[:lanes, 0], d[:lanes, 1] = (part != 0).all(), (part != 0).any()
        d[:lanes, 2] = len(set(part != 0)) == 1
        d[:lanes, 3] = bits(part != 0)
        d[:lanes, 4] = d[:lanes, 5] = same
        d[:lanes, 6] = mask if len(set(part)) == 1 else 0
        return d

    return probe(name, "warp.cu", "votes", lambda rng: [values(rng), np.uint32(lanes), empty(32, 7)], expected)


def active(_: Argument) -> np.ndarray:
    first = np.where(LANES % 3 == 0, bits(LANES % 3 == 0), bits(LANES % 3 != 0))
    return np.stack([first, [bits(lane // 8 <= LANES // 8) for lane in LANES]], axis=1).astype(np.uint32)


def reduce_warp(mask: int) -> Probe:
    def expected(a: np.ndarray, _: Argument, d: np.ndarray) -> np.ndarray:
        chosen = (mask >> LANES & 1).astype(bool)
        part, signed = a[chosen], a[chosen].view(np.int32)
        total = part.sum(dtype=np.uint32)
        extrema = [part.min(), part.max(), *np.array([signed.min(), signed.max()]).view(np.uint32)]
        logical = [f.reduce(part) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
        d = d.copy()
        d[chosen] = [total, total, *extrema, *logical]
        return d

    # Two bits are set everywhere, so that `and` is not always 0.
    return probe(
        f"reduce_{mask:08x}",
        "warp.cu",
        "reduce",
        lambda rng: [words(rng, 32) | 0x01000010, np.uint32(mask), empty(32, 9)],
        expected,
    )


def elect(mask: int) -> Probe:
    """Which lane is elected is not documented, but that it is always the same one: here the lowest."""

    def expected(_: Argument, d: np.ndarray) -> np.ndarray:
        leader = (mask & -mask).bit_length() - 1
        return np.where((mask >> LANES & 1)[:, None], np.stack([LANES * 0 + leader, leader == LANES], 1), d).astype(
            d.dtype
        )

    return probe(f"elect_{mask:08x}", "warp.cu", "elect", lambda rng: [np.uint32(mask), empty(32, 2)], expected,
                 arch="sm_90a")  # fmt: skip


def exchange(a: np.ndarray, _: Argument) -> np.ndarray:
    return np.where(LANES % 2, a + np.uint32(1), 3 * a).astype(np.uint32)[LANES ^ 1]


WARP = (
    *(shuffle(mode, width) for mode in ("idx", "up", "down", "bfly") for width in (32, 8)),
    votes("votes", 32, lambda rng: rng.integers(0, 4, 32, np.uint32)),
    votes("votes_all", 32, lambda rng: np.full(32, 9, np.uint32)),
    votes("votes_none", 32, lambda rng: np.zeros(32, np.uint32)),
    votes("votes_20", 20, lambda rng: np.where(LANES < 20, 5, 0).astype(np.uint32)),
    votes("votes_11", 11, lambda rng: rng.integers(0, 3, 32, np.uint32)),
    probe("active", "warp.cu", "active", lambda rng: [empty(32, 2)], active),
    *(reduce_warp(mask) for mask in (FULL, 0x0F30_0812)),
    probe("warp_exchange", "warp.cu", "exchange", lambda rng: [words(rng, 32), empty(32)], exchange),
    *(elect(mask) for mask in (FULL, 0x0F30_0810)),
)

# ---- mbarriers and bulk copies --------------------------------------------------------------------------------------

STATES = [0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 7]


def ring(rounds: int) -> Probe:
    return probe(
        f"mbarrier_ring_{rounds}",
        "mbarrier.cu",
        "ring",
        lambda rng: [words(rng, rounds, 32), np.uint32(rounds), empty(rounds, 32)],
        lambda a, *_: 3 * a[:, ::-1],
        block=(64,),
        arch="sm_90a",
    )


def bulk_ring(rounds: int) -> Probe:
    return probe(
        f"bulk_ring_{rounds}",
        "mbarrier.cu",
        "bulk_ring",
        lambda rng: [words(rng, rounds, 64), np.uint32(rounds), empty(rounds, 64)],
        lambda a, *_: a + a[:, ::-1],
        block=(96,),
        arch="sm_90a",
    )


MBARRIER = (
    probe(
        "mbarrier_states",
        "mbarrier.cu",
        "states",
        lambda rng: [empty(20)],
        lambda _: np.array(STATES, np.uint32),
        block=(1,),
        arch="sm_90a",
    ),
    *map(ring, (1, 2, 9)),
    probe(
        "bulk_load",
        "mbarrier.cu",
        "bulk_load",
        lambda rng: [words(rng, 256), empty(256)],
        lambda a, _: a[::-1].copy(),
        block=(64,),
        arch="sm_90a",
    ),
    *map(bulk_ring, (2, 8)),
    probe(
        "bulk_store",
        "mbarrier.cu",
        "bulk_store",
        lambda rng: [words(rng, 2, 64), empty(2, 64), empty(64)],
        lambda a, *_: (a + np.array([[1], [2]], np.uint32), 5 * a[0]),
        (1, 2),
        block=(64,),
        arch="sm_90a",
    ),
    probe(
        "bulk_add",
        "mbarrier.cu",
        "bulk_add",
        lambda rng: [integral(rng, 64), integral(rng, 64)],
        lambda a, d: a + d,
        block=(64,),
        arch="sm_90a",
    ),
)

# ---- Barriers -------------------------------------------------------------------------------------------------------


def pairs(a: np.ndarray, rounds: np.uint32, _: Argument) -> np.ndarray:
    row, rows = a.reshape(2, 64), []
    for _ in range(rounds):
        row = row[:, ::-1] + np.uint32(1)
        rows.append(row.reshape(-1))
    return np.stack(rows)


def reduce_block(a: np.ndarray, d: np.ndarray) -> np.ndarray:
    result = np.empty_like(d)
    result[:, 0], result[:, 1], result[:, 2] = (a != 0).sum(), (a < 9).all(), (a == 7).any()
    result[:, 3] = np.where(np.arange(96) < 64, (a[:64] == 0).sum(), 0)
    result[:, 4] = (a > 3).sum()
    return result


def produced(a: np.ndarray, rounds: np.uint32, _: Argument) -> np.ndarray:
    return a[:, ::-1] + np.arange(rounds, dtype=np.uint32)[:, None]


def registers(a: np.ndarray, _: Argument) -> np.ndarray:
    return np.concatenate([(a[::-1] + np.uint32(1)) * np.uint32(group) for group in (1, 2)])


BARRIERS = (
    probe(
        "bar_pairs",
        "barriers.cu",
        "pairs",
        lambda rng: [words(rng, 128), np.uint32(5), empty(5, 128)],
        pairs,
        block=(128,),
    ),
    probe(
        "bar_producer",
        "barriers.cu",
        "producer",
        lambda rng: [words(rng, 7, 32), np.uint32(7), empty(7, 32)],
        produced,
        block=(64,),
    ),
    *(
        probe(
            f"bar_reduce_below_{limit}",
            "barriers.cu",
            "reduce",
            lambda rng, limit=limit: [rng.integers(0, limit, 96, np.uint32), empty(96, 5)],
            reduce_block,
            block=(96,),
        )
        for limit in (2, 8, 20)
    ),
    probe(
        "setmaxnreg",
        "barriers.cu",
        "registers",
        lambda rng: [words(rng, 128), empty(256)],
        registers,
        block=(384,),
        arch="sm_90a",
    ),
)

# ---- Clusters -------------------------------------------------------------------------------------------------------


def ranks(grid: tuple[int, int], cluster: tuple[int, int]) -> Probe:
    def expected(d: np.ndarray) -> np.ndarray:
        rows = []
        for y in range(grid[1]):
            for x in range(grid[0]):
                in_x, in_y = x % cluster[0], y % cluster[1]
                rows.append([in_x + in_y * cluster[0], cluster[0] * cluster[1], in_x, in_y, *cluster, x // cluster[0],
                             y // cluster[1], grid[0] // cluster[0], grid[1] // cluster[1]])  # fmt: skip
        return np.array(rows, np.uint32)

    name = "cluster_ranks_" + "_".join(map(str, grid + cluster))
    return probe(name, "cluster.cu", "ranks", lambda rng: [empty(grid[0] * grid[1], 10)], expected, grid=grid,
                 cluster=cluster, arch="sm_90a")  # fmt: skip


def exchange_cluster(blocks: int, size: int) -> Probe:
    def expected(a: np.ndarray, _: Argument) -> np.ndarray:
        cluster = a.reshape(-1, size, 32)
        following, before = np.roll(cluster, -1, 1), np.roll(cluster, 1, 1)
        return np.stack([following[:, :, ::-1], before + np.uint32(1), following], axis=2).reshape(blocks, 3, 32)

    return probe(
        f"cluster_exchange_{blocks}_{size}",
        "cluster.cu",
        "exchange",
        lambda rng: [words(rng, blocks, 32), empty(blocks, 3, 32)],
        expected,
        grid=(blocks,),
        cluster=(size,),
        arch="sm_90a",
    )


def pair(kernel: str, expected: Callable[..., np.ndarray], *shape: int) -> Probe:
    return probe(f"cluster_{kernel}", "cluster.cu", kernel, lambda rng: [words(rng, *shape), empty(*shape)], expected,
                 grid=(2,), cluster=(2,), arch="sm_90a")  # fmt: skip


CLUSTER = (
    ranks((4, 1), (2, 1)),
    ranks((4, 6), (2, 2)),
    ranks((2, 4), (1, 4)),
    exchange_cluster(4, 2),
    exchange_cluster(8, 4),
    pair("remote_arrive", lambda a, _: a[::-1] + np.uint32(5), 32),
    pair("async_store", lambda a, _: a[::-1, ::-1].copy(), 2, 32),
    pair("bulk_exchange", lambda a, _: a[::-1, ::-1].copy(), 2, 32),
)

PROBES: tuple[Probe, ...] = (*WARP, *MBARRIER, *BARRIERS, *CLUSTER)
