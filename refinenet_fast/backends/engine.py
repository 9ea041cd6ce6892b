"""The ``cpu`` backend's own convolutions and their gradients, from the compiled core.

The 3x3 one is Winograd's F(4x4, 3x3), the 1x1 one a matrix product, in float32. Both perform every step on the way in
and out, on activations in float32 or bfloat16. Winograd's error against float64 is about twice the vendor's on normal
data (1.1e-6 to 1.5e-6 at 256 channels, 4.2e-6 at 2048), in return for a quarter of the multiplications. Its sums grow
on the way: finite input below 1e30 gives no NaN as long as weights stay below 1e5.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from refinenet_fast import _native
from refinenet_fast._native import pointer
from refinenet_fast.backends.base import Fused, WayIn, WayOut
from refinenet_fast.backends.checked import check_resizable, match
from refinenet_fast.backends.table import Question, lookup
from refinenet_fast.layout import empty_nhwc, nhwc

FUSES = Fused(frozenset({"relu", "pool"}), frozenset({"bias", "relu", "select", "add", "add_relu", "upsample"}))
# Bytes of one image's map up to which a pool on the way in is faster than one apart, by instruction set. In a larger
# one a window's rows come from memory: with AVX-512, 256 channels at 128x128 take 24 ms against 22, the pool 2 of them.
LARGEST_POOLED = {"avx512": 8 << 20}
DTYPES = (torch.float32, torch.bfloat16)  # of activations; inside everything is float32
NAMES = {9: "winograd", 1: "gemm"}  # in tables, by taps
FEWEST_CHANNELS = 16  # of the input and of the output
MOST_CHANNELS = 8192  # of the input: the error grows with their square root, to 8e-6 there
# Products per output: 2.25 where tiles of 4x4 outputs cover the map exactly; 9 in a direct convolution.
MOST_PRODUCTS = 3.5
# Pixels below which transforming the weights costs more than the products that are saved: of a convolution, and of a
# weight gradient, where sums of 36 matrices are written and read more than multiplied.
FEWEST_PIXELS, FEWEST_PIXELS_GRADIENT = 48, 200
# The same where the vendor has no bfloat16 of its own, and PyTorch's is four to fifteen times slower on larger maps.
FEWEST_PIXELS_BFLOAT16, FEWEST_PIXELS_BFLOAT16_GRADIENT = 4, 16


def question(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    rotated: bool = False,
) -> Question:
    """What the tables are asked."""
    (n, c, h, w), k, taps = x.shape, weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3]
    return Question(_native._C.cpu_isa(), "cpu conv3x3", str(x.dtype).removeprefix("torch."), (n, h, w, c, k, taps))


def runs(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R)
) -> bool:
    """Whether this is there for these."""
    side = weight.shape[2]
    known = weight.shape[3] == side and side * side in NAMES and weight.numel() > 0
    return _native._C is not None and known and x.dtype in DTYPES and x.numel() > 0


def pays(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    rotated: bool = False,
) -> bool:
    """Whether this is faster than the vendor's convolution; by shape and dtype alone."""
    if not runs(x, weight):
        return False
    asked = question(x, weight, rotated)
    n, h, w, c, _, taps = asked.shape
    if taps == 9 and c > MOST_CHANNELS:
        return False
    choice = lookup(asked)
    if choice in (NAMES[taps], "vendor"):
        return choice != "vendor"
    if x.dtype == torch.bfloat16 and (known := _bfloat16_pays(n * h * w, FEWEST_PIXELS_BFLOAT16)) is not None:
        return known
    return taps == 9 and n * h * w >= FEWEST_PIXELS and _few_products(asked)


def _bfloat16_pays(pixels: int, fewest: int) -> bool | None:
    """Whether float32 inside beats what the vendor does with bfloat16 here; None: as in float32."""
    if _multiplies_bfloat16():
        return False
    return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else pixels >= fewest


def _few_products(asked: Question) -> bool:
    """Whether there are enough channels, and tiles of 4x4 outputs are full enough."""
    _, h, w, c, k, _ = asked.shape
    return min(c, k) >= FEWEST_CHANNELS and 36 * -(-h // 4) * -(-w // 4) <= MOST_PRODUCTS * h * w


@functools.lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 here (AMX), many times faster than vectors of float32."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"  # what it may use
    most = most.upper()
    return torch.cpu._is_amx_tile_supported() and (most in ("ALL", "DEFAULT") or "AMX" in most)


def fuses(
    x: Tensor,  # (N, C, H, W)
) -> Fused:
    """The steps that are faster inside :func:`convolve` than apart."""
    largest = LARGEST_POOLED.get(_native._C.cpu_isa())
    if largest is None or x[0].numel() * x.element_size() <= largest:
        return FUSES
    return Fused(FUSES.way_in - {"pool"}, FUSES.way_out)


def convolve(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    way_in: WayIn,
    way_out: WayOut,
    rotated: bool = False,
) -> Tensor:  # (N, K, H, W)
    """The convolution with the steps that :data:`FUSES` names.

    Args:
        x, weight: Float32, or ``x`` bfloat16, as the steps' other tensors are.
        way_in, way_out: No other steps than those.
        rotated: Convolve with ``weight`` turned by 180 degrees and its channels exchanged: the input gradient.

    Raises:
        RuntimeError: ``x`` is not on a CPU, or neither float32 nor bfloat16.
        ValueError: Another tensor does not go with ``x``; names it, what was expected and what came.
    """
    core = _native._C
    assert core is not None
    x, weight = nhwc(x), weight.detach().to(torch.float32).resolve_neg()
    n, c, h, w = x.shape
    k, taps = weight.shape[1 if rotated else 0], weight.shape[2] * weight.shape[3]
    bias = None if way_out.bias is None else way_out.bias.detach().to(torch.float32).contiguous().resolve_neg()
    _check(x, weight, (c, k) if rotated else (k, c), bias, k)
    address, strides = _turned(weight) if rotated else (pointer(weight), list(weight.stride()))

    def other(
        t: Tensor,  # (N, K, H, W)
        argument: str,
    ) -> Tensor:  # (N, K, H, W)
        return match(t, argument, x, (n, k, h, w), x.dtype)

    mask = None if way_out.select is None else other(way_out.select, "select")
    adds = [other(t, "add") for t in way_out.add]
    adds_relu = [other(t, "add_relu") for t in way_out.add_relu]
    low = way_out.upsample
    if low is not None:
        check_resizable(low, "upsample")
        low = match(low, "upsample", x, (n, k, *low.shape[2:]), x.dtype)
    y = empty_nhwc(x, (n, k, h, w))
    core.cpu_convolve(
        taps,
        pointer(x),
        address,
        strides,
        *(pointer(t) for t in (bias, mask)),
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
    if not runs(x, weight) or weight.shape[2] != 3:
        return False
    asked = question(x, weight)._replace(kernel="cpu weight_grad")
    choice = lookup(asked)
    if choice in (NAMES[9], "vendor"):
        return choice != "vendor"
    n, h, w, *_ = asked.shape
    if x.dtype == torch.bfloat16 and (known := _bfloat16_pays(n * h * w, FEWEST_PIXELS_BFLOAT16_GRADIENT)) is not None:
        return known
    return n * h * w >= FEWEST_PIXELS_GRADIENT and _few_products(asked)


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
    weight: Tensor,  # (K, C, R, R); (C, K, R, R) where rotated
    channels: tuple[int, int],  # (K, C); (C, K) where rotated
    bias: Tensor | None,  # (K,)
    k: int,
) -> None:
    """Below here all these are addresses."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        raise RuntimeError(f"x: expected float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
    taps = (1, 1) if tuple(weight.shape[2:]) == (1, 1) else (3, 3)
    if tuple(weight.shape) != (*channels, *taps) or weight.device != x.device:
        expected, got = f"{(*channels, *taps)} on {x.device}", f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight: expected {expected}, got {got}")
    if bias is not None and (tuple(bias.shape) != (k,) or bias.device != x.device):
        raise ValueError(f"bias: expected {(k,)} on {x.device}, got {tuple(bias.shape)} on {bias.device}")


def _turned(
    weight: Tensor,  # (C, K, R, R)
) -> tuple[int, list[int]]:
    """Address and strides that give (K, C, R, R), turned by 180 degrees: from the last tap backwards."""
    along_c, along_k, along_y, along_x = weight.stride()
    last = (weight.shape[2] - 1) * (along_y + along_x)
    return pointer(weight) + weight.element_size() * last, [along_k, along_c, -along_y, -along_x]
