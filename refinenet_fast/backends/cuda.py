"""CUDA C++ from the compiled core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from refinenet_fast import _native
from refinenet_fast._native import DTYPES, pointer
from refinenet_fast.backends.base import PLAIN_IN, PLAIN_OUT, Fused, VendorConv, WayIn, WayOut, as_weight
from refinenet_fast.backends.checked import match
from refinenet_fast.backends.configurations import Architecture, architecture_of
from refinenet_fast.backends.native import Native
from refinenet_fast.backends.operands import (
    FUSES,
    POOL_TOO,
    POOLED_CHANNELS,
    arithmetic,
    check_weight,
    gradient_like,
    matched,
    pack_weight,
    uses_tf32,
)
from refinenet_fast.backends.table import Choice, Question, Shape, lookup
from refinenet_fast.layout import empty_nhwc, nhwc

CHUNK = 16  # bytes that are copied at once: rows of packed weights are whole ones
# Output channels of a block, by kernel as the tables name it, the smallest last.
TILES = {"conv3x3": (128, 64), "pool_conv3x3": (256, 64), "weight_grad": (128, 64)}
HOPPER_TILES = (256, 128, 64)  # of conv3x3 by wgmma
SPLITS = (2, 4, 8)  # of the input channels, that are tried


class Cuda(Native):
    """CUDA C++ for sm_80, sm_90a and sm_100 (whatever ``build_info()`` lists), on the current stream.

    Float32 convolutions use TF32 where cuDNN would, and else three products of TF32 numbers for each of float32. On
    Hopper, those of 16-bit types run by TMA and wgmma; the loop of sm_80 takes what these cannot: channels or tensors
    that are not whole chunks of 16 bytes at multiples of that. Where tiles are fewer than multiprocessors, convolutions
    are split over input channels; the parts, in float32, are added in their order.
    """

    name = "cuda"
    device_type = "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    proven = False
    limits = (
        "channels or addresses that 16 bytes do not divide: tiles of 64 channels, copies of 8 or 4 bytes or elements",
        "more than 2^31 - 128 pixels, weights or blocks: the vendor's convolution",
        f"a pool before more than {POOLED_CHANNELS} output channels: a kernel of its own",
        "on Hopper a pool before a 3x3 convolution of 16-bit types: a kernel of its own, unless a table says otherwise",
    )
    # Pixels and channels of a block of the convolutions: 128 or 64; after a pool and on sm_90a channels alone, 256 too
    tile = 0  # 0: by the sizes
    splits = 0  # of the convolutions' input channels; 0: by the sizes
    sm80_loop = False  # of 16-bit convolutions on Hopper too, for comparing

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
        found = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
        if all(_lacking(*capability) for capability in found):
            major, minor = max(found)
            return f"{_lacking(major, minor)}, and there is only sm_{major}{minor}"
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = super().can_run(device, dtype)
        if reason is not None:
            return reason
        major, minor = torch.cuda.get_device_capability(device)
        lacking = _lacking(major, minor)
        return f"{lacking}, and {device} is sm_{major}{minor}" if lacking else None

    # -- convolution ----------------------------------------------------------------------------------------------

    def refusal(
        self,
        x: Tensor,  # (N, C, H, W)
        k: int,
        pool: bool = False,
    ) -> str | None:
        """Why the vendor's convolution runs this and none of the kernels; None: a kernel does.

        With ``pool``: why none of the kernels that pool on the way in.
        """
        n, c, h, w = x.shape
        return _native._C.cuda_refusal(n, h, w, c, k, pool)

    def _architecture(self, device: torch.device) -> Architecture:
        return architecture_of(device)

    def _choice(self, kernel: str, x: Tensor, weight: Tensor, rotated: bool = False) -> Choice | None:
        """What the tables say of one of :data:`TILES`: "vendor", "apart" (of a pool), or a tile."""
        (n, c, h, w), k, taps = x.shape, weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3]
        family = self._architecture(x.device).family
        return lookup(Question(family, f"cuda {kernel}", arithmetic(x.dtype), (n, h, w, c, k, taps)))

    def _takes_wgmma(self, dtype: torch.dtype, device: torch.device, c: int, k: int) -> bool:
        """Whether Hopper's own loop takes a convolution with so many channels: tensors as PyTorch allocates them."""
        size = torch.finfo(dtype).bits // 8
        whole = c * size % CHUNK == 0 and k * size % CHUNK == 0
        return self._architecture(device).capability == 90 and size == 2 and whole and not self.sm80_loop

    def _tiling(self, kernel: str, x: Tensor, weight: Tensor, rotated: bool = False) -> tuple[int, int]:
        """Output channels of a block, and splits of the input channels; 0 where neither anyone nor the tables say."""
        choice = None if self.tile or self.splits else self._choice(kernel, x, weight, rotated)
        if not isinstance(choice, dict):
            return self.tile, self.splits
        tile, splits = choice.get("tile"), choice.get("splits", 0)
        known = (*TILES[kernel], *HOPPER_TILES) if kernel == "conv3x3" else TILES[kernel]
        sound = tile in known and isinstance(splits, int) and splits >= 0
        return (tile, int(splits)) if sound else (0, 0)

    def _is_vendors(self, kernel: str, x: Tensor, weight: Tensor, rotated: bool = False) -> bool:
        if self.refusal(x, weight.shape[1 if rotated else 0]):
            return True
        return self._choice(kernel, x, weight, rotated) == "vendor"

    def trials(
        self, kernel: str, dtype: str, shape: Shape, device: torch.device
    ) -> list[tuple[Choice, Callable[[], object]]]:
        """A convolution is timed as it ends a residual conv unit: with a sum, its weights still to be packed."""
        n, h, w, c, k, taps = shape
        kind, side = getattr(torch, dtype.removeprefix("tf32 ")), 3 if taps == 9 else 1
        x, gy = (nhwc(torch.randn(n, m, h, w, device=device, dtype=kind)) for m in (c, k))
        weight, way_out = torch.randn(k, c, side, side, device=device, dtype=kind), WayOut(add=(gy,))

        def own(tile: int, splits: int = 1) -> None:
            if kernel == "weight_grad":
                self._gradients(x, gy, weight, False, None, tile)
            else:
                pool = WayIn(pool=kernel == "pool_conv3x3")
                self._convolve(x, weight, pool, way_out, tiling=(tile, splits))

        def others() -> None:
            if kernel == "weight_grad":
                VendorConv._conv3x3_weight_grad(self, x, gy, weight)
            elif kernel == "pool_conv3x3":
                self._convolve(self.maxpool5(x)[0], weight, PLAIN_IN, way_out)
            else:
                self.way_out(VendorConv._conv3x3(self, x, weight, PLAIN_IN, PLAIN_OUT, False), way_out)

        whole = c * x.element_size() % CHUNK == 0 and (kernel == "conv3x3" or uses_tf32(kind))
        tiles: tuple[int, ...] = TILES[kernel] if whole else TILES[kernel][-1:]  # others fall back to the smallest
        if kernel == "conv3x3" and self._takes_wgmma(kind, device, c, k):
            tiles = HOPPER_TILES
        choices: list[dict[str, int]] = [{"tile": tile} for tile in tiles]
        if kernel == "conv3x3":
            choices = [{"tile": tile, "splits": s} for tile in tiles for s in self._splits(tile, shape, device)]
        own_ones = [(dict(choice), partial(own, **choice)) for choice in choices]
        return [("apart" if kernel == "pool_conv3x3" else "vendor", others), *own_ones]

    def _splits(self, tile: int, shape: Shape, device: torch.device) -> list[int]:
        """Worth a trial: 1, and what gives each multiprocessor two blocks at most, of 64 input channels at least."""
        n, h, w, c, k, _ = shape
        tiles = -(-n * h * w // min(tile, 128)) * -(-k // tile)
        room = 2 * self._architecture(device).processors // tiles
        return [1, *(s for s in SPLITS if s <= min(room, c // 64))]

    def fuses(self, x: Tensor, weight: Tensor, pack: bool) -> Fused:
        k = weight.shape[0]
        if self._is_vendors("conv3x3", x, weight):
            return super().fuses(x, weight, pack)
        return FUSES if k > POOLED_CHANNELS or self.refusal(x, k, pool=True) else POOL_TOO

    def conv3x3(
        self, x: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN, way_out: WayOut = PLAIN_OUT, pack: bool = False
    ) -> Tensor:
        x, way_in = self._pooled(x, weight, way_in)
        return super().conv3x3(x, weight, way_in, way_out, pack)

    def _pooled(self, x: Tensor, weight: Tensor, way_in: WayIn) -> tuple[Tensor, WayIn]:
        """What is left to do where a kernel of its own had better pool.

        As the tables say; by default on Hopper before 3x3, as only the loop of sm_80 pools on the way in, and nine taps
        by wgmma should gain more than a pooled map costs that is written and read.
        """
        k, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
        if not way_in.pool or self.refusal(x, k, pool=True):
            return x, way_in
        choice = self._choice("pool_conv3x3", x, weight)
        by_default = taps == 9 and not self.tile and self._takes_wgmma(x.dtype, x.device, x.shape[1], k)
        apart = choice == "apart" or (choice is None and by_default)
        return self._compose_in(x, way_in, frozenset()) if apart else (x, way_in)

    def _conv3x3(self, x: Tensor, weight: Tensor, way_in: WayIn, way_out: WayOut, pack: bool) -> Tensor:
        if self._is_vendors("conv3x3", x, weight):
            return super()._conv3x3(x, weight, way_in, way_out, pack)
        return self._convolve(x, weight, way_in, way_out)

    def conv3x3_and_relu(
        self, x: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN, way_out: WayOut = PLAIN_OUT, pack: bool = False
    ) -> tuple[Tensor, Tensor]:
        many = len(way_out.add + way_out.add_relu) > _native._C.CUDA_MOST_ADDS
        if many or self._is_vendors("conv3x3", x, weight):
            return super().conv3x3_and_relu(x, weight, way_in, way_out, pack)
        x, way_in = self._pooled(x, weight, way_in)
        x, way_in = self._compose_in(x, way_in, self.fuses(x, weight, pack).way_in)
        relued = empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
        return self._convolve(x, weight, way_in, way_out, relued=relued), relued

    def conv3x3_input_grad(self, gy: Tensor, weight: Tensor, way_out: WayOut = PLAIN_OUT) -> Tensor:
        if self._is_vendors("conv3x3", gy, weight, rotated=True):
            return super().conv3x3_input_grad(gy, weight, way_out)
        return self._convolve(gy, weight, PLAIN_IN, way_out, rotated=True)

    def _convolve(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
        way_in: WayIn,
        way_out: WayOut,
        rotated: bool = False,
        relued: Tensor | None = None,  # (N, K, H, W), written
        tiling: tuple[int, int] | None = None,
    ) -> Tensor:  # (N, K, H, W)
        """The convolution, its ReLU into ``relued``; ``rotated``: that of an input gradient.

        ``tiling``: Output channels of a block, and splits; None for what the tables say.
        """
        x = self._take(x, "x")
        check_weight(weight, x, 0 if rotated else 1)
        n, c, h, w = x.shape
        k, side = weight.shape[1 if rotated else 0], weight.shape[2]
        y = empty_nhwc(x, (n, k, h, w))
        packed = pack_weight(weight, x.dtype, rotated, CHUNK // x.element_size())
        fused, left = _first_adds(matched(way_out, y), _native._C.CUDA_MOST_ADDS)
        if tiling is None:
            tiling = self._tiling("pool_conv3x3" if way_in.pool else "conv3x3", x, weight, rotated)
        tile, splits = tiling
        low = fused.upsample
        bias = None if fused.bias is None else fused.bias.to(torch.float32)
        adds = [pointer(t) for t in (*fused.add, *fused.add_relu)], len(fused.add)
        resized = pointer(low), *((1, 1) if low is None else low.shape[2:]), fused.align_corners
        kinds = side, DTYPES[x.dtype], not uses_tf32(x.dtype), rotated, way_in.relu, way_in.pool

        def arguments(parts: Tensor | None, splits: int) -> tuple[object, ...]:
            buffers = (pointer(t) for t in (x, packed, parts, y, relued, bias, fused.select))
            steps = *adds, *resized, fused.relu
            return *buffers, *steps, (n, h, w, c, k), *kinds, tile, splits, self.sm80_loop

        on = self._architecture(x.device)
        splits, room = _native._C.cuda_splits_conv3x3(*arguments(None, splits), on.capability, on.processors)
        parts = torch.empty(room, dtype=torch.float32, device=x.device) if splits > 1 else None
        self._call("conv3x3", x, *arguments(parts, splits))
        return self.way_out(y, left)

    def conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN) -> Tensor:
        if self._is_vendors("weight_grad", x, weight):
            return super().conv3x3_weight_grad(x, gy, weight, way_in)
        x, way_in = self._compose_in(x, way_in, FUSES.way_in)
        return as_weight(self._gradients(x, gy, weight, way_in.relu, None), weight)

    def parameter_grads(
        self, x: Tensor, gy: Tensor, weight: Tensor | None, bias: Tensor | None, way_in: WayIn = PLAIN_IN
    ) -> tuple[Tensor | None, Tensor | None]:
        if weight is None or bias is None or self._is_vendors("weight_grad", x, weight):
            return super().parameter_grads(x, gy, weight, bias, way_in)
        x, way_in = self._compose_in(x, way_in, FUSES.way_in)
        gb = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        gw = self._gradients(x, gy, weight, way_in.relu, gb)
        return as_weight(gw, weight), gb.to(bias.dtype)

    def _gradients(
        self,
        x: Tensor,  # (N, C, H, W)
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, R, R)
        relu_in: bool,
        gb: Tensor | None,  # (K,), the bias's, written
        tile: int | None = None,
    ) -> Tensor:  # (K, C, R, R)
        """The weight's gradient; ``tile``: None for what the tables say."""
        x = self._take(x, "x")
        check_weight(weight, x, 1)
        (n, c, h, w), (k, _, side, _) = x.shape, weight.shape
        gy = match(gy, "gy", x, (n, k, h, w), x.dtype)
        gw = gradient_like(weight if weight.dtype in DTYPES else weight.to(torch.float32))

        if tile is None:
            tile, _ = self._tiling("weight_grad", x, weight)

        def arguments(parts: Tensor | None, splits: int) -> tuple[object, ...]:
            buffers = (pointer(x), pointer(gy), pointer(parts), pointer(gw), pointer(gb))
            strides, sizes = (gw.stride(0), gw.stride(1), gw.stride(3)), (n, h, w, c, k)
            types = DTYPES[x.dtype], DTYPES[gw.dtype], not uses_tf32(x.dtype)
            return *buffers, strides, sizes, side, splits, *types, relu_in, tile

        *_, splits, _, room = _native._C.cuda_plan_weight_grad(
            *arguments(None, 0), self._architecture(x.device).processors
        )
        parts = torch.empty(room, dtype=torch.float32, device=x.device)
        self._call("weight_grad", x, *arguments(parts, splits))
        return gw

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        assert _native._C is not None
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_native._C, f"cuda_{function}")(*arguments, like.device.index, stream)


def _first_adds(way_out: WayOut, most: int) -> tuple[WayOut, WayOut]:
    """The steps up to the ``most``th sum, and those that are left."""
    add, add_relu = way_out.add, way_out.add_relu
    if len(add) + len(add_relu) <= most:
        return way_out, PLAIN_OUT
    room = max(0, most - len(add))
    fused = replace(way_out, add=add[:most], add_relu=add_relu[:room], upsample=None)
    left = replace(way_out, bias=None, relu=False, select=None, add=add[most:], add_relu=add_relu[room:])
    return fused, left


def _lacking(major: int, minor: int) -> str | None:
    """What was built, where none of it runs on that compute capability."""
    archs = _native.build_info()["cuda"]["archs"]
    return None if any(_runs_on(arch, major, minor) for arch in archs) else f"built for {', '.join(archs)}"


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether what was built for ``arch`` ("80-real", "90a-real", "100f", "120") runs on capability major.minor.

    Code for an "a" architecture runs on that one only; that for a family, "f", and other machine code on the same major
    version from its minor on; PTX, which anything but "-real" carries, on all later ones.
    """
    number = arch.split("-")[0]
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return (major, minor) == built
    if arch.endswith("-real") or number.endswith("f"):
        return major == built[0] and minor >= built[1]
    return (major, minor) >= built
