"""What the emulator has to find in tensor cores, shuffles, loops that do not end, and launches that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from emulator import EmulatorError, Struct, TensorMap, emulate, parse
from emulator_pairs import (
    ARRIVE,
    FLIGHT,
    MODULE,
    OUT,
    PROXY,
    STANDING,
    STORE,
    THREAD,
    Pair,
    constant,
    init,
    refuses,
    right_ones,
    runs,
    wrong_ones,
)

# -- tensor cores ------------------------------------------------------------------------------------------------------

# A (64, 16) at s and B (16, 8) 2048 bytes further, float16 ones; their descriptors without swizzle.
ONES = """mov.b32 %r3, 0x3C003C00; shl.b32 %r4, %t, 4; mov.u32 %r5, s; add.u32 %r4, %r4, %r5; setp.lt.u32 %p2, %t, 16;
st.shared.v4.b32 [%r4], {%r3, %r3, %r3, %r3}; @%p2 st.shared.v4.b32 [%r4+2048], {%r3, %r3, %r3, %r3};
shr.u32 %r5, %r5, 4; cvt.u64.u32 %rd1, %r5; or.b64 %rd1, %rd1, 0x1000080000; add.s64 %rd2, %rd1, 128;
setp.ne.u32 %p1, %t, %t;"""
SEEN = "fence.proxy.async; bar.sync 0;"
FENCE, DONE = "wgmma.fence.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}"
MULTIPLY = f"{WGMMA}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
BY_REGISTERS = f"{WGMMA}, {{%r6, %r7, %r8, %r9}}, %rd2, %p1, 1, 1, 0;"
FOUR = " ".join(f"add.u32 %r{k}, %r3, 0;" for k in range(6, 10))
GO = "wgmma.commit_group.sync.aligned;"
RESULT = "st.global.f32 [%out], %f1;"
SIXTEEN = {"want": constant(0x41800000), "threads": 128}
IN_FLIGHT = r"register %f1 is in flight: wgmma has not been waited for in"
PRODUCTS = [
    Pair(
        "no proxy fence",
        f"{ONES} <|fence.proxy.async;> bar.sync 0; {FENCE} {MULTIPLY} {GO} {DONE} {RESULT}",
        PROXY,
        **SIXTEEN,
    ),
    Pair(
        "no barrier",
        f"{ONES} fence.proxy.async; <|bar.sync 0;>\n {FENCE} {MULTIPLY} {GO} {DONE} {RESULT}",
        rf"race: (reads|writes) byte \d+ of shared memory, which {THREAD} wrote|through the async proxy",
        **SIXTEEN,
    ),
    Pair(
        "no wgmma.fence",
        f"{ONES} {SEEN} {FENCE} mov.f32 %f1, 0f00000000; <|{FENCE}> {MULTIPLY} {GO} {DONE} {RESULT}",
        "register %f1 was (read or )?written after the last wgmma.fence",
        **SIXTEEN,
    ),
    Pair(
        "no wgmma.fence after the operands in registers",
        f"{ONES} {FENCE} {FOUR} {SEEN} <|{FENCE}> {BY_REGISTERS} {GO} {DONE} {RESULT}",
        "register %r6 was (read or )?written after the last wgmma.fence",
        **SIXTEEN,
    ),
    Pair(
        "no wgmma.fence at all",
        f"{ONES} {SEEN} <|{FENCE}> {MULTIPLY} {GO} {DONE} {RESULT}",
        "wgmma.fence",
        **SIXTEEN,
    ),
    Pair(
        "accumulators in flight",
        f"{ONES} {SEEN} {FENCE} {MULTIPLY} {GO} <|{DONE}>\n {RESULT} {DONE}",
        IN_FLIGHT,
        **SIXTEEN,
    ),
    Pair(
        "one group too many left",
        f"{ONES} {SEEN} {FENCE} {MULTIPLY} {GO} wgmma.wait_group.sync.aligned <1|0>;\n {RESULT} {DONE}",
        IN_FLIGHT,
        **SIXTEEN,
    ),
    Pair("no commit", f"{ONES} {SEEN} {FENCE} {MULTIPLY} <|{GO}> {DONE}\n {RESULT}", IN_FLIGHT, **SIXTEEN),
    Pair(
        "operands in registers overwritten",
        f"{ONES} {FOUR} {SEEN} {FENCE} {BY_REGISTERS} {GO} <|{DONE}> mov.b32 %r6, 0; {DONE} {RESULT}",
        "register %r6 is in flight: wgmma has not been waited for in",
        **SIXTEEN,
    ),
    Pair(
        "operands in shared memory overwritten",
        f"{ONES} {SEEN} {FENCE}\n {MULTIPLY} {GO} <|{DONE}> bar.sync 0;\n st.shared.u32 [%mine], 0; {DONE} {RESULT}",
        rf"race: writes byte 0 of shared memory, which wgmma of {THREAD} and its warpgroup reads at .*:5.*{FLIGHT}",
        **SIXTEEN,
    ),
    Pair(
        "uninitialised operands",
        f"{ONES.replace('@%p2 st', '<@!%p2|@%p2> st')} {SEEN} {FENCE} {MULTIPLY} {GO} {DONE}\n {RESULT}",
        "the stored value is undefined|out of bounds",
        **SIXTEEN,
    ),
    Pair(
        "operands out of bounds",
        f"{ONES} {SEEN} add.s64 %rd2, %rd2, <128|0>; {FENCE}\n {MULTIPLY} {GO} {DONE} {RESULT}",
        r"operand B: shared address 0x\w+ (is out of bounds|holds an mbarrier)",
        **SIXTEEN,
    ),
    Pair(
        "exit with wgmma in flight",
        f"{ONES} {SEEN} {FENCE} {MULTIPLY} {GO} {OUT} <|{DONE}>",
        "^k, where.cu:98, .*ret: exits while wgmma is in flight",
        threads=128,
    ),
    Pair(
        "half a warpgroup",
        f"{ONES} {SEEN} setp.lt.u32 %p3, %t, 64; {OUT} {FENCE}\n <@%p3 bra L;|> {MULTIPLY} L: {GO} {DONE}",
        f"{STANDING}waits for the other lanes of its warpgroup",
        threads=128,
        here=False,
    ),
]
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r3, %r3, %r3, %r3}, {%r3, %r3}, "
MMA += "{%f5, %f5, %f5, %f5};"
WARPS = [
    Pair(
        "a divergent mma",
        f"mov.b32 %r3, 0x3C003C00; mov.f32 %f5, 0f00000000;\n <@%half bra L;|> {MMA} <bra M; L: {MMA} M:|> {RESULT}",
        f"{STANDING}waits for the other lanes of its warp",
        constant(0x41800000),
        here=False,
    ),
    Pair(
        "an mma by half the warp",
        f"@%half bra L; mov.b32 %r3, 0x3C003C00; mov.f32 %f5, 0f00000000; <{MMA}|> L: {OUT}",
        f"{STANDING}waits for the other lanes of its warp$|lanes of the same warp have exited",
        here=False,
    ),
    Pair(
        "a shuffle from a lane that is elsewhere",
        f"mov.u32 %r1, %x; @%half bra L;\n shfl.sync.idx.b32 %r1, %x, <0|16>, 31, 0xFFFF0000; L: {STORE}",
        "^k, where.cu:2, .*: reads the value of a lane that does not take part in block .0, 0, 0., thread .(16|48)",
        lambda x: np.where(np.arange(64) % 32 < 16, x, x[np.arange(64) // 32 * 32 + 16]),
    ),
    Pair(
        "a member mask of exited lanes",
        f"{OUT} @%half exit;\n shfl.sync.idx.b32 %r1, %x, 16, 31, <-1|0xFFFF0000>;",
        "^k, where.cu:2, .*: the member mask names lanes that have exited",
    ),
    Pair(
        "a member mask without the lane itself",
        f"shfl.sync.idx.b32 %r1, %x, 0, 31, <0xFFFF|-1>; {OUT}",
        "a lane runs it that the member mask does not name in block .0, 0, 0., thread .(16|48), 0, 0",
    ),
    Pair(
        "members that do not come",
        f"{OUT} @%half bra L;\n shfl.sync.idx.b32 %r1, %x, 16, 31, <-1|0xFFFF0000>; bar.warp.sync 0xFFFF0000; L:"
        "bar.warp.sync -1;",
        f"{STANDING}waits for the lanes that its member mask names",
        here=False,
    ),
    Pair(
        "members that a predicate leaves out",
        f"<@%half|> shfl.sync.idx.b32 %r1, %x, 0, 31, -1; {OUT}",
        f"{STANDING}waits for the lanes that its member mask names|names lanes that have exited",
        here=False,
    ),
]

# -- spinning ----------------------------------------------------------------------------------------------------------

LOOPS = (
    r"^k, where.cu:2, PTX line \d+, [\w.]+: more than 500 basic blocks: block \(0, 0, 0\), thread \(\d+, 0, 0\) loops$"
)
TEST = "W: mbarrier.test_wait.parity.shared.b64 %p8, [full], 0; @!%p8 bra W;"
SPINS = [
    Pair(
        "a flag in global memory that nobody sets",
        f"<|@%leader st.volatile.global.u32 [%in], 7;> ld.param.u64 %rd1, [in];\n"
        f"W: ld.volatile.global.u32 %r1, [%rd1]; setp.ne.u32 %p1, %r1, 7; @%p1 bra W; {STORE}",
        LOOPS,
        constant(7),
        here=False,
    ),
    Pair(
        "a flag in shared memory that nobody sets",
        f"@%leader st.shared.u32 [s], <6|7>; bar.sync 0;\n"
        f"W: ld.volatile.shared.u32 %r1, [s]; setp.ne.u32 %p1, %r1, 7; @%p1 bra W; {STORE}",
        LOOPS,
        constant(7),
        here=False,
    ),
    Pair("a test_wait", f"{init(65)} bar.sync 0; {ARRIVE} <|@%leader {ARRIVE}>\n {TEST} {OUT}", LOOPS, here=False),
    Pair(
        "a test_wait, its readers first in the text",
        f"{init(32)} bar.sync 0; @%first bra SEND;\n {TEST} bra M; SEND: <|{ARRIVE}> M: {OUT}",
        LOOPS,
        here=False,
    ),
]
ALL = [*PRODUCTS, *WARPS, *SPINS]


@pytest.mark.parametrize("pair", wrong_ones(ALL))
def test_wrong_kernels(pair):
    refuses(pair)


@pytest.mark.parametrize("pair", right_ones(ALL))
def test_right_kernels(pair):
    runs(pair)


# -- what a launch has to fit ------------------------------------------------------------------------------------------

WORDS = np.zeros(64, np.uint32)
TILED = np.zeros((8, 16), np.float32)


def kernel_of(parameters: str = "", before: str = "", target: str = "sm_90a"):
    text = MODULE.format(parameters=parameters, shared="", addresses="", body="")
    header = ".extern .shared .align 16 .b8 dynamic[];\n.visible"
    text = text.replace("sm_90a", target).replace(".visible", header).replace(")\n{", f") {before}\n{{", 1)
    return parse(text)["k"]


@pytest.mark.parametrize(
    "sizes, given, said",
    [
        ({}, {"grid": [0]}, "grid: expected one to three sizes >= 1, got \\(0,\\)"),
        ({}, {"grid": [1, 1, 1, 1]}, "grid: expected one to three sizes"),
        ({}, {"grid": [70_000]}, r"grid: \(70000, 1, 1\) x \(64, 1, 1\) exceeds the budget of 4000000 threads"),
        ({}, {"block": [32, 33]}, r"block: expected at most 1024 threads, got \(32, 33, 1\)"),
        ({}, {"grid": [3], "cluster": [2]}, r"grid: expected multiples of the cluster \(2, 1, 1\), got \(3, 1, 1\)"),
        ({}, {"grid": [32], "cluster": [32]}, r"cluster: expected at most 16 blocks, got \(32, 1, 1\)"),
        ({"before": ".reqntid 128"}, {}, r"block: expected \(128,\), as it was compiled for, got \(64, 1, 1\)"),
        (
            {"before": ".reqnctapercluster 2"},
            {"grid": [2], "cluster": [1]},
            r"cluster: expected \(2,\), as it was compil",
        ),
        ({"before": ".reqnctapercluster 2"}, {"grid": [3]}, r"grid: expected multiples of the cluster \(2, 1, 1\)"),
        ({"target": "sm_80"}, {"shared": 166_913}, "166913 bytes of shared memory; sm_80 has 166912"),
        ({}, {"shared": 232_449}, "232449 bytes of shared memory; sm_90a has 232448"),
        ({}, {"args": [WORDS]}, "expected 2 arguments, got 1"),
        ({}, {"args": [WORDS] * 3}, "expected 2 arguments, got 3"),
        ({}, {"args": [WORDS, np.float32(1)]}, r"parameter in: expected 8 bytes, got 4 \(float32\)"),
        ({"parameters": ", .param .u32 n"}, {"args": [WORDS] * 3}, r"parameter n: expected 4 bytes, got 8 \(ndarray\)"),
        (
            {"parameters": ", .param .u32 n"},
            {"args": [WORDS, WORDS, 1 << 32]},
            "n: expected a number of 4 bytes",
        ),
        ({}, {"args": [WORDS, "a text"]}, "parameter in: expected an array, a number, a TensorMap"),
        ({}, {"args": [WORDS, Struct("i", (1.5,))]}, "parameter in"),
        (
            {},
            {"args": [WORDS, WORDS[:32]]},
            r"ld.global.u32: address 0x\w+ is out of bounds .byte 128 of buffer in, which",
        ),
        ({}, {"args": [WORDS[::2], WORDS]}, r"buffer out: expected C-contiguous memory, got strides \(8,\)"),
        (
            {},
            {"args": [WORDS, 12345]},
            r"address 0x3039 is (not aligned to 4 bytes|out of bounds) .in no buffer|before all",
        ),
        ({"before": ".maxntid 32"}, {}, "block: expected at most 32 threads"),
        (
            {"target": "sm_80"},
            {"cluster": [2], "grid": [2], "args": [np.zeros(128, np.uint32)] * 2},
            "cluster: expected one block on sm_80",
        ),
    ],
)
def test_launches_that_do_not_fit(sizes, given, said):
    launch = {"grid": [1], "block": [64], "args": [WORDS, WORDS], "cluster": (), "shared": 0} | given
    kernel = kernel_of(**sizes)
    with pytest.raises(EmulatorError, match=said) as raised:
        emulate(kernel, launch.pop("grid"), launch.pop("block"), launch.pop("args"), **launch)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "array, box, options, said",
    [
        (TILED, (8, 16), {"kind": "f16"}, "elements of 4 bytes are no f16"),
        (TILED, (8, 16), {"kind": "f8"}, "elements of 4 bytes are no f8"),
        (TILED, (16,), {}, r"expected one to five dimensions and a box of as many, got \(8, 16\) and \(16,\)"),
        (np.zeros((1, 1, 1, 1, 1, 4), np.float32), (1,) * 6, {}, "expected one to five dimensions"),
        (np.zeros((512, 4), np.float32), (257, 4), {}, "expected a box of 1 to 256 elements in each dimension"),
        (TILED, (0, 16), {}, "expected a box of 1 to 256 elements in each dimension"),
        (TILED, (8, 2), {}, "expected the box's rows to be multiples of 16 bytes, got 8"),
        (np.zeros((8, 17), np.float32), (8, 16), {}, r"strides that are multiples of 16 bytes, got \(68, 4\)"),
        (
            np.zeros(129, np.float32)[1:].reshape(8, 16),
            (8, 16),
            {},
            "expected an address that 16 bytes divide, got one 4",
        ),
        (TILED, (8, 16), {"swizzle": 32}, "expected rows of at most 32 bytes under that swizzle, got 64"),
        (TILED, (8, 16), {"swizzle": 48}, "swizzle"),
        (
            TILED.view(np.uint32),
            (8, 16),
            {"kind": "u32", "nan_fill": True},
            "NaN fills floating-point elements, not u32",
        ),
    ],
)
def test_tensor_maps_that_cuda_would_not_make(array, box, options, said):
    tensor = TensorMap(array, box, **({"kind": "f32"} | options))
    with pytest.raises(EmulatorError, match=f"tensor map m: .*{said}"):
        emulate(kernel_of(parameters=", .param .align 64 .b8 m[128]"), [1], [64], [WORDS, WORDS, tensor])
