"""What Triton's convolutions are launched with: that it fits, fills the GPU, and is a function of the problem alone."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch

from refinenet_fast.backends import WayOut, launches
from refinenet_fast.backends.configurations import (
    A100,
    B200,
    H100,
    Architecture,
    Configuration,
    Problem,
    candidates,
    choose,
    fitted,
    programs,
    shared_bytes,
    tiles,
)

SMALLER = (Architecture(86, 82, 101_376), Architecture(120, 170, 101_376))  # with less shared memory
KERNELS = ["conv3x3", "weight_grad"]
PROBLEMS = [
    Problem(n, h, w, c, k, taps, size, exact)
    for (n, h, w), (c, k), taps, (size, exact) in itertools.product(
        [(1, 1, 1), (1, 16, 16), (1, 32, 32), (8, 16, 16), (8, 128, 128), (2, 97, 131), (1, 512, 3)],
        [(1, 1), (3, 21), (64, 64), (256, 256), (512, 512), (2048, 512)],
        [9, 1],
        [(2, False), (4, False), (4, True)],
    )
]


@pytest.mark.parametrize("architecture", [A100, H100, B200, *SMALLER], ids=lambda a: f"sm_{a.capability}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_problem_has_candidates_and_all_fit(kernel, architecture):
    for problem in PROBLEMS:
        chosen = choose(kernel, architecture, problem)
        assert choose(kernel, architecture, problem) == chosen
        for configuration in candidates(kernel, architecture, problem):
            assert shared_bytes(kernel, configuration, problem) <= architecture.shared
            assert fitted(kernel, architecture, problem, asdict(configuration)) == configuration
            assert configuration.splits <= max(1, problem.taps * problem.c, tiles(problem, configuration))
        if not architecture.has_descriptors:
            assert not chosen.described


def test_rows_of_descriptors_are_multiples_of_16_bytes():
    for problem in PROBLEMS:
        for kernel in KERNELS:
            channels = [problem.c] if kernel == "conv3x3" else [problem.c, problem.k]
            if choose(kernel, H100, problem).described:
                assert all(c * problem.size % 16 == 0 for c in channels)


@pytest.mark.parametrize(
    "problem",
    [Problem(8, 16, 16, 512, 512, 9, 2), Problem(1, 64, 64, 256, 256, 9, 2), Problem(1, 32, 32, 256, 256, 9, 2)],
)
def test_small_maps_fill_a_quarter_of_the_gpu_at_least(problem):
    """By smaller tiles, or by a split over input channels."""
    chosen = choose("conv3x3", H100, problem)
    assert programs("conv3x3", problem, chosen) * chosen.splits >= H100.processors // 4


def test_large_maps_on_hopper_keep_both_operands_in_shared_memory():
    chosen = choose("conv3x3", H100, Problem(8, 128, 128, 256, 256, 9, 2))
    assert chosen.described and chosen.rows == 1 and chosen.splits == 1


def test_the_weight_gradient_is_one_wave():
    problem = Problem(8, 128, 128, 256, 256, 9, 2)
    chosen = choose("weight_grad", H100, problem)
    waves = programs("weight_grad", problem, chosen) * chosen.splits / H100.processors
    assert 0.8 < waves <= 1


def test_what_does_not_fit_is_no_candidate():
    problem = Problem(8, 128, 128, 256, 256, 9, 2)
    small = Architecture(90, 132, 60_000)
    assert all(shared_bytes("conv3x3", c, problem) <= 60_000 for c in candidates("conv3x3", small, problem))
    large = Configuration(True, 1, 128, 256, 64, warps=8, stages=4)
    assert fitted("conv3x3", small, problem, asdict(large)) is None
    assert fitted("conv3x3", H100, problem, asdict(large)) == large
    exact = Problem(8, 128, 128, 256, 256, 9, 4, exact=True)  # three products take more columns than B200 has
    wide = asdict(Configuration(True, 1, 128, 256, 32, warps=8, stages=2))
    assert fitted("conv3x3", B200, exact, wide) is None and fitted("conv3x3", H100, exact, wide) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"tile": 3},
        {"columns": 24},
        {"outs": "x"},
        {"stages": 0},
        {"described": 1},
        {"speed": None},
        {"rows": True},
        None,
    ],
    ids=str,
)
def test_a_choice_that_is_no_configuration_is_none(change):
    problem, choice = Problem(8, 128, 128, 256, 256, 9, 2), asdict(Configuration(True, 1, 128, 256, 64, 8, 4))
    assert fitted("conv3x3", H100, problem, choice) is not None
    wrong = {**choice, **change} if change else {key: choice[key] for key in list(choice)[1:]}  # {}: one is missing
    assert fitted("conv3x3", H100, problem, wrong) is None


def nhwc_meta(n, c, h, w, dtype=torch.bfloat16):
    return torch.empty_strided((n, c, h, w), (c * h * w, 1, c * w, c), device="meta", dtype=dtype)


@pytest.mark.parametrize("n, wide", [(127, False), (128, True)])
def test_offsets_have_64_bits_where_a_tensor_has_more_elements_than_32_count(n, wide):
    """128 images of 256 channels at 256 x 256 are 2^31 elements."""
    tl = pytest.importorskip("triton.language")
    x, y = nhwc_meta(n, 256, 256, 256), nhwc_meta(n, 64, 256, 256)
    packed = torch.empty(9, 64, 256, device="meta", dtype=torch.bfloat16)
    configuration = choose("conv3x3", A100, launches.problem_of(x, 64, 9, True))
    (launch,) = launches.convolution(x, packed, y, None, False, WayOut(), configuration)
    assert launch.constants["INDEX"] == (tl.int64 if wide else tl.int32)
    weight = torch.empty(64, 256, 3, 3, device="meta")
    several = [
        *launches.weight_gradient(x, y, weight, False, configuration)[:1],
        *launches.bias_gradient(x, weight[0, :, 0, 0], 4)[:1],
        launches.pool_convolution(x, packed[:1], y, None, False, WayOut()),
    ]
    assert [launch.constants["INDEX"] for launch in several] == [tl.int64 if wide else tl.int32] * 3


def test_what_32_bits_and_grids_do_not_count_runs_elsewhere():
    from refinenet_fast.backends.triton import _countable

    assert _countable(nhwc_meta(8, 1, 128, 128), 4)
    for shape in [(2**11, 1, 2**10, 2**10), (2**16, 1, 2, 2), (1, 1, 2**16, 2), (1, 2**11, 1, 2**20), (0, 1, 2, 2)]:
        assert not _countable(nhwc_meta(*shape), 4)
