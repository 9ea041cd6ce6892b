"""Bilinear resizing: weights from integer quotient and remainder, an exact adjoint, non-finite values as in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from common import (
    Place,
    assert_equal,
    assert_same_bits,
    laid_out,
    layouts,
    narrow,
    seeds,
    shapes,
    sides,
    sprinkled,
    unchanged,
)
from refinenet_fast.backends import get
from refinenet_fast.layout import nhwc_strides
from refinenet_fast.plain import bilinear_matrix, resize
from refinenet_fast.testing import compare, poisoned, relative_l2

sizes = st.tuples(sides, sides)
# (in, out, align_corners) where PyTorch's weights are exact too: multiples of 1/4
EXACT = [
    (2, 3, True),
    (3, 5, True),
    (5, 3, True),
    (9, 5, True),
    (1, 4, True),
    (5, 1, True),
    (4, 8, False),
    (8, 4, False),
]
EXACT += [(12, 4, False), (1, 4, False), (2, 1, False), (6, 3, False)]


@given(shape=shapes, size=sizes, how=layouts, corners=st.booleans(), adds=st.booleans(), seed=seeds)
@example((1, 33, 16, 31), (64, 61), "channels_last", True, True, 0)
@example((1, 3, 64, 61), (16, 31), "contiguous", False, False, 0)
def test_against_float64(place, shape, size, how, corners, adds, seed):
    x = laid_out(place.data(seed=seed)(*shape), how)
    add = laid_out(place.data(seed=seed)(*shape[:2], *size, salt=1), how) if adds else None
    with unchanged(x, add), poisoned():
        y = place.kernels.bilinear(x, size, corners, add)
        gx = place.kernels.bilinear_backward(y, shape[2:], corners)
    assert y.dtype == place.dtype and y.stride() == nhwc_strides(y.shape) and gx.stride() == nhwc_strides(shape)
    if adds:
        error, limit = compare([y], lambda x, add: add + resize(x, size, corners), [x, add])
    else:
        error, limit = compare([y], lambda x: resize(x, size, corners), [x])
    assert error <= limit
    error, limit = compare([gx], lambda x: resize(x, size, corners), [x], y)
    assert error <= limit


@given(shape=narrow, size=sizes, corners=st.booleans(), seed=seeds)
def test_half_precision_is_rounded_once(place, shape, size, corners, seed):
    """Weights and sums are at least float32, whatever the activations are."""
    x, add = place.data(seed=seed)(*shape), place.data(seed=seed)(*shape[:2], *size, salt=1)
    y = place.kernels.bilinear(x, size, corners, add)
    want = add.double() + resize(x.double(), size, corners)
    terms = add.double().abs() + resize(x.double().abs(), size, corners)
    slack = 8 * torch.finfo(torch.promote_types(place.dtype, torch.float32)).eps * terms
    assert ((y.double() - want).abs() <= 0.5 * torch.finfo(place.dtype).eps * want.abs() + slack).all()


@given(shape=shapes, size=sizes, corners=st.booleans(), seed=seeds)
def test_add_may_be_overwritten_where_the_caller_says_so(place, shape, size, corners, seed):
    x, add = place.data(seed=seed)(*shape), place.data(seed=seed)(*shape[:2], *size, salt=1)
    want = place.kernels.bilinear(x, size, corners, add)
    add = add.contiguous(memory_format=torch.channels_last)
    assert_equal(place.kernels.bilinear(x, size, corners, add, overwrite_add=True), want)


@given(sizes=sizes, corners=st.booleans())
@example((127, 253), True)
@example((253, 127), False)
def test_every_backend_has_the_specifications_weights(place32, sizes, corners):
    """Bit for bit, along either dimension; and backward has the same ones, transposed."""
    size_in, size_out = sizes
    eye = torch.eye(size_in, device=place32.device)[:, None, :, None]  # (in, 1, in, 1)
    want = get("reference").bilinear(eye, (size_out, 1), corners)  # (in, 1, out, 1)
    assert_equal(place32.kernels.bilinear(eye, (size_out, 1), corners), want)
    assert_equal(place32.kernels.bilinear(eye.transpose(2, 3), (1, size_out), corners), want.transpose(2, 3))
    assert relative_l2(want[:, 0, :, 0].T.cpu(), bilinear_matrix(size_in, size_out, corners)) < 1e-7
    eye = torch.eye(size_out, device=place32.device)[:, None, :, None]  # (out, 1, out, 1)
    want = want.transpose(0, 2)  # (out, 1, in, 1)
    assert_equal(place32.kernels.bilinear_backward(eye, (size_in, 1), corners), want)
    assert_equal(place32.kernels.bilinear_backward(eye.transpose(2, 3), (1, size_in), corners), want.transpose(2, 3))


@given(shape=narrow, size=sizes, corners=st.booleans(), seed=seeds)
def test_backward_is_the_adjoint(place, shape, size, corners, seed):
    """<bilinear(x), g> = <x, bilinear_backward(g)>."""
    x, g = place.data(seed=seed)(*shape), place.data(seed=seed)(*shape[:2], *size, salt=1)
    y, gx = place.kernels.bilinear(x, size, corners), place.kernels.bilinear_backward(g, shape[2:], corners)
    left, right = y.double() * g.double(), x.double() * gx.double()
    scale = left.abs().sum() + right.abs().sum()
    assert abs(left.sum() - right.sum()) <= 4 * torch.finfo(place.dtype).eps * scale


PAIRS = [(rows, columns) for rows in EXACT for columns in EXACT if rows[2] == columns[2]]


def one_non_finite_each(place: Place, h: int, w: int) -> Tensor:  # (h w, 3, h, w)
    """In each image another pixel, in each channel another value; small integers elsewhere."""
    x = place.data(integers=True)(h * w, 3, h, w)
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[:, channel].flatten(1).fill_diagonal_(value)
    return x


def test_non_finite_values_are_pytorchs(place):
    for (h, height, corners), (w, width, _) in PAIRS:
        x = one_non_finite_each(place, h, w)
        want = F.interpolate(x, (height, width), mode="bilinear", align_corners=corners)
        assert_equal(place.kernels.bilinear(x, (height, width), corners), want)
        add = sprinkled(place.data(integers=True)(*want.shape, salt=1), seed=1)
        assert_equal(place.kernels.bilinear(x, (height, width), corners, add), want + add)


def test_non_finite_gradients_are_pytorchs(place):
    for (h, height, corners), (w, width, _) in PAIRS:
        gy = one_non_finite_each(place, height, width)
        x = place.data()(*gy.shape[:2], h, w).requires_grad_()
        (want,) = torch.autograd.grad(F.interpolate(x, (height, width), mode="bilinear", align_corners=corners), x, gy)
        assert_equal(place.kernels.bilinear_backward(gy, (h, w), corners), want)


def test_a_dimension_that_keeps_its_size_spreads_nothing(place):
    """There PyTorch reads one pixel, not a neighbour with weight 0 as well."""
    x = one_non_finite_each(place, 3, 3)
    for corners in (True, False):
        for size in ((3, 9), (9, 3), *([(3, 3)] if place.device == "cpu" else [])):  # (3, 3) is a copy on a GPU
            want = F.interpolate(x, size, mode="bilinear", align_corners=corners)
            assert_equal(place.kernels.bilinear(x, size, corners).isfinite(), want.isfinite())


@pytest.mark.parametrize("corners", [True, False])
def test_resizing_to_the_same_size_changes_nothing(place, corners):
    x = place.data()(2, 19, 7, 5)
    assert_equal(place.kernels.bilinear(x, (7, 5), corners), x)
    assert_equal(place.kernels.bilinear_backward(x, (7, 5), corners), x)


@pytest.mark.parametrize(("shape", "size"), [((1, 70, 33, 17), (65, 34)), ((3, 16, 40, 9), (7, 64))])
def test_the_same_bits_twice(place, shape, size):
    x, add = place.data()(*shape), place.data()(*shape[:2], *size, salt=1)
    assert_same_bits(*([place.kernels.bilinear(x, size, True, add)] for _ in range(2)))
    assert_same_bits(*([place.kernels.bilinear_backward(add, shape[2:], True)] for _ in range(2)))


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 3), (3, 2)])
def test_gradcheck_of_the_specification(size, corners):
    reference = get("reference")

    class Resize(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.size = x.shape[2:]
            return reference.bilinear(x, size, corners)

        @staticmethod
        def backward(ctx, gy: Tensor) -> Tensor:
            return reference.bilinear_backward(gy, ctx.size, corners)

    x = Place("reference", "cpu", torch.float64).data()(2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(Resize.apply, x)
