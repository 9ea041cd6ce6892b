"""When the CUDA backend runs out of memory: nothing that was given is changed, and the next call works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from refinenet_fast import backends
from refinenet_fast.backends import WayIn, WayOut
from refinenet_fast.testing import Data

pytestmark = [needs_nvcc, pytest.mark.usefixtures("exact")]
K = 24
CONVOLUTIONS = ("conv3x3", "conv3x3_and_relu", "input_grad", "pool")
OTHERS = ("parameter_grads", "maxpool5", "maxpool5_backward", "bilinear", "bilinear_backward")  # the same on any GPU
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 MiB"
# (architecture, input channels, layout): weights that are filled up with zeros, and copies of what does not lie in
# NHWC, are allocations too.
SETUPS = (
    ("sm_80", 72, torch.channels_last),
    ("sm_90a", 72, torch.channels_last),
    ("sm_80", 21, torch.contiguous_format),
)


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        for name in ("conv3x3", "conv3x3_splits", "weight_grad", "pool_conv3x3", "maxpool5", "bilinear"):
            start(CSRC / "cuda" / f"{name}.cu", "sm_80")


class Allocations(TorchDispatchMode):
    """Within the block, ops whose results have memory of their own are counted; number ``failing`` fails."""

    def __init__(self, failing: int = -1) -> None:
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if any(t.untyped_storage()._cdata not in given for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            self.count += 1
            if self.count - 1 == self.failing:
                raise torch.OutOfMemoryError(MESSAGE)
        return made


def calls(kernels, c, layout):
    """By name: what is called, and the tensors that it is given."""
    data = Data(torch.bfloat16)
    x, gy = data(1, c, 3, 5).contiguous(memory_format=layout), data(1, K, 3, 5, salt=2).contiguous(memory_format=layout)
    weight, bias = data.weight(K, c, 3, salt=1), data(K, salt=3)
    low, way_in = data(1, K, 2, 2, salt=4).contiguous(memory_format=layout), WayIn(True)
    way_out = WayOut(bias, True, select=gy, add=(gy,) * 8, add_relu=(gy,), upsample=low)
    which = backends.get("reference").maxpool5(x, argmax=True)[1].contiguous(memory_format=layout)
    given = [x, weight, gy, bias, low, which]
    return given, {
        "conv3x3": lambda: kernels.conv3x3(x, weight, way_in, way_out),
        "conv3x3_and_relu": lambda: kernels.conv3x3_and_relu(x, weight, way_in, WayOut(add=(gy,))),
        "input_grad": lambda: kernels.conv3x3_input_grad(gy, weight, WayOut(select=x)),
        "parameter_grads": lambda: kernels.parameter_grads(x, gy, weight, bias, way_in),
        "pool": lambda: kernels.conv3x3(x, weight, WayIn(True, pool=True), WayOut(bias)),
        "maxpool5": lambda: kernels.maxpool5(x, argmax=True),
        "maxpool5_backward": lambda: kernels.maxpool5_backward(x, which),
        "bilinear": lambda: kernels.bilinear(low, (3, 5), True, add=gy),
        "bilinear_backward": lambda: kernels.bilinear_backward(gy, (2, 2), True),
    }


@pytest.mark.parametrize(
    "arch, c, layout, name",
    [(*setup, name) for setup in SETUPS for name in CONVOLUTIONS + OTHERS * (setup[0] == "sm_80")],
)
def test_out_of_memory(arch, c, layout, name, monkeypatch):
    """Whichever allocation fails, nothing is launched behind it and nothing given is changed; then all is as before."""
    kernels, launched = Emulated(arch, processors=2), []
    kernels.splits = 2
    given, known = calls(kernels, c, layout)
    call, before, want = known[name], [t.clone() for t in given], known[name]()
    with monkeypatch.context() as patch, Allocations() as whole:
        patch.setattr(kernels, "_call", lambda *_: launched.append(whole.count))
        call()
    assert whole.count > (layout == torch.contiguous_format)
    for failing in range(whole.count):
        begun = []
        with monkeypatch.context() as patch, Allocations(failing) as until:
            patch.setattr(kernels, "_call", lambda *_, begun=begun, until=until: begun.append(until.count))
            with pytest.raises(torch.OutOfMemoryError, match=MESSAGE):
                call()
        assert begun == [count for count in launched if count <= failing]
        assert all(torch.equal(t, old) for t, old in zip(given, before, strict=True))
    assert torch.equal(first(call()), first(want))


def first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]
