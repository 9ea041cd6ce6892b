"""The convolution with its ways in and out, and its weight and bias gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from common import (
    MEMORIES,
    assert_equal,
    assert_same_bits,
    convolving,
    in_memory,
    laid_out,
    layouts,
    narrow,
    seeds,
    sprinkled,
    unchanged,
)
from refinenet_fast.backends import WayIn, WayOut, get, rotated
from refinenet_fast.layout import nhwc_strides
from refinenet_fast.testing import Data, compare, conv, convolution, poisoned, relative_l2

ways_in = st.builds(WayIn, relu=st.booleans(), pool=st.booleans())
kernel_sizes = st.sampled_from([1, 3])
STEPS = ("bias", "relu", "select", "add", "add_relu", "upsample")


def way_out_of(steps: set[str], data: Data, n: int, k: int, h: int, w: int) -> WayOut:
    """Every step of ``steps``; the upsampled map is such that its weights are halves."""
    add = tuple(data(n, k, h, w, salt=s) for s in (11, 12))
    add_relu = (data(n, k, h, w, salt=13),)
    return WayOut(
        bias=data(k, salt=14) if "bias" in steps else None,
        relu="relu" in steps,
        select=data(n, k, h, w, salt=15) if "select" in steps else None,
        add=add if "add" in steps else (),
        add_relu=add_relu if "add_relu" in steps else (),
        upsample=data(n, k, h // 2 + 1, w // 2 + 1, salt=16) if "upsample" in steps else None,
    )


@given(
    sides=st.tuples(st.sampled_from([1, 2, 0]), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5)),
    out=st.integers(1, 9),
    kernel=kernel_sizes,
    way_in=ways_in,
    steps=st.sets(st.sampled_from(STEPS)),
    how=layouts,
    seed=seeds,
)
@example((1, 5, 2, 3), 4, 3, WayIn(True, True), set(STEPS), "contiguous", 0)
@example((2, 3, 3, 1), 70, 1, WayIn(False, True), set(STEPS), "channels", 1)
def test_ways_in_and_out_happen_in_their_order(place32, sides, out, kernel, way_in, steps, how, seed):
    """On small integers, so that every sum but Winograd's is exact and a step out of order shows."""
    n, c, h, w = sides[0], sides[1], 2 * sides[2] + 1, 2 * sides[3] + 1
    data = place32.data(integers=True, seed=seed)
    x, weight = laid_out(data(n, c, h, w), how), data.weight(out, c, kernel, salt=1)
    way_out = way_out_of(steps, data, n, out, h, w)
    maps = (way_out.select, *way_out.add, *way_out.add_relu, way_out.upsample)
    with unchanged(x, weight, way_out.bias, *maps), poisoned(), convolving("vendor"):
        y = place32.kernels.conv3x3(x, weight, way_in, way_out)
    assert_equal(y, convolution(x, weight, way_in, way_out))
    assert y.stride() == nhwc_strides(y.shape)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(STEPS, 2)))
def test_each_pair_of_steps(place32, first, second):
    data = place32.data(integers=True)
    x, weight = data(1, 3, 5, 7), data.weight(4, 3, 3, salt=1)
    way_out = way_out_of({first, second}, data, 1, 4, 5, 7)
    with convolving("vendor"):
        y = place32.kernels.conv3x3(x, weight, way_out=way_out)
    assert_equal(y, convolution(x, weight, WayIn(), way_out))


def test_a_nan_in_the_mask_selects(place):
    data = place.data(integers=True)
    x, mask = data(1, 3, 5, 7), sprinkled(data(1, 3, 5, 7, salt=2), seed=1)
    mask[0, 0, 0, :3] = torch.tensor([torch.nan, 0.0, -0.0])
    weight = torch.eye(3, dtype=place.dtype, device=place.device)[:, :, None, None]
    assert_equal(place.kernels.conv3x3(x, weight, way_out=WayOut(select=mask)), torch.where(~(mask <= 0), x, 0))


@given(shape=narrow, out=st.integers(1, 20), kernel=kernel_sizes, way_in=ways_in, how=layouts, seed=seeds)
@example((2, 37, 13, 11), 41, 3, WayIn(True, False), "channels_last", 0)
def test_against_float64(place, shape, out, kernel, way_in, how, seed):
    n, c, h, w = shape
    data = place.data(seed=seed)
    x, weight, bias = laid_out(data(*shape), how), data.weight(out, c, kernel, salt=1), data(out, salt=2)
    gy = laid_out(data(n, out, h, w, salt=3), how)
    with unchanged(x, weight, bias, gy), poisoned():
        y = place.kernels.conv3x3(x, weight, way_in, WayOut(bias=bias))
        gx = place.kernels.conv3x3_input_grad(gy, weight)
        gw, gb = place.kernels.conv3x3_weight_grad(x, gy, weight, way_in), place.kernels.bias_grad(gy, bias)
    plain_x, winograd = laid_out(data(*shape), how), place.kernels.is_winograd(x, weight)
    checks = [
        compare([y], lambda x, w, b: convolution(x, w, way_in, WayOut(bias=b)), [x, weight, bias], winograd=winograd),
        compare([gx], lambda x: conv(x, weight), [plain_x], gy, winograd),
        compare([gw, gb], lambda w, b: convolution(x.to(w.dtype), w, way_in, WayOut(bias=b)), [weight, bias], gy),
    ]
    for error, limit in checks:
        assert error <= limit


@pytest.mark.parametrize(
    ("shape", "out"),
    [((1, 16, 16, 16), 16), ((2, 33, 8, 23), 17), ((1, 40, 3, 300), 70), ((1, 19, 61, 7), 32), ((3, 256, 17, 12), 24)],
    ids=str,
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_many_channels_with_every_step(place32, shape, out, memory):
    """The sizes from which a backend has better than a direct convolution; weights in any memory."""
    data = place32.data()
    x, weight = data(*shape), in_memory(data.weight(out, shape[1], 3, salt=1), memory)
    winograd = place32.kernels.is_winograd(x, weight)
    assert winograd == (place32.backend == "cpu")
    steps = way_out_of(set(STEPS), data, shape[0], out, *shape[2:])
    gy, back = data(shape[0], out, *shape[2:], salt=2), WayOut(select=x, add=(x,))
    maps = [steps.select, *steps.add, *steps.add_relu, steps.upsample]

    def all_steps(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, *adds: Tensor) -> Tensor:
        way_out = WayOut(bias, True, mask, adds[:2], adds[2:3], adds[3])
        return convolution(x, weight, WayIn(relu=True), way_out)

    def backward(gy: Tensor, x: Tensor) -> Tensor:
        gx = torch.nn.functional.conv_transpose2d(gy, weight.to(gy.dtype), padding=1)
        return torch.where(x > 0, gx, 0) + x

    for pack in (False, True, True):
        with unchanged(x, weight, gy), poisoned():
            y = place32.kernels.conv3x3(x, weight, WayIn(relu=True), steps, pack=pack)
            gx = place32.kernels.conv3x3_input_grad(gy, weight, back)
        error, limit = compare([y], all_steps, [x, weight, steps.bias, *maps], winograd=winograd)
        assert error <= limit and y.stride() == nhwc_strides(y.shape)
        error, limit = compare([gx], backward, [gy, x], winograd=winograd)
        assert error <= limit and gx.stride() == nhwc_strides(gx.shape)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("batch", [2, 0])
def test_gradients_have_the_parameters_dtype_and_strides(place, batch, memory, kernel):
    x, gy = place.data()(batch, 6, 5, 4), place.data()(batch, 4, 5, 4, salt=1)
    for dtype in {place.dtype, torch.promote_types(place.dtype, torch.float32)}:
        weight = in_memory(torch.randn(4, 6, kernel, kernel, device=place.device).to(dtype), memory)
        grad = place.kernels.conv3x3_weight_grad(x, gy, weight)
        like = torch.empty_like(weight)
        assert (grad.dtype, grad.shape, grad.stride()) == (dtype, weight.shape, like.stride())
        bias = place.kernels.bias_grad(gy, torch.ones(4, dtype=dtype, device=place.device))
        assert (bias.dtype, bias.shape) == (dtype, (4,))
        if batch == 0:
            assert not grad.any() and not bias.any()


def test_a_bias_gradient_is_summed_wide(place):
    gy = torch.full((1, 2, 90, 90), 0.25, dtype=place.dtype, device=place.device)
    grad = place.kernels.bias_grad(gy, torch.ones(2, device=place.device, dtype=torch.float64))
    assert_equal(grad, torch.full_like(grad, 90 * 90 / 4))


@pytest.mark.parametrize("channels", [3, 32])
def test_non_finite_input_stays_local(place32, channels):
    data = place32.data()
    weight = data.weight(channels, channels, 3, salt=1).abs() + 0.1
    for value in (torch.nan, torch.inf, -torch.inf):
        x = data(2, channels, 40, 44)
        x[0, 1, 3, 4] = value
        finite = place32.kernels.conv3x3(x, weight).isfinite()
        assert not finite[0, :, 2:5, 3:6].any(), "non-finite input has to show"
        assert finite[1].all() and finite[0, :, 20:].all() and finite[0, :, :, 22:].all(), "and only nearby"


@pytest.mark.parametrize(("kernel", "out"), [(1, 8), (3, 8), (3, 32)])
def test_large_finite_input_never_gives_nan(place, kernel, out):
    if place.dtype == torch.float16:
        pytest.skip("float16 ends at 65504")
    data = place.data(integers=True)
    x, weight = data(1, 64, 12, 16) * 4.9e29, data.weight(out, 64, kernel, salt=1)
    gw = place.kernels.conv3x3_weight_grad(x, data(1, out, 12, 16), weight)
    for y in (place.kernels.conv3x3(x, weight, pack=True), gw):
        assert y.isfinite().all()


@pytest.mark.parametrize("channels", [8, 32])
def test_weights_written_behind_autograds_back_are_noticed(place, channels):
    """A backend may keep packed weights, but neither address nor version counter says that they are unchanged."""
    x = place.data()(1, channels, 16, 16)
    weight = torch.nn.Parameter(place.data().weight(channels, channels, 3, salt=1))
    writes = [
        lambda: weight.data.mul_(2),
        lambda: setattr(weight, "data", -weight.data),
        lambda: weight.data.copy_(weight.data.flip(0)),  # the same numbers in other places
        lambda: weight.detach()[7, 7, 2, 2].add_(1),
    ]
    if place.dtype in (torch.float32, torch.float64) and place.device == "cpu":
        writes.append(lambda: weight.detach().numpy().__setitem__((0, 0, 0, 0), 7.0))
    with torch.no_grad():
        for write in writes:
            place.kernels.conv3x3(x, weight, pack=True)
            write()
            want = place.kernels.conv3x3(x, weight.detach().clone())
            error = relative_l2(place.kernels.conv3x3(x, weight, pack=True), want)
            assert error <= 16 * torch.finfo(place.dtype).eps


def test_the_same_bits_twice(place):
    x, gy = place.data()(2, 17, 33, 20), place.data()(2, 23, 33, 20, salt=1)
    weight = place.data().weight(23, 17, 3, salt=2)
    way_out = WayOut(bias=place.data()(23, salt=3), relu=True, add=(gy,))
    assert_same_bits(*([place.kernels.conv3x3(x, weight, WayIn(True, True), way_out)] for _ in range(2)))
    assert_same_bits(*([place.kernels.conv3x3_weight_grad(x, gy, weight, WayIn(True))] for _ in range(2)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_gradcheck_of_the_specification(kernel):
    reference = get("reference")

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight, bias)
            return reference.conv3x3(x, weight, way_out=WayOut(bias=bias))

        @staticmethod
        def backward(ctx, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight, bias = ctx.saved_tensors
            gw, gb = reference.conv3x3_weight_grad(x, gy, weight), reference.bias_grad(gy, bias)
            return reference.conv3x3(gy, rotated(weight)), gw, gb

    data = Data(torch.float64)
    inputs = data(2, 3, 4, 3), data.weight(2, 3, kernel, salt=1), data(2, salt=2)
    assert torch.autograd.gradcheck(Conv.apply, [t.requires_grad_() for t in inputs])
