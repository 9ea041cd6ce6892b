"""When the CUDA backend runs out of memory: nothing that was given is changed, and the next call works."""

from __future__ import annotations

import pytest
import torch

from emulator.backend import Emulated
from executors import needs_nvcc
from refinenet_fast.backends import WayIn, WayOut, cuda, native
from refinenet_fast.testing import Data

pytestmark = [needs_nvcc, pytest.mark.usefixtures("exact")]
X, K = (1, 72, 3, 5), 24
CONVOLUTIONS = ("conv3x3", "conv3x3_and_relu", "input_grad", "parameter_grads", "pool")
OTHERS = ("maxpool5", "maxpool5_backward", "bilinear", "bilinear_backward")
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 MiB"


class Allocations:
    """Of the backend, counted; number ``failing`` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.failing = 0, -1
        for module in (torch, cuda, native):
            for name in ("empty", "empty_like", "empty_nhwc"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, allocate):
        def one(*args, **options):
            self.count += 1
            if self.count - 1 == self.failing:
                raise torch.OutOfMemoryError(MESSAGE)
            return allocate(*args, **options)

        return one


def calls(kernels):
    """By name: what is called, and the tensors that it is given."""
    data = Data(torch.bfloat16)
    x, weight, gy, bias = data(*X), data.weight(K, X[1], 3, salt=1), data(1, K, 3, 5, salt=2), data(K, salt=3)
    low, way_in = data(1, K, 2, 2, salt=4), WayIn(True)
    way_out = WayOut(bias, True, select=gy, add=(gy,) * 9, upsample=low)
    pooled = kernels.maxpool5(x, argmax=True)[1]
    given = [x, weight, gy, bias, low, pooled]
    return given, {
        "conv3x3": lambda: kernels.conv3x3(x, weight, way_in, way_out),
        "conv3x3_and_relu": lambda: kernels.conv3x3_and_relu(x, weight, way_in, WayOut(add=(gy,))),
        "input_grad": lambda: kernels.conv3x3_input_grad(gy, weight, WayOut(select=x)),
        "parameter_grads": lambda: kernels.parameter_grads(x, gy, weight, bias, way_in),
        "pool": lambda: kernels.conv3x3(x, weight, WayIn(True, pool=True), WayOut(bias)),
        "maxpool5": lambda: kernels.maxpool5(x, argmax=True),
        "maxpool5_backward": lambda: kernels.maxpool5_backward(x, pooled),
        "bilinear": lambda: kernels.bilinear(low, (3, 5), True, add=gy),
        "bilinear_backward": lambda: kernels.bilinear_backward(gy, (2, 2), True),
    }


@pytest.mark.parametrize("name", CONVOLUTIONS + OTHERS)
def test_out_of_memory(name, monkeypatch):
    """Whichever allocation fails, nothing is launched behind it and nothing given is changed; then all is as before."""
    kernels, launched = Emulated(), []
    kernels.splits = 2
    given, known = calls(kernels)
    call, before, want = known[name], [t.clone() for t in given], known[name]()
    allocations, real = Allocations(monkeypatch), kernels._call
    monkeypatch.setattr(kernels, "_call", lambda *arguments: launched.append(allocations.count) or real(*arguments))
    call()
    (total, allocations.count), ends = (allocations.count, 0), launched.copy()
    assert total > 0
    for failing in range(total):
        allocations.count, allocations.failing = 0, failing
        launched.clear()
        with pytest.raises(torch.OutOfMemoryError, match=MESSAGE):
            call()
        assert launched == [end for end in ends if end <= failing]
        assert all(torch.equal(t, old) for t, old in zip(given, before, strict=True))
    allocations.failing = -1
    assert torch.equal(first(call()), first(want))


def first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]
