"""The kernels in plain PyTorch, in any dtype: what :mod:`refinenet_fast.testing` holds them against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refinenet_fast.backends import WayIn, WayOut


def bilinear_matrix(size_in: int, size_out: int, align_corners: bool) -> Tensor:  # (size_out, size_in) float64
    """The weights of bilinear resizing along one dimension, from integer quotient and remainder."""
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        numerator, denominator = max((2 * i + 1) * size_in - size_out, 0), 2 * size_out
        if align_corners:
            numerator, denominator = i * (size_in - 1), max(size_out - 1, 1)
        near, rest = divmod(numerator, denominator)
        matrix[i, near] += (denominator - rest) / denominator
        matrix[i, min(near + 1, size_in - 1)] += rest / denominator
    return matrix


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """``F.interpolate``; in float64 with exact weights, where PyTorch's are only as exact as its pixel positions."""
    if x.dtype != torch.float64:
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)
    rows, columns = (bilinear_matrix(x.shape[d], size[d - 2], align_corners).to(x.device) for d in (2, 3))
    return rows @ x @ columns.T


def pool_index(argmax: Tensor) -> Tensor:  # (N, C, H, W) uint8 -> (N, C, H, W) int64
    """The pixels that argmax bytes choose, as ``F.max_pool2d(..., return_indices=True)`` gives them."""
    height, width = argmax.shape[2:]
    dx, dy = (argmax & 7).long(), (argmax >> 3).long()
    rows = torch.arange(height, device=argmax.device)[:, None] + dy - 2
    columns = torch.arange(width, device=argmax.device) + dx - 2  # chosen by the row pass, in each row
    if ((dx > 4) | (dy > 4) | (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)).any():
        raise ValueError("argmax: expected bytes that choose one of five rows and columns within the image")
    return rows * width + columns.gather(2, rows)


def pick(x: Tensor, argmax: Tensor) -> Tensor:  # all (N, C, H, W)
    """A 5x5 max pool of ``x`` with its decisions imposed."""
    return x.flatten(2).gather(2, pool_index(argmax).flatten(2)).view_as(x)


def maxpool(x: Tensor) -> Tensor:
    """5x5 max pool, stride 1, that keeps the size."""
    return F.max_pool2d(x, 5, stride=1, padding=2)


def conv(x: Tensor, w: Tensor | None, b: Tensor | None = None) -> Tensor:
    """``F.conv2d`` that keeps the size, in the dtype of ``x``; ``x`` itself without a weight."""
    if w is None:
        return x
    return F.conv2d(x, w.to(x.dtype), None if b is None else b.to(x.dtype), padding=w.shape[2] // 2)


def convolution(x: Tensor, w: Tensor, way_in: WayIn, way_out: WayOut) -> Tensor:
    """The backends' ``conv3x3`` in plain PyTorch: the convolution and all its steps, one after another."""
    x = x.relu() if way_in.relu else x
    x = maxpool(x) if way_in.pool else x
    return convolution_steps(conv(x, w, way_out.bias), way_out)


def convolution_steps(y: Tensor, way_out: WayOut) -> Tensor:
    """The steps on the way out that follow the bias."""
    y = y.relu() if way_out.relu else y
    y = y if way_out.select is None else torch.where(~(way_out.select <= 0), y, 0)
    for t in (*way_out.add, *(t.relu() for t in way_out.add_relu)):
        y = y + t
    if way_out.upsample is not None:
        y = y + resize(way_out.upsample, y.shape[2:], way_out.align_corners)
    return y
