"""What training holds between forward and backward, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common import public
from refinenet_fast.testing import Call, crp_call, eager, fuse_call, rcu_call

SHAPE = (2, 8, 9, 7)
ELEMENTS = math.prod(SHAPE)


def held(function: Callable[..., Tensor], call: Call) -> dict[torch.dtype, int]:
    """Bytes that autograd holds for backward, by dtype; each memory once, the arguments not counted."""
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    given = {t.untyped_storage().data_ptr() for t in leaves if t is not None}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(call, *leaves)
    assert y.requires_grad
    sizes: dict[torch.dtype, int] = {}
    for address, t in kept.items():
        if address not in given:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.untyped_storage().nbytes()
    return sizes


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("order", ["pool-conv", "conv-pool"])
def test_a_crp_holds_each_stages_input_and_no_pooled_map(place, order, stages):
    """The first stage's is ``x`` itself; where pools follow convolutions, the pool's choices beside it."""
    call = crp_call(SHAPE, place.data(), stages=stages, order=order)
    with place.forced():
        ours = held(public, call)
    theirs = held(eager, call)
    activation = ELEMENTS * place.dtype.itemsize
    assert ours.pop(torch.uint8, 0) == (stages * ELEMENTS if order == "conv-pool" else 0)
    assert ours.pop(place.dtype, 0) == (stages - 1) * activation
    assert not ours
    assert theirs.pop(torch.int64) == stages * 8 * ELEMENTS
    assert theirs.pop(place.dtype) >= 2 * stages * activation


@pytest.mark.parametrize("recompute", [False, True])
def test_an_rcu_holds_one_map_or_none_and_a_fusion_none(place, recompute):
    with place.forced():
        rcu = held(public, rcu_call(SHAPE, place.data(), middle=5, biases="12", recompute=recompute))
        fusion = held(public, fuse_call([SHAPE, (2, 3, 5, 4)], place.data(), [3, 1], 8, True))
    assert rcu == ({} if recompute else {place.dtype: ELEMENTS // 8 * 5 * place.dtype.itemsize})
    assert fusion == {}


def test_what_a_unit_adds_is_not_held(place):
    call = rcu_call(SHAPE, place.data(), adds="1")
    x, add, *_ = (None if t is None else t.requires_grad_() for t in call.tensors)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
        place.forced(),
    ):
        public(call, *call.tensors)
    assert x.data_ptr() in kept and add.data_ptr() not in kept


@pytest.mark.parametrize("units", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_of_rcus_holds_two_maps_a_unit_or_one(place, units, recompute):
    with place.forced():
        run = held(public, rcu_call(SHAPE, place.data(), units=units, recompute=recompute))
    maps = units - 1 if recompute else 2 * units - 1
    assert run == {place.dtype: maps * ELEMENTS * place.dtype.itemsize}
