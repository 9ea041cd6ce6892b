"""What the convolutions for GPUs share: the steps that they perform, packed weights, checks, TF32 or not."""

from __future__ import annotations

import torch
from torch import Tensor

from refinenet_fast.backends.base import Fused, WayOut
from refinenet_fast.backends.checked import match

FUSES = Fused(frozenset({"relu"}), frozenset({"bias", "relu", "select", "add", "add_relu", "upsample"}))
POOL_TOO = Fused(FUSES.way_in | {"pool"}, FUSES.way_out)
POOLED_CHANNELS = 512  # most outputs of a convolution that pools itself: a block computes 256, and others pool again


def pack_weight(
    weight: Tensor,  # (K, C, R, R)
    dtype: torch.dtype,
    rotated: bool = False,
    multiple: int = 1,
) -> Tensor:  # (R * R, K, C'); (R * R, C, K') where rotated
    """Weights as the kernels read them, in one copy that converts too; rows filled up with zeros to a ``multiple``."""
    k, c, r, _ = weight.shape
    taps = weight.detach().reshape(k, c, r * r).permute(*((2, 1, 0) if rotated else (2, 0, 1)))
    width = taps.shape[2]
    make = torch.zeros if width % multiple else torch.empty
    packed = make((*taps.shape[:2], -(-width // multiple) * multiple), dtype=dtype, device=weight.device)
    packed[..., :width].copy_(taps)
    return packed


def arithmetic(dtype: torch.dtype) -> str:
    """As tables name it."""
    name = str(dtype).removeprefix("torch.")
    return f"tf32 {name}" if dtype == torch.float32 and uses_tf32(dtype) else name


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether cuDNN's convolutions of float32 would use TF32; True for other types, which do not ask."""
    if dtype != torch.float32:
        return True
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by PyTorch's newer switch, which the older one then refuses to answer for
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def check_weight(weight: Tensor, x: Tensor, channels: int) -> None:
    """Below here it is an address: 3x3 or 1x1, dimension ``channels`` those of x (N, C, H, W), on the same device."""
    if weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"weight: expected a 1x1 or 3x3 kernel, got {tuple(weight.shape)}")
    if weight.shape[channels] != x.shape[1] or weight.device != x.device:
        expected, got = f"{x.shape[1]} on {x.device}", f"{weight.shape[channels]} on {weight.device}"
        raise ValueError(f"weight: expected dimension {channels} to be {expected}, got {got}")


def matched(way_out: WayOut, y: Tensor) -> WayOut:  # y: (N, K, H, W)
    """With what it reads in NHWC memory, of the shape and dtype that ``y`` asks for: below here it is an address."""

    def others(tensors: tuple[Tensor, ...], argument: str) -> tuple[Tensor, ...]:
        return tuple(match(t, argument, y, y.shape, y.dtype) for t in tensors)

    bias, select, low = way_out.bias, way_out.select, way_out.upsample
    if bias is not None and (tuple(bias.shape) != (y.shape[1],) or bias.device != y.device):
        raise ValueError(f"bias: expected {(y.shape[1],)} on {y.device}, got {tuple(bias.shape)} on {bias.device}")
    return WayOut(
        None if bias is None else bias.detach().contiguous().resolve_neg(),
        way_out.relu,
        None if select is None else match(select, "select", y, y.shape, y.dtype),
        others(way_out.add, "add"),
        others(way_out.add_relu, "add_relu"),
        None if low is None else match(low, "upsample", y, (*y.shape[:2], *low.shape[2:]), y.dtype),
        way_out.align_corners,
    )


def gradient_like(
    weight: Tensor,  # (K, C, R, R)
) -> Tensor:  # (K, C, R, R)
    """Room for its gradient, in its strides where the taps of those are one dimension."""
    gw = torch.empty_like(weight)
    if gw.stride(2) != gw.shape[3] * gw.stride(3):
        gw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return gw
