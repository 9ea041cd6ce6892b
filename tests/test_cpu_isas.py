"""The CPU kernels for each instruction set: the same specification, one chosen at run time or forced."""

from __future__ import annotations

import platform

import pytest
import torch

import refinenet_fast
from common import assert_equal, assert_same_bits, run_python
from refinenet_fast import _native, testing
from refinenet_fast.backends import get

if _native._C is None:
    pytest.skip(f"{_native.missing}", allow_module_level=True)

ISAS = list(_native._C.cpu_isas())
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def set_isa():
    """Chooses an instruction set; the one in use comes back afterwards."""
    before = _native._C.cpu_isa()
    yield _native._C.cpu_set_isa
    _native._C.cpu_set_isa(before)


def test_what_is_built_and_what_this_processor_has():
    built = refinenet_fast.build_info()["cpu_isas"]
    assert "baseline" in ISAS and set(ISAS) <= set(built)
    if platform.machine() in ("x86_64", "AMD64"):
        assert {"baseline", "avx2", "avx512"} == set(built)
        capability = torch.backends.cpu.get_cpu_capability()
        assert ("avx2" in ISAS) or capability == "DEFAULT"
        assert ("avx512" in ISAS) == (capability == "AVX512")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_right(set_isa, isa, dtype):
    set_isa(isa)
    assert refinenet_fast.build_info()["cpu_isa"] == isa
    for shape in (*testing.ODD, (2, 70, 13, 11), (1, 33, 40, 9)):
        for op, direction, error, limit in testing.check_kernels(get("cpu"), shape, testing.Data(dtype)):
            assert error <= limit, f"{op} {direction} at {shape}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 129])
def test_all_pool_alike(set_isa, channels, dtype):
    """Whatever the width of a vector and what is left over: bit for bit, NaN included."""
    x = testing.Data(dtype, integers=True)(2, channels, 7, 6)
    x[0, :, 3, 2], x[1, -1, 0, 0] = torch.inf, torch.nan
    gy, kernels, first = testing.Data(dtype)(2, channels, 7, 6, salt=1), get("cpu"), None
    for isa in ISAS:
        set_isa(isa)
        value, argmax = kernels.maxpool5(x, relu=True, argmax=True)
        found = [value, argmax, kernels.maxpool5_backward(gy, argmax, gy)]
        first = first or found
        assert_same_bits(found[:2], first[:2])
        assert testing.relative_l2(found[2], first[2]) <= 2 * torch.finfo(dtype).eps
    want, which = get("reference").maxpool5(x, relu=True, argmax=True)
    assert_equal(first[0], want)
    assert_equal(first[1], which)


def test_an_unknown_one_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(ISAS)) as error:
        _native._C.cpu_set_isa("sse9")
    assert "sse9" in str(error.value)
    done = run_python("import refinenet_fast", REFINENET_FAST_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "ValueError: REFINENET_FAST_CPU_ISA: expected" in done.stderr and ", ".join(ISAS) in done.stderr


def test_the_environment_forces_one_and_the_best_is_the_default():
    code = "from refinenet_fast import _native; print(_native._C.cpu_isa(), *_native._C.cpu_isas())"
    done = run_python(code, REFINENET_FAST_CPU_ISA="baseline")
    assert done.stdout.split() == ["baseline", *ISAS], done.stderr
    done = run_python(code)
    assert done.stdout.split() == [ISAS[0], *ISAS], done.stderr
    assert [isa for isa in ("avx512", "avx2", "baseline") if isa in ISAS] == ISAS
