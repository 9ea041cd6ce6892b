"""The four kernels in plain PyTorch: the specification, on any device and in any floating dtype.

Everything here is differentiable as it stands, so forcing this backend in an export traces plain operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refinenet_fast.backends.base import VendorConv
from refinenet_fast.layout import nhwc


class Reference(VendorConv):
    """Pure PyTorch; its convolution is the vendor's."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else f"needs a floating dtype, got {dtype}"

    def maxpool5(self, x: Tensor, relu: bool = False, argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        x = torch.relu(x) if relu else x
        if not argmax:
            return nhwc(F.max_pool2d(x, 5, stride=1, padding=2)) if x.numel() else nhwc(x.clone()), None
        rows, dx = _max_of_5(x, dim=3)
        value, dy = _max_of_5(rows, dim=2)
        return nhwc(value), nhwc(dx | dy << 3)

    def maxpool5_backward(self, gy: Tensor, argmax: Tensor, add: Tensor | None = None) -> Tensor:
        wide = gy.to(torch.promote_types(gy.dtype, torch.float32))
        grad = _give_to_5(_give_to_5(wide, argmax >> 3, dim=2), argmax & 7, dim=3)
        return nhwc((grad if add is None else grad + add).to(gy.dtype))

    def bilinear(
        self,
        x: Tensor,
        size: tuple[int, int],
        align_corners: bool,
        add: Tensor | None = None,
        overwrite_add: bool = False,
    ) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        for dim, out in ((2, size[0]), (3, size[1])):
            near, far, weight = _taps(x.shape[dim], out, align_corners, y, dim)
            y = (1 - weight) * y.index_select(dim, near) + weight * y.index_select(dim, far)
        y = nhwc(y.to(x.dtype) if add is None else (y + add).to(x.dtype))
        return add.copy_(y) if overwrite_add and add is not None else y

    def bilinear_backward(self, gy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
        grad = gy.to(torch.promote_types(gy.dtype, torch.float32))
        for dim in (2, 3):
            grad = _bilinear_adjoint(grad, size[dim - 2], align_corners, dim)
        return nhwc(grad.to(gy.dtype))


def _along(index: Tensor, dim: int) -> Tensor:
    """A 1-D tensor laid along ``dim`` (2 or 3) of (N, C, H, W)."""
    return index.view(-1, 1) if dim == 2 else index


def _shifted(
    x: Tensor,  # (N, C, H, W)
    by: int,
    dim: int,
    fill: float,
) -> Tensor:  # (N, C, H, W)
    """``x[i + by]`` along ``dim``, ``fill`` outside; |by| <= 2."""
    pad = (2, 2, 0, 0) if dim == 3 else (0, 0, 2, 2)
    return F.pad(x, pad, value=fill).narrow(dim, 2 + by, x.shape[dim])


def _max_of_5(
    x: Tensor,  # (N, C, H, W)
    dim: int,
) -> tuple[Tensor, Tensor]:  # (N, C, H, W) as x; (N, C, H, W) uint8
    """Maximum of i - 2 ... i + 2 along ``dim`` and which of the five it is: the first, or the last NaN."""
    first = (2 - torch.arange(x.shape[dim], device=x.device)).clamp(min=0)  # the first tap inside the image
    which = _along(first, dim).to(torch.uint8).expand(x.shape)
    best = torch.full_like(x, -torch.inf)
    for tap in range(5):
        value = _shifted(x, tap - 2, dim, fill=-torch.inf)
        better = (value > best) | value.isnan()
        best, which = torch.where(better, value, best), torch.where(better, tap, which)
    return best, which


def _give_to_5(
    grad: Tensor,  # (N, C, H, W)
    which: Tensor,  # (N, C, H, W) uint8
    dim: int,
) -> Tensor:  # (N, C, H, W)
    """The adjoint of ``_max_of_5``: each place sums the gradients of those windows whose choice it was."""
    total = torch.zeros_like(grad)
    for tap in range(5):
        chosen = torch.where(which == tap, grad, 0)  # by those at i; the place they chose is i + tap - 2
        total = total + _shifted(chosen, 2 - tap, dim, fill=0)
    return total


def _taps(
    size_in: int, size_out: int, align_corners: bool, like: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:  # (size_out,) int64, (size_out,) int64, along dim
    """Both source indices and the weight of the second, from integer quotient and remainder."""
    i = torch.arange(size_out, device=like.device)
    if align_corners:
        numerator, denominator = i * (size_in - 1), max(size_out - 1, 1)
    else:
        numerator, denominator = ((2 * i + 1) * size_in - size_out).clamp(min=0), 2 * size_out
    near = numerator // denominator
    weight = (numerator - near * denominator).to(like.dtype) / denominator
    far = near if size_in == size_out else (near + 1).clamp(max=size_in - 1)  # 0 x infinity would be NaN
    return near, far, _along(weight, dim)


def _bilinear_adjoint(
    grad: Tensor,  # (N, C, H, W)
    size_in: int,
    align_corners: bool,
    dim: int,
) -> Tensor:  # (N, C, H, W), `dim` of size_in
    """Each input gathers from the outputs that read it, first to last: no scatter, so no order to race for."""
    near, far, weight = _taps(size_in, grad.shape[dim], align_corners, grad, dim)
    weight = weight.flatten()
    source = torch.arange(size_in, device=grad.device)
    # Outputs are sorted by `near`, and an input is read by those whose near is its own index or the one before.
    first = torch.searchsorted(near, source - 1)
    last = torch.searchsorted(near, source, right=True)
    total = torch.zeros_like(grad.narrow(dim, 0, 1)).repeat_interleave(size_in, dim)
    for k in range(int((last - first).max())):
        out = (first + k).clamp(max=grad.shape[dim] - 1)
        value = grad.index_select(dim, out)
        for index, part in ((near, 1 - weight), (far, weight)):
            reads = (first + k < last) & (index[out] == source)
            total = total + torch.where(_along(reads, dim), _along(part[out], dim) * value, 0)
    return total
