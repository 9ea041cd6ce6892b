"""The CUDA kernels executed without a GPU; and the emulator itself, which has to refuse what a kernel must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import refinenet_fast
from emulator import EmulatorError, Schedule, emulate, parse
from emulator.backend import Emulated
from emulator.compilers import CSRC, compiled, find, nvcc, start
from emulator.machine import Machine
from executors import needs_nvcc
from refinenet_fast import testing
from refinenet_fast.testing import Data


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        for arch in ("sm_80", "sm_90a", "sm_100"):
            for source in ("maxpool5.cu", "bilinear.cu", "conv3x3.cu", "weight_grad.cu"):
                start(CSRC / "cuda" / source, arch)


@pytest.fixture(autouse=True)
def _exact():
    with testing.exact_float32():
        yield


# -- the kernels of csrc/cuda ------------------------------------------------------------------------------------------


SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (1, 16, 7, 5), (1, 5, 18, 3), (0, 4, 5, 5)]
BLOCKS, WARPS = Schedule(256, 1), Schedule(32, 2)


@pytest.mark.runs_on("reference", "emulator", "gpu")
@pytest.mark.parametrize("dtype", Emulated.dtypes, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_kernels(shape, dtype, executor):
    """Forward and backward, with vectors of channels and without, against float64."""
    check(executor.kernels(), shape, Data(dtype, executor.device))


@needs_nvcc
@pytest.mark.parametrize("dtype", Emulated.dtypes, ids=str)
@pytest.mark.parametrize("shape, schedule", [*((shape, BLOCKS) for shape in SHAPES[1:4]), (SHAPES[1], WARPS)], ids=str)
def test_cuda_kernels_in_another_order(shape, schedule, dtype):
    check(Emulated(schedule=schedule), shape, Data(dtype))


def check(kernels, shape, data):
    for op, direction, error, limit in testing.check_kernels(kernels, shape, data):
        assert error <= limit, f"{op} {direction}: error {error:.3g}, limit {limit:.3g}"


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100"])
def test_other_architectures(arch):
    check(Emulated(arch), (1, 4, 5, 6), Data())


@needs_nvcc
def test_non_finite_values_are_pytorchs():
    x = Data()(1, 8, 9, 7)
    x[0, :, 2, 3], x[0, 1, 7], x[0, 5, :, 0] = torch.nan, torch.inf, -torch.inf
    value, argmax = Emulated().maxpool5(x, relu=True, argmax=True)
    want, which = refinenet_fast.backends.get("reference").maxpool5(x, relu=True, argmax=True)
    torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(argmax, which)


@needs_nvcc
@pytest.mark.parametrize("source", ["maxpool5.cu", "bilinear.cu"])
def test_every_opcode_of_the_kernels_is_known(source):
    kernels = compiled(CSRC / "cuda" / source)
    assert kernels and not set().union(*map(Machine.unknown, kernels.values()))


# -- what it refuses ---------------------------------------------------------------------------------------------------

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"
KERNEL = """
.visible .entry k(.param .u64 p, .param .u32 n)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .loc 1 7 0
    ld.param.u64 %rd1, [p];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    {body}
    ret;
}}
"""


def run(body: str, data: np.ndarray, n: int = 0, threads: int = 8) -> None:
    kernel = parse(HEADER + '.file 1 "some/where.cu"\n' + KERNEL.format(body=body))["k"]
    emulate(kernel, [1], [threads], [data, n])


def test_it_runs():
    data = np.arange(8, dtype=np.float32)
    run("ld.global.f32 %f1, [%rd3]; fma.rn.f32 %f1, %f1, 0f40000000, 0f3F800000; st.global.f32 [%rd3], %f1;", data)
    assert data.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


def test_lanes_diverge_and_meet_again():
    data = np.zeros(8, np.uint32)
    run(
        "mov.u32 %r3, 0; L1: setp.ge.u32 %p1, %r3, %r2; @%p1 bra L2; add.u32 %r3, %r3, 1; bra.uni L1;"
        "L2: @!%p1 add.u32 %r3, %r3, 100; mul.lo.u32 %r3, %r3, %r3; st.global.u32 [%rd3], %r3;",
        data,
    )
    assert data.tolist() == [i * i for i in range(8)]


@pytest.mark.parametrize(
    "body, said",
    [
        ("ld.global.f32 %f1, [%rd3+4];", r"where.cu:7, PTX line \d+, ld.global.f32: address .* is out of bounds "
         r"\(byte 32 of buffer p, which has 32\)"),
        ("ld.global.f32 %f1, [%rd3+-4];", "is out of bounds \\(in no buffer"),
        ("ld.global.f32 %f1, [%rd3+2];", "is not aligned to 4 bytes"),
        ("ld.global.v2.f32 {%f1, %f2}, [%rd3];", "is not aligned to 8 bytes"),
        ("st.global.f32 [%rd3], %f7;", r"the stored value is undefined in block \(0, 0, 0\), thread \(0, 0, 0\)"),
        ("add.s64 %rd4, %rd3, %rd7; ld.global.f32 %f1, [%rd4];", "the address is undefined"),
        ("setp.eq.u32 %p1, %r7, 0; @%p1 bra L1; L1:", "the predicate is undefined"),
        ("setp.lt.u32 %p1, %r2, 4; @%p1 mov.u32 %r3, 1; st.global.u32 [%rd3], %r3;", r"undefined .* thread \(4, 0"),
        ("st.global.u32 [%rd1], %r2;", "threads write different values to one address of buffer p"),
        ("L1: bra.uni L1;", r"more than \d+ basic blocks: block .* loops"),
        ("frobnicate.f32 %f1, %f2;", "frobnicate.f32: this opcode is not known"),
        ("ld.param.u64 %rd4, [n];", "reads past the parameter's 4 bytes"),
    ],
)  # fmt: skip
def test_what_a_kernel_must_not_do(body, said, monkeypatch):
    monkeypatch.setattr("emulator.launch.BUDGET", 1000)
    with pytest.raises(EmulatorError, match=said):
        run(body, np.zeros(8, np.float32))


def test_addresses_are_as_aligned_as_those_of_the_arrays():
    data, body = np.zeros(12, np.float32), "ld.global.v2.f32 {%f1, %f2}, [%rd1]; st.global.f32 [%rd1], %f2;"
    run(body, data[:8])
    with pytest.raises(EmulatorError, match="is not aligned to 8 bytes"):
        run(body, data[1:9])


def test_what_is_undefined_may_be_moved():
    data = np.zeros(8, np.float32)
    run("mov.f32 %f1, %f2; selp.f32 %f1, %f1, %f3, %p1; mov.f32 %f1, 0f3F800000; st.global.f32 [%rd3], %f1;", data)
    assert data.tolist() == [1] * 8


def test_launches_that_do_not_fit():
    with pytest.raises(EmulatorError, match="block: expected at most 1024 threads"):
        run("", np.zeros(8, np.float32), threads=1025)
    with pytest.raises(EmulatorError, match="buffer p: expected C-contiguous memory"):
        run("", np.zeros((8, 8), np.float32).T)
    with pytest.raises(EmulatorError, match="expected one kernel with"):
        find({}, "nothing")


@pytest.mark.parametrize("text", ["add.s32 %r1, %r2, &;", "123;", "ld.global.f32 %f1, [%rd1 * 2];"])
def test_what_it_cannot_read(text):
    with pytest.raises(EmulatorError, match=r"PTX line \d+: cannot read"):
        parse(HEADER + KERNEL.format(body=text))
