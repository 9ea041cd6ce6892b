"""The CUDA backend's weight gradient against float64: its PTX for sm_80 in the emulator; on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from emulator import Schedule
from emulator.compilers import CSRC, nvcc, start
from refinenet_fast import _native
from refinenet_fast.testing import Data
from triton_cases import check_grads

pytestmark = pytest.mark.usefixtures("exact")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
everywhere = pytest.mark.runs_on("emulator", "gpu")
# (tile, shape, K): both channels end within a tile, the pixels within a stage.
SMALL, LARGE, ELEMENTS = (64, (2, 40, 5, 7), 72), (128, (1, 136, 5, 7), 72), (0, (2, 21, 5, 7), 37)
ROUTES = [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large"), pytest.param(ELEMENTS, id="elements")]


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        start(CSRC / "cuda" / "weight_grad.cu", "sm_80")


@pytest.fixture
def check(executor, monkeypatch):
    """Holds one gradient to float64, where ``executor`` runs it."""

    def check(route, dtype=BF16, schedule=None, **options):
        tile, shape, k = route
        kernels = executor.kernels(schedule) if schedule else executor.kernels()
        monkeypatch.setattr(kernels, "tile", tile)
        error, limit = check_grads(kernels, shape, k, dtype, device=executor.device, **options)
        assert error <= limit

    return check


@everywhere
@pytest.mark.parametrize("route", ROUTES)
def test_tf32_where_cudnn_would_use_it(executor, route, monkeypatch):
    """No tolerance of float32 would allow it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    kernels = executor.kernels()
    monkeypatch.setattr(kernels, "tile", route[0])
    error, limit = check_grads(kernels, *route[1:], FP32, taps=1, device=executor.device)
    assert limit < error <= 1e-3


@everywhere
@pytest.mark.parametrize("route", ROUTES)
def test_contiguous_weights(check, route):
    check(route, taps=9, contiguous=True)


@everywhere
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape, k", [((1, 1, 1, 1), 1), ((2, 24, 5, 3), 16), ((70, 8, 1, 1), 8), ((3, 3, 1, 5), 2)])
def test_odd_shapes_by_the_plan(check, shape, k, dtype):
    check((0, shape, k), dtype, contiguous=True)


@everywhere
@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled"), Schedule(128, 3, "late")])
@pytest.mark.parametrize(
    "route", [(64, (1, 16, 5, 40), 16), (128, (1, 16, 5, 40), 16), (0, (1, 15, 5, 40), 13)], ids=str
)
def test_schedules(check, route, schedule):
    """Warps in any order, copies that complete as late as they may."""
    check(route, schedule=schedule, taps=1)


@everywhere
@pytest.mark.parametrize("route", [(64, (2, 8, 23, 31), 16), (0, (1, 7, 31, 37), 5)], ids=str)
def test_splits_of_the_pixels(check, route):
    _, (n, c, h, w), k = route
    sizes = (n, h, w, c, k)
    plan = _native._C.cuda_plan_weight_grad(*[0] * 5, (0, 0, 0), sizes, 1, 0, 1, 1, False, True, route[0], 108)
    assert plan[4] > 2
    check(route, taps=1)


@everywhere
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("route", [(64, (1, 72, 9, 17), 8), (128, (1, 136, 7, 19), 72)], ids=str)
def test_blocks_that_take_turns_with_the_bias(check, route, dtype):
    """Two tiles of input channels, five stages and more."""
    check(route, dtype, taps=1)


@everywhere
def test_the_bias_alone(executor):
    data, kernels = Data(BF16, executor.device), executor.kernels()
    x, gy, weight, bias = data(1, 8, 5, 7), data(1, 8, 5, 7, salt=1), data.weight(8, 8, 3, salt=2), data(8, salt=3)
    gw, gb = kernels.parameter_grads(x, gy, weight, bias)
    none, alone = kernels.parameter_grads(x, gy, None, bias)
    assert none is None and torch.equal(alone, gb) and gb.dtype == bias.dtype
    assert torch.equal(kernels.parameter_grads(x, gy, weight, None)[0], gw)


@everywhere
@pytest.mark.parametrize("c, k", [(12, 20), (18, 6), (16, 18)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_channels_that_are_not_whole_chunks(check, c, k, dtype):
    """Copied in pieces of 8 bytes, and of 4."""
    check((0, (1, c, 5, 7), k), dtype)


@everywhere
def test_an_empty_batch_gives_zeros(executor):
    x, gy, weight = (torch.ones(s, device=executor.device) for s in ((0, 3, 4, 4), (0, 2, 4, 4), (2, 3, 3, 3)))
    assert torch.equal(executor.kernels().conv3x3_weight_grad(x, gy, weight), torch.zeros_like(weight))
