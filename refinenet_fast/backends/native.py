"""What the two compiled backends share: outputs allocated here, raw pointers handed to ``refinenet_fast._C``."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from refinenet_fast._native import DTYPES, pointer
from refinenet_fast.backends.checked import Checked, check_resizable, match
from refinenet_fast.layout import empty_nhwc


class Native(Checked):
    """``maxpool5`` and ``bilinear`` from the compiled core."""

    @abstractmethod
    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        """Run ``_C.<name>_<function>`` on the device, stream and threads that ``like`` asks for."""

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
        check_resizable(x, "x")
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


def _pixels(x: Tensor) -> tuple[int, int, int, int]:
    """(N, H, W, C): sizes in memory order."""
    n, c, h, w = x.shape
    return n, h, w, c
