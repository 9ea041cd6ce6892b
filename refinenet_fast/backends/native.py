"""What the two compiled backends share: outputs allocated here, raw pointers handed to ``refinenet_fast._C``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from refinenet_fast._native import DTYPES, pointer
from refinenet_fast.backends.base import VendorConv
from refinenet_fast.layout import empty_nhwc, nhwc


class Native(VendorConv):
    """``maxpool5`` and ``bilinear`` from the compiled core; the convolution is the vendor's unless overridden."""

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

    def _take(self, t: Tensor, argument: str) -> Tensor:
        """``t`` in NHWC memory, if this backend runs it: below here it is an address."""
        reason = self.can_run(t.device, t.dtype)
        if reason is not None:
            raise RuntimeError(f"{argument}: backend {self.name!r} cannot run this: {reason}")
        return nhwc(t)

    def maxpool5(self, x: Tensor, relu: bool = False, argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        x = self._take(x, "x")
        y = empty_nhwc(x, x.shape)
        which = empty_nhwc(x, x.shape, torch.uint8) if argmax else None
        shape = _pixels(x)
        self._call("maxpool5", x, pointer(x), pointer(y), pointer(which), *shape, DTYPES[x.dtype], relu)
        return y, which

    def maxpool5_backward(self, gy: Tensor, argmax: Tensor, add: Tensor | None = None) -> Tensor:
        gy = self._take(gy, "gy")
        argmax = match(argmax, "argmax", gy, gy.shape, torch.uint8)
        add = None if add is None else match(add, "add", gy, gy.shape, gy.dtype)
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
        x = self._take(x, "x")
        summed = None if add is None else match(add, "add", x, (*x.shape[:2], *size), x.dtype)
        if overwrite_add and summed is not None:
            y = summed
        else:
            y = empty_nhwc(x, (x.shape[0], x.shape[1], *size))
        buffers = (pointer(x), pointer(summed), pointer(y))
        self._call("bilinear", x, *buffers, *_pixels(x), *size, DTYPES[x.dtype], align_corners)
        return y

    def bilinear_backward(self, gy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        gy = self._take(gy, "gy")
        gx = empty_nhwc(gy, (gy.shape[0], gy.shape[1], *size))
        buffers = (pointer(gy), pointer(gx))
        self._call(
            "bilinear_backward", gy, *buffers, *_pixels(gx), gy.shape[2], gy.shape[3], DTYPES[gy.dtype], align_corners
        )
        return gx


def match(t: Tensor, argument: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``t`` in NHWC memory, if it has that shape and dtype on the device of ``like``."""
    if tuple(t.shape) != tuple(shape) or t.dtype != dtype or t.device != like.device:
        expected, got = f"{tuple(shape)} {dtype} on {like.device}", f"{tuple(t.shape)} {t.dtype} on {t.device}"
        raise ValueError(f"{argument}: expected {expected}, got {got}")
    return nhwc(t)


def _pixels(x: Tensor) -> tuple[int, int, int, int]:
    """(N, H, W, C): sizes in memory order."""
    n, c, h, w = x.shape
    return n, h, w, c
