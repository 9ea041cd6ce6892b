"""C++ from the compiled core; where its convolution does not pay, oneDNN's with its own ways out and packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from refinenet_fast import _native
from refinenet_fast.backends import engine
from refinenet_fast.backends.base import (
    PLAIN_IN,
    PLAIN_OUT,
    Fused,
    VendorConv,
    WayIn,
    WayOut,
    as_weight,
    fixed_order,
    split,
)
from refinenet_fast.backends.native import Native
from refinenet_fast.backends.packed import PackedWeights
from refinenet_fast.backends.table import Choice, Shape
from refinenet_fast.layout import nhwc

ONEDNN_FUSES = Fused(way_out=frozenset({"bias", "add"}))  # not ReLU: oneDNN's turns NaN into 0


class Cpu(Native):
    """C++ on torch's own threads, for AVX-512, AVX2 or any processor."""

    name = "cpu"
    device_type = "cpu"
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self) -> None:
        self.packed = PackedWeights()

    def unavailable(self) -> str | None:
        return _native.missing

    def _call(self, function: str, like: Tensor, *arguments: object) -> None:
        assert _native._C is not None
        getattr(_native._C, f"cpu_{function}")(*arguments, torch.get_num_threads())

    def trials(
        self, kernel: str, dtype: str, shape: Shape, device: torch.device
    ) -> list[tuple[Choice, Callable[[], object]]]:
        n, h, w, c, k, taps = shape
        kind, side = getattr(torch, dtype), 3 if taps == 9 else 1
        x, weight = nhwc(torch.randn(n, c, h, w, dtype=kind)), torch.randn(k, c, side, side)
        if kernel == "weight_grad":
            gy = nhwc(torch.randn(n, k, h, w, dtype=kind))
            return [
                ("vendor", partial(VendorConv._conv3x3_weight_grad, self, x, gy, weight)),
                (engine.NAMES[taps], partial(engine.weight_gradient, x, gy, weight, None, False)),
            ]
        return [
            ("vendor", partial(self._onednn, x, weight, PLAIN_IN, PLAIN_OUT, pack=True)),
            (engine.NAMES[taps], partial(engine.convolve, x, weight, PLAIN_IN, PLAIN_OUT)),
        ]

    def is_winograd(self, x: Tensor, weight: Tensor) -> bool:
        if weight.shape[2] != 3:
            return False
        gy = x.detach()[:, :1].expand(-1, weight.shape[0], -1, -1)
        return engine.pays(x, weight) or engine.pays(gy, weight, rotated=True) or engine.gradient_pays(x, weight)

    def fuses(self, x: Tensor, weight: Tensor, pack: bool) -> Fused:
        return engine.fuses(x) if engine.pays(x, weight) else ONEDNN_FUSES

    def _conv3x3(self, x: Tensor, weight: Tensor, way_in: WayIn, way_out: WayOut, pack: bool) -> Tensor:
        if engine.pays(x, weight):
            return engine.convolve(x, weight, way_in, way_out)
        return self._onednn(x, weight, way_in, way_out, pack)

    def conv3x3_input_grad(self, gy: Tensor, weight: Tensor, way_out: WayOut = PLAIN_OUT) -> Tensor:
        if not engine.pays(gy, weight, rotated=True):
            return super().conv3x3_input_grad(gy, weight, way_out)
        return engine.convolve(gy, weight, PLAIN_IN, way_out, rotated=True)

    def conv3x3_weight_grad(self, x: Tensor, gy: Tensor, weight: Tensor, way_in: WayIn = PLAIN_IN) -> Tensor:
        return self.parameter_grads(x, gy, weight, None, way_in)[0]

    def parameter_grads(
        self, x: Tensor, gy: Tensor, weight: Tensor | None, bias: Tensor | None, way_in: WayIn = PLAIN_IN
    ) -> tuple[Tensor | None, Tensor | None]:
        if weight is None or not engine.gradient_pays(x, weight):
            gw = None if weight is None else super().conv3x3_weight_grad(x, gy, weight, way_in)
            return gw, None if bias is None else self.bias_grad(gy, bias)
        x, way_in = self._compose_in(x, way_in, frozenset({"relu"}))
        gw, gb = engine.weight_gradient(x, gy, weight, bias, way_in.relu)
        return as_weight(gw, weight), None if gb is None else gb.to(bias.dtype)

    def _onednn(
        self,
        x: Tensor,  # (N, C, H, W)
        weight: Tensor,  # (K, C, R, R)
        way_in: WayIn,
        way_out: WayOut,
        pack: bool,
    ) -> Tensor:  # (N, K, H, W)
        """With all steps, whatever :meth:`fuses` said: the tables may have been read anew since."""
        x, way_in = self._compose_in(x, way_in, ONEDNN_FUSES.way_in)
        if not (pack and _onednn_runs(x)):  # a reorder of its own at every call would cost more than it saves
            y = super()._conv3x3(x, weight, way_in, WayOut(bias=way_out.bias), pack)
            return self.way_out(y, replace(way_out, bias=None))
        way_out, left = split(way_out, ONEDNN_FUSES.way_out)
        x, pad = nhwc(x), [weight.shape[2] // 2] * 2
        bias = None if way_out.bias is None else way_out.bias.to(x.dtype)
        common = (bias, pad, [1, 1], [1, 1], 1)

        def reorder(
            w: Tensor,  # (K, C, R, R)
        ) -> Tensor:
            return torch.ops.mkldnn._reorder_convolution_weight(w, pad, [1, 1], [1, 1], 1, x.shape)

        packed = self.packed.get(weight, x.dtype, "oneDNN", reorder)
        convolve = torch.ops.mkldnn._convolution_pointwise
        with fixed_order(x, weight):
            if way_out.add:
                y = convolve.binary(x, nhwc(way_out.add[0]), packed, *common, "add", None, None, [], "")
            else:
                y = convolve(x, packed, *common, "none", [], "")
        return self.way_out(self.way_out(nhwc(y), WayOut(add=way_out.add[1:])), left)


def _onednn_runs(
    x: Tensor,  # (N, C, H, W)
) -> bool:
    """Whether oneDNN is there, switched on, and has a convolution for this dtype on this processor."""
    if x.numel() == 0 or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
