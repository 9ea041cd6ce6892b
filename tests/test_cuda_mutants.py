"""Bugs planted in the CUDA backend's convolution and weight gradient: the emulator, or the result, has to show each."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from emulator import EmulatorError, Schedule
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc
from triton_cases import check_conv, check_grads

pytestmark = pytest.mark.skipif(not nvcc() or not CSRC.exists(), reason="needs an nvcc, and the sources")
CONV, GRAD, RING, INDEX, WAY_OUT = (
    f"cuda/{name}" for name in ("conv3x3.cu", "weight_grad.cu", "ring.h", "index.h", "way_out.h")
)
# In place of what chooses among all the instances: the ones that are run here.
INSTANCES = {
    CONV: "template __global__ void conv_kernel<BFloat16, Rectified, CopyChunks, kSmall>(Request);\n",
    GRAD: "template __global__ void grad_kernel<BFloat16, Rectified, CopyChunks, kSmall>(Request);\n"
    "template __global__ void sum_kernel<__nv_bfloat16>(Request);\n",
}
SCHEDULES = (Schedule(32, 1, "late"), Schedule(128, 0, "early"), Schedule(32, 2, "shuffled"))


class Mutant(NamedTuple):
    """``replacement`` for ``pattern``, which occurs once in ``file``; ``expect``: what is said of kernel ``source``."""

    name: str
    source: str
    file: str
    pattern: str
    replacement: str
    expect: str


BARRIER = "    __syncthreads();\n"
LOAD = "    if (next < steps) load(ring + next % kStages * stage_bytes);\n"
NEXT = "    const int next = step + kStages - 1;\n"
MUTANTS = (
    Mutant("no_wait", CONV, RING, "ptx::cp_async_wait<kStages - 2>();", "", "in flight|race"),
    Mutant("waits_for_too_few", CONV, RING, "wait<kStages - 2>", "wait<kStages - 1>", "in flight|race"),
    Mutant("no_barrier", CONV, RING, BARRIER, "", "race"),
    Mutant("no_barrier_weight_grad", GRAD, RING, BARRIER, "", "race"),
    Mutant("loads_before_the_barrier", CONV, RING, BARRIER + NEXT + LOAD, NEXT + LOAD + BARRIER, "race"),
    Mutant("into_the_current_stage", GRAD, RING, "ring + next % kStages", "ring + step % kStages", "race|in flight"),
    Mutant("no_empty_groups", CONV, RING, "ptx::cp_async_commit();  // of a stage, or of nothing",
           "if (next < steps) ptx::cp_async_commit();", "in flight|race"),
    Mutant("no_barrier_behind_the_ring", CONV, RING, "__syncthreads();  // the ring has been read", "", "race"),
    Mutant("no_barrier_before_rows", CONV, CONV, "__syncthreads();  // rows are read", "// rows are read", "race"),
    Mutant("right_border", CONV, INDEX, "column < w;", "column <= w;", "out of bounds|result"),
    Mutant("upper_border", GRAD, INDEX, "row >= 0 &&", "row >= -1 &&", "out of bounds|result"),
    Mutant("one_pixel_too_many", CONV, CONV, "inside_[i] = pixel < pixels ?", "inside_[i] = pixel <= pixels ?",
           "out of bounds|result"),
    Mutant("channels_of_the_next_pixel", CONV, INDEX, "left < 0 ? 0", "left < 0 ? lanes", "out of bounds|result"),
    Mutant("stores_beyond_the_channels", CONV, CONV, "pixel >= pixels || channel >= k", "pixel >= pixels",
           "out of bounds|race|result|different values"),
    Mutant("stores_beyond_the_pixels", CONV, CONV, "pixel >= pixels || channel >= k", "channel >= k", "out of bounds"),
    Mutant("reads_unturned_chunks", CONV, CONV, "stage + narrow_chunk(pixel + m * 16 + lane % 16, chunk + lane / 16)",
           "stage + (pixel + m * 16 + lane % 16) * kNarrowRow + (chunk + lane / 16) * 16", "result"),
    Mutant("other_halves", GRAD, GRAD, "chunk + lane / 16));\n", "chunk + (lane / 16 ^ 1)));\n", "result"),
    Mutant("transposed_taps", CONV, INDEX, "{tap / side - side / 2, tap % side - side / 2}",
           "{tap % side - side / 2, tap / side - side / 2}", "out of bounds|result"),
    Mutant("first_split_left_out", GRAD, GRAD, "split = 0; split < request.splits", "split = 1; split < request.splits",
           "result"),
    Mutant("bias_after_relu", CONV, WAY_OUT, "AddBias, Rectify,", "Rectify, AddBias,", "result"),
    Mutant("odd_pitch", CONV, INDEX, "return tile + 8;", "return tile + 5;", "not aligned"),
)  # fmt: skip


def reduced(source: str) -> str:
    """A source with one instance of each of its kernels."""
    kernels, _, _ = (CSRC / source).read_text().partition("using Kernel =")
    return f"{kernels}{INSTANCES[source]}}}\n}}\n"


def changed(mutant: Mutant) -> dict[str, str]:
    """The mutant's sources, by their paths below csrc."""
    texts = {mutant.file: (CSRC / mutant.file).read_text(), mutant.source: reduced(mutant.source)}
    count = texts[mutant.file].count(mutant.pattern)
    assert count == 1, f"{mutant.name}: {mutant.pattern!r} occurs {count} times"
    texts[mutant.file] = texts[mutant.file].replace(mutant.pattern, mutant.replacement)
    return texts


def finding(source: str, texts: dict[str, str]) -> str:
    """What is said of it; "" if nothing is wrong."""
    for schedule in SCHEDULES:
        kernels = Emulated(schedule=schedule, tile=64, changed=texts)
        try:
            if source == CONV:  # two images; both channels end within a tile
                error, limit = check_conv(kernels, (2, 40, 5, 7), 24, torch.bfloat16, "first of an rcu")
            else:
                error, limit = check_grads(kernels, (2, 24, 5, 17), 40, torch.bfloat16)
        except EmulatorError as found:
            return str(found)
        except AssertionError:
            return "result"
        if error > limit:
            return "result"
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant(mutant):
    said = finding(mutant.source, changed(mutant))
    assert re.search(mutant.expect, said), f"expected {mutant.expect}, got {said or 'nothing'}"


@pytest.mark.parametrize("source", [CONV, GRAD])
def test_nothing_is_said_of_the_kernels_themselves(source):
    assert finding(source, {source: reduced(source)}) == ""
