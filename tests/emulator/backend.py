"""The ``cuda`` backend's kernels in the emulator, as a backend: whatever tests a backend tests these."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from emulator.compilers import CSRC, compiled, find, picked
from emulator.launch import Struct, emulate
from emulator.products import HopperPlan, Launch, Plan, bytes_at, convolution, weight_gradient
from emulator.unit import LOCKSTEP, Schedule
from refinenet_fast import _native
from refinenet_fast.backends.configurations import A100, Architecture
from refinenet_fast.backends.cuda import Cuda
from refinenet_fast.backends.native import Native

THREADS = 256  # kThreads in csrc/cuda/launch.h
STRIP = 16  # kStrip in csrc/cuda/maxpool5.cu
# By the numbers of DType in csrc/common/arguments.h: bytes of an element, and its name in a mangled kernel's.
TYPES = {0: (4, "f"), 1: (2, "13__nv_bfloat16"), 2: (2, "6__half")}


@dataclass(frozen=True)
class Entry:
    """How one function of ``refinenet_fast._C`` becomes a launch (the host code of csrc/cuda/<source>).

    ``sizes(sizes)`` gives the elements of each pointer's tensor and the threads before division by the vector's width;
    ``bytewise`` are the pointers to bytes.
    """

    source: str
    kernel: str
    pointers: tuple[str, ...]
    layout: str  # of the struct of arguments after the pointers
    elements: Callable[[Sequence[int]], tuple[tuple[int, ...], int]]
    bytewise: tuple[str, ...] = ()
    flags: Callable[[Sequence[int], Sequence[int]], tuple[bool, ...]] = lambda pointers, rest: ()
    arguments: Callable[[Sequence[int]], tuple[int, ...]] = tuple  # type: ignore[assignment]


def _map(s: Sequence[int]) -> int:  # (N, H, W, C, ...)
    return s[0] * s[1] * s[2] * s[3]


def _large(s: Sequence[int]) -> int:  # (N, h, w, C, H, W, ...)
    return s[0] * s[4] * s[5] * s[3]


def _axes(s: Sequence[int]) -> tuple[int, ...]:
    n, h, w, c, out_h, out_w, dtype, corners = s
    return n, h, w, c, h, out_h, corners, w, out_w, corners, dtype


ENTRIES = {
    "maxpool5": Entry(
        "maxpool5.cu",
        "forward_kernel",
        ("x", "y", "argmax"),
        "qqqqi?3x",
        lambda s: ((_map(s),) * 3, s[0] * -(-s[1] // STRIP) * s[2] * s[3]),
        ("argmax",),
        lambda pointers, rest: (bool(rest[5]), pointers[2] != 0),
    ),
    "maxpool5_backward": Entry(
        "maxpool5.cu",
        "backward_kernel",
        ("gy", "argmax", "add", "gx"),
        "qqqqi4x",
        lambda s: ((_map(s),) * 4, _map(s)),
        ("argmax",),
    ),
    "bilinear": Entry(
        "bilinear.cu",
        "forward_kernel",
        ("x", "add", "y"),
        "qqqqqq?7xqq?7xi4x",
        lambda s: ((_map(s), _large(s), _large(s)), _large(s)),
        arguments=_axes,
    ),
    "bilinear_backward": Entry(
        "bilinear.cu",
        "backward_kernel",
        ("gy", "gx"),
        "qqqqqq?7xqq?7xi4x",
        lambda s: ((_large(s), _map(s)), _map(s)),
        arguments=_axes,
    ),
}


class Emulated(Cuda):
    """The CUDA backend on tensors in host memory.

    Args:
        schedule: Of 32 lanes for a warp, 256 for a block, more for several blocks at once.
        tile: Of the convolutions, as ``Cuda.tile``.
        processors: The multiprocessors that the convolutions' plans are made for.
        changed: Texts in place of those of the convolutions' files, by their paths below csrc.
    """

    name = "emulated"
    device_type = "cpu"
    last = 0  # of each launch's clusters, only so many run, the last ones; 0: all

    def __init__(
        self,
        arch: str = "sm_80",
        schedule: Schedule = LOCKSTEP,
        tile: int = 0,
        processors: int = A100.processors,
        changed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.arch, self.schedule, self.tile, self.processors = arch, schedule, tile, processors
        self.changed = changed

    def unavailable(self) -> str | None:
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return Native.can_run(self, device, dtype)

    def _architecture(self, device: torch.device) -> Architecture:
        return replace(A100, capability=int(re.sub(r"\D", "", self.arch)), processors=self.processors)

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        if function in ("conv3x3", "weight_grad"):
            headers = tuple((path, text) for path, text in self.changed.items() if path.endswith(".h"))
            for source, name, blocks, threads, shared, given, cluster in self._launches(function, *arguments):
                kernel = picked(CSRC / source, self.arch, name, self.changed.get(source, ""), headers)
                sizes = {"cluster": [cluster], "shared": shared, "last": self.last}
                emulate(kernel, [blocks], [threads], given, schedule=self.schedule, **sizes)
            return
        entry = ENTRIES[function]
        flat = [int(a) for a in arguments]  # type: ignore[call-overload]
        pointers, rest = flat[: len(entry.pointers)], flat[len(entry.pointers) :]
        size, mangled = TYPES[rest[6] if len(rest) > 6 else rest[4]]
        elements, threads = entry.elements(rest)
        if not threads:
            return
        whole = rest[3] % (16 // size) == 0 and not any(pointer % 16 for pointer in pointers)
        lanes = 16 // size if whole else 1
        buffers: list[object] = [
            bytes_at(pointer, count * (1 if name in entry.bytewise else size))
            for name, pointer, count in zip(entry.pointers, pointers, elements, strict=True)
        ]
        arguments = Struct(f"{len(buffers)}Q{entry.layout}", (*buffers, *entry.arguments(rest)))
        flags = "".join(f"Lb{int(flag)}E" for flag in entry.flags(pointers, rest))
        kernel = find(compiled(CSRC / "cuda" / entry.source, self.arch), f"{entry.kernel}I{mangled}Li{lanes}E{flags}E")
        blocks = -(-threads // lanes // THREADS)
        emulate(kernel, [blocks], [THREADS], [arguments], schedule=self.schedule, last=self.last)

    def _launches(self, function: str, *arguments: object) -> list[Launch]:
        """Of a convolution or a weight gradient, as the library plans it for this architecture."""
        core = _native._C
        if function == "weight_grad":
            return weight_gradient(Plan(*core.cuda_plan_weight_grad(*arguments, self.processors)), *arguments)
        capability = int(self.arch.removeprefix("sm_").rstrip("a"))
        if hopper := core.cuda_plan_conv3x3_sm90(*arguments, capability, self.processors):
            return convolution(HopperPlan(*hopper), *arguments)
        return convolution(Plan(*core.cuda_plan_conv3x3(*arguments, self.processors)), *arguments)
