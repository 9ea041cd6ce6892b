"""Triton's convolution against float64: the PTX for sm_80 (pointers) and sm_90 (descriptors, wgmma) in the emulator."""

from __future__ import annotations

import pytest
import torch

from emulator import Schedule
from emulator.triton_backend import EmulatedTriton
from refinenet_fast.backends import launches
from refinenet_fast.backends.configurations import Configuration
from triton_cases import WAYS, check_conv, tf32_errors

pytest.importorskip("triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROW = Configuration(True, 1, 64, 64, 64, warps=4, stages=3)  # one row of pixels: both operands in shared memory
BOX = Configuration(True, 4, 16, 64, 64, warps=4, stages=3)  # pixels through registers
POINTERS = Configuration(False, 1, 64, 64, 32, warps=4, stages=3)
SHAPES = {ROW: (2, 72, 3, 70), BOX: (2, 72, 9, 18), POINTERS: (2, 70, 9, 17)}
ROUTES = [pytest.param(90, ROW, id="row"), pytest.param(80, POINTERS, id="pointers")]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 as float32, not as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(kernels, shape, k=40, dtype=BF16, way="everything", **options):
    error, limit = check_conv(kernels, shape, k, dtype, way, **options)
    assert error <= limit


@pytest.mark.parametrize("capability, configuration", ROUTES)
@pytest.mark.parametrize("way", WAYS)
def test_ways(capability, configuration, way):
    check(EmulatedTriton(capability, configuration=configuration), SHAPES[configuration], way=way)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_dtypes(capability, configuration, dtype):
    channels = configuration.channels * 2 // dtype.itemsize
    fitting = Configuration(**{**vars(configuration), "channels": channels})
    check(EmulatedTriton(capability, configuration=fitting), SHAPES[configuration], dtype=dtype)


@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_tf32_where_cudnn_would_use_it(capability, configuration, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    fitting = Configuration(**{**vars(configuration), "channels": 32})
    error, expected = tf32_errors(EmulatedTriton(capability, configuration=fitting), (1, 40, 3, 20), 24)
    assert expected > 1e-5 and error <= 1.1 * expected


@pytest.mark.parametrize(
    "capability, configuration",
    [
        pytest.param(90, Configuration(True, 1, 128, 256, 64, warps=8, stages=4), id="8 warps, slices"),
        pytest.param(90, BOX, id="box"),
        pytest.param(90, Configuration(**{**vars(BOX), "splits": 2}), id="box, splits"),
        pytest.param(90, POINTERS, id="pointers on sm_90"),
        pytest.param(80, Configuration(**{**vars(POINTERS), "splits": 4}), id="pointers, splits"),
        pytest.param(80, Configuration(False, 1, 128, 128, 64, warps=8, stages=3), id="pointers, 8 warps"),
    ],
)
def test_configurations(capability, configuration):
    shape = (2, 72, 9, 18) if configuration.rows > 1 else (1, 72, 3, 75)
    check(EmulatedTriton(capability, configuration=configuration), shape, k=136)


@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_input_gradient(capability, configuration):
    check(EmulatedTriton(capability, configuration=configuration), SHAPES[configuration], way="gradient", rotated=True)


@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_1x1(capability, configuration):
    check(EmulatedTriton(capability, configuration=configuration), SHAPES[configuration], taps=1)


@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled"), Schedule(128, 3, "late")])
@pytest.mark.parametrize("capability, configuration", [*ROUTES, pytest.param(90, BOX, id="box")])
def test_schedules(capability, configuration, schedule):
    """Warps in any order, copies that complete as late as they may."""
    _, c, _, w = SHAPES[configuration]
    check(EmulatedTriton(capability, schedule, configuration), (1, c, 2, w), way="first of an rcu")


@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_offsets_of_64_bits(capability, configuration, monkeypatch):
    import triton.language as tl

    monkeypatch.setattr(launches, "_integers", lambda *numbers: tl.int64)
    check(EmulatedTriton(capability, configuration=configuration), SHAPES[configuration])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape, k", [((1, 1, 1, 1), 1), ((3, 3, 1, 5), 2), ((2, 16, 5, 1), 21), ((1, 24, 7, 130), 8)])
def test_odd_shapes_with_the_configuration_that_is_chosen(capability, shape, k):
    check(EmulatedTriton(capability), shape, k)


def test_empty():
    y = EmulatedTriton(90).conv3x3(torch.ones(0, 8, 5, 5, dtype=BF16), torch.ones(4, 8, 3, 3))
    assert y.shape == (0, 4, 5, 5) and y.dtype == BF16
