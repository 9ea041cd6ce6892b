"""Autocast casts activations only: float32 weights stand beside them, and their gradients stay float32."""

from __future__ import annotations

import torch
from torch import Tensor


def is_on(kind: str) -> bool:
    """Whether autocast is on for a type of device, one that may have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``x`` is computed in: autocast's where that is on for its device, float64 excepted."""
    kind = x.device.type
    if x.dtype != torch.float64 and is_on(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def activations(
    x: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    """``x`` in autocast's dtype and in ``channels_last`` memory; itself where it is so already."""
    return x.to(autocast_dtype(x)).contiguous(memory_format=torch.channels_last)
