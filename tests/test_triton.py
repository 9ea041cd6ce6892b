"""The Triton backend against float64: pool and resampling, whole hot paths, the interpreter, what it refuses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from common import run_python
from emulator import Schedule
from emulator.triton_backend import EmulatedTriton
from refinenet_fast import backends, ops, testing
from refinenet_fast.backends import choose, triton
from refinenet_fast.testing import Data

pytest.importorskip("triton")
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (1, 16, 7, 5), (1, 5, 18, 3), (1, 72, 3, 9), (0, 4, 5, 5)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 as float32, not as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(kernels, shape, data):
    rows = testing.check_pool_and_bilinear(kernels, shape, data)
    for op, direction, error, limit in rows:
        assert error <= limit, f"{op} {direction}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[2], dtype) for dtype in EmulatedTriton.dtypes[1:])],
    ids=str,
)
def test_pool_and_bilinear(shape, dtype):
    check(EmulatedTriton(), shape, Data(dtype))


@pytest.mark.parametrize("capability", [90, 100])
def test_pool_and_bilinear_on_other_architectures(capability):
    check(EmulatedTriton(capability), (1, 4, 5, 6), Data())


@pytest.mark.parametrize("dtype", EmulatedTriton.dtypes, ids=str)
def test_pool_and_bilinear_in_warps(dtype):
    check(EmulatedTriton(schedule=Schedule(32, 1)), (1, 16, 3, 5), Data(dtype))


@pytest.mark.parametrize("number", range(len(testing.some_calls((1, 1, 1, 1), Data()))))
@pytest.mark.parametrize("capability, dtype", [(80, torch.float16), (90, torch.bfloat16)], ids=str)
def test_hot_paths(capability, dtype, number, monkeypatch):
    """The ops, forward and backward, on this backend."""
    kernels = EmulatedTriton(capability)
    monkeypatch.setitem(choose._BACKENDS, kernels.name, kernels)
    call = testing.some_calls((1, 16, 6, 5), Data(dtype))[number]
    for op, direction, error, limit in testing.check_call(call, kernels.name):
        assert error <= limit, f"{op} {direction}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("capability", [80, 90])
def test_the_relu_ahead_is_what_backward_keeps(capability, monkeypatch):
    kernels = EmulatedTriton(capability)
    monkeypatch.setitem(choose._BACKENDS, kernels.name, kernels)
    _, (_, read, _) = testing.rcu_call((1, 8, 3, 4), Data(torch.float16), units=2).train(kernels.name)
    assert (read.min() >= 0) == (capability == 90)


def test_non_finite_values_are_pytorchs():
    x = Data()(1, 8, 9, 7)
    x[0, :, 2, 3], x[0, 1, 7], x[0, 5, :, 0] = torch.nan, torch.inf, -torch.inf
    for relu in (True, False):
        value, argmax = EmulatedTriton().maxpool5(x, relu=relu, argmax=True)
        want, which = backends.get("reference").maxpool5(x, relu=relu, argmax=True)
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(argmax, which)
        assert torch.equal(EmulatedTriton().maxpool5(x, relu=relu)[0].isnan(), want.isnan())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_convolutions_relus_and_masks_keep_nan(capability, dtype):
    """On the way in, on the way out, in what is added, selected by and written ahead: as in PyTorch."""
    x, gate = torch.ones(1, 16, 5, 9, dtype=dtype), -torch.ones(1, 16, 5, 9, dtype=dtype)
    weight = torch.zeros(16, 16, 1, 1, dtype=dtype)
    x[0, 3, 2, 4], gate[0, 5, 1, 1], gate[0, 6, 1, 2] = torch.nan, torch.nan, 1
    way_out = backends.WayOut(relu=True, select=gate, add_relu=(gate,))
    y, relued = EmulatedTriton(capability).conv3x3_and_relu(x, weight, backends.WayIn(relu=True), way_out)
    want = backends.get("reference").conv3x3(x, weight, backends.WayIn(relu=True), way_out)
    assert want.isnan().sum() == 1 and torch.equal(y.isnan(), want.isnan()) and torch.equal(relued.isnan(), y.isnan())
    y = EmulatedTriton(capability).conv3x3(x, weight, backends.WayIn(relu=True), backends.WayOut(relu=True))
    assert torch.equal(y.isnan(), x.isnan().any(1, keepdim=True).expand_as(y))


@pytest.mark.parametrize("capability", [80, 90])
def test_slices_whose_address_no_tensor_map_takes(capability):
    kernels, data = EmulatedTriton(capability), Data(torch.bfloat16)
    whole, weight = data(1, 24, 1, 1), data.weight(8, 8, 3, salt=1)
    x, gy = whole[:, 3:11], data(1, 9, 1, 1, salt=2)[:, 1:]
    assert x.data_ptr() % 16 and x.is_contiguous(memory_format=torch.channels_last)
    got = [kernels.conv3x3(x, weight), kernels.conv3x3_weight_grad(x, gy, weight)]
    want = [kernels.conv3x3(x.clone(), weight), kernels.conv3x3_weight_grad(x.clone(), gy.clone(), weight)]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("way_in", [backends.WayIn(), backends.WayIn(relu=True)])
def test_a_weight_gradient_has_the_weights_strides(way_in):
    weight = torch.randn(8, 8, 3, 3).transpose(2, 3)
    x = torch.randn(1, 8, 4, 4)
    gw = EmulatedTriton(80).conv3x3_weight_grad(x, x, weight, way_in)
    assert gw.stride() == weight.stride()


def test_what_does_not_belong_together_is_refused():
    """Below the backend all are addresses."""
    kernels, x, weight = EmulatedTriton(90), torch.ones(1, 16, 4, 4), torch.ones(8, 16, 3, 3)
    wrong = {
        "weight: expected dimension 1 to be 16": lambda: kernels.conv3x3(x, weight[:, :8]),
        "weight: expected dimension 0 to be 16": lambda: kernels.conv3x3_input_grad(x, weight),
        "bias: expected \\(8,\\)": lambda: kernels.conv3x3(x, weight, way_out=backends.WayOut(bias=torch.ones(2))),
        "add: expected \\(1, 8, 4, 4\\)": lambda: kernels.conv3x3(x, weight, way_out=backends.WayOut(add=(x,))),
        "gy: expected \\(1, 8, 4, 4\\)": lambda: kernels.conv3x3_weight_grad(x, x, weight),
        "gy: expected .*float32": lambda: kernels.conv3x3_weight_grad(x, torch.ones(1, 8, 4, 4).half(), weight),
    }
    for sentence, call in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            call()


def test_pytorchs_newer_switch_for_tf32(monkeypatch):
    """After it is used, asking the older one raises; half precision must not ask at all."""
    code = """
import torch
from refinenet_fast.backends.operands import uses_tf32
torch.backends.cudnn.conv.fp32_precision = "ieee"
assert not uses_tf32(torch.float32) and uses_tf32(torch.bfloat16)
torch.backends.cudnn.conv.fp32_precision = "tf32"
assert uses_tf32(torch.float32)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_bilinear_to_far_sizes():
    """Indices and weights come from integers: far sizes and both corners, against the reference."""
    x = Data()(1, 4, 3, 11)
    for size in ((1, 1), (5, 2), (9, 40)):
        for corners in (True, False):
            y = EmulatedTriton().bilinear(x, size, corners)
            want = backends.get("reference").bilinear(x.double(), size, corners)
            assert testing.relative_l2(y, want) <= 1e-6


INTERPRET = """
import itertools
import sys

import torch
from refinenet_fast import backends, ops, testing
from refinenet_fast.backends.configurations import Configuration
from refinenet_fast.backends.triton import Triton
from refinenet_fast.testing import Data
from triton_cases import WAYS, check_conv, check_grads

kernels = backends.get("triton")
assert kernels.can_run(torch.device("cpu"), torch.float32) is None

def say(what, error, limit):
    print(what, error, limit, error <= limit)

class Configured(Triton):
    def __init__(self, configuration):
        self.configuration = configuration

    def _configuration(self, kernel, x, k, taps):
        return self.configuration

routes = [
    Configuration(True, 1, 16, 16, 16, warps=4, stages=3, splits=2),
    Configuration(True, 4, 8, 32, 16, warps=4, stages=3),
    Configuration(False, 1, 32, 16, 32, warps=4, stages=3),
    Configuration(False, 1, 16, 32, 16, warps=4, stages=3, splits=3),
]
dtype = getattr(torch, sys.argv[1])
for op, direction, error, limit in testing.check_kernels(kernels, (1, 20, 7, 5), Data(dtype)):
    say((op, direction), error, limit)
for configuration, (shape, k) in itertools.product(routes, [((1, 8, 1, 1), 8), ((2, 24, 5, 3), 16)]):
    given = Configured(configuration)
    for way in WAYS:
        say((way, configuration, shape), *check_conv(given, shape, k, dtype, way))
    for taps in (1, 9):
        say(("grads", configuration), *check_grads(given, shape, k, dtype, taps))
    say(("input", configuration), *check_conv(given, shape, k, dtype, "gradient", rotated=True))
for shape, k in [((2, 3, 1, 7), 5), ((1, 20, 7, 5), 16)]:
    say(("pool", shape), *check_conv(kernels, shape, k, dtype, "everything", taps=1, pool=True))
for call in testing.some_calls((1, 5, 4, 3), Data(dtype)):
    for op, direction, error, limit in testing.check_call(call, "triton"):
        say((op, direction), error, limit)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted(dtype):
    """In a process of its own: what the interpreter has touched cannot be compiled."""
    done = run_python(INTERPRET, dtype, TRITON_INTERPRET="1", PYTHONPATH=str(Path(__file__).parent))
    rows = done.stdout.strip().split("\n")
    assert done.returncode == 0 and len(rows) > 80, done.stderr
    assert [row for row in rows if not row.endswith("True")] == []


def test_why_it_cannot_run_here(monkeypatch):
    """`list_backends` gives the reason, `auto` goes on without it, forcing it raises."""
    kernels, device = backends.get("triton"), torch.device("cuda:0")

    def reason():
        (info,) = (info for info in backends.list_backends() if info.name == "triton")
        assert info.available == (info.reason is None or info.reason.startswith("unproven"))
        return info.reason

    def refused(match):
        with backends.use_backend("triton"), pytest.raises(RuntimeError, match=f"rcu: .*'triton' is forced.*{match}"):
            ops.rcu(torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3), None, torch.ones(2, 2, 3, 3))

    if not torch.cuda.is_available():
        assert reason() == "no CUDA device is available"
        refused("no CUDA device is available")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert reason() == "needs sm_80 or newer, and there is only sm_75"
    older = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: older[getattr(d, "index", d)])
    device = torch.device("cuda:1")
    assert kernels.can_run(device, torch.float16) == "needs sm_80 or newer, and cuda:1 is sm_75"
    device = torch.device("cuda:0")
    assert kernels.can_run(device, torch.float16) is None
    assert kernels.can_run(device, torch.float64) == "needs one of float32, float16, bfloat16, got float64"
    assert kernels.can_run(torch.device("cpu"), torch.float32) == "needs tensors on device type 'cuda', got 'cpu'"
    refused("needs tensors on device type 'cuda'")
    monkeypatch.setattr(triton, "lacking", triton.lacking.__wrapped__)  # not as it was asked first
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert reason() == "needs Triton 3.6 or newer, got 3.5.1"
    refused("needs Triton 3.6 or newer")

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    monkeypatch.setattr("triton.__version__", "3.6.0+git1")
    assert reason().startswith("unproven")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason() == "Triton is not installed"
    assert choose._resolve("rcu", "auto", "cuda", 0, torch.float64) == "reference"
