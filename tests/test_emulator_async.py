"""What the emulator has to find in asynchronous copies and clusters: a wrong kernel and a right one for each check."""

from __future__ import annotations

import numpy as np
import pytest

from emulator import TensorMap
from emulator_pairs import (
    ARRIVE,
    CLUSTER,
    EXCHANGE,
    FLIGHT,
    NOT_THERE,
    OUT,
    PROXY,
    STANDING,
    STORE,
    THERE,
    THREAD,
    Pair,
    init,
    refuses,
    right_ones,
    runs,
    swapped,
    wait,
    wrong_ones,
)

# -- cp.async ----------------------------------------------------------------------------------------------------------

ONE = "cp.async.ca.shared.global [%mine], [%in], 4;"
COPY = f"{ONE} cp.async.commit_group;"
OWN = f"ld.shared.u32 %r1, [%mine]; {STORE}"
# Where a warp is there before the copy has begun, it reads what nobody has written.
NOTHING = "st.global.u32: the stored value is undefined in block"
GROUP = (
    rf"race: reads byte \d+ of shared memory, which cp.async of {THREAD} wrote at where.cu:\d, .*; {FLIGHT}|{NOTHING}"
)
COPIES = [
    Pair("not waited for", f"{COPY} <|cp.async.wait_group 0;>\n {OWN}", GROUP),
    Pair("one group too many left", f"{COPY} cp.async.wait_group <1|0>;\n {OWN}", GROUP),
    Pair(
        "the second of two groups",
        f"""cp.async.ca.shared.global [%mine+1024], [%in], 4; cp.async.commit_group; {COPY}
        cp.async.wait_group 1; ld.shared.u32 %r1, [%mine+<0|1024>]; {STORE}""",
        GROUP,
    ),
    Pair("not committed", f"{ONE} <|cp.async.commit_group;> cp.async.wait_group 0;\n {OWN}", GROUP),
    Pair("wait_all", f"{ONE} <cp.async.wait_group 0|cp.async.wait_all>;\n {OWN}", GROUP),
    Pair("other threads' copies", f"{COPY} cp.async.wait_all;\n <|bar.sync 0;> {EXCHANGE}", GROUP, swapped(32)),
    Pair(
        "other threads' copies, waited for too late",
        f"{COPY} <bar.sync 0;|> cp.async.wait_all;\n <|bar.sync 0;> {EXCHANGE}",
        GROUP,
        swapped(32),
    ),
    Pair(
        "copies over what others read",
        f"""st.shared.u32 [%mine], %t; bar.sync 0; ld.shared.u32 %r1, [%next];
        <|bar.sync 0;> {COPY} cp.async.wait_all; {STORE}""",
        rf"race: (writes byte \d+ .*, which {THREAD} reads|reads byte \d+ .*, which cp.async of {THREAD} wrote) at",
        lambda x: np.arange(64) ^ 32,
    ),
    Pair(
        "an mbarrier without the copies",
        f"""{init(64)} bar.sync 0; {COPY}
        <{ARRIVE}|cp.async.mbarrier.arrive.noinc.shared.b64 [full];> {wait()} {EXCHANGE}""",
        GROUP,
        swapped(32),
    ),
    Pair(
        "a source misaligned",
        f"cp.async.ca.shared.global [%mine], [%in+<2|0>], 4; cp.async.wait_all; {OWN}",
        r"where.cu:1, .*: address 0x\w+ is not aligned to 4 bytes",
    ),
    Pair(
        "a destination misaligned",
        f"cp.async.ca.shared.global [%mine+<2|0>], [%in], 4; cp.async.wait_all; {OWN}",
        r"where.cu:1, .*: address 0x4[08]2 is not aligned to 4 bytes .shared",
    ),
    Pair(
        "a source out of bounds",
        f"setp.lt.u32 %p1, %t, 48; selp.u32 %r3, 4, <4|0>, %p1;\n"
        f"cp.async.ca.shared.global [%mine], [%in+64], 4, %r3; cp.async.wait_all; {OWN}",
        r"where.cu:2, .*: address 0x\w+ is out of bounds .byte 256 of buffer in, which has 256.* thread .48, 0, 0",
        lambda x: np.append(x[16:], np.zeros(16)),
    ),
    Pair(
        "zeros after the source's bytes",
        f"""shl.b32 %r3, %t, 4; mov.u32 %r4, s; add.u32 %r4, %r4, %r3; setp.lt.u32 %p1, %t, 16;
        mul.wide.u32 %rd2, %r3, 1; ld.param.u64 %rd1, [in]; add.s64 %rd1, %rd1, %rd2;
        @%p1 cp.async.cg.shared.global [%r4], [%rd1+<16|0>], 16, 8; cp.async.wait_all; bar.sync 0; {OWN}""",
        r"where.cu:3, .*: address 0x\w+ is out of bounds .byte 256 of buffer in, which has 256",
        lambda x: (x.reshape(16, 4) * np.array([1, 1, 0, 0], np.uint32)).ravel(),
    ),
    Pair(
        "more than the size",
        f"cp.async.ca.shared.global [%mine], [%in], 4, <8|4>; cp.async.wait_all; {OWN}",
        "takes 8 bytes of the source into 4",
    ),
    Pair(
        "4 bytes past L1", f"cp.async.<cg|ca>.shared.global [%mine], [%in], 4; cp.async.wait_all; {OWN}", "copies 4 byt"
    ),
]

# -- bulk copies -------------------------------------------------------------------------------------------------------

READY = f"{init(1)} fence.mbarrier_init.release.cluster; bar.sync 0;"
EXPECT = "@%leader mbarrier.arrive.expect_tx.shared.b64 %rd8, [full], 256;"
INTO = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
LOAD = f"@%leader {INTO} [s], [%in], 256, [full];"
FILL = "st.shared.u32 [%mine], %x; fence.proxy.async.shared::cta; bar.sync 0;"
SAVE = "@%leader cp.async.bulk.global.shared::cta.bulk_group [%out], [s], 256;"
COMMIT, SAVED = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
READ_EARLY = r"race: reads byte \d+ of shared memory, which a bulk copy into shared memory wrote at where.cu:\d, .*"
READ_EARLY += f"{FLIGHT}|{NOTHING}"
UNDER = "^k: at the end of the block: a bulk copy (into|from) shared memory is in flight: "
BULK = [
    Pair("a load not waited for", f"{READY} {EXPECT} {LOAD} <|{wait()}>\n {OWN}", READ_EARLY),
    Pair(
        "a load that one warp waits for",
        f"{READY} {EXPECT} {LOAD} <@!%first bra L;|> {wait()} L:\n {OWN}",
        READ_EARLY,
    ),
    Pair(
        "too many bytes expected",
        f"{READY} {EXPECT[:-4]}<272|256>; {LOAD}\n {wait()} {OWN}",
        STANDING + r"waits for phase 0 of the mbarrier at byte 4096: 0 arrivals and \d+ bytes are missing",
        here=False,
    ),
    Pair(
        "too many bytes expected, and how many are missing",
        f"{READY} {EXPECT[:-4]}<272|256>; {LOAD}\n {wait()} {OWN}",
        "^((?!272 bytes are).)* 16 bytes are missing",
        here=False,
    ),
    Pair(
        "too few bytes expected",
        f"{READY} {EXPECT[:-4]}<128|256>; {LOAD}\n {wait()} {OWN}",
        STANDING + r"waits for phase 0 of the mbarrier at byte 4096: 0 arrivals and -?128 bytes are missing",
        here=False,
    ),
    Pair(
        "too few bytes expected, and how many are missing",
        f"{READY} {EXPECT[:-4]}<128|256>; {LOAD}\n {wait()} {OWN}",
        "^((?! 128 bytes are).)* -128 bytes are missing",
        here=False,
    ),
    Pair(
        "no bytes expected",
        f"{READY} <@%leader {ARRIVE}|{EXPECT}> {LOAD}\n {wait()} {OWN}",
        READ_EARLY,
    ),
    Pair(
        "no multiple of 16",
        f"{READY} {EXPECT[:-4]}<40|256>;\n @%leader {INTO} [s], [%in], <40|256>, [full]; {wait()} {OWN}",
        "where.cu:2, .*copies 40 bytes, no multiple of 16",
    ),
    Pair(
        "into a misaligned address",
        f"{READY} {EXPECT} @%leader {INTO} [s+<8|0>], [%in], 256, [full]; {wait()} {OWN}",
        "shared address 0x408 is not aligned to 16 bytes",
    ),
    Pair(
        "from a misaligned address",
        f"{READY} {EXPECT} @%leader {INTO} [s], [%in+<8|0>], 256, [full]; {wait()} {OWN}",
        r"address 0x\w+8 is not aligned to 16 bytes",
    ),
    Pair(
        "from out of bounds",
        f"{READY} {EXPECT} @%leader {INTO} [s], [%in+<16|0>], 256, [full]; {wait()} {OWN}",
        r"address 0x\w+ is out of bounds .byte 256 of buffer in, which has 256",
    ),
    Pair(
        "to out of bounds",
        f"{READY} {EXPECT} @%leader {INTO} [s+<3872|0>], [%in], 256, [full]; {wait()} {OWN}",
        "shared address 0x14[01]0 (holds an mbarrier|is out of bounds)",
    ),
    Pair("a load nobody waits for", f"{READY} {EXPECT} {LOAD} <|{wait()}> {OUT}", UNDER + "nobody", here=False),
    Pair(
        "a load over what others read",
        f"""{READY} {FILL} ld.shared.u32 %r1, [%next];
        <|bar.sync 0;> {EXPECT} {LOAD} {wait()} {STORE}""",
        rf"race: writes byte \d+ .*, which {THREAD} reads at where.cu:1|{READ_EARLY}",
        swapped(32),
    ),
    Pair(
        "a load over what was stored",
        f"{READY} st.shared.u32 [%mine], %t; <|fence.proxy.async;> bar.sync 0;\n {EXPECT} {LOAD} {wait()} {OWN}",
        PROXY,
    ),
    Pair(
        "no proxy fence before a store",
        f"st.shared.u32 [%mine], %x; <|fence.proxy.async.shared::cta;> bar.sync 0;\n {SAVE} {COMMIT} {SAVED}",
        PROXY,
    ),
    Pair(
        "no proxy fence behind the barrier",
        f"st.shared.u32 [%mine], %x; bar.sync 0; fence.proxy.async<.global|>;\n {SAVE} {COMMIT} {SAVED}",
        PROXY,
    ),
    Pair(
        "no barrier before a store",
        f"st.shared.u32 [%mine], %x; fence.proxy.async; <|bar.sync 0;>\n {SAVE} {COMMIT} {SAVED}",
        rf"race: (reads|writes) byte \d+ of shared memory, which|copies uninitialised shared memory in {THREAD}",
    ),
    Pair(
        "a store not waited for", f"{FILL} {SAVE} {COMMIT} <|{SAVED}>", UNDER + f"{THREAD} has not waited", here=False
    ),
    Pair("a store not committed", f"{FILL} {SAVE} <|{COMMIT}> {SAVED}", UNDER + f"{THREAD} has not waited", here=False),
    Pair(
        "one store too many left",
        f"{FILL} {SAVE} {COMMIT} cp.async.bulk.wait_group.read <1|0>;",
        UNDER + f"{THREAD} has not waited for its group",
        here=False,
    ),
    Pair(
        "its source overwritten",
        f"{FILL} {SAVE} {COMMIT} <|cp.async.bulk.wait_group.read 0;> bar.sync 0;\n st.shared.u32 [%mine], %t; {SAVED}",
        rf"where.cu:2, .*race: writes byte \d+ of .*, which a bulk copy of {THREAD} reads at where.cu:1.*; {FLIGHT}",
    ),
    Pair(
        "its result read when only its source has been",
        f"""{FILL} {SAVE} {COMMIT} cp.async.bulk.wait_group<.read|> 0; @!%leader bra DONE;
        ld.global.u32 %r1, [%out]; add.u32 %r1, %r1, 1; {STORE} DONE:""",
        "race|numbers",  # where the copy lands late
        lambda x: x + (np.arange(64) == 0),
        once=True,
    ),
    Pair(
        "uninitialised memory stored",
        f"<@%first|> st.shared.u32 [%mine], %x; fence.proxy.async; bar.sync 0; {SAVE} {COMMIT} {SAVED}",
        f"copies uninitialised shared memory in {THREAD}",
    ),
]
MAP = "mov.b64 %rd1, m; cvta.param.u64 %map, %rd1;"
TILE = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
BOX = f"@%leader {TILE} [s], [%map, {{0, 0}}], [full];"
UNBOX = "@%leader cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {0, 0}], [s];"


def loads(out: np.ndarray, given: np.ndarray) -> TensorMap:
    return TensorMap(given.reshape(4, 16), (4, 16), "u32")


def stores(out: np.ndarray, given: np.ndarray) -> TensorMap:
    return TensorMap(out.reshape(4, 16), (4, 16), "u32")


TENSORS = [
    Pair("a box not waited for", f"{MAP} {READY} {EXPECT} {BOX} <|{wait()}>\n {OWN}", READ_EARLY, tensor=loads),
    Pair(
        "a box beyond shared memory",
        f"{MAP} {READY} {EXPECT} @%leader {TILE} [s+<3968|0>], [%map, {{0, 0}}], [full]; {wait()} {OWN}",
        "a box of 256 bytes at byte 3968 of 41.. is out of bounds",
        tensor=loads,
    ),
    Pair(
        "a box misaligned",
        f"{MAP} {READY} {EXPECT} @%leader {TILE} [s+<64|0>], [%map, {{0, 0}}], [full]; {wait()} {OWN}",
        "shared address 0x440 is not aligned to 128 bytes",
        tensor=loads,
    ),
    Pair(
        "another rank",
        f"{MAP} {READY} {EXPECT} {BOX.replace('2d', '<3d|2d>').replace('0, 0', '0, 0<, 0|>')} {wait()} {OWN}",
        "copies 3 dimensions of a tensor map of 2",
        tensor=loads,
    ),
    Pair(
        "no tensor map",
        f"{MAP} {READY} {EXPECT} @%leader {TILE} [s], [<%in|%map>, {{0, 0}}], [full]; {wait()} {OWN}",
        r"there is no tensor map at 0x\w+ in",
        tensor=loads,
    ),
    Pair(
        "a tensor map misaligned",
        f"{MAP} {READY} {EXPECT} @%leader {TILE} [s], [%map+<8|0>, {{0, 0}}], [full]; {wait()} {OWN}",
        r"tensor map at 0x\w+: not aligned to 64 bytes",
        tensor=loads,
    ),
    Pair(
        "bytes of what lies inside only",
        f"{MAP} {READY} {EXPECT[:-4]}<128|256>; @%leader {TILE} [s], [%map, {{8, 0}}], [full]; {wait()} {OWN}",
        f"{READ_EARLY}|{STANDING}.*0 arrivals and -?128 bytes are missing",
        lambda x: np.pad(x.reshape(4, 16)[:, 8:], ((0, 0), (0, 8))).ravel(),
        tensor=loads,
        here=False,
    ),
    Pair(
        "no proxy fence before a box is stored",
        f"{MAP} st.shared.u32 [%mine], %x; <|fence.proxy.async;> bar.sync 0; {UNBOX} {COMMIT} {SAVED}",
        PROXY,
        tensor=stores,
    ),
    Pair(
        "a stored box not waited for",
        f"{MAP} {FILL} {UNBOX} {COMMIT} <|{SAVED}>",
        UNDER + f"{THREAD} has not waited for its group",
        tensor=stores,
        here=False,
    ),
    Pair(
        "a stored box's source overwritten",
        f"{MAP} {FILL} {UNBOX} {COMMIT} <|{SAVED}> bar.sync 0;\n st.shared.u32 [%mine], 0; {SAVED}",
        rf"race: writes byte \d+ of .*, which a bulk copy of {THREAD} reads at where.cu:1.*; {FLIGHT}",
        tensor=stores,
    ),
]

# -- clusters ----------------------------------------------------------------------------------------------------------


def multicast(fence: str, before: str, mask: str) -> str:
    """The first block's leader copies its input into both blocks."""
    return f"""setp.eq.and.u32 %p1, %block, 0, %leader; mov.u16 %h1, {mask}; {init(1)} {fence} bar.sync 0;
    {before} {EXPECT}
    @%p1 {INTO}.multicast::cluster [s], [%in], 256, [full], %h1; {wait()} {OWN}"""


INIT_FENCE = "fence.mbarrier_init.release.cluster;"
TWO = {"want": lambda x: np.tile(x[:64], 2), "grid": 2, "cluster": 2}
CLUSTERS = [
    Pair(
        "multicast beyond the cluster",
        multicast(INIT_FENCE, CLUSTER, "<7|3>"),
        "where.cu:3, .*: multicast mask 0x7 in a cluster of 2 blocks in block .0, 0, 0., thread .0, 0, 0",
        **TWO,
    ),
    Pair(
        "multicast to one block only",
        multicast(INIT_FENCE, CLUSTER, "<1|3>"),
        rf"{STANDING}waits for phase 0 of the mbarrier at byte 4096: 0 arrivals and 256 bytes are missing",
        here=False,
        **TWO,
    ),
    Pair(
        "multicast before the other's mbarrier",
        multicast(INIT_FENCE, f"<|{CLUSTER}>", "3"),
        rf"signals the mbarrier at byte 4096, which {THREAD} initialised: race|{NOT_THERE}",
        **TWO,
    ),
    Pair(
        "multicast without fence.mbarrier_init",
        multicast(f"<|{INIT_FENCE}>", CLUSTER, "3"),
        rf"signals the mbarrier at byte 4096, which {THREAD} initialised: race.* no proxy fence .fence.mbarrier_init",
        **TWO,
    ),
    Pair(
        "a store to the other's mbarrier before it is there",
        f"""{init(1)} <|{INIT_FENCE}> @%leader mbarrier.arrive.expect_tx.shared.b64 %rd8, [full], 256;
        mov.u32 %r4, full; xor.b32 %r3, %block, 1; mapa.shared::cluster.u32 %r5, %r4, %r3; {THERE}
        <barrier.cluster.arrive.relaxed; barrier.cluster.wait;|{CLUSTER}>
        st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%there], %x, [%r5]; bar.sync 0;
        {wait()} {OWN} {CLUSTER}""",
        rf"signals the mbarrier at byte 4096, which {THREAD} initialised: race|{NOT_THERE}",
        swapped(64),
        grid=2,
        cluster=2,
    ),
    Pair(
        "a block that has exited",
        f"{THERE} st.shared.u32 [%mine], %x; {CLUSTER}\n ld.shared::cluster.u32 %r1, [%there]; <|{CLUSTER}> {STORE}",
        r"where.cu:2, .*: shared address 0x\w+ lies in a block that has exited",
        swapped(64),
        grid=2,
        cluster=2,
        once=True,
    ),
    Pair(
        "another block's memory as one's own",
        f"{THERE} st.shared.u32 [%mine], %x; {CLUSTER} ld.shared::<cta|cluster>.u32 %r1, [%there]; {CLUSTER} {STORE}",
        r"shared address 0x[12]000400 is another block's: .shared::cluster reaches it in",
        swapped(64),
        grid=2,
        cluster=2,
    ),
    Pair(
        "a rank beyond the cluster",
        f"mapa.shared::cluster.u32 %there, %mine, <2|1>; {OUT}",
        "rank 2 in a cluster of 2 blocks",
        grid=2,
        cluster=2,
    ),
]
ALL = [*COPIES, *BULK, *TENSORS, *CLUSTERS]


@pytest.mark.parametrize("pair", wrong_ones(ALL))
def test_wrong_kernels(pair):
    refuses(pair)


@pytest.mark.parametrize("pair", right_ones(ALL))
def test_right_kernels(pair):
    runs(pair)
