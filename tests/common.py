"""What several test files share: places to run, tensors in odd memory layouts, and comparisons."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import refinenet_fast
from refinenet_fast import _native, backends, ops, testing
from refinenet_fast.backends import engine
from refinenet_fast.testing import Call, Data


class Place(NamedTuple):
    """A backend on a device, computing in a dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return "-".join([self.backend, *([self.device] if self.device != "cpu" else []), self.name])

    @property
    def name(self) -> str:
        """The dtype's."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> backends.Backend:
        return backends.get(self.backend)

    def data(self, **options: Any) -> Data:
        return Data(self.dtype, self.device, **options)

    def forced(self) -> refinenet_fast.use_backend:
        return refinenet_fast.use_backend(self.backend)


def _places() -> list[Place]:
    found = []
    devices = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
    for info in refinenet_fast.list_backends():
        kernels = backends.get(info.name)
        for device in devices if info.available else []:
            found += [
                Place(info.name, device, d) for d in testing.DTYPES if not kernels.can_run(torch.device(device), d)
            ]
    return found


PLACES = _places()

# -- random shapes and layouts -----------------------------------------------------------------------------------------

sides = st.one_of(st.just(1), st.sampled_from([2, 3, 5, 7, 11, 13, 17]), st.integers(1, 20))
shapes = st.tuples(st.sampled_from([1, 2, 0, 3]), st.integers(1, 70), sides, sides)  # (N, C, H, W)
narrow = st.tuples(st.sampled_from([1, 2, 0, 3]), st.integers(1, 9), sides, sides)
seeds = st.integers(0, 999)
LAYOUTS = ["channels_last", "contiguous", "transposed", "rows", "channels", "expanded", "expanded_batch"]
layouts = st.sampled_from(LAYOUTS)
MEMORIES = ["contiguous", "channels_last", "transposed", "sliced"]  # of weights


def laid_out(x: Tensor, how: str) -> Tensor:  # (N, C, H, W)
    """A tensor of the shape of ``x`` (and of its values, unless expanded) in memory laid out as ``how`` says."""
    n, c, h, w = x.shape
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "rows":  # every second pixel of some rows of a larger image
        return x.new_full((n, c, h + 2, 2 * w), torch.nan)[:, :, 1:-1, ::2].copy_(x)
    if how == "channels":  # the first channels of a channels_last tensor
        wider = x.new_full((n, 2 * c, h, w), torch.nan).contiguous(memory_format=torch.channels_last)
        return wider[:, :c].copy_(x)
    if how == "expanded":
        return x[:, :1, :, :1].expand(x.shape)
    if how == "expanded_batch":
        return x[:1].expand(x.shape)
    return x.contiguous()


def in_memory(weight: Tensor, memory: str) -> Tensor:  # (K, C, R, R)
    """The weight in memory of that kind, perhaps other numbers."""
    if memory == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    if memory == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "sliced":  # gaps in memory, for which PyTorch too allocates a dense gradient
        return weight.repeat(2, 1, 1, 1)[::2]
    return weight.contiguous()


def sprinkled(x: Tensor, seed: int) -> Tensor:
    """``x`` with a few NaN and infinities, and on some seeds -inf over whole windows."""
    generator = torch.Generator().manual_seed(seed)
    lot = torch.rand(x.shape, generator=generator).to(x.device)
    x = x.clone()
    if seed % 3 == 0:
        x[..., : x.shape[3] // 2 + 1] = -torch.inf
    for k, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[(lot > k / 30) & (lot < (k + 1) / 30)] = value
    return x


@contextmanager
def convolving(how: str) -> Iterator[None]:
    """Within the block the ``cpu`` backend convolves by its "engine" at any size, by the "vendor", or as "chosen"."""

    def pays(
        x: torch.Tensor,  # (N, C, H, W)
        weight: torch.Tensor,  # (K, C, R, R)
        rotated: bool = False,
    ) -> bool:
        return how == "engine" and engine.runs(x, weight)

    with pytest.MonkeyPatch.context() as patch:
        if how != "chosen":
            patch.setattr(engine, "pays", pays)
            patch.setattr(engine, "gradient_pays", lambda x, weight: pays(x, weight) and weight.shape[2] == 3)
        yield


@contextmanager
def running_on(isa: str, threads: int) -> Iterator[None]:
    """Within the block the compiled core runs on that instruction set, and everything on so many threads."""
    before = _native._C.cpu_isa(), torch.get_num_threads()
    try:
        _native._C.cpu_set_isa(isa)
        torch.set_num_threads(threads)
        yield
    finally:
        _native._C.cpu_set_isa(before[0])
        torch.set_num_threads(before[1])


# -- comparisons -------------------------------------------------------------------------------------------------------


def assert_equal(got: Tensor, want: Tensor) -> None:
    """The same values and dtype, NaN in the same places."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, check_stride=False)


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same shapes, dtypes, strides and bits."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def assert_same_gradients(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same bits; for biases to rounding, since a backend may sum them with the weight's gradient, or else alone."""
    for a, b in zip(got, want, strict=True):
        if b.ndim == 1:
            assert a.dtype == b.dtype and testing.relative_l2(a, b) <= 4 * torch.finfo(b.dtype).eps
        else:
            assert_same_bits([a], [b])


class Log(TorchDispatchMode):
    """Within the block, every op that runs below autograd: its name, and for this package's the backend too."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name())
        self.ops.append((name.split("::")[1], args[-1]) if name.startswith("refinenet_fast::") else (name,))
        return func(*args, **(kwargs or {}))

    @property
    def own(self) -> list[tuple[str, ...]]:
        """This package's ops: (op, backend)."""
        return [op for op in self.ops if len(op) == 2]


@contextmanager
def unchanged(*tensors: Tensor | None) -> Iterator[None]:
    """Checks that the block leaves the tensors' values, and their version counters, as they were."""
    given = [t for t in tensors if t is not None]
    before = [(t.detach().clone(), t._version) for t in given]
    yield
    for t, (values, version) in zip(given, before, strict=True):
        assert t._version == version
        assert_equal(t.detach(), values)


def assert_right(call: Call, backend: str) -> None:
    """Result, gradients and decisions, of the op below autograd, and its arguments left alone."""
    with unchanged(*call.tensors):
        rows = list(testing.check_call(call, backend))
    for op, direction, error, limit in rows:
        assert error <= limit, f"{op} {direction}: error {error:.3g}, limit {limit:.3g}"


def public(call: Call, *tensors: Tensor | None) -> Tensor:
    """The public function of the call's op, on ``tensors`` in place of the call's own."""
    if call.op == "rcu":
        x, (adds, units) = tensors[0], testing.rcu_parts(tensors)
        if len(units) == 1:
            return ops.rcu(x, *units[0], *call.options, add=adds[0])
        return ops.rcu_run(x, units, *call.options, adds=adds)
    k = len(tensors) // 3 if call.op == "fuse" else 1
    images, rest = list(tensors[:k]), tensors[k:]
    weights, biases = list(rest[: len(rest) // 2]), list(rest[len(rest) // 2 :])
    if call.op == "fuse":
        return ops.fuse(images, weights, biases, *call.options)
    return ops.crp(images[0], weights, biases, *call.options)


def with_gradients(
    function: Callable[..., Tensor], call: Call, gy: Tensor | None = None, needs: testing.Needs = None
) -> tuple[Tensor, list[Tensor]]:
    """``function(call, *tensors)`` and its gradients in those that ``needs`` names; ``gy`` = None: those of its sum."""
    leaves, wanted = testing.as_leaves(call.tensors, needs)
    y = function(call, *leaves)
    grads = torch.autograd.grad(y.sum(), wanted) if gy is None else torch.autograd.grad(y, wanted, gy)
    return y.detach(), list(grads)


def laid(call: Call, how: str) -> Call:
    """``call`` with its first tensor laid out as ``how`` says."""
    return replace(call, tensors=[laid_out(call.tensors[0], how), *call.tensors[1:]])


def assert_pytorchs(call: Call, place: Place, only_x: bool = False) -> None:
    """Result and gradients (or only that in x) equal those of plain PyTorch; nothing that was passed in changes.

    On small integers, of which Winograd's convolution alone makes something inexact: that one does not run.
    """
    gy = place.data(integers=True)(*testing.eager(call, *call.tensors).shape, salt=9)
    want, want_grads = with_gradients(testing.eager, call, gy)
    with unchanged(*call.tensors, gy), place.forced(), convolving("vendor"):
        y, grads = with_gradients(public, call, gy)
    count = 1 if only_x else None
    for got, wanted in zip([y, *grads[:count]], [want, *want_grads[:count]], strict=True):
        assert_equal(got, wanted)


def assert_repeatable(call: Call, place: Place) -> None:
    """The same bits twice; once with the gradient of a sum, which is an expanded scalar."""
    with unchanged(*call.tensors), place.forced():
        y, grads = with_gradients(public, call)
        again, grads_again = with_gradients(public, call, torch.ones_like(y))
    assert_same_bits([y, *grads], [again, *grads_again])


def assert_gradcheck(call: Call) -> None:
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    assert torch.autograd.gradcheck(lambda *tensors: public(call, *tensors), leaves)


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with these environment variables and none of the package's others."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REFINENET_FAST_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
