"""Multi-resolution fusion: against float64, against PyTorch where sums are exact, derivatives numerically."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import (
    assert_equal,
    assert_gradcheck,
    assert_pytorchs,
    assert_repeatable,
    assert_right,
    laid_out,
    layouts,
    public,
    seeds,
    sides,
    sprinkled,
)
from refinenet_fast import ops
from refinenet_fast.testing import Call, Data, eager, fuse_call

sizes = st.tuples(sides, sides)


@st.composite
def fusions(draw, data: Data, kernels: tuple[int | None, ...] = (3, 1, None)) -> Call:
    """One to four paths of any sizes, some of the same size; paths without a convolution have the result's channels."""
    n, channels, corners = draw(st.sampled_from([1, 2, 0])), draw(st.integers(1, 9)), draw(st.booleans())
    few = draw(st.lists(sizes, min_size=1, max_size=3))
    paths = draw(st.lists(st.tuples(st.sampled_from(few), st.sampled_from(kernels)), min_size=1, max_size=4))
    shapes = [(n, channels if r is None else draw(st.integers(1, 9)), *size) for size, r in paths]
    size = draw(st.one_of(st.none(), sizes, st.sampled_from(few)))
    call = fuse_call(shapes, data, [r for _, r in paths], channels, draw(st.booleans()), size, corners)
    images = [laid_out(x, draw(layouts)) for x in call.tensors[: len(paths)]]
    return Call("fuse", images + call.tensors[len(paths) :], call.options)


def usual(data: Data, corners: bool = True) -> Call:
    """The decoder's: a path at full size, one at half, with different channels."""
    return fuse_call([(2, 19, 9, 14), (2, 11, 5, 7)], data, [3, 3], 13, True, align_corners=corners)


@given(choices=st.data(), seed=seeds)
def test_against_float64(place, choices, seed):
    assert_right(choices.draw(fusions(place.data(seed=seed))), place.backend)


@pytest.mark.parametrize("corners", [True, False])
def test_the_decoders_own_against_float64(place, corners):
    assert_right(usual(place.data(), corners), place.backend)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(("channels", "sides", "out"), [(6, (19, 37), 5), (768, (5, 9), 12), (1024, (3, 5), 12)])
def test_a_depth_decoders_against_float64(place, corners, channels, sides, out):
    """One path, projected by a 1x1 convolution and upsampled by less than 2, to an odd size."""
    shape, size = (1, channels, sides[0], sides[0]), (sides[1], sides[1])
    call = fuse_call([shape], place.data(), [1], out, True, size, corners)
    assert_right(call, place.backend)


@given(choices=st.data(), seed=seeds)
def test_paths_of_one_size_are_pytorchs(place32, choices, seed):
    """On small integers every sum is exact."""
    n, c, size = 2, choices.draw(st.integers(1, 9)), choices.draw(sizes)
    kernels = choices.draw(st.lists(st.sampled_from([3, 1, None]), min_size=1, max_size=4))
    data = place32.data(integers=True, seed=seed)
    call = fuse_call([(n, c, *size)] * len(kernels), data, kernels, c, biases=True)
    assert_pytorchs(call, place32)


@given(seed=seeds, kernels=st.lists(st.sampled_from([1, None]), min_size=3, max_size=3))
def test_non_finite_values_are_pytorchs(place32, seed, kernels):
    data = place32.data(integers=True, seed=seed)
    call = fuse_call([(2, 4, 9, 5), (2, 4, 5, 3), (2, 4, 3, 2)], data, kernels, 4)  # weights are multiples of 1/4
    call.tensors[:3] = [sprinkled(x, seed + i) for i, x in enumerate(call.tensors[:3])]
    with place32.forced():
        y = public(call, *call.tensors)
    assert_equal(y, eager(call, *call.tensors))


@pytest.mark.parametrize("corners", [True, False])
def test_an_expanded_gradient_and_the_same_bits_twice(place, corners):
    call = usual(place.data(), corners)
    assert_repeatable(call, place)


def test_the_size_is_the_largest_of_the_paths_unless_given(place32):
    """Height and width may come from different paths."""
    xs = [place32.data()(1, 3, *size) for size in ((4, 9), (6, 5), (2, 2))]
    with place32.forced():
        assert ops.fuse(xs, [None] * 3).shape == (1, 3, 6, 9)
        assert ops.fuse(xs, [None] * 3, size=(3, 20)).shape == (1, 3, 3, 20)
        assert_equal(ops.fuse(xs, [None] * 3), ops.fuse(xs, [None] * 3, None, (6, 9), True))


def test_one_tensor_on_several_paths(place32):
    """A path without a convolution must hand out neither its argument nor one gradient's memory twice."""
    x, gy = place32.data()(1, 3, 4, 5).requires_grad_(), place32.data()(1, 3, 4, 5, salt=1)
    call = Call("fuse", [x.detach()] * 2 + [None] * 4, ([4, 5], True))
    with place32.forced():
        alone = public(call, x, None, None)
        assert alone.data_ptr() != x.data_ptr()
        twice = public(call, x, x, *[None] * 4)
        assert_equal(twice.detach(), 2 * x.detach())
        (gx,) = torch.autograd.grad(twice, x, gy)
    assert_equal(gx, 2 * gy)
    assert alone.detach().equal(x.detach())


GRADCHECKS = {
    "usual": {"shapes": [(1, 2, 5, 4), (1, 3, 3, 2)], "kernels": [3, 3], "biases": True},
    "one path": {"shapes": [(1, 2, 4, 3)], "kernels": [1]},
    "no convolutions": {"shapes": [(1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 2, 2)], "kernels": [None, None, None]},
    "only resized": {"shapes": [(1, 2, 4, 3), (1, 2, 2, 5)], "kernels": [None, 1]},
    "downscaled": {"shapes": [(1, 2, 5, 6), (1, 2, 2, 3)], "kernels": [3, None], "size": (3, 2), "biases": True},
    "same sizes": {"shapes": [(1, 2, 3, 3)] * 3, "kernels": [3, None, 1]},
}


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck(case, corners):
    call = fuse_call(data=Data(torch.float64), channels=2, align_corners=corners, **GRADCHECKS[case])
    assert_gradcheck(call)
