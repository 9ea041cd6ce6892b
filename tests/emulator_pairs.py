"""Kernels in PTX text in pairs, a wrong one and the same put right: what the emulator's checks are tested with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest

from emulator import EmulatorError, Schedule, TensorMap, emulate, parse
from emulator.parser import Kernel
from probes.run import SCHEDULES

MODULE = """.version 9.0
.target sm_90a
.address_size 64
.file 1 "some/where.cu"
.visible .entry k(.param .u64 out, .param .u64 in{parameters})
{{
    .reg .pred %p<9>, %leader, %first, %half;
    .reg .b32 %r<20>, %t, %lane, %warp, %block, %x, %mine, %pair, %next, %there;
    .reg .b16 %h<3>;
    .reg .b64 %rd<9>, %out, %in, %map;
    .reg .f32 %f<9>;
    {shared}
    .loc 1 99 0
    ld.param.u64 %out, [out];
    ld.param.u64 %in, [in];
    mov.u32 %t, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mad.lo.u32 %r1, %block, %r1, %t;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %out, %out, %rd1;
    add.s64 %in, %in, %rd1;
    ld.global.u32 %x, [%in];
    and.b32 %lane, %t, 31;
    shr.u32 %warp, %t, 5;
    setp.eq.u32 %leader, %t, 0;
    setp.lt.u32 %first, %t, 32;
    setp.lt.u32 %half, %lane, 16;
    {addresses}
    {body}
    .loc 1 98 0
    ret;
}}
"""
SHARED = ".shared .align 1024 .b8 s[4096]; .shared .align 8 .b64 full; .shared .align 8 .b64 more;"
# A word of each thread, its neighbour's in the warp, and that of its lane in the next warp.
ADDRESSES = "shl.b32 %r1, %t, 2; mov.u32 %r2, s; add.u32 %mine, %r2, %r1; xor.b32 %pair, %mine, 4;" + (
    "xor.b32 %next, %mine, 128;"
)
BUDGET = 500  # basic blocks: these kernels end soon or never
PTX_LINE = r"PTX line \d+, [\w.:]+: "


@dataclass(frozen=True)
class Pair:
    """
    Attributes:
        body: One line of "where.cu" each; of ``<a|b>``, a makes the kernel wrong and b right.
        said: What the wrong one is refused with; "numbers": its results may be wrong instead.
        want: The right one's results by its input, one word per thread; None: its input.
        here: The refusal names the kernel, the source's line, block and thread (a deadlock has several of those).
        once: Order decides, and one of the schedules has to find it.
        missed: Why the wrong kernel is not refused.
        refused: Why the right kernel is.
    """

    name: str
    body: str
    said: str
    want: Callable[[np.ndarray], np.ndarray] | None = None
    threads: int = 64
    grid: int = 1
    cluster: int = 1
    tensor: Callable[[np.ndarray, np.ndarray], TensorMap] | None = None  # of the results or the input
    shared: bool = True
    here: bool = True
    once: bool = False
    missed: str = ""
    refused: str = ""

    def kernel(self, right: bool) -> Kernel:
        lines = [line.strip() for line in self.body.strip().split("\n")]
        chosen = [re.sub(r"<([^|<>]*)\|([^<>]*)>", lambda m: m[1 + right], line) for line in lines]
        return parse(
            MODULE.format(
                parameters=", .param .align 64 .b8 m[128]" if self.tensor else "",
                shared=SHARED if self.shared else "",
                addresses=ADDRESSES if self.shared else "",
                body="\n".join(f".loc 1 {number} 0\n{line}" for number, line in enumerate(chosen, 1)),
            )
        )["k"]

    def run(self, right: bool, schedule: Schedule) -> bool:
        """Whether the results are as wanted."""
        given = np.arange(100, 100 + self.grid * self.threads, dtype=np.uint32)
        out = np.zeros_like(given)
        wanted = given.copy() if self.want is None else np.asarray(self.want(given.copy()))
        more = [self.tensor(out, given)] if self.tensor else []
        kernel, sizes = self.kernel(right), {"cluster": [self.cluster], "schedule": schedule}
        with mock.patch("emulator.launch.BUDGET", BUDGET):
            emulate(kernel, [self.grid], [self.threads], [out, given, *more], **sizes)
        return bool((out == wanted).all())


def wrong_ones(pairs: Sequence[Pair]) -> list:
    return [_parameter(pair, pair.missed) for pair in pairs]


def right_ones(pairs: Sequence[Pair]) -> list:
    return [_parameter(pair, pair.refused) for pair in pairs]


def _parameter(pair: Pair, why: str) -> object:
    return pytest.param(pair, id=pair.name, marks=[pytest.mark.xfail(strict=True, reason=why)] if why else [])


def refuses(pair: Pair) -> None:
    found = {}
    for name, schedule in SCHEDULES.items():
        try:
            found[name] = "" if pair.run(False, schedule) else "numbers"
        except EmulatorError as error:
            found[name] = str(error)
    matching = [bool(re.search(pair.said, said)) for said in found.values()]
    assert any(matching) if pair.once else all(matching), found
    for said in found.values():
        if said not in ("", "numbers"):
            where = rf"^k, where\.cu:\d+, {PTX_LINE}.* in block \(\d, 0, 0\), thread \(\d+, 0, 0\)( and others)?$"
            assert re.search(where if pair.here else "^k[:,] ", said), said


def runs(pair: Pair) -> None:
    for name, schedule in SCHEDULES.items():
        assert pair.run(True, schedule), name


def swapped(step: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x[np.arange(len(x)) ^ step]


def constant(value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.full_like(x, value)


# -- what many of them say and do --------------------------------------------------------------------------------------

THREAD = r"block \(\d, 0, 0\), thread \(\d+, 0, 0\)"
RACE = rf"race: (reads|writes) byte \d+ of shared memory( of the cluster's block 1)?, which {THREAD} "
BOTH = RACE + rf"(wrote|reads) at where.cu:\d, {PTX_LINE[:-2]}; nothing orders the two in {THREAD}$"
ZEROED = "st.shared.u32 [%mine], 0; bar.sync 0;"
STORE = "st.global.u32 [%out], %r1;"
CLUSTER = "barrier.cluster.arrive; barrier.cluster.wait;"
# Its own word, in the other block.
THERE = "xor.b32 %r3, %block, 1; mapa.shared::cluster.u32 %there, %mine, %r3;"
STANDING = rf"^k: deadlock: (.*; )?{THREAD}( and \d+ more)? at where.cu:\d, {PTX_LINE}"
OUT = "st.global.u32 [%out], %x;"
ARRIVE = "mbarrier.arrive.shared.b64 %rd8, [full];"
EXCHANGE = f"ld.shared.u32 %r1, [%next]; {STORE}"  # after whatever orders it
NOT_THERE = r"there is no mbarrier at byte 4096 of shared memory: it is uninitialised"
FLIGHT = r"may still be in flight: it has not been waited for in block"
PROXY = (
    rf"(reads|overwrites) byte \d+ of shared memory through the async proxy, which {THREAD} wrote at where.cu:\d, .* "
    "through the generic proxy, and no proxy fence .fence.proxy.async. lies between"
)


def init(count: int, barrier: str = "full") -> str:
    return f"@%leader mbarrier.init.shared.b64 [{barrier}], {count};"


def wait(parity: int = 0, name: str = "W", barrier: str = "full") -> str:
    return f"{name}: mbarrier.try_wait.parity.shared.b64 %p8, [{barrier}], {parity}; @!%p8 bra {name};"
