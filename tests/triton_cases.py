"""One convolution of a backend for GPUs, or one weight gradient, against float64: wherever its kernels run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refinenet_fast.backends import Backend, WayIn, WayOut
from refinenet_fast.testing import Data, compare, conv, maxpool, poisoned, relative_l2, resize

# name: (ReLU in, steps of the way out: how many of those that are tensors)
WAYS: dict[str, tuple[bool, dict[str, int]]] = {
    "plain": (False, {}),
    "first of an rcu": (True, {"bias": 1, "relu": 1}),
    "second of an rcu": (False, {"add": 1}),
    "gradient": (False, {"select": 1, "add": 1}),
    "end of a chain": (False, {"add": 3, "add_relu": 1}),
    "fusion": (False, {"low": 1, "corners": 1}),
    "everything": (True, {"bias": 1, "relu": 1, "select": 1, "add": 2, "add_relu": 1, "low": 1}),
}


class Steps:
    """The tensors of a way, made for an output of one shape."""

    def __init__(self, way: str, shape: Sequence[int], data: Data, pool: bool = False) -> None:  # shape: (N, K, H, W)
        (self.relu_in, self.named), self.pool = WAYS[way], pool
        n, k, h, w = shape
        make = {
            "bias": lambda salt: data(k, salt=salt),
            "low": lambda salt: data(n, k, (h + 1) // 2, (w + 2) // 3, salt=salt),
        }
        self.counts = {name: self.named.get(name, 0) for name in ("bias", "select", "add", "add_relu", "low")}
        salts = iter(range(100, 200))
        self.tensors = [
            make.get(name, lambda salt: data(*shape, salt=salt))(next(salts))
            for name, count in self.counts.items()
            for _ in range(count)
        ]

    def of(self, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        rest = iter(tensors)
        return {name: [next(rest) for _ in range(count)] for name, count in self.counts.items()}

    def way_out(self) -> WayOut:
        own = self.of(self.tensors)
        first = {name: found[0] if found else None for name, found in own.items()}
        relu, corners = bool(self.named.get("relu")), bool(self.named.get("corners"))
        adds = tuple(own["add"]), tuple(own["add_relu"])
        return WayOut(first["bias"], relu, first["select"], *adds, first["low"], corners)

    def plain(self, x: Tensor, weight: Tensor, *tensors: Tensor) -> Tensor:
        own = self.of(tensors)
        x = x.relu() if self.relu_in else x
        y = conv(maxpool(x) if self.pool else x, weight, *own["bias"])
        y = y.relu() if self.named.get("relu") else y
        for mask in own["select"]:
            y = torch.where(mask > 0, y, 0)
        for t in own["add"]:
            y = y + t
        for t in own["add_relu"]:
            y = y + t.relu()
        for t in own["low"]:
            y = y + resize(t, y.shape[2:], bool(self.named.get("corners")))
        return y


def tf32(t: Tensor) -> Tensor:
    """As tensor cores read float32: without the last 13 bits."""
    return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)


def check_conv(
    kernels: Backend,
    shape: Sequence[int],
    k: int,
    dtype: torch.dtype,
    way: str,
    taps: int = 9,
    rotated: bool = False,
    pool: bool = False,
    device: str = "cpu",
) -> tuple[float, float]:
    """Error and limit, of a result whose ReLU is written too; of the input gradient where ``rotated``."""
    n, c, h, w = shape
    # Small integers, whose sums are exact wherever nothing is resampled: then every bit has to be right.
    integers = way not in ("fusion", "everything")
    data, size = Data(dtype, device, integers), 3 if taps == 9 else 1
    x, weight = data(*shape), data.weight(k, c, size, salt=1)
    steps = Steps(way, (n, k, h, w), data, pool)
    if rotated:
        turned = weight.flip(2, 3).transpose(0, 1).contiguous()
        with poisoned():
            y = kernels.conv3x3_input_grad(x, turned, steps.way_out())
    else:
        with poisoned():
            y, relued = kernels.conv3x3_and_relu(x, weight, WayIn(steps.relu_in, pool), steps.way_out())
        assert torch.equal(relued, y.relu())
    given = [x, weight, *steps.tensors]
    want = steps.plain(*(t.double() for t in given))
    if integers:
        assert torch.equal(y, want.to(dtype))
    else:  # no element may be off by more than its rounding, however small its part in the whole
        slack = 2e-6 * (1 + c * size * size) ** 0.5
        assert ((y - want).abs() <= torch.finfo(dtype).eps * want.abs() + slack).all()
    return compare([y], steps.plain, given)


def check_grads(
    kernels: Backend,
    shape: Sequence[int],
    k: int,
    dtype: torch.dtype,
    taps: int = 9,
    contiguous: bool = False,
    relu_in: bool = True,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[float, float]:
    """Error and limit, the worse of the weight's and of the bias's gradient; both are ``dtype``'s by default."""
    n, c, h, w = shape
    x, own, size = Data(dtype, device)(*shape), Data(weight_dtype or dtype, device), 3 if taps == 9 else 1
    weight, bias = own.weight(k, c, size, salt=2), own(k, salt=3)
    gy = Data(dtype, device, integers=True)(n, k, h, w, salt=1)  # whose sums are exact
    weight = weight.contiguous() if contiguous else weight
    with poisoned():
        gw, gb = kernels.parameter_grads(x, gy, weight, bias, WayIn(relu_in))
    assert gw.stride() == weight.stride() and gw.dtype == weight.dtype
    assert torch.equal(gb, gy.double().sum((0, 2, 3)).to(gb.dtype))

    def plain(w: Tensor, b: Tensor) -> Tensor:
        own = x.to(w.dtype)
        return conv(own.relu() if relu_in else own, w, b)

    return compare([gw, gb], plain, [weight, bias], gy.to(weight.dtype))


def tf32_errors(
    kernels: Backend, shape: Sequence[int], k: int, device: str = "cpu", relu_in: bool = False
) -> tuple[float, float]:
    """Of a float32 convolution with TF32 allowed: its error, and that of exact products of what tensor cores read."""
    data = Data(device=device)
    x, weight = data(*shape), data.weight(k, shape[1], 3, salt=1)
    y = kernels.conv3x3(x, weight, WayIn(relu_in))
    x = x.relu() if relu_in else x
    want = conv(x.double(), weight.double())
    return relative_l2(y, want), relative_l2(conv(tf32(x).double(), tf32(weight).double()), want)
