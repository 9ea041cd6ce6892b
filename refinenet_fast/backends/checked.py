"""What backends share that run tensors of some devices and dtypes, in NHWC memory, by their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from refinenet_fast.backends.base import VendorConv
from refinenet_fast.layout import nhwc


class Checked(VendorConv):
    """Kernels of one's own for ``maxpool5`` and ``bilinear``; the convolution is the vendor's unless overridden."""

    device_type: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = self.unavailable()
        if reason is not None:
            return reason
        if device.type != self.device_type:
            return f"needs tensors on device type {self.device_type!r}, got {device.type!r}"
        if dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"needs one of {known}, got {str(dtype).removeprefix('torch.')}"
        return None

    def _take(
        self,
        t: Tensor,  # (N, C, H, W)
        argument: str,
    ) -> Tensor:  # (N, C, H, W)
        """``t`` in NHWC memory, if this backend runs it: below here it is an address."""
        reason = self.can_run(t.device, t.dtype)
        if reason is not None:
            raise RuntimeError(f"{argument}: backend {self.name!r} cannot run this: {reason}")
        return nhwc(t)


def check_resizable(
    t: Tensor,  # (N, C, h, w)
    argument: str,
) -> None:
    """Raises ValueError where a map has no pixel to interpolate between."""
    if 0 in t.shape[2:]:
        raise ValueError(f"{argument}: expected a height and a width of at least 1, got {tuple(t.shape)}")


def match(
    t: Tensor,  # (N, C, H, W)
    argument: str,
    like: Tensor,  # any
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # (N, C, H, W)
    """``t`` in NHWC memory, if it has that shape and dtype on the device of ``like``."""
    if tuple(t.shape) != tuple(shape) or t.dtype != dtype or t.device != like.device:
        expected, got = f"{tuple(shape)} {dtype} on {like.device}", f"{tuple(t.shape)} {t.dtype} on {t.device}"
        raise ValueError(f"{argument}: expected {expected}, got {got}")
    return nhwc(t)
