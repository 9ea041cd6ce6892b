"""The CUDA kernels on maps of more than 2^31 elements: their last pixels, which memory alone that is used costs.

In the emulator only the last block runs, or the last cluster; a GPU runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emulator import EmulatorError
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from refinenet_fast import backends
from refinenet_fast.backends import WayIn, WayOut
from refinenet_fast.layout import nhwc_strides
from refinenet_fast.testing import Data
from test_cuda_mutants import CONV, TILE, instances

pytestmark = pytest.mark.usefixtures("exact")
BF16 = torch.bfloat16
SHAPE = 1, 8, 16392, 16384  # (N, C, H, W): 2^31 + 2^20 elements
PART = 24, 1040  # rows and columns, the last ones, that have values
FREE = 32 << 30  # bytes of a GPU's memory
everywhere = pytest.mark.runs_on("emulator", "gpu")


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        for name in ("conv3x3", "pool_conv3x3", "weight_grad", "maxpool5", "bilinear"):
            start(CSRC / "cuda" / f"{name}.cu", "sm_80")
        start(CSRC / "cuda" / "conv3x3_sm90.cu", "sm_90a")


@pytest.fixture
def kernels(executor, monkeypatch):
    found = executor.kernels()
    if executor.name == "gpu" and torch.cuda.mem_get_info()[0] < FREE:
        pytest.skip(f"needs {FREE >> 30} GB of free memory")
    if executor.name != "gpu":
        monkeypatch.setattr(found, "last", 1)
        monkeypatch.setattr(found, "processors", 1 << 22)  # a tile for each block
    monkeypatch.setattr(found, "tile", 64)
    monkeypatch.setattr(found, "splits", 1)
    return found


def large(device: str, salt: int, half: bool = False) -> tuple[Tensor, Tensor]:
    """A map (1, 8, H, W), or one of half the height and width, that has values in its last rows and columns; these."""
    shape, part = [(*SHAPE[:2], SHAPE[2] // by, SHAPE[3] // by) for by in (1, 2)][half], [s >> half for s in PART]
    x = torch.empty_strided(shape, nhwc_strides(shape), dtype=BF16, device=device)
    values = Data(BF16, device, integers=True)(1, 8, *part, salt=salt)
    x[:, :, -part[0] :, -part[1] :] = values
    return x, values


def assert_last(got: Tensor, want: Tensor, rows: int, columns: int) -> None:
    """The last rows and columns are the same."""
    same = torch.equal(got[:, :, -rows:, -columns:], want[:, :, -rows:, -columns:])
    assert same, f"{rows} rows of {columns}"  # pytest would print the maps


def convolved(kernels: backends.Backend, device: str, way_in: WayIn, rows: int, columns: int) -> None:
    """A convolution that reads and writes as many maps as it can."""
    maps, parts = zip(*(large(device, salt) for salt in range(3)))
    weight = Data(BF16, device, integers=True)(8, 8, 3, 3, salt=9)
    low = torch.ones(1, 8, 1, 1, dtype=BF16, device=device)

    def call(kernels: backends.Backend, x: Tensor, mask: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.conv3x3_and_relu(x, weight, way_in, WayOut(select=mask, add=(add,), upsample=low))

    for got, want in zip(call(kernels, *maps), call(backends.get("reference"), *parts)):
        assert_last(got, want, rows, columns)


@everywhere
def test_convolution(kernels, executor):
    convolved(kernels, executor.device, WayIn(True), 1, 64)


@everywhere
def test_convolution_after_a_pool(kernels, executor):
    convolved(kernels, executor.device, WayIn(True, pool=True), 8, 8)


@pytest.mark.runs_on("emulator-sm90a", "gpu")
@pytest.mark.parametrize("plain", [True, False])
def test_convolution_on_sm90a(kernels, executor, plain):
    """Stored by TMA, and by threads."""
    if not plain:
        return convolved(kernels, executor.device, WayIn(True), 8, 16)
    x, part = large(executor.device, 0)
    weight = Data(BF16, executor.device, integers=True)(8, 8, 3, 3, salt=9)
    assert_last(kernels.conv3x3(x, weight), backends.get("reference").conv3x3(part, weight), 8, 16)


@pytest.mark.runs_on("emulator")
def test_weight_gradient(kernels, monkeypatch):
    """The last split's part; the sum of the parts, whose size is no map's, does not run."""
    launched, parts = [], []
    launches, call = kernels._launches, kernels._call
    monkeypatch.setattr(kernels, "_launches", lambda *args: launched.extend(launches(*args)[:1]) or launched)

    def called(*arguments: object) -> None:
        call(*arguments)
        parts.append(launched[0].arguments[0].values[2].view("float32").copy())  # freed when the gradient is there

    monkeypatch.setattr(kernels, "_call", called)
    (x, x_part), (gy, gy_part) = large("cpu", 0), large("cpu", 1)
    kernels.conv3x3_weight_grad(x, gy, torch.empty(8, 8, 1, 1))
    splits = launched[0].blocks
    pixels = SHAPE[2] * SHAPE[3] // splits
    assert pixels < PART[1] and len(parts[0]) == splits * 72  # behind the weight's those of the bias
    got = torch.from_numpy(parts[0][: splits * 64].reshape(splits, 8, 8)[-1]).double()
    want = torch.einsum("cp, kp -> kc", *(t[0, :, -1, -pixels:].double() for t in (x_part, gy_part)))
    assert torch.equal(got, want)


CALLS: dict[str, Callable[[backends.Backend, Callable[..., Tensor]], Tensor]] = {
    "maxpool5": lambda kernels, given: kernels.maxpool5(given(0), relu=True)[0],
    "argmax": lambda kernels, given: kernels.maxpool5(given(0), argmax=True)[1],
    "bilinear": lambda kernels, given: resized(kernels, given(0, half=True), given(1)),
    "bilinear_backward": lambda kernels, given: shrunk(kernels, given(0)),
}


def resized(kernels: backends.Backend, x: Tensor, add: Tensor) -> Tensor:
    return kernels.bilinear(x, tuple(add.shape[2:]), False, add)


def shrunk(kernels: backends.Backend, gy: Tensor) -> Tensor:
    return kernels.bilinear_backward(gy, (gy.shape[2] // 2, gy.shape[3] // 2), False)


@everywhere
@pytest.mark.parametrize("name", CALLS)
def test_pool_and_bilinear(kernels, executor, name):
    got = CALLS[name](kernels, lambda salt, half=False: large(executor.device, salt, half)[0])
    want = CALLS[name](backends.get("reference"), lambda salt, half=False: large(executor.device, salt, half)[1])
    assert_last(got, want, 1, 148)


@everywhere
def test_the_pools_gradient(kernels, executor):
    (gy, gy_part), (add, add_part) = large(executor.device, 0), large(executor.device, 1)
    which = torch.empty_strided(SHAPE, nhwc_strides(SHAPE), dtype=torch.uint8, device=executor.device)
    reference = backends.get("reference")
    part = reference.maxpool5(large(executor.device, 2)[1], argmax=True)[1]
    which[:, :, -PART[0] :, -PART[1] :] = part
    want = reference.maxpool5_backward(gy_part, part, add_part)
    assert_last(kernels.maxpool5_backward(gy, which, add), want, 1, 256)


@needs_nvcc
def test_what_is_counted_in_32_bits_is_seen():
    """It is written to another map, or to none."""
    text = (CSRC / TILE).read_text()
    changed = {**instances(CONV), TILE: text.replace("int64_t{place.number} * k", "place.number * k")}
    assert changed[TILE] != text
    kernels = Emulated(tile=64, changed=changed)
    kernels.last = kernels.splits = 1
    with pytest.raises((EmulatorError, AssertionError)):
        convolved(kernels, "cpu", WayIn(True), 1, 64)
