"""Triton's weight and bias gradients against float64, as PTX in the emulator."""

from __future__ import annotations

import pytest
import torch

from emulator import Schedule
from emulator.triton_backend import EmulatedTriton
from refinenet_fast.backends import launches
from refinenet_fast.backends.configurations import Configuration
from triton_cases import check_grads

pytest.importorskip("triton")
ROW = Configuration(True, 1, 64, 64, 64, warps=4, stages=3, splits=3)
BOX = Configuration(True, 4, 16, 64, 64, warps=4, stages=3, splits=2)
POINTERS = Configuration(False, 1, 32, 64, 32, warps=4, stages=3, splits=3)
ROUTES = [
    pytest.param(90, ROW, id="row"),
    pytest.param(90, BOX, id="box"),
    pytest.param(80, POINTERS, id="pointers"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 as float32, not as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(kernels, shape, k=40, dtype=torch.bfloat16, **options):
    error, limit = check_grads(kernels, shape, k, dtype, **options)
    assert error <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_dtypes(capability, configuration, dtype):
    if dtype == torch.float32 and configuration.described:  # as many bytes
        columns = configuration.columns // 2
        configuration = Configuration(**{**vars(configuration), "columns": columns, "channels": 32, "outs": 32})
    check(EmulatedTriton(capability, configuration=configuration), (2, 40, 5, 17), dtype=dtype)


@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_1x1_and_contiguous_weights(capability, configuration):
    check(EmulatedTriton(capability, configuration=configuration), (1, 40, 5, 33), taps=1, contiguous=True)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape, k", [((1, 1, 1, 1), 1), ((2, 24, 5, 3), 16), ((1, 16, 3, 70), 136)])
def test_odd_shapes_with_the_configuration_that_is_chosen(capability, shape, k):
    check(EmulatedTriton(capability), shape, k, contiguous=True)


@pytest.mark.parametrize("schedule", [Schedule(32, 1, "late"), Schedule(32, 2, "shuffled")])
@pytest.mark.parametrize("capability, configuration", ROUTES)
def test_schedules(capability, configuration, schedule):
    check(EmulatedTriton(capability, schedule, configuration), (1, 16, 5, 40), k=16, taps=1)


def test_offsets_of_64_bits(monkeypatch):
    import triton.language as tl

    monkeypatch.setattr(launches, "_integers", lambda *numbers: tl.int64)
    check(EmulatedTriton(80, configuration=POINTERS), (2, 40, 3, 17))


def test_an_empty_batch_gives_zeros():
    gw = EmulatedTriton(80).conv3x3_weight_grad(torch.ones(0, 3, 4, 4), torch.ones(0, 2, 4, 4), torch.ones(2, 3, 3, 3))
    assert torch.equal(gw, torch.zeros(2, 3, 3, 3))
