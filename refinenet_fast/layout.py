"""``channels_last`` memory with one set of strides for every shape, degenerate ones included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nhwc_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Strides of a dense (N, C, H, W) tensor in NHWC memory, those of dimensions of size 1 too."""
    _, c, h, w = shape
    return (c * h * w, 1, c * w, c)


def nhwc(
    x: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    """``x`` in NHWC memory: itself where it is so already, a copy otherwise.

    PyTorch ignores the strides of dimensions of size 1 and of empty tensors when it asks whether a tensor is
    ``channels_last``; here they are set too, so that every backend returns the same strides.
    """
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    strides = nhwc_strides(x.shape)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def empty_nhwc(
    x: Tensor,  # any: for its dtype and device
    shape: Sequence[int],  # (N, C, H, W)
    dtype: torch.dtype | None = None,
) -> Tensor:  # (N, C, H, W)
    """An uninitialised (N, C, H, W) tensor in NHWC memory."""
    return torch.empty_strided(shape, nhwc_strides(shape), dtype=dtype or x.dtype, device=x.device)
