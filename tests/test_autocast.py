"""Autocast casts activations only; float32 parameters beside half-precision activations get float32 gradients."""

from __future__ import annotations

import pytest
import torch

from common import assert_right, assert_same_bits, public, with_gradients
from refinenet_fast import ops
from refinenet_fast.testing import Call, Data, compare, crp_call, eager, fuse_call, rcu_call

OPS = ["rcu", "fuse", "crp"]


def example(op: str, data: Data) -> Call:
    if op == "fuse":
        return fuse_call([(2, 8, 6, 5), (2, 6, 3, 2)], data, [3, 1], 7, biases=True)
    return {"rcu": rcu_call, "crp": crp_call}[op]((2, 8, 6, 5), data)


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The activations, not the parameters."""
    images = 2 if call.op == "fuse" else 1
    return Call(call.op, [x.to(dtype) for x in call.tensors[:images]] + call.tensors[images:], call.options)


@pytest.mark.parametrize("op", OPS)
def test_an_autocast_region_is_a_cast_of_the_activations(place16, op):
    call, kind = example(op, Data(torch.float32, place16.device)), torch.device(place16.device).type

    def in_a_region(call: Call, *tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, place16.dtype):
            return public(call, *tensors)  # backward runs outside

    def by_hand(call: Call, *tensors: torch.Tensor) -> torch.Tensor:
        return public(call, *cast(Call(op, list(tensors), call.options), place16.dtype).tensors)

    with place16.forced():
        y, grads = with_gradients(in_a_region, call)
        want, want_grads = with_gradients(by_hand, call)
    assert y.dtype == place16.dtype
    assert {g.dtype for g in grads} == {torch.float32}
    assert_same_bits([y, *grads], [want, *want_grads])


@pytest.mark.parametrize("op", OPS)
def test_float32_parameters_beside_half_precision_activations(place16, op):
    call = cast(example(op, Data(torch.float32, place16.device)), place16.dtype)
    assert_right(call, place16.backend)
    with place16.forced():
        y, grads = with_gradients(public, call)
    assert y.dtype == place16.dtype
    assert [g.dtype for g in grads] == [t.dtype for t in call.tensors if t is not None]


def test_disabled_autocast_and_float64_are_left_alone():
    for dtype, enabled in ((torch.float32, False), (torch.float64, True)):
        call = example("crp", Data(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, grads = with_gradients(public, call)
        want, want_grads = with_gradients(public, call)
        assert_same_bits([y, *grads], [want, *want_grads])
        assert y.dtype == dtype


def test_mixed_paths_meet_in_autocasts_dtype():
    """A float32 map beside one that an earlier layer already computed in bfloat16."""
    data = Data()
    xs, w = [data(1, 3, 4, 5), data(1, 3, 2, 2, salt=1).bfloat16()], data.weight(3, 3, 3, salt=2)
    with pytest.raises(TypeError, match=r"xs\[1\]"):
        ops.fuse(xs, [w, w])
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.fuse(xs, [w, w])
    assert y.dtype == torch.bfloat16
    call = Call("fuse", [xs[0].bfloat16(), xs[1], w, w, None, None], ([4, 5], True))
    error, limit = compare([y], lambda *t: eager(call, *t), call.tensors)
    assert error <= limit
