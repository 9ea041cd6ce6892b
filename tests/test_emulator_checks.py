"""What the emulator has to find: races, and the misuse of barriers; a wrong kernel and a right one for each check."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.clocks import Clocks
from emulator.errors import Fault
from emulator.shadow import Shadow
from emulator_pairs import (
    ARRIVE,
    BOTH,
    CLUSTER,
    EXCHANGE,
    NOT_THERE,
    OUT,
    STANDING,
    STORE,
    THERE,
    THREAD,
    ZEROED,
    Pair,
    constant,
    init,
    refuses,
    right_ones,
    runs,
    swapped,
    wait,
    wrong_ones,
)

# -- races -------------------------------------------------------------------------------------------------------------


RACES = [
    Pair(
        "read after write, across warps",
        f"{ZEROED}\n st.shared.u32 [%mine], %x;\n <|bar.sync 0;> ld.shared.u32 %r1, [%next];\n {STORE}",
        BOTH,
        swapped(32),
    ),
    Pair(
        "read after write, within a warp",
        f"{ZEROED}\n st.shared.u32 [%mine], %x;\n <|bar.warp.sync -1;> ld.shared.u32 %r1, [%pair];\n {STORE}",
        BOTH,
        swapped(1),
    ),
    Pair(
        "a shuffle orders no memory",
        f"""{ZEROED} st.shared.u32 [%mine], %x;
        <shfl.sync.bfly.b32 %r2, %t, 1, 31, -1;|bar.warp.sync -1;> ld.shared.u32 %r1, [%pair]; {STORE}""",
        BOTH,
        swapped(1),
    ),
    Pair(
        "a bar.warp.sync of half the warp",
        f"""{ZEROED} st.shared.u32 [%mine], %x; @%half bra L;
        bar.warp.sync 0xFFFF0000; L: <|bar.warp.sync -1;> ld.shared.u32 %r1, [%pair]; {STORE}""",
        BOTH,
        swapped(1),
    ),
    Pair(
        "write after read, across warps",
        f"""st.shared.u32 [%mine], %x; bar.sync 0; ld.shared.u32 %r1, [%next];
        <|bar.sync 0;> st.shared.u32 [%mine], %t; {STORE}""",
        BOTH,
        swapped(32),
    ),
    Pair(
        "write after read, within a warp",
        f"""st.shared.u32 [%mine], %x; bar.warp.sync -1; ld.shared.u32 %r1, [%pair];
        <|bar.warp.sync -1;> st.shared.u32 [%mine], %t; {STORE}""",
        BOTH,
        swapped(1),
    ),
    Pair(
        "write after write",
        f"""st.shared.u32 [%mine], %t;
        <|bar.sync 0;> st.shared.u32 [%next], %x; bar.sync 0; ld.shared.u32 %r1, [%mine]; {STORE}""",
        BOTH,
        swapped(32),
    ),
    Pair(
        "two values at one address",
        f"setp.eq.u32 %p1, %lane, 0; @%p1 st.shared.u32 [s], <%warp|7>; bar.sync 0; ld.shared.u32 %r1, [s]; {STORE}",
        f"{BOTH}|threads write different values to one address of shared memory in {THREAD}",
        constant(7),
    ),
    Pair(
        "two values at one address, from one warp",
        f"st.shared.u32 [s], <%lane|7>;\n bar.sync 0; ld.shared.u32 %r1, [s]; {STORE}",
        f"threads write different values to one address of shared memory in {THREAD}",
        constant(7),
    ),
    Pair(
        "a cluster's blocks",
        f"""{THERE} {ZEROED} {CLUSTER} st.shared.u32 [%mine], %x;
        <bar.sync 0;|{CLUSTER}> ld.shared::cluster.u32 %r1, [%there]; {CLUSTER} {STORE}""",
        BOTH,
        swapped(64),
        grid=2,
        cluster=2,
    ),
    Pair(
        "a cluster's relaxed arrival",
        f"""{THERE} {ZEROED} {CLUSTER} st.shared.u32 [%mine], %x; barrier.cluster.arrive<.relaxed|>;
        barrier.cluster.wait; ld.shared::cluster.u32 %r1, [%there]; {CLUSTER} {STORE}""",
        BOTH,
        swapped(64),
        grid=2,
        cluster=2,
    ),
    Pair(
        "a flag without release",
        f"""{ZEROED} @!%first bra W; @!%leader bra OWN; st.shared.u32 [s+4], 7;
        st.<relaxed|release>.cta.shared.u32 [s], 1;
        OWN: mov.u32 %r1, 7; bra DONE;
        W: ld.acquire.cta.shared.u32 %r2, [s]; setp.eq.u32 %p1, %r2, 0; @%p1 bra W;
        ld.shared.u32 %r1, [s+4]; DONE: {STORE}""",
        BOTH,
        constant(7),
    ),
    Pair(
        "a flag between fences",
        f"""{ZEROED} @!%first bra W; @!%leader bra OWN; st.shared.u32 [s+4], 7;
        <|fence.acq_rel.cta;> st.relaxed.cta.shared.u32 [s], 1;
        OWN: mov.u32 %r1, 7; bra DONE;
        W: ld.relaxed.cta.shared.u32 %r2, [s]; setp.eq.u32 %p1, %r2, 0; @%p1 bra W;
        <|fence.acq_rel.cta;> ld.shared.u32 %r1, [s+4]; DONE: {STORE}""",
        BOTH,
        constant(7),
    ),
    Pair(
        "flags of two blocks",
        f"""{THERE} {ZEROED} {CLUSTER} st.shared.u32 [%mine+1024], %x; bar.sync 0;
        @%leader st.release.cluster.shared.u32 [s], 1; barrier.cluster.arrive.relaxed; barrier.cluster.wait;
        <ld.acquire.cluster.shared.u32 %r2, [s];|{CLUSTER}>
        ld.shared::cluster.u32 %r1, [%there+1024]; {CLUSTER} {STORE}""",
        BOTH,
        swapped(64),
        grid=2,
        cluster=2,
    ),
    Pair(
        "a flag, its readers first in the text",
        f"""{ZEROED} @%first bra SEND;
        W: ld.<relaxed|acquire>.cta.shared.u32 %r2, [s]; setp.eq.u32 %p1, %r2, 0; @%p1 bra W;
        ld.shared.u32 %r1, [s+4]; bra DONE;
        SEND: @!%leader bra OWN; st.shared.u32 [s+4], 7; st.release.cta.shared.u32 [s], 1;
        OWN: mov.u32 %r1, 7; DONE: {STORE}""",
        BOTH,
        constant(7),
    ),
]
GLOBAL = r"race: (reads|writes) byte \d+ of buffer \w+, which (block \d of the grid|several blocks) (wrote|read)"
RACES += [
    Pair(
        f"blocks write two values{text}",
        "mul.wide.u32 %rd1, %t, 4; ld.param.u64 %rd2, [out]; add.s64 %rd2, %rd2, %rd1;\n"
        "st.global.u32 [%rd2], <%block|7>;",
        f"{GLOBAL}|threads write different values to one address of buffer out",
        lambda x: np.repeat([7, 0], 64),
        grid=2,
        shared=shared,
    )
    for text, shared in (("", True), (", together in a unit", False))
] + [
    Pair(
        f"a block reads what another writes{text}",
        f"mul.wide.u32 %rd1, %t, 4; ld.param.u64 %rd2, [in]; add.s64 %rd2, %rd2, %rd1;\n"
        f"ld.global.u32 %r1, [<%rd2|%in>]; st.global.u32 [%in], 0; {STORE}",
        GLOBAL,
        grid=2,
        shared=shared,
    )
    for text, shared in (("", True), (", together in a unit", False))
]
RACES += [
    Pair(
        "global memory within a block",
        f"""st.global.u32 [%out], %x; xor.b32 %r2, %t, 32; mul.wide.u32 %rd1, %r2, 4; ld.param.u64 %rd2, [out];
        <|bar.sync 0;> add.s64 %rd2, %rd2, %rd1; ld.global.u32 %r1, [%rd2]; bar.sync 0; {STORE}""",
        "race",
        swapped(32),
        missed="global memory has no shadow of threads; in lockstep even the numbers are right",
    ),
    Pair(
        "uninitialised shared memory",
        f"<|st.shared.u32 [%mine], %x;> ld.shared.u32 %r1, [%mine];\n {STORE}",
        r"^k, where.cu:2, PTX line \d+, st.global.u32: the stored value is undefined in block \(0, 0, 0\), thread ",
    ),
    Pair(
        "uninitialised shared memory, an atomic operation",
        "<|st.shared.u32 [%mine], 1;> atom.shared.add.u32 %r1, [%mine], 1; ld.shared.u32 %r1, [%mine];" + STORE,
        "uninitialised shared memory takes part in an atomic operation",
        constant(2),
    ),
    Pair(
        "shared memory out of bounds",
        f"st.shared.u32 [%mine+<4096|0>], %x; ld.shared.u32 %r1, [%mine]; {STORE}",
        r"^k, where.cu:1, .*address 0x14[0-9a-f]0 is out of bounds: byte 4\d+ of 4\d+ in .*, thread \(\d+, 0, 0\)",
    ),
    Pair(
        "shared memory misaligned",
        f"st.shared.u32 [%mine+<2|0>], %x; ld.shared.u32 %r1, [%mine]; {STORE}",
        r"^k, where.cu:1, .*: address 0x4[08]2 is not aligned to 4 bytes .shared.* in .*, thread \((0|32), 0, 0\)",
    ),
]

# -- barriers ----------------------------------------------------------------------------------------------------------

BARRIERS = [
    Pair(
        "two counts at one barrier",
        f"@%first bar.sync 1, 64; @!%first bar.sync 1, <96|64>; {OUT}",
        r"barrier 1 is waited for with counts (64 and 96|96 and 64)",
    ),
    Pair("a count of no whole warps", f"bar.sync 1, <40|64>; {OUT}", "a count of 40 threads is not one of whole warps"),
    Pair(
        "a count too small",
        f"bar.sync 1, <64|96>; {OUT}",
        r"96 threads arrive at barrier 1, which expects 64|race: arrives at barrier 1, which .* has used",
        threads=96,
    ),
    Pair(
        "a count too large",
        f"{OUT}\n bar.sync 1, <96|64>;",
        STANDING + r"waits for barrier 1, where 64 of 96 threads have arrived",
        here=False,
    ),
    Pair(
        "a count too large, and how many have arrived",
        f"{OUT}\n bar.sync 1, <96|64>;",
        "^((?!where 32 of 96).)* where 64 of 96 threads have arrived$",
        here=False,
    ),
    Pair("a barrier beyond the last", f"bar.sync <16|15>; {OUT}", "barrier 16: a block has 16"),
    Pair(
        "reuse by other threads",
        f"setp.lt.u32 %p1, %t, 64; @%p1 bar.sync 1, 64; <|bar.sync 0;> @!%p1 bar.sync 1, 64; {OUT}",
        r"race: arrives at barrier 1, which block \(0, 0, 0\), thread \(\d+, 0, 0\) has used, and does not know that|"
        "128 threads arrive at barrier 1, which expects 64",
        threads=128,
    ),
    Pair(
        "a warp that does not come",
        f"{OUT}\n <@%first|> bar.sync 1, 64;",
        r"^k: deadlock: block \(0, 0, 0\), thread \(0, 0, 0\) and 31 more at where.cu:2, PTX line \d+, bar.sync: "
        "waits for barrier 1, where 32 of 64 threads have arrived$",
        here=False,
    ),
    Pair(
        "a producer that does not arrive",
        f"""@%first bra SEND; bar.sync 1, 64; ld.shared.u32 %r1, [%next]; bra DONE;
        SEND: st.shared.u32 [%mine], %x; <|bar.arrive 1, 64;> mov.u32 %r1, %x; DONE: {STORE}""",
        STANDING + "waits for barrier 1, where 32 of 64",
        lambda x: np.tile(x[:32], 2),
        here=False,
    ),
    Pair(
        "barriers in two orders",
        f"<@%first|> bar.sync 1, 64; bar.sync 2, 64; <@!%first bar.sync 1, 64;|> {OUT}",
        rf"{STANDING}waits for barrier 1, where 32 of 64.*; {THREAD} and 31 more at .*: waits for barrier 2, where 32",
        here=False,
    ),
    Pair(
        "lanes of the warp that have exited",
        f"{OUT} setp.ge.u32 %p1, %t, <48|32>; @%p1 exit;\n bar.sync 0;",
        "^k, where.cu:2, .*bar.sync: lanes of the same warp have exited",
    ),
    Pair(
        "a barrier of a block's exited threads",
        f"{OUT} @%first exit;\n bar.sync <1, 64|0>;",
        STANDING + "waits for barrier 1, where 32 of 64 threads have arrived",
        here=False,
    ),
    Pair(
        "a divergent bar.sync",
        f"{OUT} @%half bra L;\n <bar|barrier>.sync 0; bra M;\n L: <bar|barrier>.sync 0; M:",
        STANDING + "waits for the other lanes of its warp",
        here=False,
    ),
    Pair(
        "a bar.sync under a predicate of half a warp",
        f"{OUT} <@%half|> bar.sync 0;",
        STANDING + "waits for the other lanes of its warp",
        here=False,
    ),
    Pair(
        "a cluster's barrier, twice", f"<barrier.cluster.arrive;|> {CLUSTER} {OUT}", "arrives .* twice without waiting"
    ),
    Pair(
        "a cluster's barrier, not arrived",
        f"<|barrier.cluster.arrive;> barrier.cluster.wait; {OUT}",
        "waits at the cluster's barrier without having arrived",
    ),
]


# -- mbarriers ---------------------------------------------------------------------------------------------------------


MBARRIERS = [
    Pair(
        "no wait",
        f"{ZEROED} {init(64)} bar.sync 0; st.shared.u32 [%mine], %x; {ARRIVE}\n <|{wait()}> {EXCHANGE}",
        BOTH,
        swapped(32),
    ),
    Pair(
        "a relaxed arrival",
        f"""{ZEROED} {init(64)} bar.sync 0; st.shared.u32 [%mine], %x;
        mbarrier.arrive<.relaxed.cta|>.shared.b64 %rd8, [full]; {wait()} {EXCHANGE}""",
        BOTH,
        swapped(32),
    ),
    Pair("not initialised", f"<|{init(64)}> bar.sync 0; {ARRIVE} {wait()} {OUT}", NOT_THERE),
    Pair(
        "initialisation not ordered before use",
        f"{init(64)} <|bar.sync 0;>\n {ARRIVE} {wait()} {OUT}",
        f"{NOT_THERE}|race: reads byte 4096 of shared memory, which .*thread .0, 0, 0. wrote at where.cu:1",
    ),
    Pair(
        "initialisation not ordered before cp.async.mbarrier.arrive",
        f"""{init(65)} <|bar.sync 0;> cp.async.ca.shared.global [%mine], [%in], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [full]; bar.sync 0; @%leader {ARRIVE} {wait()} {EXCHANGE}""",
        f"{NOT_THERE}|race: reads byte 4096",
        swapped(32),
    ),
    Pair(
        "initialised twice",
        f"{init(64)} <{init(64)}|> bar.sync 0; {ARRIVE} {wait()} {OUT}",
        "initialises the mbarrier at byte 4096 of shared memory a second time",
    ),
    Pair(
        "used when invalidated",
        f"{init(64)} bar.sync 0; {ARRIVE} {wait()} bar.sync 0; @%leader mbarrier.inval.shared.b64 [full];"
        f"<|{init(64)}> bar.sync 0; {ARRIVE} {wait(name='V')} {OUT}",
        NOT_THERE,
    ),
    Pair(
        "invalidated while others may wait",
        f"{init(64)} bar.sync 0; {ARRIVE} {wait()} <|bar.sync 0;> @%leader mbarrier.inval.shared.b64 [full]; {OUT}",
        f"race: writes byte 4096|{NOT_THERE}",
    ),
    Pair(
        "too many arrivals",
        f"{init(2)} bar.sync 0; @%leader mbarrier.arrive.shared.b64 %rd8, [full], <3|2>; {wait()} {OUT}",
        "3 arrivals at an mbarrier whose phase expects 2 more",
    ),
    Pair("a count of zero", f"{init(0)[:-2]}<0|64>; bar.sync 0; {ARRIVE} {wait()} {OUT}", "expected a count from 1 to"),
    Pair(
        "an arrival missing",
        f"{init(65)} bar.sync 0; {ARRIVE} <|@%leader {ARRIVE}>\n {wait()} {OUT}",
        STANDING + "waits for phase 0 of the mbarrier at byte 4096: 1 arrivals and 0 bytes are missing .waits for pari",
        here=False,
    ),
    Pair(
        "the parity of the phase before",  # passes at once, or never when the phase is over already
        f"""{ZEROED} {init(32)} bar.sync 0; @%first bra SEND; {wait("<1|0>")} ld.shared.u32 %r1, [%next]; bra DONE;
        SEND: st.shared.u32 [%mine], %x; {ARRIVE} mov.u32 %r1, %x; DONE: {STORE}""",
        f"({BOTH})|{STANDING}waits for phase 1 of the mbarrier at byte 4096: 32 arrivals",
        lambda x: np.tile(x[:32], 2),
        here=False,
    ),
    Pair(
        "the parity of the phase after",
        f"{init(64)} bar.sync 0; {ARRIVE} {wait()} {wait('<1|0>', 'V')} {OUT}",
        STANDING
        + r"waits for phase 1 of the mbarrier at byte 4096: 64 arrivals and 0 bytes are missing \(waits for parity 1",
        here=False,
    ),
    Pair(
        "an mbarrier read",
        f"st.shared.u32 [s], 0; {init(1)} bar.sync 0; ld.shared.u32 %r2, [<full|s>]; {OUT}",
        "shared address 0x1400 holds an mbarrier, which is opaque",
    ),
    Pair(
        "an mbarrier written",
        f"{init(1)} bar.sync 0; st.shared.u32 [<full|s>], 0; {OUT}",
        "shared address 0x1400 holds an mbarrier, which is opaque",
    ),
    Pair(
        "an mbarrier misaligned",
        f"{init(64, '<full+4|full>')} bar.sync 0; {ARRIVE} {wait()} {OUT}",
        "address 0x1404 is not aligned to 8 bytes .shared address 0x1404. in block",
    ),
    Pair(
        "another block's mbarrier, no cluster barrier",
        f"""mov.u32 %r4, full; xor.b32 %r3, %block, 1; mapa.shared::cluster.u32 %there, %r4, %r3; {init(64)} bar.sync 0;
        <|{CLUSTER}> mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%there]; {wait()} {CLUSTER} {OUT}""",
        f"{NOT_THERE}|race: reads byte 4096 of shared memory",
        grid=2,
        cluster=2,
    ),
]


def test_a_reader_after_a_write_is_remembered_beside_later_ones():
    """Of reads since the last write by lanes of one warp at two times, and not of those before it."""
    clocks = Clocks(64, str)
    shadow, word = Shadow(clocks, 1, 4, 1), np.zeros((1, 1), np.int64)
    warp = np.arange(32)
    shadow.load(np.repeat(word, 32, axis=0), warp)
    clocks.acquire(np.array([0]), clocks.release(warp))
    shadow.store(word, np.array([0]))
    clocks.acquire(warp, clocks.release(np.array([0])))
    shadow.load(word, np.array([1]))
    clocks.release(np.array([0]))
    shadow.load(word, np.array([2]))
    clocks.release(np.array([0]))
    shadow.load(word, np.array([3]))
    clocks.acquire(np.array([32]), clocks.release(np.array([2, 3])))
    with pytest.raises(Fault, match="race: writes byte 0 of shared memory, which 1 reads"):
        shadow.store(word, np.array([32]))


ALL = [*RACES, *BARRIERS, *MBARRIERS]


@pytest.mark.parametrize("pair", wrong_ones(ALL))
def test_wrong_kernels(pair):
    refuses(pair)


@pytest.mark.parametrize("pair", right_ones(ALL))
def test_right_kernels(pair):
    runs(pair)
