"""CUDA C++ from the compiled core."""

from __future__ import annotations

import torch
from torch import Tensor

from refinenet_fast import _native
from refinenet_fast.backends.native import Native


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
    """Whether what was built for ``arch`` ("80-real", "90a-real", "120") runs on compute capability major.minor.

    Code for an "a" architecture runs on that one only; other machine code on the same major version from its minor on;
    PTX, which anything but "-real" carries, on all later ones.
    """
    number = arch.split("-")[0]
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return (major, minor) == built
    if arch.endswith("-real"):
        return major == built[0] and minor >= built[1]
    return (major, minor) >= built
