"""The yardsticks themselves, and the check of every backend that stands on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from common import assert_equal
from refinenet_fast import backends, plain, testing


def test_relative_l2_never_lets_a_nan_pass():
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert testing.relative_l2(one, one) == 0
    assert testing.relative_l2(one * 1.5, one) == pytest.approx(0.5)
    assert testing.relative_l2(one, one * 0) == math.inf
    assert testing.relative_l2(torch.empty(0, 3), torch.empty(0, 3)) == 0
    for got, want in ((nan, one), (one, nan), (nan, nan), (one * math.inf, one * math.inf)):
        assert testing.relative_l2(got, want) == math.inf
    with pytest.raises(ValueError, match=r"expected shape \(3,\).*got \(1, 3\)"):
        testing.relative_l2(one[None], one)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_tolerance_is_twice_pytorchs_own_error_or_16_eps(dtype):
    floor = 16 * torch.finfo(dtype).eps
    assert testing.tolerance(dtype, 0.0) == floor
    assert testing.tolerance(dtype, 1.0) == max(2.0, floor)
    assert testing.tolerance(dtype, math.inf) == testing.tolerance(dtype, math.nan) == floor


def test_poisoned_fills_fresh_memory_and_restores_the_settings():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with testing.poisoned():
        assert torch.empty_strided((2, 3), (3, 1)).isnan().all()
        assert torch.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(5, dtype=torch.uint8) == 255).all()
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("sizes", [(5, 12), (12, 5), (1, 4), (4, 1), (7, 7)])
def test_bilinear_matrix_agrees_with_pytorch(sizes, align_corners):
    matrix = plain.bilinear_matrix(*sizes, align_corners)  # (out, in)
    eye = torch.eye(sizes[0], dtype=torch.float64)[:, None, :, None]  # (in, 1, in, 1)
    want = F.interpolate(eye, (sizes[1], 1), mode="bilinear", align_corners=align_corners)[:, 0, :, 0]
    torch.testing.assert_close(matrix, want.T, rtol=0, atol=1e-13)


def test_pool_index_reads_the_byte_as_documented():
    x = torch.zeros(1, 1, 5, 7)
    x[0, 0, 3, 4] = 1
    argmax = torch.full((1, 1, 5, 7), 2 | 2 << 3, dtype=torch.uint8)  # everyone chooses itself ...
    argmax[0, 0, 3, 2:7] = torch.tensor([4 - c + 2 for c in range(2, 7)], dtype=torch.uint8) | 2 << 3
    argmax[0, 0, 1, 3] = 0 | 4 << 3  # ... but this one: two rows down, and there the row pass's choice counts
    index = plain.pool_index(argmax)
    assert index[0, 0, 0, 0] == 0
    assert index[0, 0, 1, 3] == 3 * 7 + 4
    assert plain.pick(x, argmax)[0, 0, 1, 3] == 1
    for byte in (255, 5, 0, 5 << 3):
        with pytest.raises(ValueError, match="argmax"):
            plain.pool_index(torch.full((1, 1, 1, 1), byte, dtype=torch.uint8))


def test_a_wrong_kernel_and_a_wrong_decision_are_noticed(monkeypatch):
    call, reference = testing.crp_call((1, 3, 6, 5), testing.Data()), type(backends.get("reference"))
    right = reference.maxpool5

    def off_by_one(self, x, relu=False, argmax=False):
        value, which = right(self, x, relu, argmax)
        return value, None if which is None else torch.full_like(which, 2 | 2 << 3)

    monkeypatch.setattr(reference, "maxpool5", off_by_one)
    rows = {direction: error <= limit for _, direction, error, limit in testing.check_call(call, "reference")}
    assert rows["forward"] and not rows["decisions"]
    monkeypatch.undo()
    back = reference.maxpool5_backward
    monkeypatch.setattr(reference, "maxpool5_backward", lambda *arguments, **named: back(*arguments, **named) * 1.001)
    rows = {direction: error <= limit for _, direction, error, limit in testing.check_call(call, "reference")}
    assert rows == {"forward": True, "backward": False, "decisions": True}


def test_random_data_is_the_same_each_time():
    for integers in (True, False):
        data = testing.Data(integers=integers)
        assert_equal(data(2, 3, 4, 5), data(2, 3, 4, 5))
        assert not data(2, 3, 4, 5).equal(data(2, 3, 4, 5, salt=1))


@pytest.mark.slow
def test_every_backend_is_right_on_the_cpu():
    rows = testing.check_backends("cpu")
    assert [row for row in rows if not row["ok"]] == []
    assert {row["op"] for row in rows} >= {
        "maxpool5",
        "bilinear",
        "conv3x3",
        "conv3x3_weight_grad",
        "rcu",
        "fuse",
        "crp",
    }


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_backend_is_right_on_the_gpu():
    assert [row for row in testing.check_backends("cuda") if not row["ok"]] == []
