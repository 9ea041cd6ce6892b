"""Chained residual pooling: against float64, against PyTorch where sums are exact, derivatives numerically."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from common import (
    assert_gradcheck,
    assert_pytorchs,
    assert_repeatable,
    assert_right,
    assert_same_gradients,
    laid,
    layouts,
    narrow,
    public,
    seeds,
    sprinkled,
    with_gradients,
)
from refinenet_fast.testing import Data, crp_call

ORDERS = ["pool-conv", "conv-pool"]
options = {
    "stages": st.integers(1, 4),
    "kernel": st.sampled_from([1, 3]),
    "biases": st.booleans(),
    "order": st.sampled_from(ORDERS),
    "relu": st.booleans(),
}


@given(shape=narrow, how=layouts, seed=seeds, options=st.fixed_dictionaries(options))
@example((2, 37, 13, 11), "contiguous", 0, {"stages": 4})
@example((1, 70, 5, 33), "channels", 1, {"stages": 2, "order": "conv-pool", "biases": True})
def test_against_float64(place, shape, how, seed, options):
    assert_right(laid(crp_call(shape, place.data(seed=seed), **options), how), place.backend)


@given(shape=narrow, how=layouts, seed=seeds, options=st.fixed_dictionaries({**options, "stages": st.integers(1, 2)}))
def test_ties_are_pytorchs(place32, shape, how, seed, options):
    """On small integers every sum is exact, and many windows have several maxima."""
    call = laid(crp_call(shape, place32.data(integers=True, seed=seed), **options), how)
    assert_pytorchs(call, place32)


@given(shape=narrow, seed=seeds, options=st.fixed_dictionaries({**options, "kernel": st.just(1), "stages": st.just(2)}))
def test_non_finite_values_are_pytorchs(place32, shape, seed, options):
    call = crp_call(shape, place32.data(integers=True, seed=seed), **options)
    call.tensors[0] = sprinkled(call.tensors[0], seed)
    assert_pytorchs(call, place32, only_x=True)


@pytest.mark.parametrize("order", ORDERS)
def test_an_expanded_gradient_and_the_same_bits_twice(place, order):
    call = crp_call((2, 19, 9, 7), place.data(), stages=3, biases=True, order=order)
    assert_repeatable(call, place)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "biases", "stages", "relu"), [(3, False, 2, True), (1, True, 3, False), (3, True, 1, True)]
)
def test_gradcheck(kernel, biases, stages, relu, order):
    call = crp_call((2, 2, 4, 3), Data(torch.float64), stages, kernel, biases, order, relu)
    assert_gradcheck(call)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 4], [0, 2]])
def test_each_gradient_alone_is_the_one_among_all(place32, order, wanted):
    """x, two weights, two biases: backward stops early where nothing deeper is wanted."""
    call = crp_call((1, 5, 6, 7), place32.data(), stages=2, biases=True, order=order)
    with place32.forced():
        _, every = with_gradients(public, call)
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(call.tensors)]
        grads = torch.autograd.grad(public(call, *leaves).sum(), [leaves[i] for i in wanted])
    assert_same_gradients(grads, [every[i] for i in wanted])
