"""What the ops refuse: each error has the right type and names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common import run_python
from refinenet_fast.ops import crp, fuse, rcu

X = torch.ones(2, 4, 5, 6)  # (N, C, H, W)
W = torch.ones(4, 4, 3, 3)
B = torch.ones(4)
SMALL = torch.ones(2, 4, 3, 3)
META = torch.empty(4, 4, 3, 3, device="meta")

# name: (call, error, what the message says, in this order)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # rcu
    "rcu x no tensor": (lambda: rcu([1.0], W, None, W), TypeError, ["x: ", "Tensor", "list"]),
    "rcu x rank": (lambda: rcu(X[0], W, None, W), ValueError, ["x: ", "4 dimensions", "(4, 5, 6)"]),
    "rcu x integers": (lambda: rcu(X.long(), W, None, W), TypeError, ["x: ", "floating", "int64"]),
    "rcu x complex": (lambda: rcu(X.cfloat(), W, None, W), TypeError, ["x: ", "floating", "complex64"]),
    "rcu x without pixels": (lambda: rcu(X[:, :, :0], W, None, W), ValueError, ["x: ", ">= 1", "(2, 4, 0, 6)"]),
    "rcu w1 missing": (lambda: rcu(X, None, None, W), TypeError, ["w1: ", "Tensor", "NoneType"]),
    "rcu w1 rank": (lambda: rcu(X, W[0], None, W), ValueError, ["w1: ", "4 dimensions", "(4, 3, 3)"]),
    "rcu w1 channels": (lambda: rcu(X, W[:, :3], None, W), ValueError, ["w1: ", "4 input channels", "3"]),
    "rcu w1 kernel": (lambda: rcu(X, torch.ones(4, 4, 5, 5), None, W), ValueError, ["w1: ", "3x3", "(4, 4, 5, 5)"]),
    "rcu w1 not square": (lambda: rcu(X, W[..., :1], None, W), ValueError, ["w1: ", "3x3", "(4, 4, 3, 1)"]),
    "rcu w1 dtype": (lambda: rcu(X, W.double(), None, W), TypeError, ["w1: ", "float32", "float64"]),
    "rcu w1 half": (
        lambda: rcu(X.bfloat16(), W.half(), None, W),
        TypeError,
        ["w1: ", "bfloat16", "float32", "float16"],
    ),
    "rcu w1 device": (lambda: rcu(X, META, None, W), ValueError, ["w1: ", "cpu", "meta"]),
    "rcu b1 shape": (lambda: rcu(X, W, B[:3], W), ValueError, ["b1: ", "(4,)", "(3,)"]),
    "rcu b1 rank": (lambda: rcu(X, W, B[None], W), ValueError, ["b1: ", "1 dimension", "(1, 4)"]),
    "rcu b1 number": (lambda: rcu(X, W, 0.0, W), TypeError, ["b1: ", "Tensor", "float"]),
    "rcu b1 device": (lambda: rcu(X, W, B.to("meta"), W), ValueError, ["b1: ", "cpu", "meta"]),
    "rcu w2 in": (lambda: rcu(X, W[:3], None, W), ValueError, ["w2: ", "3 input channels", "4"]),
    "rcu w2 out": (lambda: rcu(X, W, None, W[:3]), ValueError, ["w2: ", "4 output channels", "3"]),
    "rcu b2 dtype": (lambda: rcu(X, W, B, W, B.half()), TypeError, ["b2: ", "float32", "float16"]),
    "rcu skip": (lambda: rcu(X, W, B, W, skip="none"), ValueError, ["skip: ", "'raw', 'relu'", "'none'"]),
    "rcu skip list": (lambda: rcu(X, W, B, W, skip=[]), ValueError, ["skip: ", "'raw', 'relu'", "[]"]),
    # crp
    "crp x rank": (lambda: crp(X[0, 0], [W]), ValueError, ["x: ", "4 dimensions", "(5, 6)"]),
    "crp weights empty": (lambda: crp(X, []), ValueError, ["weights: ", "at least one", "empty list"]),
    "crp weights tensor": (lambda: crp(X, W), TypeError, ["weights: ", "list or tuple", "Tensor"]),
    "crp weights None": (lambda: crp(X, None), TypeError, ["weights: ", "list or tuple", "NoneType"]),
    "crp weights generator": (lambda: crp(X, iter([W])), TypeError, ["weights: ", "list or tuple", "iterator"]),
    "crp weights entry": (lambda: crp(X, [W, None]), TypeError, ["weights[1]: ", "Tensor", "NoneType"]),
    "crp weights channels": (lambda: crp(X, [W, W[:, :2]]), ValueError, ["weights[1]: ", "4 input", "2"]),
    "crp weights out": (lambda: crp(X, [W, W[:2]]), ValueError, ["weights[1]: ", "as many output", "(2, 4, 3, 3)"]),
    "crp weights device": (lambda: crp(X, [W, META]), ValueError, ["weights[1]: ", "cpu", "meta"]),
    "crp weights dtype": (lambda: crp(X, [W.bfloat16()]), TypeError, ["weights[0]: ", "float32", "bfloat16"]),
    "crp biases few": (lambda: crp(X, [W, W], [B]), ValueError, ["biases: ", "2 entries", "1"]),
    "crp biases empty": (lambda: crp(X, [W], []), ValueError, ["biases: ", "at least one", "empty"]),
    "crp biases tensor": (lambda: crp(X, [W], B), TypeError, ["biases: ", "list or tuple", "Tensor"]),
    "crp biases shape": (lambda: crp(X, [W, W], [None, B[:1]]), ValueError, ["biases[1]: ", "(4,)", "(1,)"]),
    "crp order": (lambda: crp(X, [W], order="conv"), ValueError, ["order: ", "'pool-conv', 'conv-pool'", "'conv'"]),
    "crp order None": (lambda: crp(X, [W], order=None), ValueError, ["order: ", "'pool-conv', 'conv-pool'", "None"]),
    # fuse
    "fuse xs empty": (lambda: fuse([], []), ValueError, ["xs: ", "at least one", "empty list"]),
    "fuse xs tensor": (lambda: fuse(X, [W]), TypeError, ["xs: ", "list or tuple", "Tensor"]),
    "fuse xs entry": (lambda: fuse([X, "x"], [W, W]), TypeError, ["xs[1]: ", "Tensor", "str"]),
    "fuse xs rank": (lambda: fuse([X, X[0]], [W, W]), ValueError, ["xs[1]: ", "4 dimensions", "(4, 5, 6)"]),
    "fuse xs batch": (lambda: fuse([X, SMALL[:1]], [W, W]), ValueError, ["xs[1]: ", "batch 2", "1"]),
    "fuse xs dtype": (lambda: fuse([X, SMALL.half()], [W, W]), TypeError, ["xs[1]: ", "float32", "float16"]),
    "fuse xs device": (lambda: fuse([X, SMALL.to("meta")], [W, None]), ValueError, ["xs[1]: ", "cpu", "meta"]),
    "fuse xs channels": (
        lambda: fuse([X, SMALL[:, :3]], [None] * 2),
        ValueError,
        ["xs[1]: ", "4 output channels", "3"],
    ),
    "fuse weights many": (lambda: fuse([X], [W, W]), ValueError, ["weights: ", "1 entries", "2"]),
    "fuse weights few": (lambda: fuse([X, SMALL], [W]), ValueError, ["weights: ", "2 entries", "1"]),
    "fuse weights channels": (lambda: fuse([X, SMALL], [W, W[:3]]), ValueError, ["weights[1]: ", "4 output", "3"]),
    "fuse weights in": (lambda: fuse([X, SMALL], [W, W[:, :3]]), ValueError, ["weights[1]: ", "4 input", "3"]),
    "fuse weights device": (lambda: fuse([X], [META]), ValueError, ["weights[0]: ", "cpu", "meta"]),
    "fuse biases many": (lambda: fuse([X], [W], [B, B]), ValueError, ["biases: ", "1 entries", "2"]),
    "fuse biases alone": (lambda: fuse([X], [None], [B]), ValueError, ["biases[0]: ", "None", "bias"]),
    "fuse size negative": (lambda: fuse([X], [W], size=(-5, 6)), ValueError, ["size: ", ">= 1", "(-5, 6)"]),
    "fuse size zero": (lambda: fuse([X], [W], size=(5, 0)), ValueError, ["size: ", ">= 1", "(5, 0)"]),
    "fuse size number": (lambda: fuse([X], [W], size=5), TypeError, ["size: ", "(H, W)", "5"]),
    "fuse size three": (lambda: fuse([X], [W], size=(1, 2, 3)), TypeError, ["size: ", "(H, W)", "(1, 2, 3)"]),
    "fuse size floats": (lambda: fuse([X], [W], size=(5.0, 6.0)), TypeError, ["size: ", "integers", "(5.0, 6.0)"]),
    "fuse size text": (lambda: fuse([X], [W], size="56"), TypeError, ["size: ", "(H, W)", "'56'"]),
    "fuse align_corners": (lambda: fuse([X], [W], align_corners=1), TypeError, ["align_corners: ", "bool", "1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_a_reason(name):
    call, error, parts = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    message, at = str(raised.value), 0
    assert message.startswith(parts[0]), message
    for part in parts:
        assert part in message[at:], f"{part!r} after {message[:at]!r} in {message!r}"
        at = message.index(part, at) + len(part)


def test_tensors_that_nothing_computes_with():
    for x, w in ((X.to(torch.float8_e5m2), W.to(torch.float8_e5m2)), (X.to_sparse(), W)):
        with pytest.raises((TypeError, ValueError), match=r"^x: expected .*, got"):
            crp(x, [w])


def test_what_is_refused_is_refused_before_anything_changes():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError):
        crp(x, [W, W[:2]])
    assert x.grad is None and x._version == 0


BARE = """
import torch
import refinenet_fast
from refinenet_fast.testing import Data, some_calls

own, backend = torch.ops.refinenet_fast, "{backend}"
few, many, large = torch.zeros(1, 1, 64, 64), torch.zeros(1, 4096, 32, 32), torch.zeros(1, 64, 99, 99)
attempts = [
    lambda: own.fuse([few, many, *[None] * 4], [64, 64], True, backend),
    lambda: own.fuse([few, few.bfloat16()[..., :2], *[None] * 4], [64, 64], True, backend),
    lambda: own.fuse([few, None, None], [-64, 64], True, backend),
    lambda: own.crp_backward(large, [few, None], [few, few.byte()], [True, False], "conv-pool", backend),
]
for call in some_calls((1, 3, 4, 5), Data()):
    op, train = getattr(own, call.op), getattr(own, call.op + "_train")
    for broken in ([], call.tensors[:1], [None] * len(call.tensors), [few[0]] * len(call.tensors)):
        attempts += [lambda op=op, t=broken, o=call.options: op(t, *o, backend) for op in (op, train)]
for attempt in attempts:
    try:
        attempt()
    except Exception:
        pass
print("alive")
"""


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_bare_ops_do_not_crash_the_interpreter(backend):
    """Below the public functions, with what these would refuse: nonsense or an exception, but nothing worse."""
    done = run_python(BARE.format(backend=backend))
    assert done.stdout.split() == ["alive"], f"exit status {done.returncode}\n{done.stderr}"
