"""Residual conv unit (Lin et al., CVPR 2017, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from refinenet_fast.backends import Backend, WayIn, WayOut, resolve, select
from refinenet_fast.layout import empty_nhwc
from refinenet_fast.ops import _check
from refinenet_fast.ops._autocast import activations
from refinenet_fast.ops._library import HotPath, Tensors

SKIPS = ("raw", "relu")


def rcu(
    x: Tensor,  # (N, C, H, W)
    w1: Tensor,  # (M, C, 3, 3)
    b1: Tensor | None,  # (M,)
    w2: Tensor,  # (C, M, 3, 3)
    b2: Tensor | None = None,  # (C,)
    skip: str = "raw",
) -> Tensor:  # (N, C, H, W)
    r"""Residual conv unit: ``y = x + conv2(relu(conv1(relu(x))))``; nothing follows the sum.

    What is kept for backward is ``x`` and ``relu(conv1(relu(x)))``.

    Args:
        x: Activations, any floating dtype. ``channels_last`` memory is used as it is, another layout costs one copy.
        w1, b1: The first convolution, 3x3 or 1x1; ``b1=None`` for no bias. Float32 parameters may stand beside
            float16 or bfloat16 activations.
        w2, b2: The second one; the paper's has no bias.
        skip: ``"raw"`` adds ``x`` (paper, most ports); ``"relu"`` adds ``relu(x)`` (ports whose ReLU works in place:
            MiDaS v2.1, VGGT).

    Returns:
        In ``channels_last`` memory, of the dtype of ``x`` (of autocast's where autocast is on).

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        RuntimeError: A forced backend cannot run this; says why.
    """
    _check.choice(skip, "skip", SKIPS)
    x = activations(_check.image(x, "x"))
    _check.weight(w1, "w1", x)
    _check.bias(b1, "b1", w1, x)
    _check.weight(w2, "w2", x, channels=w1.shape[0])
    if w2.shape[0] != x.shape[1]:
        raise ValueError(f"w2: expected {x.shape[1]} output channels, those of x, got {w2.shape[0]}")
    _check.bias(b2, "b2", w2, x)
    return _RCU(resolve("rcu", x), [x, w1, b1, w2, b2], skip)


def _forward(kernels: Backend, tensors: Tensors, skip: str, keep: bool) -> tuple[Tensor, list[Tensor]]:
    x, w1, b1, w2, b2 = tensors
    h = kernels.conv3x3(x, w1, WayIn(relu=True), WayOut(bias=b1, relu=True), pack=not keep)
    skipped = WayOut(bias=b2, add=(x,)) if skip == "raw" else WayOut(bias=b2, add_relu=(x,))
    return kernels.conv3x3(h, w2, way_out=skipped, pack=not keep), [h] if keep else []


def _backward(
    kernels: Backend,
    gy: Tensor,  # (N, C, H, W)
    tensors: Tensors,
    saved: list[Tensor],
    needs: list[bool],
    skip: str,
) -> Tensors:
    r"""``gh = select(conv2^T(gy), h > 0)``; ``gx = gy + select(conv1^T(gh), x > 0)``, ReLU'd skip: all selected."""
    x, w1, b1, w2, b2 = tensors
    (h,) = saved
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    gx = gw1 = gb1 = None
    if need_x or need_w1 or need_b1:
        gh = kernels.conv3x3_input_grad(gy, w2, WayOut(select=h))
        gw1 = kernels.conv3x3_weight_grad(x, gh, w1, WayIn(relu=True)) if need_w1 else None
        gb1 = kernels.bias_grad(gh, b1) if need_b1 else None
        if need_x and skip == "raw":
            gx = kernels.conv3x3_input_grad(gh, w1, WayOut(select=x, add=(gy,)))
        elif need_x:
            gx = select(kernels.conv3x3_input_grad(gh, w1, WayOut(add=(gy,))), x)
    gw2 = kernels.conv3x3_weight_grad(h, gy, w2) if need_w2 else None
    gb2 = kernels.bias_grad(gy, b2) if need_b2 else None
    return [gx, gw1, gb1, gw2, gb2]


def _fake(tensors: Tensors, skip: str) -> tuple[Tensor, list[Tensor]]:
    x, w1, *_ = tensors
    n, _, height, width = x.shape
    return empty_nhwc(x, x.shape), [empty_nhwc(x, (n, w1.shape[0], height, width))]


_RCU = HotPath("rcu", "str skip", forward=_forward, backward=_backward, fake=_fake, images=lambda tensors: 1)
