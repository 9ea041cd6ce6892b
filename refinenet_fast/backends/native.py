"""What the two compiled backends share: outputs allocated here, raw pointers handed to ``refinenet_fast._C``."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from refinenet_fast import _native
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


class Cpu(Native):
    """C++ on torch's own threads, for AVX-512, AVX2 or any processor."""

    name = "cpu"
    device_type = "cpu"
    dtypes = (torch.float32, torch.bfloat16)

    def unavailable(self) -> str | None:
        return _native.missing

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        assert _native._C is not None
        getattr(_native._C, f"cpu_{function}")(*arguments, torch.get_num_threads())


class Cuda(Native):
    """CUDA C++ for sm_80, sm_90a and sm_100 (whatever ``build_info()`` lists), on the current stream."""

    name = "cuda"
    device_type = "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    proven = False

    def unavailable(self) -> str | None:
        if _native.missing is not None:
            return _native.missing
        cuda = _native.build_info()["cuda"]
        if not cuda["built"]:
            return f"built without CUDA: {cuda['reason']}"
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        built, driver = _native._C.cuda_built_version() // 1000, _native._C.cuda_driver_version() // 1000
        if driver < built:
            return f"built with CUDA {built}, and the driver runs up to CUDA {driver}"
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = super().can_run(device, dtype)
        if reason is not None:
            return reason
        major, minor = torch.cuda.get_device_capability(device)
        archs = _native.build_info()["cuda"]["archs"]
        if not any(_runs_on(arch, major, minor) for arch in archs):
            return f"built for {', '.join(archs)}, and {device} is sm_{major}{minor}"
        return None

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        assert _native._C is not None
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_native._C, f"cuda_{function}")(*arguments, like.device.index, stream)


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code built for ``arch`` ("80-real", "90a-real") runs on compute capability major.minor.

    Code for an "a" architecture runs on that one only; other code on the same major version from its minor on.
    """
    number = arch.split("-")[0]
    digits = number.rstrip("af")
    built_major, built_minor = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return (major, minor) == (built_major, built_minor)
    return major == built_major and minor >= built_minor
