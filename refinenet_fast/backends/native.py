"""What the two compiled backends share: outputs allocated here, raw pointers handed to ``refinenet_fast._C``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from refinenet_fast._native import DTYPES, pointer
from refinenet_fast.backends.base import Backend, VendorConv
from refinenet_fast.layout import empty_nhwc, nhwc


class Native(VendorConv, Backend):
    """``maxpool5`` and ``bilinear`` from the compiled core; the convolution is still the vendor's."""

    device_type: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    @abstractmethod
    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        """Run ``_C.<name>_<function>`` on the device, stream and threads that ``like`` asks for."""

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

    def maxpool5(self, x: Tensor, relu: bool = False, argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        x = nhwc(x)
        y = empty_nhwc(x, x.shape)
        which = empty_nhwc(x, x.shape, torch.uint8) if argmax else None
        shape = _pixels(x)
        self._call("maxpool5", x, pointer(x), pointer(y), pointer(which), *shape, DTYPES[x.dtype], relu)
        return y, which

    def maxpool5_backward(self, gy: Tensor, argmax: Tensor, add: Tensor | None = None) -> Tensor:
        gy, argmax = nhwc(gy), nhwc(argmax)
        add = None if add is None else nhwc(add)
        gx = empty_nhwc(gy, gy.shape)
        buffers = (pointer(gy), pointer(argmax), pointer(add), pointer(gx))
        self._call("maxpool5_backward", gy, *buffers, *_pixels(gy), DTYPES[gy.dtype])
        return gx

    def bilinear(
        self,
        x: Tensor,
        size: tuple[int, int],
        align_corners: bool,
        add: Tensor | None = None,
        overwrite_add: bool = False,
    ) -> Tensor:
        x = nhwc(x)
        summed = None if add is None else nhwc(add)
        if overwrite_add and summed is not None:
            y = summed
        else:
            y = empty_nhwc(x, (x.shape[0], x.shape[1], *size))
        buffers = (pointer(x), pointer(summed), pointer(y))
        self._call("bilinear", x, *buffers, *_pixels(x), *size, DTYPES[x.dtype], align_corners)
        return y

    def bilinear_backward(self, gy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        gy = nhwc(gy)
        gx = empty_nhwc(gy, (gy.shape[0], gy.shape[1], *size))
        buffers = (pointer(gy), pointer(gx))
        self._call(
            "bilinear_backward", gy, *buffers, *_pixels(gx), gy.shape[2], gy.shape[3], DTYPES[gy.dtype], align_corners
        )
        return gx


def _pixels(x: Tensor) -> tuple[int, int, int, int]:
    """(N, H, W, C): sizes in memory order."""
    n, c, h, w = x.shape
    return n, h, w, c
