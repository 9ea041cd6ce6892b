"""The CUDA backend's convolutions that pool on the way in, against float64: PTX in the emulator; on a GPU, if any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from emulator import Schedule
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from refinenet_fast.backends import WayIn, WayOut, table
from refinenet_fast.testing import Data, conv, maxpool, relative_l2
from triton_cases import WAYS, check_conv, tf32

pytestmark = pytest.mark.usefixtures("exact")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
everywhere = pytest.mark.runs_on("emulator", "gpu")
taps = pytest.mark.parametrize("taps", [1, 9])


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        start(CSRC / "cuda" / "pool_conv3x3.cu", "sm_80")


@pytest.fixture
def check(executor, monkeypatch):
    """Holds one convolution to float64, where ``executor`` runs it."""

    def check(route, dtype=BF16, way="everything", schedule=None, **options):
        tile, shape, k = route
        kernels = executor.kernels(schedule) if schedule else executor.kernels()
        monkeypatch.setattr(kernels, "tile", tile)
        assert "pool" in kernels.fuses(torch.empty(shape, device="meta"), torch.empty(k, 1, 1, 1), False).way_in
        error, limit = check_conv(kernels, shape, k, dtype, way, pool=True, device=executor.device, **options)
        assert error <= limit

    return check


@everywhere
@taps
@pytest.mark.parametrize("way", WAYS)
def test_ways(check, way, taps):
    check((64, (2, 40, 3, 9), 24), way=way, taps=taps)


@everywhere
@taps
@pytest.mark.parametrize("tile", [64, 256])
def test_tf32_where_cudnn_would_use_it(executor, tile, taps, monkeypatch):
    """Rounded, the error is that of cutting at most."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    data, kernels = Data(FP32, executor.device), executor.kernels()
    monkeypatch.setattr(kernels, "tile", tile)
    x, weight = data(1, 24, 9, 3), data.weight(16, 24, 3 if taps == 9 else 1, salt=1)
    pooled = maxpool(x.double())
    want = conv(pooled, weight.double())
    expected = relative_l2(conv(tf32(pooled.float()).double(), tf32(weight).double()), want)
    assert 1e-5 < relative_l2(kernels.conv3x3(x, weight, WayIn(pool=True)), want) <= expected


@everywhere
@taps
@pytest.mark.parametrize("c", [12, 18, 21])
def test_channels_that_are_not_whole_chunks(check, c, taps):
    """Copied in pieces of 8 bytes, of 4, and element by element."""
    check((0, (1, c, 3, 9), 9), way="first of an rcu", taps=taps)


@everywhere
@taps
@pytest.mark.parametrize(
    "shape, k", [((1, 1, 1, 1), 1), ((3, 3, 1, 5), 2), ((1, 16, 11, 1), 21), ((1, 8, 7, 13), 8), ((9, 8, 1, 1), 8)]
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_odd_shapes_by_the_plan(check, shape, k, dtype, taps):
    check((0, shape, k), dtype, taps=taps)


@everywhere
@taps
@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled")])
@pytest.mark.parametrize("route", [(64, (1, 104, 3, 7), 8), (256, (1, 104, 3, 7), 8), (0, (1, 69, 3, 7), 5)], ids=str)
def test_schedules(check, route, schedule, taps):
    """Warps in any order, copies that complete as late as they may; more slices than are in shared memory at once."""
    check(route, way="first of an rcu", schedule=schedule, taps=taps)


@everywhere
@taps
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_non_finite_values_as_in_pytorch(executor, dtype, relu, taps):
    """NaN goes through maxima and ReLU; -infinity is a pixel's value, and not what pads."""
    data, kernels = Data(dtype, executor.device, integers=True), executor.kernels()
    x, weight = data(1, 8, 9, 13), data.weight(8, 8, 3 if taps == 9 else 1, salt=1)
    x[0, 0, 4, 4], x[0, 1, 8, 12], x[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    x[0, 3, :6, 5:12] = -torch.inf
    pooled = F.max_pool2d((x.relu() if relu else x).double(), 5, 1, 2)
    want = F.conv2d(pooled, weight.double(), padding=weight.shape[2] // 2).to(dtype)
    y = kernels.conv3x3(x, weight, WayIn(relu, pool=True))
    finite = want.isfinite()
    assert torch.isinf(want).any() and torch.isnan(want).any() and finite.any()
    assert torch.equal(y.isfinite(), finite) and torch.equal(y[finite], want[finite])
    if dtype != FP32:  # as three products of TF32 infinity is NaN
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.nan_to_num(), want.nan_to_num())


@everywhere
def test_what_a_block_computes_not_alone(executor, monkeypatch):
    """Two blocks of 256 output channels pool the same pixels; from 512 on the pool is a kernel of its own."""
    data, kernels = Data(BF16, executor.device, integers=True), executor.kernels()
    monkeypatch.setattr(kernels, "tile", 256)
    x, weight = data(1, 8, 3, 2), data.weight(264, 8, 1, salt=1)
    want = conv(maxpool(x.double()), weight.double()).to(BF16)
    assert torch.equal(kernels.conv3x3(x, weight, WayIn(pool=True)), want)
    assert "pool" not in kernels.fuses(x, data.weight(520, 8, 1, salt=1), False).way_in


@everywhere
def test_an_empty_batch(executor):
    x, weight = (
        torch.ones(0, 8, 5, 5, dtype=BF16, device=executor.device),
        torch.ones(4, 8, 3, 3, device=executor.device),
    )
    y = executor.kernels().conv3x3(x, weight, WayIn(True, pool=True), WayOut(relu=True))
    assert y.shape == (0, 4, 5, 5) and y.dtype == BF16


@needs_nvcc
@taps
def test_the_fused_kernel_on_sm_90a(taps):
    kernels = Emulated("sm_90a", tile=64)
    assert launched(kernels, (1, 24, 3, 5), taps) == ["conv3x3"]
    error, limit = check_conv(kernels, (1, 24, 3, 5), 16, BF16, "everything", taps, pool=True)
    assert error <= limit


def launched(kernels, shape, taps, dtype=BF16) -> list[str]:  # shape: (N, C, H, W)
    """The kernels of a pool and a convolution to 16 channels."""
    found, call = [], kernels._call
    kernels._call = lambda function, like, *arguments: found.append(function)
    side = 3 if taps == 9 else 1
    kernels.conv3x3(torch.empty(shape, dtype=dtype), torch.empty(16, shape[1], side, side), WayIn(True, pool=True))
    kernels._call = call
    return found


@needs_nvcc
def test_a_pool_before_3x3_is_apart_on_sm_90a(monkeypatch, tmp_path):
    """By default, and where the loop of wgmma takes what is left."""
    kernels, shape = Emulated("sm_90a", processors=2), (1, 24, 3, 5)
    assert launched(kernels, shape, 9) == ["maxpool5", "conv3x3"]
    error, limit = check_conv(kernels, shape, 16, BF16, "everything", pool=True)
    assert error <= limit
    fused = ((shape, 1, BF16), (shape, 9, FP32), ((1, 21, 3, 5), 9, BF16))
    assert all(launched(kernels, *other) == ["conv3x3"] for other in fused)
    assert launched(Emulated(), shape, 9) == ["conv3x3"]
    assert any("on Hopper a pool" in limit for limit in kernels.limits)
    monkeypatch.setenv("REFINENET_FAST_TABLES", str(tmp_path))
    for choice, kinds in (({"tile": 64}, ["conv3x3"]), ("apart", ["maxpool5", "conv3x3"])):
        row = {"kernel": "cuda pool_conv3x3", "dtype": "bfloat16", "shape": [1, 3, 5, 24, 16, 9], "choice": choice}
        table.write("sm_90", [row], {})
        assert launched(kernels, shape, 9) == kinds
    monkeypatch.undo()
    table.reload()
