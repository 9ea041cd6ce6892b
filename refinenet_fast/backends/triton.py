"""Triton kernels, compiled where they run: NVIDIA GPUs from sm_80 on, and Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from refinenet_fast.backends import launches
from refinenet_fast.backends.base import PLAIN_IN, PLAIN_OUT, Fused, VendorConv, WayIn, WayOut
from refinenet_fast.backends.checked import Checked, match
from refinenet_fast.backends.configurations import (
    A100,
    Architecture,
    Configuration,
    Problem,
    architecture_of,
    candidates,
    choose,
    describable,
    fitted,
)
from refinenet_fast.backends.launches import Launch
from refinenet_fast.backends.table import Choice, Question, Shape, lookup
from refinenet_fast.layout import empty_nhwc, nhwc

OLDEST = (3, 6)  # of Triton
FUSES = Fused(frozenset({"relu"}), frozenset({"bias", "relu", "select", "add", "add_relu", "upsample"}))
POOL_TOO = Fused(FUSES.way_in | {"pool"}, FUSES.way_out)
POOLED_CHANNELS = 512  # most outputs of a 1x1 convolution that pools itself
BIAS_SPLITS = 256  # most programs of a bias gradient beside each other


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on the CPU: ``TRITON_INTERPRET=1``, before it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(Checked):
    """All kernels in Triton, on the current stream. Float32 convolutions use TF32 where cuDNN would."""

    name = "triton"
    device_type = "cpu" if interpreting() else "cuda"
    # The interpreter computes bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if interpreting() else (torch.float32, torch.float16, torch.bfloat16)
    proven = False

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"needs Triton {'.'.join(map(str, OLDEST))} or newer, got {version}"
        if not interpreting() and not torch.cuda.is_available():
            return "no CUDA device is available"
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = super().can_run(device, dtype)
        if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(device)
            return f"needs sm_80 or newer, and {device} is sm_{major}{minor}"
        return reason

    def _architecture(self, device: torch.device) -> Architecture:
        return A100 if interpreting() else architecture_of(device)

    def _configuration(
        self, kernel: str, device: torch.device, dtype: torch.dtype, problem: Problem
    ) -> Configuration | None:
        """What the tables say, or else what should be fastest; None for the vendor's convolution."""
        architecture = self._architecture(device)
        choice = lookup(Question(architecture.family, f"triton {kernel}", _arithmetic(dtype), problem.shape))
        if choice == "vendor":
            return None
        found = None
        if isinstance(choice, dict):
            found = fitted(kernel, architecture, problem, Configuration(**choice))
        return found or choose(kernel, architecture, problem)

    def trials(
        self, kernel: str, dtype: str, shape: Shape, device: torch.device
    ) -> list[tuple[Choice, Callable[[], object]]]:
        n, h, w, c, k, taps = shape
        kind = getattr(torch, dtype.removeprefix("tf32 "))
        x = nhwc(torch.randn(n, c, h, w, device=device, dtype=kind))
        gy = nhwc(torch.randn(n, k, h, w, device=device, dtype=kind))
        weight = torch.randn(k, c, 3 if taps == 9 else 1, 3 if taps == 9 else 1, device=device, dtype=kind)
        problem, architecture, tf32 = _problem(x, k, taps), self._architecture(device), dtype.startswith("tf32")
        packed, way_out = launches.pack(weight, kind), WayOut()
        vendor: Callable[[], object] = partial(VendorConv._conv3x3, self, x, weight, PLAIN_IN, way_out, False)
        if kernel == "weight_grad":
            vendor = partial(VendorConv._conv3x3_weight_grad, self, x, gy, weight)
        found: list[tuple[Choice, Callable[[], object]]] = [("vendor", vendor)]
        for described in {architecture.has_descriptors and describable(kernel, problem), False}:
            for configuration in candidates(kernel, architecture, problem, described):
                if kernel == "conv3x3":
                    several = launches.convolution(x, packed, gy, None, False, way_out, configuration, tf32=tf32)
                else:
                    several = launches.weight_gradient(x, gy, torch.empty_like(weight), False, configuration, tf32)
                found.append((asdict(configuration), partial(self._run, *several)))
        return found

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
        """Whether the vendor's convolution runs this: its pixels are too many, or it is faster."""
        if not _countable(x) or not x.numel():
            return True
        problem = _problem(x, weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3])
        return self._configuration("conv3x3", x.device, x.dtype, problem) is None

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
        x = self._take(x, "x")
        y = empty_nhwc(x, (x.shape[0], weight.shape[1 if rotated else 0], *x.shape[2:]))
        packed = launches.pack(weight, x.dtype, rotated)
        way_out = _matched(way_out, y)
        if way_in.pool:
            self._run(launches.pool_convolution(x, packed, y, relued, way_in.relu, way_out, _tf32()))
            return y
        chosen = self._configuration("conv3x3", x.device, x.dtype, launches.problem_of(x, packed))
        self._run(*launches.convolution(x, packed, y, relued, way_in.relu, way_out, chosen, rotated, _tf32()))
        return y

    def conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN) -> Tensor:
        chosen = self._weight_grads(x, gy, weight)
        # wgmma reads both operands from shared memory: a ReLU inside would write them there again at every step.
        if not way_in.relu or way_in.pool or chosen is None or chosen.described:
            return super().conv3x3_weight_grad(x, gy, weight, way_in)
        return self._weight_gradient(x, gy, weight, chosen, relu_in=True)

    def _conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        chosen = self._weight_grads(x, gy, weight)
        if chosen is None:
            return super()._conv3x3_weight_grad(x, gy, weight)
        return self._weight_gradient(x, gy, weight, chosen)

    def _weight_grads(self, x: Tensor, gy: Tensor, weight: Tensor) -> Configuration | None:
        """The configuration of a weight gradient; None for the vendor's."""
        if not gy.numel() or not _countable(x):
            return None
        problem = _problem(x, weight.shape[0], weight.shape[2] * weight.shape[3])
        return self._configuration("weight_grad", x.device, x.dtype, problem)

    def _weight_gradient(
        self,
        x: Tensor,  # (N, C, H, W)
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, R, R)
        chosen: Configuration,
        relu_in: bool = False,
    ) -> Tensor:  # (K, C, R, R)
        x, gy = self._take(x, "x"), self._take(gy, "gy")
        gw = torch.empty_like(weight)
        if gw.stride(2) != gw.shape[3] * gw.stride(3):
            gw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        self._run(*launches.weight_gradient(x, gy, gw, relu_in, chosen, _tf32()))
        return gw

    def bias_grad(self, gy: Tensor, bias: Tensor) -> Tensor:
        gy = self._take(gy, "gy")
        if not gy.numel() or not _countable(gy):
            return super().bias_grad(gy, bias)
        gb = torch.empty_like(bias)
        n, _, h, w = gy.shape
        self._run(*launches.bias_gradient(gy, gb, min(BIAS_SPLITS, -(-n * h * w // 256))))
        return gb

    # -- pooling and resampling -----------------------------------------------------------------------------------

    def maxpool5(self, x: Tensor, relu: bool = False, argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        x = self._take(x, "x")
        y = empty_nhwc(x, x.shape)
        which = empty_nhwc(x, x.shape, torch.uint8) if argmax else None
        if x.numel():
            self._run(launches.pool(x, y, which, relu))
        return y, which

    def maxpool5_backward(self, gy: Tensor, argmax: Tensor, add: Tensor | None = None) -> Tensor:
        gy = self._take(gy, "gy")
        argmax = match(argmax, "argmax", gy, gy.shape, torch.uint8)
        add = None if add is None else match(add, "add", gy, gy.shape, gy.dtype)
        gx = empty_nhwc(gy, gy.shape)
        if gy.numel():
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
        if y.numel():
            self._run(launches.upsampling(x, summed, y, align_corners))
        return y

    def bilinear_backward(self, gy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        gy = self._take(gy, "gy")
        gx = empty_nhwc(gy, (*gy.shape[:2], *size))
        if gx.numel():
            self._run(launches.upsampling_backward(gy, gx, align_corners))
        return gx


def _countable(x: Tensor) -> bool:  # (N, C, H, W)
    """Whether its pixels are counted in int32: others are the vendor's."""
    return x.shape[0] * x.shape[2] * x.shape[3] <= launches.MOST_PIXELS


def _problem(x: Tensor, k: int, taps: int) -> Problem:  # x: (N, C, H, W)
    n, c, h, w = x.shape
    return Problem(n, h, w, c, k, taps, x.element_size())


def _arithmetic(dtype: torch.dtype) -> str:
    """As tables name it."""
    name = str(dtype).removeprefix("torch.")
    return f"tf32 {name}" if dtype == torch.float32 and _tf32() else name


def _tf32() -> bool:
    """Whether cuDNN's float32 convolutions would use TF32."""
    return torch.backends.cudnn.allow_tf32


def _matched(way_out: WayOut, y: Tensor) -> WayOut:  # y: (N, K, H, W)
    """With what it reads in NHWC memory, of the shape and dtype that ``y`` asks for: below here it is an address."""

    def others(tensors: tuple[Tensor, ...], argument: str) -> tuple[Tensor, ...]:
        return tuple(match(t, argument, y, y.shape, y.dtype) for t in tensors)

    bias, select, low = way_out.bias, way_out.select, way_out.upsample
    return WayOut(
        None if bias is None else bias.detach().contiguous().resolve_neg(),
        way_out.relu,
        None if select is None else match(select, "select", y, y.shape, y.dtype),
        others(way_out.add, "add"),
        others(way_out.add_relu, "add_relu"),
        None if low is None else match(low, "upsample", y, (*y.shape[:2], *low.shape[2:]), y.dtype),
        way_out.align_corners,
    )
