"""Residual conv unit, and a run of them (Lin et al., CVPR 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refinenet_fast.backends import Backend, WayIn, WayOut, resolve, select
from refinenet_fast.layout import empty_nhwc
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
) -> Tensor:  # (N, C, H, W)
    r"""Residual conv unit: ``y = x + conv2(relu(conv1(relu(x))))``; nothing follows the sum.

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
    return _RCU(resolve("rcu", x), [x, w1, b1, w2, b2], skip, recompute)


def rcu_run(
    x: Tensor,  # (N, C, H, W)
    units: Sequence[Unit],
    skip: str = "raw",
    recompute: bool = False,
) -> Tensor:  # (N, C, H, W)
    r"""Residual conv units in a row, as one hot path: what :func:`rcu` computes, one after another.

    Between two of them a backend may write the sum together with its ReLU, which is all that the next unit's first
    convolution and backward need. What is kept for backward is, beside ``x``, two maps a unit, and one for the first;
    where ``recompute``, one map a unit after the first.

    Args:
        x, skip, recompute: As in :func:`rcu`.
        units: ``(w1, b1, w2, b2)`` of each, as in :func:`rcu`; one or more.

    Returns, Raises: As :func:`rcu`; arguments are named ``units[i].w1``.
    """
    _check.choice(skip, "skip", SKIPS)
    _check.flag(recompute, "recompute")
    x = activations(_check.image(x, "x"))
    tensors: Tensors = [x]
    for i, unit in enumerate(_check.sequence(units, "units")):
        if len(_check.sequence(unit, f"units[{i}]")) != 4:
            raise ValueError(f"units[{i}]: expected (w1, b1, w2, b2), got {len(unit)} entries")
        _check_unit(x, unit, f"units[{i}].")
        tensors += unit
    return _RCU(resolve("rcu", x), tensors, skip, recompute)


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


def _units(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """What belongs to each unit, of a list as long as the tensors: without x."""
    return [tensors[i : i + 4] for i in range(1, len(tensors), 4)]


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
    y = read = tensors[0]
    ahead = kernels.relu_ahead(y)
    units = _units(tensors)
    saved: list[Tensor] = []
    for i, (w1, b1, w2, b2) in enumerate(units):
        h = _hidden(kernels, read, w1, b1, WayIn(relu=not (ahead and i > 0)), pack=not keep)
        saved += [read] * (i > 0) + [h] * (not recompute)
        total = WayOut(bias=b2, add=(y,)) if skip == "raw" else WayOut(bias=b2, add_relu=(y,))
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
    ahead = kernels.relu_ahead(tensors[0])
    decisive: list[Tensor] = []
    for i, (read, h, unit) in enumerate(zip(*_reads(tensors[0], saved, recompute), _units(tensors), strict=True)):
        h = _hidden(kernels, read, unit[0], unit[1], WayIn(relu=not (ahead and i > 0))) if h is None else h
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
    reads, hs = _reads(tensors[0], saved, recompute)
    ahead = kernels.relu_ahead(gy)
    grads: Tensors = []
    for i, unit in reversed(list(enumerate(_units(tensors)))):
        need = needs[1 + 4 * i : 5 + 4 * i]
        before = any(needs[: 1 + 4 * i])
        way_in = WayIn(relu=not (ahead and i > 0))
        h = _hidden(kernels, reads[i], unit[0], unit[1], way_in) if hs[i] is None else hs[i]
        gy, *own = _unit_backward(kernels, gy, reads[i], h, unit, [before, *need], skip, way_in)
        grads = [*own, *grads]
        if not before:
            return [*[None] * (1 + 4 * i), *grads]
    return [gy, *grads]


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
    x = tensors[0]
    n, _, height, width = x.shape
    saved: list[Tensor] = []
    for i, (w1, *_) in enumerate(_units(tensors)):
        saved += [empty_nhwc(x, x.shape)] if i > 0 else []
        saved += [] if recompute else [empty_nhwc(x, (n, w1.shape[0], height, width))]
    return empty_nhwc(x, x.shape), saved


_RCU = HotPath(
    "rcu", "str skip, bool recompute", forward=_forward, backward=_backward, fake=_fake, images=lambda tensors: 1
)
