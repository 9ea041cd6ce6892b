"""The launchers' host code against the emulator's own copy of it, products.py and backend.py in tests/emulator.

Whatever else shows that a kernel is right launches it by that copy. Here each call is launched by both: the launchers
run over a runtime without a GPU, which notes kernel, grid and every argument.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import launched
import refinenet_fast
from emulator import backend
from emulator.backend import Emulated
from emulator.compilers import CSRC
from emulator.launch import Struct
from emulator.tensormap import TensorMap
from refinenet_fast import _native
from refinenet_fast.backends import WayIn
from refinenet_fast.backends.cuda import Cuda
from refinenet_fast.testing import Data
from triton_cases import WAYS, Steps

needs_core = pytest.mark.skipif(
    not launched.compiler() or not CSRC.exists() or not _native._C, reason="needs g++, the sources and the core"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = FP32, BF16, FP16
DEVICE, STREAM = 3, 1 << 40  # of every launch
AT = torch.device("cuda", DEVICE)
TYPES, SWIZZLES = {"f16": 6, "bf16": 9}, {64: 2, 128: 3}  # CU_TENSOR_MAP_DATA_TYPE_..., CU_TENSOR_MAP_SWIZZLE_...


class Expected(NamedTuple):
    """A launch of the emulator's; ``name`` is a pattern that the kernel's mangled name has in it."""

    name: str
    blocks: int
    threads: int
    cluster: int
    shared: int
    arguments: list[object]


def address(value: object) -> object:
    return value.ctypes.data if isinstance(value, np.ndarray) else value


def both(wanted: object, given: bytes) -> tuple[object, object]:
    """An argument as the emulator would pass it, and what the launcher has passed; what lies between members is left
    out."""
    if isinstance(wanted, Struct):
        return tuple(map(address, wanted.values)), struct.unpack(f"<{wanted.layout}", given)
    if isinstance(wanted, TensorMap):  # Map in csrc/tests/fake_cuda/cuda.h
        rank, size = wanted.array.ndim, wanted.array.itemsize
        sizes = [*wanted.array.shape[::-1], *[0] * (4 - rank)]
        strides = [*wanted.array.strides[-2::-1], *[0] * (4 - rank)]
        assert size == 2 and wanted.array.flags.c_contiguous and not wanted.nan_fill
        box = [*wanted.box[::-1], *[0] * (4 - rank)]
        made = *sizes, *strides, *box, rank, TYPES[wanted.kind], SWIZZLES[wanted.swizzle]
        return (wanted.array.ctypes.data, *made), struct.unpack("<Q4Q3Q4I3I36x", given)
    return wanted, given


class Both(Emulated):
    """Launches nothing: notes what the emulator and what the launchers would."""

    def __init__(self, core: launched.Core, monkeypatch: pytest.MonkeyPatch, arch: str = "sm_80", **settings) -> None:
        super().__init__(arch, processors=settings.pop("processors", 108))
        self.core, self.expected = core, []
        for name, value in settings.items():
            setattr(self, name, value)
        for name, noted in (("emulate", self._noted), ("picked", _picked), ("compiled", _compiled), ("find", _find)):
            monkeypatch.setattr(backend, name, noted)

    def _noted(self, name, grid, block, arguments, *, cluster=(1,), shared=0, schedule, last=None) -> None:
        self.expected.append(Expected(name, *grid, *block, *cluster, shared, list(arguments)))

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        capability = int(re.sub(r"\D", "", self.arch))
        self.core.begin(capability, self.processors)
        Cuda._call(self, function, SimpleNamespace(device=AT), *arguments)
        self.expected = []
        super()._call(function, like, *arguments)
        for want, got in zip(self.expected, self.core.launches(), strict=True):
            compare(want, got)


def _picked(source, arch, part, *changed) -> str:
    return re.escape(part)


def _compiled(source, arch) -> None:
    return None


def _find(kernels: None, part: str) -> str:
    return part


def compare(want: Expected, got: launched.Launched) -> None:
    assert re.search(want.name, got.name), f"{want.name} in {got.name}"
    assert want[1:5] == got[1:5], f"blocks, threads, cluster and shared memory of {got.name}"
    assert got.shared <= got.allowed and (got.device, got.stream) == (DEVICE, STREAM)
    for number, (argument, given) in enumerate(zip(want.arguments, got.arguments, strict=True)):
        wanted, passed = both(argument, given)
        assert wanted == passed, f"argument {number} of {got.name}"


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As if a device were there: those that PyTorch was asked to make the current one."""
    devices, streams = [], {AT: SimpleNamespace(cuda_stream=STREAM)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(devices.append(device)))
    return devices


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, entered: list[torch.device]) -> Callable[..., Both]:
    core = launched.core()
    monkeypatch.setattr(_native, "_C", core.module)
    return lambda *args, **settings: Both(core, monkeypatch, *args, **settings)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)


def in_every_arithmetic(test: Callable) -> Callable:
    cases = [(FP32, False), (FP32, True), (BF16, True), (FP16, True)]
    return pytest.mark.parametrize("dtype, tf32", cases, indirect=["tf32"])(pytest.mark.usefixtures("tf32")(test))


def convolve(kernels: Both, dtype: torch.dtype, way: str, c: int = 40, k: int = 72, taps: int = 9, pool=False) -> None:
    shape, data = (2, c, 5, 19), Data(dtype)
    steps = Steps(way, (2, k, 5, 19), data, pool)
    weight = data.weight(k, c, 3 if taps == 9 else 1, salt=1)
    kernels.conv3x3_and_relu(data(*shape), weight, WayIn(steps.relu_in, pool), steps.way_out())
    if not pool and not steps.relu_in:
        kernels.conv3x3_input_grad(data(2, k, 5, 19), weight)


@needs_core
@in_every_arithmetic
def test_convolutions(make, dtype):
    for way in WAYS:
        convolve(make(splits=1), dtype, way)
        convolve(make(tile=128), dtype, way, k=136)
        convolve(make(splits=1), dtype, way, c=5, k=21, taps=1)  # not in whole chunks
        convolve(make(splits=1), dtype, way, c=12, k=20)
        convolve(make(splits=3), dtype, way, c=200)
        convolve(make(), dtype, way, c=200, k=21)  # as many splits as the plan makes


@needs_core
@in_every_arithmetic
def test_convolutions_that_pool(make, dtype):
    for way in ("plain", "first of an rcu", "end of a chain"):
        for taps in (1, 9):
            convolve(make(tile=64), dtype, way, taps=taps, pool=True)
            convolve(make(tile=256), dtype, way, c=21, k=260, taps=taps, pool=True)


@needs_core
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_convolutions_on_sm90a(make, dtype):
    for way in WAYS:
        for tile in (64, 128, 256):
            convolve(make("sm_90a", tile=tile, splits=1, processors=132), dtype, way, k=tile + 8)
        convolve(make("sm_90a", tile=64, splits=1, processors=6), dtype, way, k=200)  # fewer blocks than tiles
        convolve(make("sm_90a", tile=64, processors=132), dtype, way, c=136, taps=1)
        convolve(make("sm_90a", splits=3, processors=132), dtype, way, c=200)
        convolve(make("sm_90a", sm80_loop=True, processors=132), dtype, way)
        convolve(make("sm_90a", splits=1, processors=132), dtype, way, c=20)  # the loop of sm_80


@needs_core
@in_every_arithmetic
def test_weight_gradients(make, dtype):
    for given in {dtype, FP32}:  # of the weight
        for c, k, side, tile in ((40, 72, 3, 64), (136, 72, 1, 128), (5, 21, 3, 0)):
            data, kernels = Data(dtype), make(tile=tile)
            x, gy, weight = data(2, c, 5, 19), data(2, k, 5, 19), Data(given).weight(k, c, side, salt=1)
            kernels.conv3x3_weight_grad(x, gy, weight)
            kernels.parameter_grads(x, gy, weight.contiguous(), torch.ones(k), WayIn(relu=True))


@needs_core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [40, 5])
def test_pools_and_resizes(make, dtype, c):
    kernels, data = make(), Data(dtype)
    x, large, argmax = data(2, c, 5, 19), data(2, c, 9, 40), torch.zeros(2, c, 5, 19, dtype=torch.uint8)
    for relu in (False, True):
        for wanted in (False, True):
            kernels.maxpool5(x, relu, argmax=wanted)
    for add in (None, x):
        kernels.maxpool5_backward(x, argmax, add)
    for corners in (False, True):
        kernels.bilinear(x, (9, 40), corners)
        kernels.bilinear(x, (9, 40), corners, add=large, overwrite_add=True)
        kernels.bilinear_backward(large, (5, 19), corners)


def each(kernels: Emulated) -> None:
    """Every function of the core, on (N, H, W, C) = (2, 5, 19, 40)."""
    data = Data(BF16)
    x, large, gy, weight = data(2, 40, 5, 19), data(2, 40, 9, 40), data(2, 72, 5, 19), data.weight(72, 40, 3, salt=1)
    kernels.conv3x3(x, weight)
    kernels.conv3x3_weight_grad(x, gy, weight)
    kernels.maxpool5(x)
    kernels.maxpool5_backward(x, torch.zeros(2, 40, 5, 19, dtype=torch.uint8))
    kernels.bilinear(x, (9, 40), True)
    kernels.bilinear_backward(large, (5, 19), True)


@needs_core
def test_the_tensors_device_is_made_current_by_pytorch(make, entered):
    each(make(splits=1))
    assert entered == [AT] * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cudas_own_words_where_there_is_no_device(entered):
    """Of every function, as it is called."""
    if not refinenet_fast.build_info()["cuda"]["built"]:
        pytest.skip("built without CUDA")
    called = []

    class Refused(Emulated):
        def _call(self, function: str, like: Tensor, *arguments: object) -> None:
            said = rf"^CUDA kernel {function} on \(N, H, W, C\) = \(2, 5, 19, 40\)(, K = 72)?: .*(driver|device)"
            with pytest.raises(RuntimeError, match=said):
                Cuda._call(self, function, SimpleNamespace(device=AT), *arguments)
            called.append(function)

    each(Refused())
    assert called == ["conv3x3", "weight_grad", *backend.ENTRIES]


@needs_core
@pytest.mark.parametrize(
    "archs, there",
    [(["80-real", "90a-real", "100-real"], True), (["90a"], True), (["80"], False), (["90-real"], False)],
)
def test_a_build_without_sm90a_plans_for_the_other_loop(make, monkeypatch, archs, there):
    kernels, seen = make("sm_90a", processors=132), []
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": {"archs": archs}})
    monkeypatch.setattr(kernels, "_has_hoppers_loop", lambda device: Cuda._has_hoppers_loop(kernels, device))
    monkeypatch.setattr(kernels, "_call", lambda *arguments: None)
    real = kernels.core.module.cuda_splits_conv3x3
    noted = lambda *arguments: (seen.append(arguments[-2]), real(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(kernels.core.module, "cuda_splits_conv3x3", noted)
    data = Data(BF16)
    kernels.conv3x3(data(1, 64, 5, 7), data.weight(64, 64, 3, salt=1))
    assert seen == [90 if there else 80]
    assert kernels._takes_wgmma(BF16, torch.device("cpu"), 64, 64) == there
    pooled = WayIn(pool=True)
    assert kernels._pooled(data(1, 64, 5, 7), data.weight(64, 64, 3, salt=1), pooled)[1].pool == (not there)


@needs_core
@pytest.mark.parametrize("size", [(5, 5), (3, 1), (2, 2)], ids=str)
def test_no_other_kernel_sizes(make, size):
    kernels, x = make(), torch.ones(1, 8, 5, 7)
    weight = torch.ones(8, 8, *size)
    with pytest.raises(ValueError, match="weight: expected a 1x1 or 3x3 kernel, got"):
        kernels.conv3x3(x, weight)
    with pytest.raises(ValueError, match="weight: expected a 1x1 or 3x3 kernel, got"):
        kernels.conv3x3_weight_grad(x, x, weight)
