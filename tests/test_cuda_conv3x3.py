"""The CUDA backend's convolution against float64: its PTX for sm_80 and sm_90a in the emulator; on a GPU, if any."""

from __future__ import annotations

import re

import pytest
import torch

import refinenet_fast
from emulator import Schedule
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from refinenet_fast import _native
from refinenet_fast.backends import WayIn, WayOut
from refinenet_fast.testing import Data, compare, conv
from triton_cases import WAYS, check_conv, tf32_errors

pytestmark = pytest.mark.usefixtures("exact")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
everywhere = pytest.mark.runs_on("emulator", "gpu")
by_every_loop = pytest.mark.runs_on("emulator", "emulator-sm90a", "gpu")
on_hopper = pytest.mark.runs_on("emulator-sm90a", "gpu")  # other GPUs take their own loop
# (tile, shape, K): tiles of pixels over two images; both channels end within a tile and within a slice.
SMALL, LARGE, ELEMENTS = (64, (2, 40, 5, 7), 72), (128, (2, 40, 5, 14), 136), (0, (2, 21, 5, 7), 37)
# Of sm_90a, whose tiles are 16 x 8 pixels: four tiles over both edges, in turn; two slices of channels.
WIDE, NARROW = (256, (1, 72, 17, 9), 136), (64, (2, 72, 5, 9), 72)
ROUTES = [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large"), pytest.param(ELEMENTS, id="elements")]


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        start(CSRC / "cuda" / "conv3x3.cu", "sm_80")
        start(CSRC / "cuda" / "conv3x3_sm90.cu", "sm_90a")


@pytest.fixture
def check(executor, monkeypatch):
    """Holds one convolution to float64, where ``executor`` runs it."""

    def check(route, dtype=BF16, way="everything", schedule=None, **options):
        tile, shape, k = route
        kernels = executor.kernels(schedule) if schedule else executor.kernels()
        monkeypatch.setattr(kernels, "tile", tile)
        monkeypatch.setattr(kernels, "splits", 1)  # so few tiles would be split: tests/test_cuda_splits.py
        assert kernels.refusal(torch.empty(shape, device="meta"), k) is None
        error, limit = check_conv(kernels, shape, k, dtype, way, device=executor.device, **options)
        assert error <= limit

    return check


@by_every_loop
@pytest.mark.parametrize("way", WAYS)
def test_ways(check, way):
    check(SMALL, way=way)


@everywhere
@pytest.mark.parametrize("way", WAYS)
def test_ways_element_by_element(check, way):
    check(ELEMENTS, way=way)


@everywhere
@pytest.mark.parametrize("relu_in", [True, False])
@pytest.mark.parametrize(
    "route",
    [(64, (1, 40, 3, 7), 24), (128, (1, 40, 3, 20), 24), (0, (1, 21, 3, 7), 9)],
    ids=["small", "large", "elements"],
)
def test_tf32_where_cudnn_would_use_it(executor, route, relu_in, monkeypatch):
    """Rounded, the error is that of cutting at most."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    kernels = executor.kernels()
    monkeypatch.setattr(kernels, "tile", route[0])
    error, expected = tf32_errors(kernels, route[1], route[2], executor.device, relu_in)
    assert 1e-5 < error <= expected


@everywhere
@pytest.mark.parametrize("route", ROUTES)
def test_input_gradient(check, route):
    check(route, way="gradient", rotated=True)


@on_hopper
@pytest.mark.parametrize("route", [WIDE, NARROW], ids=["256", "64"])
def test_input_gradient_on_sm90a(check, route):
    check(route, way="gradient", rotated=True)


@everywhere
@pytest.mark.parametrize(
    "route", [(64, (2, 136, 5, 7), 72), (128, (1, 72, 3, 45), 136), (0, (2, 69, 5, 7), 21)], ids=str
)
def test_1x1(check, route):
    check(route, taps=1)


@on_hopper
@pytest.mark.parametrize("way", ["everything", "plain"])
@pytest.mark.parametrize("route", [(256, (1, 136, 17, 9), 136), (64, (3, 520, 1, 3), 24)], ids=str)
def test_1x1_on_sm90a(check, route, way):
    check(route, taps=1, way=way)


@everywhere
@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled"), Schedule(128, 3, "late")])
@pytest.mark.parametrize("route", [(64, (1, 40, 3, 7), 24), (128, (1, 40, 2, 9), 24), (0, (1, 37, 3, 7), 21)], ids=str)
def test_schedules(check, route, schedule):
    """Warps in any order, copies that complete as late as they may."""
    check(route, way="first of an rcu", schedule=schedule)


@on_hopper
@pytest.mark.parametrize("completion", ["early", "late", "shuffled"])
@pytest.mark.parametrize("way", ["first of an rcu", "second of an rcu"])
def test_schedules_on_sm90a(check, way, completion):
    check((64, (2, 72, 3, 9), 24), way=way, schedule=Schedule(128, 1, completion))


@on_hopper
@pytest.mark.parametrize("completion, seed", [("late", 2), ("shuffled", 3)])
@pytest.mark.parametrize("way", ["first of an rcu", "second of an rcu"])
@pytest.mark.parametrize("tile", [256, 128])
def test_schedules_of_wide_tiles_on_sm90a(check, tile, way, completion, seed):
    """Two slices of channels: six boxes of pixels and eighteen tiles of weights go through rings of four to seven."""
    check((tile, (1, 72, 3, 5), 24), way=way, schedule=Schedule(128, seed, completion))


@by_every_loop
@pytest.mark.parametrize("shape, k", [((1, 1, 1, 1), 1), ((3, 3, 1, 5), 2), ((2, 16, 5, 1), 21), ((1, 24, 7, 13), 8)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_odd_shapes_by_the_plan(check, shape, k, dtype):
    check((0, shape, k), dtype)


@everywhere
@pytest.mark.parametrize("c", [4, 12, 18])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_channels_that_are_not_whole_chunks(check, c, dtype):
    """Copied in pieces of 8 bytes, and of 4."""
    check((0, (2, c, 5, 7), 20), dtype)


@on_hopper
def test_more_images_than_blocks_on_sm90a(check):
    check((0, (7, 8, 1, 1), 8))


@needs_nvcc
@pytest.mark.parametrize("shape, k, splits", [((7, 8, 1, 1), 72, 1), ((5, 136, 1, 1), 24, 3)], ids=str)
def test_more_tiles_than_clusters_on_sm90a(shape, k, splits):
    """Eight clusters' worth by three of them, the last one's pixels beyond the images; nine of three splits."""
    kernels = Emulated("sm_90a", tile=64, processors=6)
    kernels.splits = splits
    error, limit = check_conv(kernels, shape, k, BF16, "first of an rcu", taps=1)
    assert error <= limit


@on_hopper
def test_the_loop_of_sm_80_where_it_is_asked_for(executor, monkeypatch):
    """On Hopper too; sums are exact: either loop makes the same ones."""
    data, kernels = Data(BF16, executor.device, integers=True), executor.kernels()
    x, weight = data(1, 16, 5, 7), data.weight(24, 16, 3, salt=1)
    want = kernels.conv3x3(x, weight)
    monkeypatch.setattr(kernels, "sm80_loop", True)
    launched = []
    if executor.name == "emulator-sm90a":
        real = kernels._launches
        monkeypatch.setattr(kernels, "_launches", lambda *args: launched.extend(real(*args)) or launched)
    assert torch.equal(kernels.conv3x3(x, weight), want)
    assert all(launch.source == "cuda/conv3x3.cu" for launch in launched)


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_weights_of_any_dtype_and_strides(executor, dtype):
    data, kernels = Data(BF16, executor.device, integers=True), executor.kernels()
    x, weight = data(1, 8, 3, 5), data.weight(8, 8, 3, salt=1).to(dtype)
    want = kernels.conv3x3(x, weight.contiguous())
    for other in (weight.contiguous(memory_format=torch.channels_last), weight.contiguous().flip(0, 3).flip(0, 3)):
        assert torch.equal(kernels.conv3x3(x, other), want)
    assert torch.equal(want, conv(x.double(), weight.double()).to(BF16))


@by_every_loop
def test_more_sums_than_one_way_out_has_room_for(executor):
    data, kernels = Data(BF16, executor.device, integers=True), executor.kernels()
    x, weight = data(1, 8, 3, 5), data.weight(8, 8, 3, salt=1)
    maps = [data(1, 8, 3, 5, salt=s) for s in range(2, 13)]
    for count in (0, 5, 8, 9, 11):
        way_out = WayOut(add=tuple(maps[:count]), add_relu=tuple(maps[count:]))
        want = conv(x.double(), weight.double()) + sum(maps[:count]) + sum(t.relu() for t in maps[count:])
        y, relued = kernels.conv3x3_and_relu(x, weight, way_out=way_out)
        assert torch.equal(y, want.to(BF16)) and torch.equal(relued, y.relu())


@by_every_loop
def test_non_finite_values_stay_where_they_are_read(executor):
    data, kernels = Data(BF16, executor.device), executor.kernels()
    weight = data.weight(24, 16, 3, salt=1).abs() + 0.1
    for value in (torch.nan, torch.inf, -torch.inf):
        x = data(2, 16, 7, 9)
        x[0, 3, 2, 4] = value
        finite = kernels.conv3x3(x, weight).isfinite()
        assert not finite[0, :, 1:4, 3:6].any() and finite.sum() == finite.numel() - 9 * 24
    assert kernels.conv3x3(x, weight, WayIn(relu=True)).isfinite().all()  # of -inf


@everywhere
def test_what_no_kernel_takes_has_a_reason(executor):
    kernels = executor.kernels()
    assert kernels.refusal(torch.empty(0, 8, 5, 5, device="meta"), 4) == "there is nothing to compute"
    assert kernels.refusal(torch.empty(2, 1, 2**15, 2**15, device="meta"), 4) == "more than 2^31 - 128 pixels"
    x = torch.ones(0, 8, 5, 5, dtype=BF16, device=executor.device)
    y = kernels.conv3x3(x, torch.ones(4, 8, 3, 3, device=executor.device))
    assert y.shape == (0, 4, 5, 5) and y.dtype == BF16


@needs_nvcc
def test_float32_on_sm_90a():
    """The loop of sm_80 there, which float32 takes."""
    error, limit = check_conv(Emulated("sm_90a"), (1, 24, 3, 5), 16, FP32, "everything")
    assert error <= limit


def test_what_cuda_says_comes_with_kernel_and_sizes():
    """Refused sizes by the launcher itself; and where there is no device, that."""
    if not refinenet_fast.build_info()["cuda"]["built"]:
        pytest.skip("built without CUDA")
    core = _native._C
    rest = ((), 0, 0, 1, 1, True, False), (3, 1, False, False, False, False, 0, 0, False, 0, 0)
    asked = "CUDA kernel conv3x3 on (N, H, W, C) = (0, 3, 5, 8), K = 4: invalid argument"
    with pytest.raises(RuntimeError, match=re.escape(asked)):
        core.cuda_conv3x3(*[0] * 7, *rest[0], (0, 3, 5, 8, 4), *rest[1])
    with pytest.raises(ValueError, match="add: expected 8 tensors at most"):
        core.cuda_conv3x3(*[0] * 7, (0,) * 9, *rest[0][1:], (1, 3, 5, 8, 4), *rest[1])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"CUDA kernel conv3x3 on .* = \(1, 3, 5, 8\), K = 4: .*(driver|device)"):
            core.cuda_conv3x3(*[0] * 7, *rest[0], (1, 3, 5, 8, 4), *rest[1])


@everywhere
def test_wrong_operands_are_named(executor):
    kernels = executor.kernels()
    x, weight = torch.ones(1, 8, 3, 5, device=executor.device), torch.ones(4, 8, 3, 3, device=executor.device)
    with pytest.raises(ValueError, match=r"weight: expected dimension 1 to be 8"):
        kernels.conv3x3(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"bias: expected \(4,\)"):
        kernels.conv3x3(x, weight, way_out=WayOut(bias=torch.ones(3, device=executor.device)))
    with pytest.raises(ValueError, match=r"select: expected \(1, 4, 3, 5\)"):
        kernels.conv3x3(x, weight, way_out=WayOut(select=x))
    with pytest.raises(ValueError, match=r"gy: expected \(1, 4, 3, 5\)"):
        kernels.conv3x3_weight_grad(x, x, weight)


@everywhere
def test_large_finite_input_never_gives_nan(executor):
    data = Data(FP32, executor.device, integers=True)
    x, weight = data(1, 16, 5, 7) * 4.9e29, data.weight(8, 16, 3, salt=1)
    kernels = executor.kernels()
    for y in (kernels.conv3x3(x, weight), kernels.conv3x3_weight_grad(x, data(1, 8, 5, 7, salt=2), weight)):
        assert y.isfinite().all()


@everywhere
def test_float32_is_as_exact_as_float32(executor):
    """Many channels, so that three products of TF32 have to make up for one."""
    data, kernels = Data(FP32, executor.device), executor.kernels()
    x, weight = data(1, 256, 3, 5), data.weight(16, 256, 3, salt=1)
    error, _ = compare([kernels.conv3x3(x, weight)], conv, [x, weight])
    assert error <= 5e-7
