"""The machine code of the Triton kernels, compiled for GPUs that are not here (benchmarks/machine_code.py): what must
hold of it, and that the checks see where it does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
mc = pytest.importorskip("machine_code", reason="needs the checkout's benchmarks/")

from refinenet_fast.backends.ahead import compile_ahead  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# The ways of a convolution that are compiled for each architecture; the command compiles them all.
CONVOLUTIONS = {
    80: ("first of an rcu, relu in", "end of a chain", "fusion"),
    90: ("first of an rcu", "first of an rcu, relu in", "input gradient", "end of a chain", "fusion"),
    100: ("first of an rcu, relu in", "input gradient", "end of a chain", "fusion"),
}
OTHERS = (
    ("conv3x3", "plain", mc.TYPICAL, mc.FP16),
    ("conv3x3", "plain, tf32", mc.TYPICAL, mc.FP32),
    ("conv3x3", "plain, tf32x3", mc.TYPICAL, mc.FP32),
    ("conv3x3", "plain", mc.POINTWISE, mc.BF16),
    ("conv3x3", "plain", mc.SMALL, mc.BF16),
    ("conv3x3", "plain", mc.ODD, mc.BF16),
    ("weight_grad", "plain", mc.TYPICAL, mc.BF16),
    ("weight_grad", "relu in", mc.TYPICAL, mc.BF16),
    ("weight_grad", "plain, tf32", mc.TYPICAL, mc.FP32),
    ("weight_grad", "plain, tf32x3", mc.TYPICAL, mc.FP32),
    ("weight_grad", "plain", mc.SMALL, mc.BF16),
    ("weight_grad_reduce", "plain", mc.TYPICAL, mc.BF16),
    ("bias_grad", "bias", mc.TYPICAL, mc.BF16),
    ("maxpool5_forward", "relu, argmax", mc.TYPICAL, mc.BF16),
    ("maxpool5_backward", "backward, add", mc.TYPICAL, mc.BF16),
    ("bilinear_forward", "add, corners", mc.TYPICAL, mc.BF16),
    ("bilinear_backward", "backward, no corners", mc.TYPICAL, mc.BF16),
)
ON_ALL = ("conv3x3", "weight_grad")  # the others do not depend on the architecture: on one


def keys(capability):
    ways = [("conv3x3", way, mc.TYPICAL, mc.BF16) for way in CONVOLUTIONS[capability]]
    others = [other for other in OTHERS if other[0] in ON_ALL or capability == 90]
    # Over descriptors a ReLU is a pass of its own before the weight gradient.
    return [*ways, *(other for other in others if capability == 80 or other[:2] != ("weight_grad", "relu in"))]


def case(capability, kernel, way, shape=mc.TYPICAL, dtype=mc.BF16):
    (found,) = (c for c in mc.cases(capability) if (c.kernel, c.way, c.shape, c.dtype) == (kernel, way, shape, dtype))
    return found


def convolution(configuration, relu_in=False):
    """For sm_90, in a configuration that is not the chosen one."""
    way = "first of an rcu, relu in" if relu_in else "plain"
    x = mc.maps(8, 256, 128, 128, mc.BF16)
    packed = mc.torch.empty((9, 256, 256), dtype=mc.BF16, device="meta")
    (launch,) = mc.launches.convolution(x, packed, x, None, relu_in, mc.ways(x)[way].out, configuration)
    return mc.Case("conv3x3", way, mc.TYPICAL, mc.BF16, 90, launch, configuration)


@pytest.mark.parametrize("capability, key", [(c, key) for c in ARCHITECTURES for key in keys(c)], ids=str)
def test_what_is_chosen(capability, key):
    checked = case(capability, *key)
    assert mc.violations(checked, mc.read(checked)) == []


def test_a_box_takes_a_through_registers():
    """As intended; judged as a row of pixels it is not."""
    row = case(90, "conv3x3", "plain").configuration
    box = convolution(replace(row, rows=4, columns=16, outs=128, warps=4))
    code = mc.read(box)
    assert mc.multiplies_as_intended(box, code) == []
    as_row = convolution(replace(row, rows=1, columns=64, outs=128, warps=4))
    assert mc.multiplies_as_intended(as_row, code) == ["operand A from register, not descriptor"]


def test_relu_on_the_way_in_takes_a_through_registers():
    plain = case(90, "conv3x3", "first of an rcu")
    code = mc.read(case(90, "conv3x3", "first of an rcu, relu in"))
    assert mc.multiplies_as_intended(plain, code) == ["operand A from register, not descriptor"]


def test_another_tile_is_seen():
    code = mc.read(case(90, "conv3x3", "first of an rcu"))
    narrow = convolution(replace(case(90, "conv3x3", "plain").configuration, outs=128))
    assert mc.multiplies_as_intended(narrow, code) == [
        "multiplies by HGMMA.64x256x16.F32.BF16, not HGMMA.64x128x16.F32.BF16"
    ]


@pytest.mark.parametrize("how", ["too few warps", "one slice"])
def test_spills_are_seen(how):
    chosen = case(90, "conv3x3", "fusion")
    constants = {**chosen.launch.constants, "SLICES": 1}
    warps = 4 if how == "too few warps" else chosen.launch.warps
    launch = replace(chosen.launch, warps=warps, constants=constants if how == "one slice" else chosen.launch.constants)
    broken = replace(chosen, launch=launch)
    (text,) = mc.no_spills(broken, mc.read(broken))
    assert text.startswith("spills: ")


def test_too_much_shared_memory_is_seen():
    chosen = case(90, "conv3x3", "plain")
    broken = replace(chosen, launch=replace(chosen.launch, stages=8))
    (text,) = mc.fits(broken, mc.read(broken))
    assert text.endswith("bytes of shared memory, of 232448")


@pytest.mark.parametrize("kernel, way", [("conv3x3", "first of an rcu"), ("weight_grad", "plain")])
def test_bytes_that_nobody_copies_are_seen(kernel, way):
    checked = case(90, kernel, way)
    compiled = compile_ahead(checked.launch, 90)
    rest = compiled.asm["ttgir"], compiled.metadata.tensordesc_meta, compiled.metadata.num_warps
    code = mc.read(checked)
    assert len(code.transactions) == checked.configuration.stages  # three before the loop, one in it
    assert mc.transactions(compiled.asm["ptx"], *rest) == code.transactions
    wrong = mc.transactions(compiled.asm["ptx"].replace("], 49152;", "], 49168;"), *rest)
    found = mc.barriers_count_right(checked, replace(code, transactions=wrong))
    assert found == ["49168 bytes expected, 49152 in boxes, 49152 in buffers"]
    wrong = mc.transactions(compiled.asm["ptx"], rest[0], [{**m, "elem_size": 4} for m in rest[1]], rest[2])
    found = mc.barriers_count_right(checked, replace(code, transactions=wrong))
    assert found == ["49152 bytes expected, 98304 in boxes, 49152 in buffers"]


def test_a_loop_that_stores_and_promotes_is_seen():
    checked = case(90, "conv3x3", "first of an rcu, relu in")
    code = mc.read(checked)
    promoted = tuple(text.replace("HMNMX2.BF16_V2", "FMNMX") for text in code.loop)
    broken = replace(code, loop=(*promoted, "STS.128 [R1], R4"), triton=(3, 9))
    assert mc.relu_is_native(checked, broken) == ["a bfloat16 ReLU in float32: 16 instructions"]
    assert mc.loop_stores_nothing(checked, broken) == ["1 STS in the main loop"]
    assert mc.relu_is_native(checked, replace(broken, triton=(3, 6))) == []


def test_wgmma_that_ptxas_serializes_is_seen():
    """A box of 64 pixels for 4 warps: A in registers, and each product waits for the one before."""
    row = case(90, "conv3x3", "plain").configuration
    box = convolution(replace(row, rows=4, columns=16, outs=128, warps=4))
    (text,) = mc.not_serialized(box, mc.read(box))
    assert "wgmma.mma_async instructions are serialized" in text


def test_the_smallest_loop_with_tensor_cores_is_the_main_one():
    """Not the wait behind the kernel, which branches back to behind the loop, nor a loop without any."""
    texts = ["MOV", "HGMMA R0, gdesc[UR4], R0", "IADD", "IADD", "IADD", "BRA 0x10"]
    texts += ["HGMMA R0, gdesc[UR4], R0", "EXIT", "BRA 0x80", "BRA 0x60"]
    assert mc.main_loop(list(zip(range(0, 160, 16), texts))) == texts[1:6]
