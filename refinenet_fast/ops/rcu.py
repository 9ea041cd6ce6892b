"""Residual conv unit, and a run of them (Lin et al., CVPR 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refinenet_fast.backends import Backend, WayIn, WayOut, resolve, select
from refinenet_fast.layout import empty_nhwc, nhwc
from refinenet_fast.ops import _check
from refinenet_fast.ops._autocast import activations
from refinenet_fast.ops._library import HotPath, Tensors

SKIPS = ("raw", "relu")
Unit = Sequence[Tensor | None]  # w1, b1, w2, b2


def rcu(
    x: Tensor,  # (N, C, H, W)
    w1: Tensor,  # (M, C, 3, 3)
    b1: Tensor | None,  # (M,)
    w2: Tensor,  # (C, M, 3, 3)
    b2: Tensor | None = None,  # (C,)
    skip: str = "raw",
    recompute: bool = False,
    add: Tensor | None = None,  # (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    r"""Residual conv unit: ``y = x + conv2(relu(conv1(relu(x))))``, plus ``add``; nothing follows the sum.

    What is kept for backward is ``x`` and ``relu(conv1(relu(x)))``, or ``x`` alone.

    Args:
        x: Activations, any floating dtype. ``channels_last`` memory is used as it is, another layout costs one copy.
        w1, b1: The first convolution, 3x3 or 1x1; ``b1=None`` for no bias. Float32 parameters may stand beside
            float16 or bfloat16 activations.
        w2, b2: The second one; the paper's has no bias.
        skip: ``"raw"`` adds ``x`` (paper, most ports); ``"relu"`` adds ``relu(x)`` (ports whose ReLU works in place:
            MiDaS v2.1, VGGT).
        recompute: Whether backward computes ``relu(conv1(relu(x)))`` again instead of keeping it: half the memory for
            one convolution more beside six. The gradients are the same bits.
        add: What else is summed, as where DPT adds a unit's result to the map from below; backward does not keep it.

    Returns:
        In ``channels_last`` memory, of the dtype of ``x`` (of autocast's where autocast is on).

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        RuntimeError: A forced backend cannot run this; says why.
    """
    _check.choice(skip, "skip", SKIPS)
    _check.flag(recompute, "recompute")
    x = activations(_check.image(x, "x"))
    _check_unit(x, (w1, b1, w2, b2))
    return _RCU(resolve("rcu", x), [x, _check_add(add, "add", x), w1, b1, w2, b2], skip, recompute)


def rcu_run(
    x: Tensor,  # (N, C, H, W)
    units: Sequence[Unit],
    skip: str = "raw",
    recompute: bool = False,
    adds: Sequence[Tensor | None] | None = None,  # each (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    r"""Residual conv units in a row, as one hot path: what :func:`rcu` computes, one after another.

    Between two of them a backend may write the sum together with its ReLU, which is all that the next unit's first
    convolution and backward need. What is kept for backward is, beside ``x``, two maps a unit, and one for the first;
    where ``recompute``, one map a unit after the first.

    Args:
        x, skip, recompute: As in :func:`rcu`.
        units: ``(w1, b1, w2, b2)`` of each, as in :func:`rcu`; one or more.
        adds: ``add`` of each unit, as in :func:`rcu`; None for none at all.

    Returns, Raises: As :func:`rcu`; arguments are named ``units[i].w1``, ``adds[i]``.
    """
    _check.choice(skip, "skip", SKIPS)
    _check.flag(recompute, "recompute")
    x = activations(_check.image(x, "x"))
    parameters: Tensors = []
    for i, unit in enumerate(_check.sequence(units, "units")):
        if len(_check.sequence(unit, f"units[{i}]")) != 4:
            raise ValueError(f"units[{i}]: expected (w1, b1, w2, b2), got {len(unit)} entries")
        _check_unit(x, unit, f"units[{i}].")
        parameters += unit
    adds = _check.as_many(adds, "adds", len(units), of="units")
    adds = [_check_add(add, f"adds[{i}]", x) for i, add in enumerate(adds)]
    return _RCU(resolve("rcu", x), [x, *adds, *parameters], skip, recompute)


def _check_add(
    value: Any,
    argument: str,
    x: Tensor,  # (N, C, H, W)
) -> Tensor | None:  # (N, C, H, W)
    if value is None:
        return None
    add = activations(_check.image(value, argument))
    _check.same_device_and_dtype(add, argument, x, "x")
    if add.shape != x.shape:
        raise ValueError(f"{argument}: expected shape {tuple(x.shape)}, that of x, got {tuple(add.shape)}")
    return add


def _check_unit(
    x: Tensor,  # (N, C, H, W)
    unit: Unit,
    prefix: str = "",
) -> None:
    w1, b1, w2, b2 = unit
    _check.weight(w1, f"{prefix}w1", x)
    _check.bias(b1, f"{prefix}b1", w1, x)
    _check.weight(w2, f"{prefix}w2", x, channels=w1.shape[0])
    if w2.shape[0] != x.shape[1]:
        raise ValueError(f"{prefix}w2: expected {x.shape[1]} output channels, those of x, got {w2.shape[0]}")
    _check.bias(b2, f"{prefix}b2", w2, x)


def _unpack(entries: Sequence[Any]) -> tuple[Any, list[Any], list[Sequence[Any]]]:
    """What belongs to x, to what each unit adds, and to each unit's parameters, of a list as long as the tensors."""
    count = len(entries) // 5
    units = [entries[i : i + 4] for i in range(1 + count, len(entries), 4)]
    return entries[0], list(entries[1 : 1 + count]), units


def _hidden(
    kernels: Backend,
    read: Tensor,  # (N, C, H, W): x, or its ReLU, which the unit before has written
    w1: Tensor,  # (M, C, 3, 3)
    b1: Tensor | None,  # (M,)
    way_in: WayIn,
    pack: bool = False,
) -> Tensor:  # (N, M, H, W)
    """``relu(conv1(relu(x)))``; the same bits in forward and in backward."""
    return kernels.conv3x3(read, w1, way_in, WayOut(bias=b1, relu=True), pack)


def _forward(kernels: Backend, tensors: Tensors, skip: str, recompute: bool, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Result, and for each unit what its convolutions read, but x: of a unit after the first either y or relu(y)."""
    y, adds, units = _unpack(tensors)
    read = y
    ahead = kernels.relu_ahead(y)
    saved: list[Tensor] = []
    for i, ((w1, b1, w2, b2), add) in enumerate(zip(units, adds, strict=True)):
        h = _hidden(kernels, read, w1, b1, WayIn(relu=not (ahead and i > 0)), pack=not keep)
        saved += [read] * (i > 0) + [h] * (not recompute)
        others = () if add is None else (add,)
        total = WayOut(b2, add=(y, *others)) if skip == "raw" else WayOut(b2, add=others, add_relu=(y,))
        if ahead and i + 1 < len(units):
            y, read = kernels.conv3x3_and_relu(h, w2, way_out=total, pack=not keep)
        else:
            y = read = kernels.conv3x3(h, w2, way_out=total, pack=not keep)
    return y, saved if keep else []


def _reads(x: Tensor, saved: list[Tensor], recompute: bool) -> tuple[list[Tensor], Tensors]:
    """What each unit's first convolution read, and its second one: None where that is to be computed again."""
    if recompute:
        return [x, *saved], [None] * (1 + len(saved))
    return [x, *saved[1::2]], list(saved[0::2])


def relu_results(kernels: Backend, tensors: Tensors, saved: list[Tensor], skip: str, recompute: bool) -> list[Tensor]:
    """What each ReLU's backward decides by, in forward's order: its result or, of the first of a unit, what it read."""
    x, _, units = _unpack(tensors)
    ahead = kernels.relu_ahead(x)
    decisive: list[Tensor] = []
    for i, (read, h, (w1, b1, *_)) in enumerate(zip(*_reads(x, saved, recompute), units, strict=True)):
        h = _hidden(kernels, read, w1, b1, WayIn(relu=not (ahead and i > 0))) if h is None else h
        decisive += [read, h]
    return decisive


def _backward(
    kernels: Backend,
    gy: Tensor,  # (N, C, H, W)
    tensors: Tensors,
    saved: list[Tensor],
    needs: list[bool],
    skip: str,
    recompute: bool,
) -> Tensors:
    """The units from the last to the first, as far back as a gradient is wanted."""
    x, adds, units = _unpack(tensors)
    need_x, need_adds, need_units = _unpack(needs)
    reads, hs = _reads(x, saved, recompute)
    ahead = kernels.relu_ahead(gy)
    grad_adds: Tensors = [None] * len(adds)
    grads: Tensors = [None] * (4 * len(units))
    for i, (w1, b1, *_) in reversed(list(enumerate(units))):
        if need_adds[i]:  # an op may not return what it was given
            grad_adds[i] = nhwc(gy.clone()) if i + 1 == len(units) else gy
        before = need_x or any(need_adds[:i]) or any(map(any, need_units[:i]))
        way_in = WayIn(relu=not (ahead and i > 0))
        h = _hidden(kernels, reads[i], w1, b1, way_in) if hs[i] is None else hs[i]
        gy, *own = _unit_backward(kernels, gy, reads[i], h, units[i], [before, *need_units[i]], skip, way_in)
        grads[4 * i : 4 * i + 4] = own
        if not before:
            break
    return [gy, *grad_adds, *grads]


def _unit_backward(
    kernels: Backend,
    gy: Tensor,  # (N, C, H, W)
    x: Tensor,  # (N, C, H, W), or its ReLU: then way_in has none
    h: Tensor,  # (N, M, H, W)
    unit: Unit,
    needs: list[bool],
    skip: str,
    way_in: WayIn,
) -> Tensors:
    r"""``gh = select(conv2^T(gy), h > 0)``; ``gx = gy + select(conv1^T(gh), x > 0)``, ReLU'd skip: all selected."""
    w1, b1, w2, b2 = unit
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    gx = gw1 = gb1 = None
    if need_x or need_w1 or need_b1:
        gh = kernels.conv3x3_input_grad(gy, w2, WayOut(select=h))
        gw1, gb1 = kernels.parameter_grads(x, gh, w1 if need_w1 else None, b1 if need_b1 else None, way_in)
        if need_x and skip == "raw":
            gx = kernels.conv3x3_input_grad(gh, w1, WayOut(select=x, add=(gy,)))
        elif need_x:
            gx = select(kernels.conv3x3_input_grad(gh, w1, WayOut(add=(gy,))), x)
    gw2, gb2 = kernels.parameter_grads(h, gy, w2 if need_w2 else None, b2 if need_b2 else None)
    return [gx, gw1, gb1, gw2, gb2]


def _fake(tensors: Tensors, skip: str, recompute: bool) -> tuple[Tensor, list[Tensor]]:
    x, _, units = _unpack(tensors)
    n, _, height, width = x.shape
    saved: list[Tensor] = []
    for i, (w1, *_) in enumerate(units):
        saved += [empty_nhwc(x, x.shape)] if i > 0 else []
        saved += [] if recompute else [empty_nhwc(x, (n, w1.shape[0], height, width))]
    return empty_nhwc(x, x.shape), saved


_RCU = HotPath(
    "rcu",
    "str skip, bool recompute",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    images=lambda tensors: 1 + len(tensors) // 5,
    unread=lambda tensors: range(1, 1 + len(tensors) // 5),
)
