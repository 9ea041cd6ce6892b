"""What a backend is: four kernels, and a reason where it cannot run.

The kernels (N, C, H, W are always the sizes of a ``channels_last`` tensor):

=========================  =====================================================================================
``conv3x3``                3x3, stride 1, padding 1 (or its 1x1 twin, padding 0), with a :class:`WayIn` and a
                           :class:`WayOut`; the input gradient is the same kernel with rotated weights
``conv3x3_weight_grad``    its weight and bias gradient
``maxpool5``               5x5 max pool, stride 1, padding 2, with a one-byte argmax; its backward is a gather
``bilinear``               upsample-and-add; its backward is the exact adjoint, as a gather
=========================  =====================================================================================
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from refinenet_fast.backends.table import Choice, Shape
from refinenet_fast.layout import empty_nhwc, nhwc


@dataclass(frozen=True)
class WayIn:
    """What a convolution does to its input: ReLU, then 5x5 max pool."""

    relu: bool = False
    pool: bool = False


@dataclass(frozen=True)
class WayOut:
    """What a convolution does to its result, in the order of the fields.

    ``select`` keeps a value where ``!(select <= 0)``, so that NaN passes as it does in PyTorch's ReLU backward.
    """

    bias: Tensor | None = None  # (K,)
    relu: bool = False
    select: Tensor | None = None  # (N, K, H, W)
    add: tuple[Tensor, ...] = ()  # each (N, K, H, W)
    add_relu: tuple[Tensor, ...] = ()  # each (N, K, H, W), its ReLU is added
    upsample: Tensor | None = None  # (N, K, h, w), added bilinearly upsampled to (H, W)
    align_corners: bool = True  # of that upsampling


PLAIN_IN, PLAIN_OUT = WayIn(), WayOut()


@dataclass(frozen=True)
class Fused:
    """The steps, named as the fields of :class:`WayIn` and :class:`WayOut`, that a convolution performs itself."""

    way_in: frozenset[str] = frozenset()
    way_out: frozenset[str] = frozenset()


BIAS_ONLY = Fused(way_out=frozenset({"bias"}))


class Backend(ABC):
    """One implementation of the four kernels.

    :meth:`fuses` names the steps on the way in and out that the backend's own ``_conv3x3`` performs; the others are
    composed around it here, once for all backends.
    """

    name: ClassVar[str]
    proven: ClassVar[bool] = True  # False: built, but never executed on its device, so `auto` does not pick it
    limits: ClassVar[tuple[str, ...]] = ()  # "which shapes: what runs them instead of the fastest loop"

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why nothing can run here at all, or None."""

    @abstractmethod
    def can_run(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if tensors of this device and dtype can be run, else the reason they cannot."""

    def trials(
        self,
        kernel: str,
        dtype: str,
        shape: Shape,
        device: torch.device,
    ) -> list[tuple[Choice, Callable[[], object]]]:
        """What may run one of its convolutions, ready to be timed: choices of the tables; none where it asks none."""
        return []

    # -- convolution ----------------------------------------------------------------------------------------------

    def is_winograd(
        self,
        x: Tensor,  # (N, C, H, W); the gradient of its convolution's result will do as well
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
    ) -> bool:
        """Whether this convolution, or its input gradient, may be Winograd's, whose error is larger."""
        return False

    def fuses(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        pack: bool,
    ) -> Fused:
        """Which steps ``_conv3x3`` performs, called with these."""
        return BIAS_ONLY

    def relu_ahead(
        self,
        x: Tensor,  # (N, C, H, W)
    ) -> bool:
        """Whether a convolution should write its ReLU'd result for the next one, as ReLU on the way in is not free."""
        return False

    @abstractmethod
    def _conv3x3(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        way_in: WayIn,
        way_out: WayOut,
        pack: bool,
    ) -> Tensor:  # (N, K, H, W)
        """The convolution with only those ways in and out that :meth:`fuses` names."""

    @abstractmethod
    def _conv3x3_weight_grad(
        self,
        x: Tensor,  # (N, C, H, W)
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1): for its shape, dtype and strides
    ) -> Tensor:  # as weight
        """Sum over the pixels, in a fixed order."""

    def conv3x3(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        way_in: WayIn = PLAIN_IN,
        way_out: WayOut = PLAIN_OUT,
        pack: bool = False,
    ) -> Tensor:  # (N, K, H, W)
        """3x3 (or 1x1) convolution with everything done on the way in and out.

        ``pack`` says that ``weight`` will come again unchanged, as it does in inference: a backend may keep a copy
        of it in a layout of its own.
        """
        fuses = self.fuses(x, weight, pack)
        x, way_in = self._compose_in(x, way_in, fuses.way_in)
        fused, left = split(way_out, fuses.way_out)
        return self.way_out(self._conv3x3(x, weight, way_in, fused, pack), left)

    def conv3x3_and_relu(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        way_in: WayIn = PLAIN_IN,
        way_out: WayOut = PLAIN_OUT,
        pack: bool = False,
    ) -> tuple[Tensor, Tensor]:  # (N, K, H, W) each
        """``conv3x3`` and the ReLU of its result."""
        y = self.conv3x3(x, weight, way_in, way_out, pack)
        return y, torch.relu(y)

    def conv3x3_input_grad(
        self,
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        way_out: WayOut = PLAIN_OUT,
    ) -> Tensor:  # (N, C, H, W)
        """Gradient of ``conv3x3`` in its input (after the way in): itself a ``conv3x3``, with rotated weights."""
        return self.conv3x3(gy, rotated(weight), way_out=way_out)

    def conv3x3_weight_grad(
        self,
        x: Tensor,  # (N, C, H, W), as saved: before the way in
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor,  # (K, C, 3, 3) or (K, C, 1, 1)
        way_in: WayIn = PLAIN_IN,
    ) -> Tensor:  # as weight, in dtype and strides too
        """Gradient of ``conv3x3`` in its weight."""
        x, _ = self._compose_in(x, way_in, frozenset())
        return as_weight(self._conv3x3_weight_grad(x, gy, weight), weight)

    def bias_grad(
        self,
        gy: Tensor,  # (N, K, H, W)
        bias: Tensor,  # (K,): for its dtype
    ) -> Tensor:  # (K,)
        """Gradient of ``conv3x3`` in its bias, summed in float32 at least."""
        wide = torch.promote_types(gy.dtype, torch.float32)
        if gy.shape[1] == 1:  # PyTorch divides the one sum among its threads; those of rows it does not
            return gy.sum(3, dtype=wide).sum(2).sum(0).to(bias.dtype)
        return gy.sum((0, 2, 3), dtype=wide).to(bias.dtype)

    def parameter_grads(
        self,
        x: Tensor,  # (N, C, H, W), as saved: before the way in
        gy: Tensor,  # (N, K, H, W)
        weight: Tensor | None,  # (K, C, 3, 3) or (K, C, 1, 1)
        bias: Tensor | None,  # (K,)
        way_in: WayIn = PLAIN_IN,
    ) -> tuple[Tensor | None, Tensor | None]:  # as weight; as bias
        """Gradients of ``conv3x3`` in its weight and its bias; None is given where one is not wanted, and returned."""
        gw = None if weight is None else self.conv3x3_weight_grad(x, gy, weight, way_in)
        return gw, None if bias is None else self.bias_grad(gy, bias)

    def _compose_in(self, x: Tensor, way_in: WayIn, fused: frozenset[str]) -> tuple[Tensor, WayIn]:
        if way_in.pool and "pool" not in fused:
            return self.maxpool5(x, relu=way_in.relu)[0], PLAIN_IN
        if way_in.relu and "relu" not in fused:
            return torch.relu(x), replace(way_in, relu=False)
        return x, way_in

    def way_out(
        self,
        y: Tensor,  # (N, K, H, W), owned by the caller: overwritten
        way_out: WayOut,
    ) -> Tensor:  # (N, K, H, W)
        """The steps of ``way_out`` one after another, where no convolution performs them."""
        if way_out.bias is not None:
            y = y.add_(way_out.bias.to(y.dtype)[:, None, None])
        if way_out.relu:
            y = y.relu_()
        if way_out.select is not None:
            y = select(y, way_out.select)
        for other in way_out.add:
            y = y.add_(other)
        for other in way_out.add_relu:
            y = y.add_(torch.relu(other))
        if way_out.upsample is not None:
            size = (y.shape[2], y.shape[3])
            y = self.bilinear(way_out.upsample, size, way_out.align_corners, add=y, overwrite_add=True)
        return y

    # -- pooling and resampling -----------------------------------------------------------------------------------

    @abstractmethod
    def maxpool5(
        self,
        x: Tensor,  # (N, C, H, W)
        relu: bool = False,
        argmax: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # (N, C, H, W) as x; (N, C, H, W) uint8
        """(ReLU,) 5x5 max pool, stride 1, padding 2, by rows then columns.

        The argmax byte at (y, x) is ``dx | dy << 3``, dx and dy in 0..4: dx says which of x - 2 ... x + 2 is the
        largest in row y (the row pass); dy says which of the row maxima at y - 2 ... y + 2 is the largest in column x
        (the column pass). Smallest dx, then smallest dy on ties, and the last NaN: PyTorch's choice.
        """

    @abstractmethod
    def maxpool5_backward(
        self,
        gy: Tensor,  # (N, C, H, W)
        argmax: Tensor,  # (N, C, H, W) uint8
        add: Tensor | None = None,  # (N, C, H, W)
    ) -> Tensor:  # (N, C, H, W) as gy
        """Gradient of ``maxpool5`` (not of its ReLU) as a gather, plus ``add``, the running gradient."""

    @abstractmethod
    def bilinear(
        self,
        x: Tensor,  # (N, C, h, w)
        size: tuple[int, int],  # (H, W)
        align_corners: bool,
        add: Tensor | None = None,  # (N, C, H, W)
        overwrite_add: bool = False,
    ) -> Tensor:  # (N, C, H, W)
        """``add`` + ``x`` resized bilinearly; written into ``add`` itself if the caller owns it and says so."""

    @abstractmethod
    def bilinear_backward(
        self,
        gy: Tensor,  # (N, C, H, W)
        size: tuple[int, int],  # (h, w)
        align_corners: bool,
    ) -> Tensor:  # (N, C, h, w)
        """The adjoint of ``bilinear``: the gradient in its ``x``."""


def split(way_out: WayOut, fused_steps: frozenset[str]) -> tuple[WayOut, WayOut]:
    """The longest run of steps, from the first on, that are fused; and the steps that are left."""
    fused: dict[str, Any] = {}
    left: dict[str, Any] = {}
    fusing = True
    for step in ("bias", "relu", "select", "add", "add_relu", "upsample"):
        wanted = getattr(way_out, step)
        if wanted is None or wanted is False or wanted == ():
            continue
        fusing = fusing and step in fused_steps
        (fused if fusing else left)[step] = wanted
    corners = way_out.align_corners
    return WayOut(**fused, align_corners=corners), WayOut(**left, align_corners=corners)


def select(
    y: Tensor,  # (N, C, H, W), owned by the caller: overwritten
    mask: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N, C, H, W)
    """``y`` where ``!(mask <= 0)``, else 0: ReLU's backward, NaN included."""
    return torch.ops.aten.threshold_backward.grad_input(y, mask, 0, grad_input=y)


def as_weight(
    grad: Tensor,  # (K, C, R, R)
    weight: Tensor,  # (K, C, R, R)
) -> Tensor:  # (K, C, R, R)
    """``grad`` in the dtype and strides of ``weight``."""
    if grad.dtype == weight.dtype and grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def rotated(
    weight: Tensor,  # (K, C, R, R)
) -> Tensor:  # (C, K, R, R)
    """Weights of the input gradient: turned by 180 degrees, input and output channels exchanged."""
    return weight.flip(2, 3).transpose(0, 1)


class VendorConv(Backend):
    """The vendor's convolution (oneDNN, cuDNN), for a backend that has none of its own, or not for all shapes."""

    def _conv3x3(self, x: Tensor, weight: Tensor, way_in: WayIn, way_out: WayOut, pack: bool) -> Tensor:
        bias = None if way_out.bias is None else way_out.bias.to(x.dtype)
        with fixed_order(x, weight):
            return nhwc(torch.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[2] // 2))

    def conv3x3_input_grad(self, gy: Tensor, weight: Tensor, way_out: WayOut = PLAIN_OUT) -> Tensor:
        x = empty_nhwc(gy, (gy.shape[0], weight.shape[1], *gy.shape[2:]))  # for its shape and strides: never read
        if gy.numel() == 0:
            return x
        return self.way_out(nhwc(_convolution_backward(gy, x, weight, wanted=0)), way_out)

    def _conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
        if gy.numel() == 0:
            return torch.zeros_like(weight)
        return _convolution_backward(gy, x, weight, wanted=1)


def _convolution_backward(
    gy: Tensor,  # (N, K, H, W)
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, R, R)
    wanted: int,
) -> Tensor:
    """The vendor's gradient in the input (wanted = 0) or the weight (1)."""
    mask, pad = [wanted == 0, wanted == 1, False], [weight.shape[2] // 2] * 2
    with fixed_order(gy, weight, weight_grad=wanted == 1):
        backward = torch.ops.aten.convolution_backward
        return backward(gy, x, weight.to(gy.dtype), None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)[wanted]


class fixed_order:
    """Within the block the vendor's convolution sums in one order, whatever the number of threads.

    On a GPU: cuDNN's deterministic algorithms only. The setting is the process's, so the first of several threads
    makes it and the last one out restores it. On a CPU: oneDNN gives each thread blocks of channels, and where there
    are more threads than blocks it splits the sum over pixels between them; so there are no more threads than blocks.
    The largest blocks that were seen are the weight gradient's with AVX-512 and AMX, and those of small maps.
    """

    BLOCK, LARGEST_BLOCK = 16, 128  # channels, of the input and of the output
    FEW_PIXELS = 256  # of a map that is small
    lock, inside, before = threading.Lock(), 0, False

    def __init__(
        self,
        x: Tensor,  # (N, C, H, W), or its gradient
        weight: Tensor,  # (K, C, R, R)
        weight_grad: bool = False,
    ) -> None:
        self.cuda, self.blocks = x.device.type == "cuda", 1
        self.restore: int | None = None
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # an export keeps no number of threads
            return
        large = weight_grad or x.shape[2] * x.shape[3] < self.FEW_PIXELS
        side = self.LARGEST_BLOCK if large else self.BLOCK
        self.blocks = max(1, (weight.shape[0] // side) * (weight.shape[1] // side))
        if torch.get_num_threads() > self.blocks:
            self.restore = torch.get_num_threads()

    def __enter__(self) -> None:
        if self.restore:
            torch.set_num_threads(self.blocks)
        if self.cuda:
            with self.lock:
                if fixed_order.inside == 0:
                    fixed_order.before = torch.backends.cudnn.deterministic
                    torch.backends.cudnn.deterministic = True
                fixed_order.inside += 1

    def __exit__(self, *_: object) -> None:
        if self.restore:
            torch.set_num_threads(self.restore)
        if self.cuda:
            with self.lock:
                fixed_order.inside -= 1
                if fixed_order.inside == 0:
                    torch.backends.cudnn.deterministic = fixed_order.before
