"""The CUDA backend's convolutions whose input channels are split, against float64; which are, and in what order."""

from __future__ import annotations

import pytest
import torch

from emulator import Schedule
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from refinenet_fast.backends import WayIn, WayOut
from refinenet_fast.testing import Data
from triton_cases import WAYS, check_conv

pytestmark = pytest.mark.usefixtures("exact")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
everywhere = pytest.mark.runs_on("emulator", "gpu")
by_every_loop = pytest.mark.runs_on("emulator", "emulator-sm90a", "gpu")
on_hopper = pytest.mark.runs_on("emulator-sm90a", "gpu")
# (tile, splits, shape, K): five slices of channels in three splits, four in three; in pieces of 4 bytes three in two.
SMALL, LARGE, ELEMENTS = (64, 3, (2, 136, 3, 5), 72), (128, 3, (1, 104, 3, 14), 136), (0, 2, (1, 70, 3, 5), 21)
# Of sm_90a: three slices in two splits, over two tiles of output channels or of pixels.
WIDE, NARROW = (256, 2, (1, 136, 3, 9), 264), (64, 2, (1, 136, 17, 3), 72)
MEDIUM = (128, 2, (1, 136, 3, 5), 136)


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        start(CSRC / "cuda" / "conv3x3.cu", "sm_80")
        start(CSRC / "cuda" / "conv3x3_splits.cu", "sm_80")
        start(CSRC / "cuda" / "conv3x3_sm90.cu", "sm_90a")
        start(CSRC / "cuda" / "conv3x3_splits.cu", "sm_90a")


@pytest.fixture
def check(executor, monkeypatch):
    """Holds one split convolution to float64, where ``executor`` runs it."""

    def check(route, dtype=BF16, way="everything", schedule=None, **options):
        tile, splits, shape, k = route
        kernels = executor.kernels(schedule) if schedule else executor.kernels()
        monkeypatch.setattr(kernels, "tile", tile)
        monkeypatch.setattr(kernels, "splits", splits)
        found = watched(kernels, monkeypatch)
        error, limit = check_conv(kernels, shape, k, dtype, way, device=executor.device, **options)
        assert error <= limit and set(found) == {splits}

    return check


def watched(kernels, monkeypatch) -> list[int]:
    """How many splits each of its convolutions has from now on, from the argument before the last."""
    found, call = [], kernels._call

    def noted(function, like, *arguments):
        if function == "conv3x3":
            assert (arguments[2] != 0) == (arguments[-2] > 1)
            found.append(arguments[-2])
        call(function, like, *arguments)

    monkeypatch.setattr(kernels, "_call", noted)
    return found


@by_every_loop
@pytest.mark.parametrize("way", WAYS)
def test_ways(check, way):
    check(NARROW if way == "plain" else SMALL, way=way)


@on_hopper
@pytest.mark.parametrize("route, dtype", [(WIDE, BF16), (MEDIUM, FP16), (MEDIUM, BF16), (NARROW, FP16)], ids=str)
def test_tiles_of_sm90a(check, route, dtype):
    check(route, dtype)


@everywhere
@pytest.mark.parametrize("route, dtype", [(SMALL, BF16), (LARGE, FP16), (LARGE, FP32), (ELEMENTS, BF16)], ids=str)
def test_tiles(check, route, dtype):
    check(route, dtype)


@by_every_loop
def test_input_gradient(check):
    check(SMALL, way="gradient", rotated=True)


@by_every_loop
def test_1x1(check):
    check((64, 3, (1, 264, 3, 5), 24), taps=1)


@everywhere
@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled")])
def test_schedules(check, schedule):
    check((64, 2, (1, 72, 3, 5), 24), way="first of an rcu", schedule=schedule)


@on_hopper
@pytest.mark.parametrize("completion", ["late", "shuffled"])
@pytest.mark.parametrize("way", ["first of an rcu", "second of an rcu"])
def test_schedules_on_sm90a(check, way, completion):
    check((64, 2, (1, 136, 3, 9), 24), way=way, schedule=Schedule(128, 1, completion))


@by_every_loop
def test_the_same_bits_whatever_runs_first(executor, monkeypatch):
    """Of sums that are not exact, whose order would show."""
    data, found = Data(FP16, executor.device), []
    x, weight, add = data(1, 200, 3, 5), data.weight(24, 200, 3, salt=1), data(1, 24, 3, 5, salt=2)
    for schedule in (Schedule(128, 1, "late"), Schedule(128, 2, "shuffled"), Schedule(256, 3, "early")):
        kernels = executor.kernels(schedule)
        monkeypatch.setattr(kernels, "splits", 3)
        found.append(kernels.conv3x3(x, weight, WayIn(True), WayOut(add=(add,))))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    monkeypatch.setattr(kernels, "splits", 1)
    whole = kernels.conv3x3(x, weight, WayIn(True), WayOut(add=(add,)))
    assert torch.allclose(whole, found[0], rtol=2e-3, atol=2e-3)


@by_every_loop
def test_more_splits_than_slices_of_channels(executor, monkeypatch):
    """Of 72 channels: three slices of 32, two of 64."""
    kernels = executor.kernels()
    monkeypatch.setattr(kernels, "splits", 9)
    found = watched(kernels, monkeypatch)
    error, limit = check_conv(kernels, (1, 72, 3, 5), 24, BF16, "everything", device=executor.device)
    wgmma = kernels._takes_wgmma(BF16, torch.device(executor.device), 72, 24)
    assert error <= limit and found == [2 if wgmma else 3]


@needs_nvcc
@pytest.mark.parametrize("arch, processors", [("sm_80", 108), ("sm_90a", 132)])
def test_what_is_split_by_default(arch, processors, monkeypatch):
    """Where there are fewer tiles than multiprocessors, and only there."""
    kernels = Emulated(arch, processors=processors)
    found = watched(kernels, monkeypatch)
    monkeypatch.setattr(kernels, "_launches", lambda *_: [])
    for c, side, n in ((256, 32, 1), (512, 16, 1), (256, 64, 1), (512, 16, 8), (256, 128, 1), (256, 8, 64)):
        x, weight = torch.empty(n, c, side, side, dtype=BF16), torch.empty(c, c, 3, 3)
        kernels.conv3x3(x, weight)
    few, most = found[:2], found[2:]
    assert few == ([3, 6] if arch == "sm_80" else [4, 8]) and most == [1] * 4
