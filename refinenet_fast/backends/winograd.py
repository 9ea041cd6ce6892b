"""The ``cpu`` backend's own 3x3 convolution and its gradients: Winograd's F(4x4, 3x3), float32, from the compiled core.

It performs every step on the way in and out, on activations in float32 or bfloat16. Its error against float64 is two to
three times the vendor's (1.6e-6 at 256 channels, 4.8e-6 at 2048), in return for a quarter of the multiplications. Sums
grow on the way: finite input below 1e30 gives no NaN as long as weights stay below 1e5.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from refinenet_fast import _native
from refinenet_fast._native import pointer
from refinenet_fast.backends.base import Fused, WayIn, WayOut
from refinenet_fast.backends.checked import match
from refinenet_fast.backends.packed import PackedWeights
from refinenet_fast.backends.table import Question, lookup
from refinenet_fast.layout import empty_nhwc, nhwc

FUSES = Fused(frozenset({"relu", "pool"}), frozenset({"bias", "relu", "select", "add", "add_relu", "upsample"}))
DTYPES = (torch.float32, torch.bfloat16)  # of activations; inside everything is float32
FEWEST_CHANNELS = 16  # of the input and of the output
# Products per output: 2.25 where tiles of 4x4 outputs cover the map exactly; 9 in a direct convolution.
MOST_PRODUCTS = 3.5
# Pixels below which reading the weights, transformed four times as many, costs more than the products that are saved;
# and below which transforming them for one call does, where they fit in the outer cache as those of 256 channels do.
FEWEST_PIXELS_GRADIENT = 200  # below, its sums of 36 matrices are written and read more than multiplied
FEWEST_PIXELS, FEWEST_PIXELS_UNPACKED, CACHED_WEIGHTS = 48, 200, 256 * 256


def question(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    packed: bool,
    rotated: bool = False,
) -> Question:
    """What the tables are asked."""
    (n, c, h, w), k, taps = x.shape, weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3]
    kernel = "cpu conv3x3" if packed else "cpu conv3x3_unpacked"
    return Question(_native._C.cpu_isa(), kernel, str(x.dtype).removeprefix("torch."), (n, h, w, c, k, taps))


def runs(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R)
) -> bool:
    """Whether this is there for these."""
    return _native._C is not None and x.dtype in DTYPES and weight.shape[2] == 3 and x.numel() > 0


def pays(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    packed: bool,
    rotated: bool = False,
) -> bool:
    """Whether this is faster than the vendor's convolution, the weights being kept or not; by shape and dtype alone."""
    if not runs(x, weight):
        return False
    choice = lookup(question(x, weight, packed, rotated))
    if choice in ("winograd", "vendor"):
        return choice == "winograd"
    if x.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return False
    (n, _, h, w), (k, c, *_) = x.shape, weight.shape
    products = 36 * -(-h // 4) * -(-w // 4)
    least = FEWEST_PIXELS if packed else FEWEST_PIXELS_UNPACKED * max(1, c * k / CACHED_WEIGHTS)
    return min(c, k) >= FEWEST_CHANNELS and n * h * w >= least and products <= MOST_PRODUCTS * h * w


@functools.lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 (AMX), many times faster than vectors of float32."""
    return torch.cpu._is_amx_tile_supported()


def convolve(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, 3, 3); (C, K, 3, 3) where rotated
    way_in: WayIn,
    way_out: WayOut,
    packed: PackedWeights | None,
    rotated: bool = False,
) -> Tensor:  # (N, K, H, W)
    """The convolution with the steps that :data:`FUSES` names.

    Args:
        x, weight: Float32, or ``x`` bfloat16, as the steps' other tensors are.
        way_in, way_out: No other steps than those.
        packed: Where transformed weights are kept; None to transform them for this call only, as in training, where
            they change before the next one.
        rotated: Convolve with ``weight`` turned by 180 degrees and its channels exchanged: the input gradient; not
            with ``packed``.

    Raises:
        RuntimeError: ``x`` is not on a CPU, or neither float32 nor bfloat16.
        ValueError: Another tensor does not go with ``x``; names it, what was expected and what came.
    """
    core = _native._C
    assert core is not None and not (rotated and packed is not None)
    x, weight = nhwc(x), weight.detach().to(torch.float32).resolve_neg()
    n, c, h, w = x.shape
    k = weight.shape[1 if rotated else 0]
    bias = None if way_out.bias is None else way_out.bias.detach().to(torch.float32).contiguous().resolve_neg()
    _check(x, weight, (c, k) if rotated else (k, c), bias, k)
    if packed is None:
        transformed = _transform(weight, rotated, _scratch)
    else:
        transformed = packed.get(weight, torch.float32, f"winograd {core.cpu_isa()}", _transform)

    def other(t: Tensor, argument: str) -> Tensor:
        return match(t, argument, x, (n, k, h, w), x.dtype)

    mask = None if way_out.select is None else other(way_out.select, "select")
    adds = [other(t, "add") for t in way_out.add]
    adds_relu = [other(t, "add_relu") for t in way_out.add_relu]
    low = way_out.upsample
    low = None if low is None else match(low, "upsample", x, (n, k, *low.shape[2:]), x.dtype)
    y = empty_nhwc(x, (n, k, h, w))
    core.cpu_conv3x3(
        *(pointer(t) for t in (x, transformed, bias, mask)),
        [pointer(t) for t in adds],
        [pointer(t) for t in adds_relu],
        pointer(low),
        *((1, 1) if low is None else low.shape[2:]),
        way_out.align_corners,
        pointer(y),
        *(n, h, w, c, k),
        _native.DTYPES[x.dtype],
        way_in.relu,
        way_in.pool,
        way_out.relu,
        torch.get_num_threads(),
    )
    return y


def gradient_pays(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R)
) -> bool:
    """As :func:`pays`, of the weight gradient."""
    if not runs(x, weight):
        return False
    family, _, dtype, shape = question(x, weight, packed=False)
    choice = lookup(Question(family, "cpu weight_grad", dtype, shape))
    if choice in ("winograd", "vendor"):
        return choice == "winograd"
    if x.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return False
    n, h, w, c, k, _ = shape
    products = 36 * -(-h // 4) * -(-w // 4)
    return min(c, k) >= FEWEST_CHANNELS and n * h * w >= FEWEST_PIXELS_GRADIENT and products <= MOST_PRODUCTS * h * w


def weight_gradient(
    x: Tensor,  # (N, C, H, W)
    gy: Tensor,  # (N, K, H, W)
    weight: Tensor,  # (K, C, 3, 3): for its strides
    bias: Tensor | None,  # (K,): whether its gradient is wanted
    relu_in: bool,
) -> tuple[Tensor, Tensor | None]:  # (K, C, 3, 3), (K,)
    """Gradients in the weight and the bias, sums over the tiles in their order.

    Raises:
        RuntimeError: ``x`` is not on a CPU, or neither float32 nor bfloat16.
        ValueError: Another tensor does not go with ``x``; names it, what was expected and what came.
    """
    core = _native._C
    assert core is not None
    x = nhwc(x)
    n, c, h, w = x.shape
    k = weight.shape[0]
    _check(x, weight, (k, c), bias, k)
    gy = match(gy, "gy", x, (n, k, h, w), x.dtype)
    gw = torch.empty_like(weight, dtype=torch.float32)
    gb = None if bias is None else torch.empty(k, dtype=torch.float32, device="cpu")
    addresses = (pointer(x), pointer(gy), pointer(gw), list(gw.stride()), pointer(gb))
    core.cpu_weight_grad(*addresses, n, h, w, c, k, _native.DTYPES[x.dtype], relu_in, torch.get_num_threads())
    return gw, gb


def _check(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, 3, 3); (C, K, 3, 3) where rotated
    channels: tuple[int, int],  # (K, C); (C, K) where rotated
    bias: Tensor | None,  # (K,)
    k: int,
) -> None:
    """Below here all these are addresses."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        raise RuntimeError(f"x: expected float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if tuple(weight.shape) != (*channels, 3, 3) or weight.device != x.device:
        expected, got = f"{(*channels, 3, 3)} on {x.device}", f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight: expected {expected}, got {got}")
    if bias is not None and (tuple(bias.shape) != (k,) or bias.device != x.device):
        raise ValueError(f"bias: expected {(k,)} on {x.device}, got {tuple(bias.shape)} on {bias.device}")


def _transform(
    weight: Tensor,  # (K, C, 3, 3); (C, K, 3, 3) where rotated
    rotated: bool = False,
    allocate: Callable[[int], Tensor] | None = None,
) -> Tensor:  # one-dimensional, as the instruction set in use reads it
    core = _native._C
    assert core is not None
    address, strides, (k, c) = pointer(weight), list(weight.stride()), weight.shape[:2]
    if rotated:
        address += weight.element_size() * 2 * (strides[2] + strides[3])  # the last tap, backwards from there
        strides, k, c = [strides[1], strides[0], -strides[2], -strides[3]], c, k
    transformed = (allocate or _allocate)(core.cpu_conv3x3_packed_elements(k, c))
    core.cpu_conv3x3_pack(address, strides, k, c, pointer(transformed), torch.get_num_threads())
    return transformed


def _allocate(elements: int) -> Tensor:
    return torch.empty(elements, dtype=torch.float32, device="cpu")  # whatever the defaults are


_kept = threading.local()
_KEPT_ELEMENTS = 16 << 20


def _scratch(elements: int) -> Tensor:
    """Memory that the next call overwrites: pages fresh from the system would cost more than the transformation.

    64 MB at most are kept for each Python thread.
    """
    if elements > _KEPT_ELEMENTS:
        return _allocate(elements)
    if getattr(_kept, "memory", None) is None or _kept.memory.numel() < elements:
        _kept.memory = _allocate(elements)
    return _kept.memory
