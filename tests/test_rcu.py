"""The residual conv unit: against float64, against PyTorch where sums are exact, and its derivatives numerically."""

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
    assert_same_bits,
    assert_same_gradients,
    laid,
    layouts,
    narrow,
    public,
    seeds,
    sprinkled,
    with_gradients,
)
from refinenet_fast.testing import Data, rcu_call

options = {
    "middle": st.integers(1, 9),
    "kernel": st.sampled_from([1, 3]),
    "biases": st.sampled_from(["", "1", "2", "12"]),
    "skip": st.sampled_from(["raw", "relu"]),
    "units": st.sampled_from([1, 1, 2, 3]),
    "adds": st.sampled_from(["", "", "1", "2", "123"]),
    "recompute": st.booleans(),
}


@given(shape=narrow, how=layouts, seed=seeds, options=st.fixed_dictionaries(options))
@example((2, 37, 13, 11), "contiguous", 0, {"middle": 29, "skip": "raw"})
@example((1, 70, 5, 33), "channels", 1, {"middle": 3, "skip": "relu", "biases": "12"})
def test_against_float64(place, shape, how, seed, options):
    assert_right(laid(rcu_call(shape, place.data(seed=seed), **options), how), place.backend)


@pytest.mark.parametrize("channels", [48, 768, 1024])
def test_widths_of_depth_decoders_against_float64(place, channels):
    """In one convolution on the way in, in the other on the way out."""
    call = rcu_call((1, channels, 3, 4), place.data(), middle=48, biases="12", units=2, adds="1")
    assert_right(call, place.backend)


@given(shape=narrow, how=layouts, seed=seeds, options=st.fixed_dictionaries(options))
def test_ties_are_pytorchs(place32, shape, how, seed, options):
    """On small integers every sum is exact, and many a ReLU sits at 0."""
    call = laid(rcu_call(shape, place32.data(integers=True, seed=seed), **options), how)
    assert_pytorchs(call, place32)


@given(shape=narrow, seed=seeds, options=st.fixed_dictionaries({**options, "kernel": st.just(1)}))
def test_non_finite_values_are_pytorchs(place32, shape, seed, options):
    call = rcu_call(shape, place32.data(integers=True, seed=seed), **options)
    call.tensors[0] = sprinkled(call.tensors[0], seed)
    assert_pytorchs(call, place32, only_x=True)


@pytest.mark.parametrize("skip", ["raw", "relu"])
def test_an_expanded_gradient_and_the_same_bits_twice(place, skip):
    call = rcu_call((2, 19, 9, 7), place.data(), middle=11, biases="12", skip=skip)
    assert_repeatable(call, place)


@pytest.mark.parametrize("skip", ["raw", "relu"])
@pytest.mark.parametrize(("kernel", "biases"), [(3, "1"), (3, ""), (3, "12"), (1, "12"), (1, "2")])
def test_gradcheck(kernel, biases, skip):
    call = rcu_call((2, 2, 4, 3), Data(torch.float64), middle=3, kernel=kernel, biases=biases, skip=skip)
    assert_gradcheck(call)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("skip", ["raw", "relu"])
@pytest.mark.parametrize("adds", ["", "1", "12"])
def test_gradcheck_of_a_run(adds, skip, recompute):
    options = {"biases": "12", "skip": skip, "units": 2, "recompute": recompute, "adds": adds}
    assert_gradcheck(rcu_call((1, 2, 3, 3), Data(torch.float64), middle=3, **options))


@pytest.mark.parametrize("units", [1, 3])
def test_recomputed_or_kept_the_bits_are_the_same(place, units):
    shape, options = (2, 19, 9, 7), {"middle": 11, "biases": "12", "units": units, "adds": "1"}
    outcomes = []
    for recompute in (False, True):
        with place.forced():
            y, grads = with_gradients(public, rcu_call(shape, place.data(), recompute=recompute, **options))
        outcomes.append([y, *grads])
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first", [1, 2, 3, 4, 7, 10])
def test_a_run_computes_only_the_gradients_that_are_wanted(place, first, recompute):
    """Frozen from the first one on, up to tensor ``first``: backward stops there."""
    call = rcu_call((1, 5, 4, 3), place.data(), biases="12", units=2, recompute=recompute, adds="12")
    wanted = [i >= first for i in range(len(call.tensors))]
    y, saved = call.train(place.backend)
    every = call.gradients(torch.ones_like(y), saved, place.backend)
    op = torch.ops.refinenet_fast.rcu_backward
    some = op(torch.ones_like(y), call.tensors, saved, wanted, *call.options, place.backend)
    assert len(some) == sum(wanted)
    assert_same_gradients(some, every[first:])
