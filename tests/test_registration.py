"""The ops as PyTorch sees them: opcheck, one layout for every backend, what autograd is told, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common import Log, Place, public, with_gradients
from refinenet_fast.testing import Call, Data, crp_call, fuse_call, rcu_call, some_calls

OPS = ["rcu", "fuse", "crp"]
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 5), (1, 4, 6, 1), (0, 3, 2, 2), (2, 5, 7, 3)]


def example(op: str, data: Data, **options) -> Call:
    """A small call of ``op``."""
    if op == "fuse":
        return fuse_call([(2, 3, 6, 5), (2, 4, 3, 2), (2, 3, 6, 5)], data, [3, 1, None], 3, True, **options)
    return {"rcu": rcu_call, "crp": crp_call}[op]((2, 3, 6, 5), data, **options)


def with_float32_parameters(call: Call) -> Call:
    """Float32 parameters beside half-precision activations."""
    count = len(call.tensors)
    images = {"fuse": count // 3, "rcu": 1 + count // 5, "crp": 1}[call.op]
    parameters = [None if t is None else t.float() for t in call.tensors[images:]]
    return Call(call.op, call.tensors[:images] + parameters, call.options)


def outcomes(call: Call, backend: str) -> list[Tensor]:
    """Everything the three entries of an op return."""
    y, saved = call.train(backend)
    return [call.infer(backend), y, *saved, *call.gradients(torch.ones_like(y), saved, backend)]


def described(tensors: list[Tensor]) -> list[tuple]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("entry", ["", "_train", "_backward"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(place32, op, entry, mixed):
    call = example(op, Data(torch.bfloat16 if mixed else torch.float32, place32.device))
    call = with_float32_parameters(call) if mixed else call
    rest = (call.tensors, *call.options, place32.backend)
    if entry == "_backward":
        y, saved = call.train(place32.backend)
        needs = [i % 2 == 0 and t is not None for i, t in enumerate(call.tensors)]
        rest = (torch.ones_like(y), call.tensors, saved, needs, *call.options, place32.backend)
    elif entry == "":
        call.tensors[:] = [None if t is None else t.requires_grad_() for t in call.tensors]
    torch.library.opcheck(getattr(torch.ops.refinenet_fast, op + entry).default, rest)


@pytest.mark.parametrize(("shape", "memory"), [*((s, "channels_last") for s in SHAPES), (SHAPES[-1], "contiguous")])
def test_every_backend_returns_the_same_shapes_dtypes_and_strides(place, shape, memory):
    """As does the fake that ``torch.compile`` plans by; results and saved tensors in NHWC memory."""
    for call in some_calls(shape, place.data()):
        if memory == "contiguous":
            call.tensors[:] = [None if t is None else t.contiguous() for t in call.tensors]
        for variant in (call, with_float32_parameters(call)) if place.dtype.itemsize == 2 else (call,):
            got = outcomes(variant, place.backend)
            assert described(got) == described(outcomes(variant, "reference"))
            with FakeTensorMode() as mode:
                fakes = [None if t is None else mode.from_tensor(t) for t in variant.tensors]
                assert described(got) == described(outcomes(Call(call.op, fakes, call.options), place.backend))


@pytest.mark.parametrize("op", OPS)
def test_gradients_have_the_parameters_strides_whatever_these_are(place, op):
    call = example(op, place.data())
    for change in (torch.Tensor.contiguous, lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)):
        changed = [change(t) if t is not None and t.dim() == 4 else t for t in call.tensors]
        with place.forced():
            _, grads = with_gradients(public, Call(op, changed, call.options))
        images = len(call.tensors) // 3 if op == "fuse" else 1
        parameters = [t for t in changed[images:] if t is not None]
        assert described(grads[-len(parameters) :]) == described(parameters)


@pytest.mark.parametrize("op", OPS)
def test_outside_grad_mode_nothing_is_kept(place, op):
    call = example(op, place.data())
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    for mode in (torch.no_grad, torch.inference_mode):
        with place.forced(), mode(), Log() as log, hooks:
            y = public(call, *leaves)
        assert log.own == [(op, place.backend)] and not kept
        assert y.grad_fn is None and not y.requires_grad
    with place.forced(), Log() as log, hooks:
        y = public(call, *leaves)
        y.sum().backward()
    assert log.own == [(op + "_train", place.backend), (op + "_backward", place.backend)]
    assert all(leaf.grad is not None for leaf in leaves if leaf is not None)
    with place.forced(), Log() as log:
        assert public(call, *[None if t is None else t.detach() for t in leaves]).grad_fn is None
    assert log.own == [(op, place.backend)]


@pytest.mark.parametrize("op", OPS)
def test_a_backend_forced_in_forward_also_runs_backward(place, op):
    call = example(op, place.data())
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    with place.forced():
        y = public(call, *leaves)
    with Log() as log:
        y.sum().backward()
    assert log.own == [(op + "_backward", place.backend)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("upstream_needs_grad", [True, False])
def test_double_backward_raises(place32, op, upstream_needs_grad):
    """Rather than taking the gradient for a constant, as in a gradient penalty beside another loss."""
    call = example(op, place32.data())
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    with place32.forced():
        y = public(call, *leaves)
        gy = torch.ones_like(y, requires_grad=upstream_needs_grad)
        (gx,) = torch.autograd.grad(y, leaves[0], gy, create_graph=True)
        with pytest.raises(RuntimeError):
            (y.square().mean() + gx.square().mean()).backward()


@pytest.mark.parametrize("op", OPS)
def test_a_change_of_a_saved_tensor_before_backward_raises(place32, op):
    call = example(op, place32.data())
    leaves = [None if t is None else t.requires_grad_() for t in call.tensors]
    with place32.forced():
        y = public(call, *leaves)
        with torch.no_grad():
            leaves[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("op", OPS)
def test_cuda_graphs_and_streams(op):
    for place in (Place(name, "cuda:0", torch.float32) for name in ("reference", "cuda")):
        call = example(op, place.data())
        want = outcomes(call, place.backend)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)  # work on another stream would be done too early
            call.tensors[0].mul_(1)
            got = outcomes(call, place.backend)
        stream.synchronize()
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = outcomes(call, place.backend)
        graph.replay()
        torch.cuda.synchronize()
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))
