"""The light-weight CRP's link in one kernel of Triton's, against float64, as PTX in the emulator."""

from __future__ import annotations

import pytest
import torch

from emulator import Schedule
from emulator.triton_backend import EmulatedTriton
from refinenet_fast.backends import WayIn
from triton_cases import check_conv

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 as float32, not as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(kernels, shape, k, dtype=torch.bfloat16, way="everything"):
    error, limit = check_conv(kernels, shape, k, dtype, way, taps=1, pool=True)
    assert error <= limit


@pytest.mark.parametrize("dtype", EmulatedTriton.dtypes, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_dtypes(capability, dtype):
    check(EmulatedTriton(capability), (2, 40, 5, 9), 24, dtype)


@pytest.mark.parametrize("way", ["plain", "first of an rcu", "end of a chain"])
def test_ways(way):
    check(EmulatedTriton(90), (1, 16, 7, 70), 16, way=way)


@pytest.mark.parametrize("shape, k", [((1, 1, 1, 1), 1), ((2, 3, 1, 7), 5), ((1, 20, 7, 1), 17), ((1, 16, 2, 3), 264)])
def test_odd_shapes(shape, k):
    check(EmulatedTriton(80), shape, k)


@pytest.mark.parametrize("capability", [80, 90])
def test_schedules(capability):
    check(EmulatedTriton(capability, Schedule(32, 1, "late")), (1, 16, 5, 9), 16)


def test_minus_infinity_and_nan_pool_as_in_pytorch():
    """-inf fills windows at the border, NaN spreads over its window: neither reaches another pixel."""
    x = torch.ones(1, 16, 9, 9, dtype=torch.bfloat16)
    x[0, :, 3, 3] = torch.nan
    y = EmulatedTriton(90).conv3x3(x, torch.eye(16)[:, :, None, None], WayIn(pool=True))
    assert torch.equal(y.isnan().sum((1, 2, 3)), torch.tensor([16 * 25])) and y[0, 0, 8, 8] == 1
