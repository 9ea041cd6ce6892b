"""Chained residual pooling (Lin et al., CVPR 2017, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refinenet_fast.backends import Backend, WayIn, WayOut, resolve, select
from refinenet_fast.layout import empty_nhwc
from refinenet_fast.ops import _check
from refinenet_fast.ops._autocast import activations
from refinenet_fast.ops._library import HotPath, Tensors

ORDERS = ("pool-conv", "conv-pool")


def crp(
    x: Tensor,  # (N, C, H, W)
    weights: Sequence[Tensor],  # each (C, C, 3, 3) or (C, C, 1, 1), one a stage
    biases: Sequence[Tensor | None] | None = None,  # each (C,)
    order: str = "pool-conv",
    relu: bool = True,
) -> Tensor:  # (N, C, H, W)
    r"""Chained residual pooling: ``y = r + t1 + ... + tn``, where ``r = relu(x)`` and each stage feeds the next.

    .. math:: t_k = \mathrm{conv}_k(\mathrm{pool}(t_{k-1})) \quad\text{or}\quad
              t_k = \mathrm{pool}(\mathrm{conv}_k(t_{k-1})), \qquad t_0 = r

    with a 5x5 max pool of stride 1. What is kept for backward is, beside ``x``, each ``t_k`` but the last, of which
    backward pools again; where pools follow convolutions, one byte per pooled element, too.

    Args:
        x: Activations, any floating dtype. ``channels_last`` memory is used as it is, another layout costs one copy.
        weights: One or more stages; float32 weights may stand beside float16 or bfloat16 activations.
        biases: One entry a stage, None where a stage has no bias; None for no biases at all.
        order: ``"pool-conv"`` (the paper's and the released networks') or ``"conv-pool"`` (the paper's improved one).
        relu: False for ``r = x``, where what comes before has a ReLU of its own.

    Returns:
        In ``channels_last`` memory, of the dtype of ``x`` (of autocast's where autocast is on).

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        RuntimeError: A forced backend cannot run this; says why.
    """
    _check.choice(order, "order", ORDERS)
    _check.flag(relu, "relu")
    x = activations(_check.image(x, "x"))
    weights = _check.sequence(weights, "weights")
    biases = _check.as_many(biases, "biases", len(weights), of="weights")
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        _check.weight(w, f"weights[{k}]", x)
        if w.shape[0] != w.shape[1]:
            raise ValueError(f"weights[{k}]: expected as many output as input channels, got {tuple(w.shape)}")
        _check.bias(b, f"biases[{k}]", w, x)
    return _CRP(resolve("crp", x), [x, *weights, *biases], order, relu)


def _unpack(tensors: Tensors) -> tuple[Tensor, Tensors, Tensors]:
    stages = len(tensors) // 2
    return tensors[0], tensors[1 : 1 + stages], tensors[1 + stages :]


def _forward(kernels: Backend, tensors: Tensors, order: str, relu: bool, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Result, and per stage what it read, but x, and in conv-pool the pool's argmax byte."""
    x, weights, biases = _unpack(tensors)
    stage = _pool_conv if order == "pool-conv" else _conv_pool
    t = x
    sums: list[Tensor] = []
    saved: list[Tensor] = []
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        last = k == len(weights) - 1
        total = WayOut()
        if last:
            total = WayOut(add=tuple(sums), add_relu=(x,)) if relu else WayOut(add=(x, *sums))
        saved += [t] if keep and k > 0 else []
        t, kept = stage(kernels, t, w, b, relu=relu and k == 0, total=total, keep=keep)
        sums.append(t)
        saved += kept
    return t, saved


def _pool_conv(
    kernels: Backend,
    t: Tensor,  # (N, C, H, W): x itself for the first stage
    w: Tensor,  # (C, C, R, R)
    b: Tensor | None,  # (C,)
    relu: bool,
    total: WayOut,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    way_out = WayOut(bias=b, add=total.add, add_relu=total.add_relu)
    return kernels.conv3x3(t, w, WayIn(relu=relu, pool=True), way_out, pack=not keep), []


def _conv_pool(
    kernels: Backend,
    t: Tensor,  # (N, C, H, W): x itself for the first stage
    w: Tensor,  # (C, C, R, R)
    b: Tensor | None,  # (C,)
    relu: bool,
    total: WayOut,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    convolved = kernels.conv3x3(t, w, WayIn(relu=relu), WayOut(bias=b), pack=not keep)
    pooled, argmax = kernels.maxpool5(convolved, argmax=keep)
    return kernels.way_out(pooled, total), [argmax] if keep else []


def _backward(
    kernels: Backend,
    gy: Tensor,  # (N, C, H, W)
    tensors: Tensors,
    saved: list[Tensor],
    needs: list[bool],
    order: str,
    relu: bool,
) -> Tensors:
    r"""With :math:`g_k` the gradient in :math:`t_k`: :math:`g_n = g_y` and :math:`g_{k-1} = g_y + J_k^T g_k`."""
    x, weights, biases = _unpack(tensors)
    need_x, need_weights, need_biases = needs[0], needs[1 : 1 + len(weights)], needs[1 + len(weights) :]
    grad_weights: Tensors = [None] * len(weights)
    grad_biases: Tensors = [None] * len(weights)
    stage = _pool_conv_backward if order == "pool-conv" else _conv_pool_backward
    g: Tensor | None = gy
    for k in reversed(range(len(weights))):
        deeper = need_x or any(need_weights[:k]) or any(need_biases[:k])
        read, argmax = _read(kernels, x, saved, k, order, relu)
        g, at_conv = stage(kernels, g, gy, weights[k], argmax, deeper)
        w, b = weights[k] if need_weights[k] else None, biases[k] if need_biases[k] else None
        way_in = WayIn(relu=relu and order == "conv-pool" and k == 0)
        grad_weights[k], grad_biases[k] = kernels.parameter_grads(read, at_conv, w, b, way_in)
        if not deeper:
            break
    gx = None if not need_x else select(g, x) if relu else g
    return [gx, *grad_weights, *grad_biases]


def _read(kernels: Backend, x: Tensor, saved: list[Tensor], k: int, order: str, relu: bool) -> tuple[Tensor, Tensor]:
    """What stage k's convolution read, but its ReLU, and its pool's argmax."""
    if order == "pool-conv":
        return kernels.maxpool5(x if k == 0 else saved[k - 1], relu=relu and k == 0, argmax=True)
    return (x if k == 0 else saved[2 * k - 1]), saved[2 * k]


def argmaxes(kernels: Backend, tensors: Tensors, saved: list[Tensor], order: str, relu: bool) -> list[Tensor]:
    """What each pool's backward decides by: (N, C, H, W) uint8, one a stage."""
    return [_read(kernels, tensors[0], saved, k, order, relu)[1] for k in range(len(tensors) // 2)]


def _pool_conv_backward(
    kernels: Backend,
    g: Tensor,  # (N, C, H, W): gradient in the stage's result
    gy: Tensor,  # (N, C, H, W): the running gradient
    w: Tensor,  # (C, C, R, R)
    argmax: Tensor,  # (N, C, H, W) uint8
    deeper: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradient in the stage's input, None unless anything ``deeper`` wants it, and in its convolution's result."""
    if not deeper:
        return None, g
    pooled = kernels.conv3x3_input_grad(g, w)
    return kernels.maxpool5_backward(pooled, argmax, add=gy), g


def _conv_pool_backward(
    kernels: Backend,
    g: Tensor,  # (N, C, H, W): gradient in the stage's result
    gy: Tensor,  # (N, C, H, W): the running gradient
    w: Tensor,  # (C, C, R, R)
    argmax: Tensor,  # (N, C, H, W) uint8
    deeper: bool,
) -> tuple[Tensor | None, Tensor]:
    """As :func:`_pool_conv_backward`."""
    at_conv = kernels.maxpool5_backward(g, argmax)
    if not deeper:
        return None, at_conv
    return kernels.conv3x3_input_grad(at_conv, w, WayOut(add=(gy,))), at_conv


def _fake(tensors: Tensors, order: str, relu: bool) -> tuple[Tensor, list[Tensor]]:
    x, weights, _ = _unpack(tensors)
    saved: list[Tensor] = []
    for k in range(len(weights)):
        saved += [empty_nhwc(x, x.shape)] if k > 0 else []
        saved += [empty_nhwc(x, x.shape, torch.uint8)] if order == "conv-pool" else []
    return empty_nhwc(x, x.shape), saved


_CRP = HotPath(
    "crp", "str order, bool relu", forward=_forward, backward=_backward, fake=_fake, images=lambda tensors: 1
)
