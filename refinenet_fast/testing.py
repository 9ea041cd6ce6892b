"""What kernels are held against: float64 truths, tolerances, poisoned outputs, and one check of every backend.

For those who add a kernel, for the tests and for the benchmarks; :func:`check_backends` runs everything.

A result is held against plain PyTorch in float64. So are gradients, with the same decisions (which side of a ReLU,
which pixel of a pool) imposed on the truth, since one flipped tie would otherwise decide the error. The decisions
themselves have to be right to within the tolerance of a tie.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refinenet_fast import backends
from refinenet_fast.backends import PLAIN_OUT, Backend, WayIn, WayOut
from refinenet_fast.ops._library import NAMESPACE
from refinenet_fast.ops.crp import argmaxes
from refinenet_fast.ops.rcu import relu_results
from refinenet_fast.plain import conv, convolution, convolution_steps, maxpool, pick, resize

Plain = Callable[..., Tensor]  # a differentiable composition of PyTorch's own functions, for any dtype
Tensors = Sequence[Tensor | None]
Needs = Sequence[bool] | None  # which gradients are wanted; None for all
Rows = Iterator[tuple[str, str, float, float]]  # op, direction (forward, backward or decisions), error, limit
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WINOGRAD_ERROR = 1e-5  # in float32; F(4x4, 3x3) stays below it up to several thousand channels
SMALL = 1000  # below so many elements a sum may cancel, and its error is taken relative to the sum of absolute values
ODD = ((1, 1, 1, 1), (2, 3, 1, 7), (1, 17, 13, 11), (3, 5, 6, 2), (0, 4, 5, 5))
USUAL = ((1, 64, 32, 32), (2, 16, 31, 47), (1, 128, 16, 16))


def relative_l2(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """``|got - want| / |scale|`` in float64, ``scale`` being ``want`` unless given; NaN gives inf, empty ones 0."""
    if got.shape != want.shape:
        raise ValueError(f"got: expected shape {tuple(want.shape)}, that of want, got {tuple(got.shape)}")
    difference = torch.linalg.vector_norm(got.double() - want.double()).item()
    size = torch.linalg.vector_norm((want if scale is None else scale).double()).item()
    if difference == 0:
        return 0.0
    return difference / size if math.isfinite(difference) and 0 < size < math.inf else math.inf


def tolerance(dtype: torch.dtype, pytorch_error: float, winograd: bool = False) -> float:
    """The error that is allowed against float64: twice PyTorch's own, and 16 units of rounding at least.

    ``winograd``: a convolution by Winograd's algorithm may be part of it; then in float32 1e-5 at least.
    """
    least = WINOGRAD_ERROR if winograd and dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    return max(2 * pytorch_error if math.isfinite(pytorch_error) else 0.0, least)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block uninitialised memory holds NaN, or the largest integer: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            memory.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block float32 is not multiplied as TF32 on a GPU, which no tolerance for float32 would allow."""
    switches: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def compare(
    got: Sequence[Tensor],
    plain: Plain,
    inputs: Tensors,
    gy: Tensor | None = None,
    winograd: bool = False,
    needs: Needs = None,
) -> tuple[float, float]:
    """Error and limit of ``plain(*inputs)``, or with ``gy`` of its gradients: of the worst of ``got``.

    The limit is that of :func:`tolerance`. The truth is ``plain`` in float64; ``plain`` in the inputs' own dtype says
    how large PyTorch's error is. ``needs`` says for each input whether its gradient is in ``got``; by default all are.
    """
    given: list[Tensor | None] = [*inputs, gy]
    dtype = next(t.dtype for t in given if t is not None)  # the activations': parameters may be float32 beside them
    wide = _each(given, Tensor.double)
    outcomes = partial(_outcomes, plain, needs)
    truth = sizes = outcomes(wide)
    if any(t.numel() < SMALL for t in truth):
        sizes = outcomes(_each(wide, Tensor.abs))
    pairs: list[tuple[float, float]] = []
    for value, want, pytorch, size in zip(got, truth, outcomes(given), sizes, strict=True):
        scale = size if want.numel() < SMALL else want
        limit = tolerance(dtype, relative_l2(pytorch, want, scale), winograd)
        pairs.append((relative_l2(value, want, scale), limit))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _outcomes(plain: Plain, needs: Needs, given: Tensors) -> list[Tensor]:
    *inputs, gy = given
    if gy is None:
        return [plain(*inputs)]
    leaves, wanted = as_leaves(inputs, needs)
    with torch.enable_grad():
        return list(torch.autograd.grad(plain(*leaves), wanted, gy))


def as_leaves(tensors: Tensors, needs: Needs = None) -> tuple[list[Tensor | None], list[Tensor]]:
    """The tensors without a history, and those of them that require a gradient: all, or those that ``needs`` names."""
    leaves = _each(tensors, lambda t: t.detach())
    pairs = zip(leaves, needs or [True] * len(leaves), strict=True)
    return leaves, [leaf.requires_grad_() for leaf, need in pairs if need and leaf is not None]


def _each(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    return [None if t is None else change(t) for t in tensors]


class Imposed:
    """ReLU and max pool with the decisions of a forward pass imposed; ``worst`` says how wrong they are."""

    def __init__(self, decided: Sequence[Tensor]) -> None:
        self.masks = iter([t for t in decided if t.dtype != torch.uint8])
        self.bytes = iter([t for t in decided if t.dtype == torch.uint8])
        self.worst = 0.0

    def relu(self, t: Tensor) -> Tensor:
        return self._note(t, torch.relu(t), torch.where(~(next(self.masks) <= 0), t, 0))

    def pool(self, t: Tensor) -> Tensor:
        return self._note(t, maxpool(t), pick(t, next(self.bytes)))

    def _note(self, t: Tensor, free: Tensor, imposed: Tensor) -> Tensor:
        if t.numel():
            scale = free.detach().abs().clamp(min=t.detach().square().mean().sqrt() + torch.finfo(t.dtype).tiny)
            gap = ((free - imposed).detach().abs() / scale).max().item()
            self.worst = max(self.worst, gap if math.isfinite(gap) else math.inf)
        return imposed


def eager(call: Call, *tensors: Tensor | None, steps: Imposed | None = None) -> Tensor:
    """The hot path of ``call`` in plain PyTorch, on ``tensors`` in place of its own; with decisions from ``steps``."""
    relu, pool = (steps.relu, steps.pool) if steps else (torch.relu, maxpool)
    if call.op == "rcu":
        x, adds, units = tensors[0], *rcu_parts(tensors)
        for (w1, b1, w2, b2), add in zip(units, adds, strict=True):
            r = relu(x)
            x = (x if call.options[0] == "raw" else r) + conv(relu(conv(r, w1, b1)), w2, b2)
            x = x if add is None else x + add
        return x
    if call.op == "fuse":
        paths, (size, corners) = len(tensors) // 3, call.options
        maps = [conv(x, tensors[paths + i], tensors[2 * paths + i]) for i, x in enumerate(tensors[:paths])]
        return reduce(torch.add, (t if list(t.shape[2:]) == list(size) else resize(t, size, corners) for t in maps))
    stages = len(tensors) // 2
    order, rectified = call.options
    total = t = relu(tensors[0]) if rectified else tensors[0]
    for w, b in zip(tensors[1 : 1 + stages], tensors[1 + stages :], strict=True):
        t = conv(pool(t), w, b) if order == "pool-conv" else pool(conv(t, w, b))
        total = total + t
    return total


@dataclass(frozen=True)
class Data:
    """Random tensors, the same on every device: normal, or integers of -2 ... 2 (many ties, exact sums)."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    integers: bool = False
    seed: int = 0

    def __call__(self, *shape: int, salt: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        if self.integers:
            t = torch.randint(-2, 3, shape, generator=generator)
        t = t.to(self.device, self.dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    def weight(self, k: int, c: int, r: int, salt: int) -> Tensor:  # (k, c, r, r)
        return self(k, c, r, r, salt=salt, scale=1 / math.sqrt(c * r * r))


@dataclass(frozen=True)
class Call:
    """One call of a hot path, below autograd: tensors and options as ``torch.ops.refinenet_fast.<op>`` takes them."""

    op: str
    tensors: list[Tensor | None]
    options: tuple[Any, ...]

    def _op(self, suffix: str = "") -> Any:
        return getattr(getattr(torch.ops, NAMESPACE), self.op + suffix)

    def infer(self, backend: str) -> Tensor:
        return self._op()(self.tensors, *self.options, backend)

    def train(self, backend: str) -> tuple[Tensor, list[Tensor]]:
        return self._op("_train")(self.tensors, *self.options, backend)

    def gradients(self, gy: Tensor, saved: list[Tensor], backend: str, needs: Needs = None) -> list[Tensor]:
        needs = needs or [True] * len(self.tensors)
        wanted = [need and t is not None for need, t in zip(needs, self.tensors, strict=True)]
        return self._op("_backward")(gy, self.tensors, saved, wanted, *self.options, backend)


def rcu_parts(tensors: Sequence[Any]) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """Of an op's tensors: what each unit adds, and each one's ``(w1, b1, w2, b2)``."""
    count = len(tensors) // 5
    return list(tensors[1 : 1 + count]), list(zip(*[iter(tensors[1 + count :])] * 4))


def decisions(call: Call, saved: list[Tensor], backend: str) -> list[Tensor]:
    """What backward decides by, saved or computed again: for ReLUs the sign, for pools bytes."""
    given = (backends.get(backend), call.tensors, saved, *call.options)
    if call.op == "rcu":
        return relu_results(*given)
    return [call.tensors[0], *argmaxes(*given)] if call.op == "crp" else []


def rcu_call(
    shape: Sequence[int],
    data: Data,
    middle: int | None = None,
    kernel: int = 3,
    biases: str = "1",
    skip: str = "raw",
    units: int = 1,
    adds: str = "",
    recompute: bool = False,
) -> Call:
    """``biases`` names the convolutions that have one: "", "1", "2" or "12"; ``adds`` the units: "", "1", ... "123"."""
    c, m = shape[1], middle or shape[1]
    added = [data(*shape, salt=5 + 10 * i) if str(i + 1) in adds else None for i in range(units)]
    tensors: list[Tensor | None] = [data(*shape), *added]
    for salt in range(0, 10 * units, 10):
        w1, w2 = data.weight(m, c, kernel, salt=salt + 1), data.weight(c, m, kernel, salt=salt + 2)
        b1, b2 = data(m, salt=salt + 3) if "1" in biases else None, data(c, salt=salt + 4) if "2" in biases else None
        tensors += [w1, b1, w2, b2]
    return Call("rcu", tensors, (skip, recompute))


def crp_call(
    shape: Sequence[int],
    data: Data,
    stages: int = 2,
    kernel: int = 3,
    biases: bool = False,
    order: str = "pool-conv",
    relu: bool = True,
) -> Call:
    ws = [data.weight(shape[1], shape[1], kernel, salt=10 + k) for k in range(stages)]
    bs = [data(shape[1], salt=20 + k) if biases else None for k in range(stages)]
    return Call("crp", [data(*shape), *ws, *bs], (order, relu))


def fuse_call(
    shapes: Sequence[Sequence[int]],
    data: Data,
    kernels: Sequence[int | None],
    channels: int,
    biases: bool = False,
    size: Sequence[int] | None = None,
    align_corners: bool = True,
) -> Call:
    """``kernels``: the size of each path's convolution, None where it has none."""
    xs = [data(*shape, salt=30 + i) for i, shape in enumerate(shapes)]
    ws = [data.weight(channels, x.shape[1], r, salt=40 + i) if r else None for i, (x, r) in enumerate(zip(xs, kernels))]
    bs = [data(channels, salt=50 + i) if biases and w is not None else None for i, w in enumerate(ws)]
    size = size or [max(x.shape[d] for x in xs) for d in (2, 3)]
    return Call("fuse", [*xs, *ws, *bs], (list(size), align_corners))


def some_calls(shape: Sequence[int], data: Data) -> list[Call]:
    """The three hot paths with their options mixed, on maps of that shape."""
    n, c, h, w = shape
    small, large = (n, c + 1, (h + 1) // 2, (w + 2) // 3), (n, c, h + 2, w)
    return [
        rcu_call(shape, data),
        rcu_call(shape, data, middle=c + 2, kernel=1, biases="2", skip="relu"),
        rcu_call(shape, data, biases="12", units=3, adds="13"),
        rcu_call(shape, data, units=2, recompute=True),
        fuse_call([shape, small], data, [3, 3], c),
        fuse_call([shape, small, shape, large], data, [None, 1, 3, None], c, True, shape[2:], align_corners=False),
        crp_call(shape, data, stages=2),
        crp_call(shape, data, stages=2, kernel=1, relu=False),
        crp_call(shape, data, stages=3, kernel=1, biases=True, order="conv-pool"),
    ]


def check_call(call: Call, backend: str, needs: Needs = None) -> Rows:
    """The result, the worst gradient (of those that ``needs`` names, by default all) and the worst saved decision."""
    with poisoned():
        y = call.infer(backend)
        y_train, saved = call.train(backend)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
        grads = call.gradients(gy, saved, backend, needs)
        decided = decisions(call, saved, backend)

    def same_decisions(*tensors: Tensor | None) -> Tensor:
        return eager(call, *tensors, steps=Imposed(decided))

    winograd = any(backends.get(backend).is_winograd(x, w) for x, w in _convolutions(call))
    forward = [compare([result], partial(eager, call), call.tensors, winograd=winograd) for result in (y, y_train)]
    yield call.op, "forward", *max(forward)
    yield call.op, "backward", *compare(grads, same_decisions, call.tensors, gy, winograd, needs)
    steps = Imposed(decided)
    eager(call, *_each(call.tensors, Tensor.double), steps=steps)
    yield call.op, "decisions", steps.worst, 2 * max(forward)[1]  # both sides of a tie may be off


def _convolutions(call: Call) -> list[tuple[Tensor, Tensor]]:
    """For each convolution of the call a tensor of the size of its result, and its weight."""
    if call.op == "rcu":
        return [(call.tensors[0], w) for w1, _, w2, _ in rcu_parts(call.tensors)[1] for w in (w1, w2)]
    if call.op == "fuse":
        paths = len(call.tensors) // 3
        return [
            (x, w) for x, w in zip(call.tensors, call.tensors[paths : 2 * paths]) if x is not None and w is not None
        ]
    x, *weights = (t for t in call.tensors if t is not None and t.dim() == 4)
    return [(x, w) for w in weights]


def check_maxpool5(
    kernels: Backend,
    x: Tensor,  # (N, C, H, W)
    gy: Tensor,  # (N, C, H, W)
    relu: bool,
    add: Tensor | None,  # (N, C, H, W)
) -> Rows:
    """The pool, whose values and choices have to be exact."""
    with poisoned():
        value, argmax = kernels.maxpool5(x, relu, argmax=True)
        gx = kernels.maxpool5_backward(gy, argmax, add)
    seen = x.relu() if relu else x
    yield "maxpool5", "forward", relative_l2(value, maxpool(seen)), 0.0
    yield "maxpool5", "decisions", relative_l2(pick(seen, argmax), value), 0.0
    both = torch.stack([gy] if add is None else [gy, add])
    yield "maxpool5", "backward", *compare([gx], lambda t: torch.stack([pick(t, argmax), t][: len(both)]), [x], both)


def check_bilinear(
    kernels: Backend,
    x: Tensor,  # (N, C, h, w)
    gy: Tensor,  # (N, C, H, W)
    align_corners: bool,
    add: Tensor | None,  # (N, C, H, W)
    overwrite_add: bool = False,
) -> Rows:
    """Resizing to the size of ``gy``."""
    size = (gy.shape[2], gy.shape[3])
    with poisoned():
        y = kernels.bilinear(x, size, align_corners, add.clone() if overwrite_add else add, overwrite_add)
        gx = kernels.bilinear_backward(gy, (x.shape[2], x.shape[3]), align_corners)
    resized = partial(resize, size=size, align_corners=align_corners)
    yield "bilinear", "forward", *compare([y], lambda x, *add: sum(add, resized(x)), [x] if add is None else [x, add])
    yield "bilinear", "backward", *compare([gx], resized, [x], gy)


def check_conv3x3(
    kernels: Backend,
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R)
    gy: Tensor,  # (N, K, H, W)
    way_in: WayIn,
    way_out: WayOut,
    way_back: WayOut = PLAIN_OUT,
    pack: bool = False,
) -> Rows:
    """A convolution with its steps, its input gradient with those of ``way_back``, its parameters' (with no pool)."""
    bias, relu, winograd = way_out.bias, WayIn(relu=way_in.relu), kernels.is_winograd(x, weight)
    with poisoned():
        y = kernels.conv3x3(x, weight, way_in, way_out, pack)
        gx = kernels.conv3x3_input_grad(gy, weight, way_back)
        grads = [t for t in kernels.parameter_grads(x, gy, weight, bias, relu) if t is not None]

    def forward(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        return convolution(x, weight, way_in, _with_tensors(way_out, others))

    def backward(gy: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        gx = F.conv_transpose2d(gy, weight.to(gy.dtype), padding=weight.shape[2] // 2)
        return convolution_steps(gx, _with_tensors(way_back, others))

    def with_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(x, weight, relu, WayOut(bias))

    yield "conv3x3", "forward", *compare([y], forward, [x, weight, *_tensors(way_out)], winograd=winograd)
    yield "conv3x3", "backward", *compare([gx], backward, [gy, weight, *_tensors(way_back)], winograd=winograd)
    error, limit = compare(grads, with_bias, [x, weight, bias], gy, winograd, needs=[False, True, True])
    yield "conv3x3_weight_grad", "backward", error, limit


def _tensors(way_out: WayOut) -> list[Tensor | None]:
    return [way_out.bias, way_out.select, way_out.upsample, *way_out.add, *way_out.add_relu]


def _with_tensors(way_out: WayOut, tensors: Tensors) -> WayOut:
    bias, mask, low, *maps = tensors
    add, add_relu = tuple(maps[: len(way_out.add)]), tuple(maps[len(way_out.add) :])
    return replace(way_out, bias=bias, select=mask, upsample=low, add=add, add_relu=add_relu)


def check_pool_and_bilinear(kernels: Backend, shape: Sequence[int], data: Data) -> Rows:
    """The kernels without a convolution."""
    x, gy, (n, c, h, w) = data(*shape), data(*shape, salt=1), shape
    yield from check_maxpool5(kernels, x, gy, relu=True, add=gy)
    high = data(n, c, 2 * h - 1, w + 3, salt=2)
    for corners in (True, False):
        yield from check_bilinear(kernels, x, high, corners, add=high)


def check_kernels(kernels: Backend, shape: Sequence[int], data: Data) -> Rows:
    """The four kernels alone."""
    yield from check_pool_and_bilinear(kernels, shape, data)
    x, (n, c, h, w) = data(*shape), shape
    weight, bias = data.weight(c + 1, c, 3, salt=3), data(c + 1, salt=4)
    gy, low = data(n, c + 1, h, w, salt=5), data(n, c + 1, (h + 1) // 2, (w + 1) // 2, salt=6)
    yield from check_conv3x3(kernels, x, weight, gy, WayIn(True, True), WayOut(bias, True, gy, (gy,), (gy,), low))


def check_backends(device: str) -> list[dict[str, Any]]:
    """All kernels and hot paths of every backend that can run on ``device``, unproven ones too, against float64.

    A row for each: op, backend, dtype, shape, direction (forward, backward or decisions), error, limit and ok.
    """
    place = torch.empty(0, device=device).device  # with its index
    names = [info.name for info in backends.list_backends() if info.available]
    rows = []
    for shape, dtype, name in itertools.product((*ODD, *USUAL), DTYPES, names):
        kernels, data = backends.get(name), Data(dtype, str(place))
        if kernels.can_run(place, dtype) is not None or (dtype not in DTYPES[:2] and shape in USUAL[1:]):
            continue
        found = [check_kernels(kernels, shape, data), *(check_call(call, name) for call in some_calls(shape, data))]
        with exact_float32():
            for op, direction, error, limit in itertools.chain(*found):
                row = {"op": op, "backend": name, "dtype": str(dtype)[6:], "shape": shape, "direction": direction}
                rows.append({**row, "error": error, "limit": limit, "ok": error <= limit})
    return rows
