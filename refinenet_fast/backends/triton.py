"""Triton kernels, compiled where they run: NVIDIA GPUs from sm_80 on, and Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from refinenet_fast.backends import launches
from refinenet_fast.backends.base import PLAIN_IN, PLAIN_OUT, Fused, VendorConv, WayIn, WayOut, as_weight
from refinenet_fast.backends.checked import Checked, match
from refinenet_fast.backends.configurations import (
    A100,
    Architecture,
    Configuration,
    architecture_of,
    candidates,
    choose,
    fitted,
)
from refinenet_fast.backends.launches import Launch
from refinenet_fast.backends.operands import (
    FUSES,
    arithmetic,
    check_weight,
    gradient_like,
    matched,
    pack_weight,
    uses_tf32,
)
from refinenet_fast.backends.reference import Reference
from refinenet_fast.backends.table import Choice, Question, Shape, lookup
from refinenet_fast.layout import empty_nhwc, nhwc

OLDEST = (3, 6)  # of Triton
POOL_TOO = Fused(FUSES.way_in | {"pool"}, FUSES.way_out)
POOLED_CHANNELS = 512  # most outputs of a 1x1 convolution that pools itself
GRID = 65_535  # most blocks along a grid's second and third dimension
VECTOR = 16  # bytes
BIAS_SPLITS = 256  # most programs of a bias gradient beside each other


_PLAIN = Reference()  # for sizes that the kernels do not count, and for empty tensors


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on the CPU: ``TRITON_INTERPRET=1``, before it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.lru_cache(maxsize=1)
def lacking() -> str | None:
    """Why no Triton that is new enough can be used; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, as for nightly builds
        version = importlib.import_module("triton").__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        return f"needs Triton {'.'.join(map(str, OLDEST))} or newer, got {version}"
    return None


class Triton(Checked):
    """All kernels in Triton, on the current stream. Float32 convolutions use TF32 where cuDNN would."""

    name = "triton"
    device_type = "cpu" if interpreting() else "cuda"
    # The interpreter computes bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if interpreting() else (torch.float32, torch.float16, torch.bfloat16)
    proven = False

    def unavailable(self) -> str | None:
        reason = lacking()
        if reason is not None or interpreting():
            return reason
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
        return None if newest >= (8, 0) else f"needs sm_80 or newer, and there is only sm_{newest[0]}{newest[1]}"

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = super().can_run(device, dtype)
        if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"needs sm_80 or newer, and {device} is sm_{major}{minor}"
        return reason

    def _architecture(self, device: torch.device) -> Architecture:
        return A100 if interpreting() else architecture_of(device)

    def _configuration(self, kernel: str, x: Tensor, k: int, taps: int) -> Configuration | None:
        """What the tables say, or else what should be fastest; None for the vendor's convolution."""
        architecture, problem = self._architecture(x.device), launches.problem_of(x, k, taps, uses_tf32(x.dtype))
        choice = lookup(Question(architecture.family, f"triton {kernel}", arithmetic(x.dtype), problem.shape))
        if choice == "vendor":
            return None
        found = fitted(kernel, architecture, problem, choice) if isinstance(choice, dict) else None
        return found or choose(kernel, architecture, problem)

    def trials(
        self, kernel: str, dtype: str, shape: Shape, device: torch.device
    ) -> list[tuple[Choice, Callable[[], object]]]:
        """A convolution is timed as it ends a residual conv unit: with a sum, its weights still to be packed."""
        n, h, w, c, k, taps = shape
        kind, tf32 = getattr(torch, dtype.removeprefix("tf32 ")), dtype.startswith("tf32")
        x, gy = (nhwc(torch.randn(n, m, h, w, device=device, dtype=kind)) for m in (c, k))
        weight = torch.randn(k, c, *[3 if taps == 9 else 1] * 2, device=device, dtype=kind)
        gw, y, way_out = torch.empty_like(weight), torch.empty_like(gy), WayOut(add=(gy,))

        def own(configuration: Configuration) -> None:
            if kernel == "weight_grad":
                self._run(*launches.weight_gradient(x, gy, gw, False, configuration, tf32))
            else:
                packed = pack_weight(weight, kind)
                self._run(*launches.convolution(x, packed, y, None, False, way_out, configuration, tf32=tf32))

        def vendors() -> None:
            if kernel == "weight_grad":
                VendorConv._conv3x3_weight_grad(self, x, gy, weight)
            else:
                self.way_out(VendorConv._conv3x3(self, x, weight, PLAIN_IN, PLAIN_OUT, False), way_out)

        known = candidates(kernel, self._architecture(device), launches.problem_of(x, k, taps, tf32))
        return [("vendor", vendors), *((asdict(each), functools.partial(own, each)) for each in known)]

    def _run(self, *several: Launch) -> None:
        """On the device that holds the tensors, on its current stream."""
        for launch in several:
            module = importlib.import_module(f"refinenet_fast.kernels.{launch.module}")  # Triton's import takes a while
            function = getattr(module, launch.kernel)
            if interpreting():
                function[launch.grid](*launch.arguments, **launch.constants)
                continue
            with torch.cuda.device(launch.device):
                options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
                function[launch.grid](*launch.arguments, **launch.constants, **options)

    # -- convolution ----------------------------------------------------------------------------------------------

    def relu_ahead(self, x: Tensor) -> bool:
        """From sm_90 on: wgmma reads pixels from shared memory only as they are."""
        return self._architecture(x.device).has_descriptors

    def fuses(self, x: Tensor, weight: Tensor, pack: bool) -> Fused:
        if self._is_vendors(x, weight):
            return super().fuses(x, weight, pack)
        # Pooling inside saves a map written and read; a program that computes not all channels pools again for others.
        return POOL_TOO if weight.shape[2] == 1 and weight.shape[0] <= POOLED_CHANNELS else FUSES

    def _conv3x3(self, x: Tensor, weight: Tensor, way_in: WayIn, way_out: WayOut, pack: bool) -> Tensor:
        if self._is_vendors(x, weight):
            return super()._conv3x3(x, weight, way_in, way_out, pack)
        return self._convolve(x, weight, way_in, way_out)

    def conv3x3_and_relu(
        self, x: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN, way_out: WayOut = PLAIN_OUT, pack: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self._is_vendors(x, weight):
            return super().conv3x3_and_relu(x, weight, way_in, way_out, pack)
        x, way_in = self._compose_in(x, way_in, self.fuses(x, weight, pack).way_in)
        relued = empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
        return self._convolve(x, weight, way_in, way_out, relued=relued), relued

    def conv3x3_input_grad(self, gy: Tensor, weight: Tensor, way_out: WayOut = PLAIN_OUT) -> Tensor:
        if self._is_vendors(gy, weight, rotated=True):
            return super().conv3x3_input_grad(gy, weight, way_out)
        return self._convolve(gy, weight, PLAIN_IN, way_out, rotated=True)

    def _is_vendors(self, x: Tensor, weight: Tensor, rotated: bool = False) -> bool:
        """Whether the vendor's convolution runs this: it is faster, or the sizes are beyond what the kernels count."""
        k, taps = weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3]
        return not _countable(x, k) or self._configuration("conv3x3", x, k, taps) is None

    def _convolve(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
        way_in: WayIn,
        way_out: WayOut,
        rotated: bool = False,
        relued: Tensor | None = None,  # (N, K, H, W), written
    ) -> Tensor:  # (N, K, H, W)
        """The convolution, its ReLU into ``relued``; ``rotated``: that of an input gradient."""
        x = aligned(self._take(x, "x"))
        check_weight(weight, x, 0 if rotated else 1)
        y = empty_nhwc(x, (x.shape[0], weight.shape[1 if rotated else 0], *x.shape[2:]))
        packed = pack_weight(weight, x.dtype, rotated)
        way_out = matched(way_out, y)
        if way_in.pool:
            self._run(launches.pool_convolution(x, packed, y, relued, way_in.relu, way_out, uses_tf32(x.dtype)))
            return y
        taps, k, _ = packed.shape
        chosen, tf32 = self._configuration("conv3x3", x, k, taps), uses_tf32(x.dtype)
        self._run(*launches.convolution(x, packed, y, relued, way_in.relu, way_out, chosen, rotated, tf32))
        return y

    def conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN) -> Tensor:
        chosen = self._weight_grads(x, gy, weight)
        # wgmma reads both operands from shared memory: a ReLU inside would write them there again at every step.
        if not way_in.relu or way_in.pool or chosen is None or chosen.described:
            return super().conv3x3_weight_grad(x, gy, weight, way_in)
        return as_weight(self._weight_gradient(x, gy, weight, chosen, relu_in=True), weight)

    def _conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        chosen = self._weight_grads(x, gy, weight)
        if chosen is None:
            return super()._conv3x3_weight_grad(x, gy, weight)
        return self._weight_gradient(x, gy, weight, chosen)

    def _weight_grads(self, x: Tensor, gy: Tensor, weight: Tensor) -> Configuration | None:
        """The configuration of a weight gradient; None for the vendor's."""
        k, _, r, _ = weight.shape
        return self._configuration("weight_grad", x, k, r * r) if _countable(x, k) else None

    def _weight_gradient(
        self,
        x: Tensor,  # (N, C, H, W)
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, R, R)
        chosen: Configuration,
        relu_in: bool = False,
    ) -> Tensor:  # (K, C, R, R)
        x = aligned(self._take(x, "x"))
        check_weight(weight, x, 1)
        gy = aligned(match(gy, "gy", x, (x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype))
        gw = gradient_like(weight)
        self._run(*launches.weight_gradient(x, gy, gw, relu_in, chosen, uses_tf32(x.dtype)))
        return gw

    def bias_grad(self, gy: Tensor, bias: Tensor) -> Tensor:
        gy = self._take(gy, "gy")
        if not _countable(gy, 1):
            return super().bias_grad(gy, bias)
        gb = torch.empty_like(bias)
        n, _, h, w = gy.shape
        self._run(*launches.bias_gradient(gy, gb, min(BIAS_SPLITS, -(-n * h * w // 256))))
        return gb

    # -- pooling and resampling -----------------------------------------------------------------------------------

    def maxpool5(self, x: Tensor, relu: bool = False, argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        x = self._take(x, "x")
        if not _countable(x, 1):
            return _PLAIN.maxpool5(x, relu, argmax)
        y = empty_nhwc(x, x.shape)
        which = empty_nhwc(x, x.shape, torch.uint8) if argmax else None
        self._run(launches.pool(x, y, which, relu))
        return y, which

    def maxpool5_backward(self, gy: Tensor, argmax: Tensor, add: Tensor | None = None) -> Tensor:
        gy = self._take(gy, "gy")
        argmax = match(argmax, "argmax", gy, gy.shape, torch.uint8)
        add = None if add is None else match(add, "add", gy, gy.shape, gy.dtype)
        if not _countable(gy, 1):
            return _PLAIN.maxpool5_backward(gy, argmax, add)
        gx = empty_nhwc(gy, gy.shape)
        self._run(launches.pool_backward(gy, argmax, add, gx))
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
        shape = (*x.shape[:2], *size)
        summed = None if add is None else match(add, "add", x, shape, x.dtype)
        y = summed if overwrite_add and summed is not None else empty_nhwc(x, shape)
        if not (_countable(x, 1) and _countable(y, 1)):
            return _PLAIN.bilinear(x, size, align_corners, summed, overwrite_add)
        self._run(launches.upsampling(x, summed, y, align_corners))
        return y

    def bilinear_backward(self, gy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        gy = self._take(gy, "gy")
        gx = empty_nhwc(gy, (*gy.shape[:2], *size))
        if not (_countable(gx, 1) and _countable(gy, 1)):
            return _PLAIN.bilinear_backward(gy, size, align_corners)
        self._run(launches.upsampling_backward(gy, gx, align_corners))
        return gx


def _countable(
    x: Tensor,  # (N, C, H, W)
    k: int,
) -> bool:
    """Whether there is something to do, and the kernels' int32 and CUDA's grids count it: other sizes run elsewhere."""
    n, c, h, w = x.shape
    counted = max(n, h) <= GRID and max(n * h * w, w * c, 9 * k * c) <= launches.MOST_PIXELS
    return x.numel() > 0 and k > 0 and counted


def aligned(t: Tensor) -> Tensor:  # (N, C, H, W) in NHWC memory
    """``t``, its address a multiple of 16 bytes, as tensor maps need it; a copy of a slice may be."""
    return t if t.data_ptr() % VECTOR == 0 else empty_nhwc(t, t.shape).copy_(t)
