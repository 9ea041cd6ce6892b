"""The 5x5 max pool: PyTorch's values, choices and gradients, bit for bit, non-finite ones and ties included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from common import Place, assert_equal, assert_same_bits, laid_out, layouts, seeds, shapes, sprinkled, unchanged
from refinenet_fast.backends import get
from refinenet_fast.layout import nhwc_strides
from refinenet_fast.plain import pool_index
from refinenet_fast.testing import poisoned

kinds = st.sampled_from(["ties", "normal", "non-finite"])


def image(place: Place, shape: tuple[int, ...], kind: str, how: str, seed: int) -> Tensor:
    x = place.data(integers=kind != "normal", seed=seed)(*shape)
    return laid_out(sprinkled(x, seed) if kind == "non-finite" else x, how)


@given(shape=shapes, kind=kinds, how=layouts, relu=st.booleans(), seed=seeds)
@example((1, 5, 64, 3), "ties", "channels_last", True, 0)
@example((2, 130, 9, 70), "non-finite", "contiguous", False, 3)
def test_values_and_choices_are_pytorchs(place, shape, kind, how, relu, seed):
    x = image(place, shape, kind, how, seed)
    want, index = F.max_pool2d(x.relu() if relu else x, 5, stride=1, padding=2, return_indices=True)
    with unchanged(x), poisoned():
        value, argmax = place.kernels.maxpool5(x, relu=relu, argmax=True)
        alone, nothing = place.kernels.maxpool5(x, relu=relu)
    assert nothing is None
    assert_equal(value, want)
    assert_equal(alone, want)
    assert_equal(pool_index(argmax), index)
    assert (value.dtype, argmax.dtype) == (place.dtype, torch.uint8)
    assert value.stride() == argmax.stride() == alone.stride() == nhwc_strides(shape)


@given(shape=shapes, kind=kinds, how=layouts, adds=st.booleans(), seed=seeds)
@example((1, 5, 64, 3), "ties", "channels_last", True, 0)
@example((2, 130, 9, 70), "non-finite", "contiguous", False, 3)
def test_the_gradient_is_pytorchs(place, shape, kind, how, adds, seed):
    x = image(place, shape, kind, "contiguous", seed).requires_grad_()
    gy = laid_out(place.data(integers=True, seed=seed)(*shape, salt=1), how)  # integers: no order of sums matters
    add = laid_out(place.data(integers=True, seed=seed)(*shape, salt=2), how) if adds else None
    (want,) = torch.autograd.grad(F.max_pool2d(x, 5, stride=1, padding=2), x, gy)
    _, argmax = place.kernels.maxpool5(x.detach(), argmax=True)
    with unchanged(gy, argmax, add), poisoned():
        gx = place.kernels.maxpool5_backward(gy, argmax, add)
    assert_equal(gx, want if add is None else want + add)
    assert gx.stride() == nhwc_strides(shape)


@given(shape=shapes, seed=seeds)
def test_a_non_finite_gradient_goes_to_the_chosen_pixel_only(place, shape, seed):
    x = image(place, shape, "ties", "contiguous", seed).requires_grad_()
    gy = sprinkled(place.data(integers=True, seed=seed)(*shape, salt=1), seed)
    (want,) = torch.autograd.grad(F.max_pool2d(x, 5, stride=1, padding=2), x, gy)
    _, argmax = place.kernels.maxpool5(x.detach(), argmax=True)
    assert_equal(place.kernels.maxpool5_backward(gy, argmax), want)


def test_the_byte_holds_a_choice_of_five_rows_and_columns(place32):
    x = place32.data()(1, 2, 9, 8)
    _, argmax = place32.kernels.maxpool5(x, argmax=True)
    want = get("reference").maxpool5(x, argmax=True)[1]
    assert_equal(argmax, want)
    assert (argmax >> 6).max() == 0
    assert (argmax & 7).max() <= 4 and (argmax >> 3).max() <= 4


@pytest.mark.parametrize("shape", [(1, 70, 33, 17), (3, 16, 5, 64)])
def test_the_same_bits_twice(place, shape):
    x, gy = place.data()(*shape), place.data()(*shape, salt=1)
    first, second = (place.kernels.maxpool5(x, True, True) for _ in range(2))
    assert_same_bits(first, second)
    assert_same_bits(*([place.kernels.maxpool5_backward(gy, first[1], x)] for _ in range(2)))


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_the_specification(relu):
    reference = get("reference")

    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            value, argmax = reference.maxpool5(x, relu, argmax=True)
            ctx.save_for_backward(x, argmax)
            return value

        @staticmethod
        def backward(ctx, gy: Tensor) -> Tensor:
            x, argmax = ctx.saved_tensors
            gx = reference.maxpool5_backward(gy, argmax)
            return gx * (x > 0) if relu else gx

    x = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(Pool.apply, x)
