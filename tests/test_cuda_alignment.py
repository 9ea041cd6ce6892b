"""The CUDA backend on tensors whose memory begins somewhere else than at multiples of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from emulator.compilers import CSRC, nvcc, start
from refinenet_fast.backends import Backend, WayIn, WayOut
from refinenet_fast.testing import Data

pytestmark = pytest.mark.usefixtures("exact")
SOURCES = ("conv3x3", "pool_conv3x3", "weight_grad", "maxpool5", "bilinear")
Move = Callable[[Tensor], Tensor]
Call = Callable[[Backend, "Given", Move], tuple[Tensor, ...]]


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        for name in SOURCES:
            start(CSRC / "cuda" / f"{name}.cu", "sm_80")
        start(CSRC / "cuda" / "conv3x3_sm90.cu", "sm_90a")


class Given:
    """Small integers, whose sums are exact: any loop makes the same ones."""

    def __init__(self, device: str, kernels: Backend) -> None:
        data = Data(torch.bfloat16, device, integers=True)
        self.x, self.low = data(1, 16, 2, 3), data(1, 24, 1, 2, salt=1)
        self.gy, self.add = data(1, 24, 2, 3, salt=2), data(1, 24, 2, 3, salt=3)
        self.weight, self.bias = data.weight(24, 16, 1, salt=4), data(24, salt=5)
        self.argmax = kernels.maxpool5(self.gy, argmax=True)[1]


# By name: what is called of tensors that have been moved.
CONVOLUTIONS: dict[str, Call] = {
    "conv3x3": lambda kernels, t, move: kernels.conv3x3_and_relu(
        move(t.x), t.weight, WayIn(True), WayOut(t.bias, select=move(t.gy), add=(move(t.add),), upsample=move(t.low))
    ),
    "input_grad": lambda kernels, t, move: (
        kernels.conv3x3_input_grad(move(t.gy), t.weight, WayOut(select=move(t.x), add=(move(t.x),))),
    ),
}
OTHERS: dict[str, Call] = {
    "pool": lambda kernels, t, move: (
        kernels.conv3x3(move(t.x), t.weight, WayIn(True, pool=True), WayOut(add=(move(t.add),))),
    ),
    "parameter_grads": lambda kernels, t, move: kernels.parameter_grads(
        move(t.x), move(t.gy), t.weight, t.bias, WayIn(True)
    ),
    "maxpool5": lambda kernels, t, move: kernels.maxpool5(move(t.x), relu=True, argmax=True),
    "maxpool5_backward": lambda kernels, t, move: (kernels.maxpool5_backward(move(t.gy), move(t.argmax), move(t.add)),),
    "bilinear": lambda kernels, t, move: (kernels.bilinear(move(t.low), (2, 3), True, move(t.add)),),
    "bilinear, overwriting": lambda kernels, t, move: (
        kernels.bilinear(move(t.low), (2, 3), False, move(t.add.clone()), overwrite_add=True),
    ),
    "bilinear_backward": lambda kernels, t, move: (kernels.bilinear_backward(move(t.gy), (1, 2), True),),
}


def moved(t: Tensor, by: int) -> Tensor:  # (N, C, H, W)
    """The same, ``by`` elements behind a multiple of 16 bytes."""
    n, c, h, w = t.shape
    room = torch.empty(t.numel() + 8, dtype=t.dtype, device=t.device)[by : by + t.numel()]
    assert room.data_ptr() % 16 == by * t.element_size()
    return room.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


class Moves:
    """Moves the tensors with those numbers, all by default."""

    def __init__(self, by: int, which: int | None = None) -> None:
        self.by, self.which, self.count = by, which, 0

    def __call__(self, t: Tensor) -> Tensor:
        self.count += 1
        return moved(t, self.by if self.which in (None, self.count - 1) else 0)


def moves(count: int) -> Iterator[Moves]:
    """All of ``count`` tensors by one element; then one after the other by more."""
    yield Moves(1)
    yield from (Moves((6, 4, 2)[which % 3], which) for which in range(count))


def check(executor, call):
    kernels = executor.kernels()
    given, aligned = Given(executor.device, kernels), Moves(0)
    want = call(kernels, given, aligned)
    for move in moves(aligned.count):
        got = call(kernels, given, move)
        assert all(map(torch.equal, got, want)), (move.by, move.which)


@pytest.mark.runs_on("emulator", "emulator-sm90a", "gpu")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(executor, name):
    check(executor, CONVOLUTIONS[name])


@pytest.mark.runs_on("emulator", "gpu")
@pytest.mark.parametrize("name", OTHERS)
def test_others(executor, name):
    check(executor, OTHERS[name])
