"""Where the tests run: every backend that is available here, on every device and in every dtype it can run."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile

os.environ["REFINENET_FAST_TABLES"] = tempfile.mkdtemp(prefix="no-tables-")  # what a user has tuned decides no test

import pytest
import torch
from hypothesis import HealthCheck, settings

from common import PLACES, Place
from executors import Executor
from refinenet_fast import use_backend
from refinenet_fast.testing import exact_float32

settings.register_profile("default", max_examples=15, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "wide", max_examples=500, derandomize=False, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# Several processes (pytest -n) share the cores among them.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
settings.load_profile("default")  # another: pytest --hypothesis-profile=wide


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_forced():
    """Nor left forced by a test that fails."""
    with use_backend("auto"):
        yield


@pytest.fixture
def exact():
    """Float32 convolutions of PyTorch's without TF32."""
    with exact_float32():
        yield


@pytest.fixture
def one_thread():
    """For networks so small that threads spend more on waiting for each other than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ordinary_rights():
    """Where tests run as root, this thread gives up what lets root pass over a file's rights: CAP_DAC_OVERRIDE (bit 1)
    and CAP_DAC_READ_SEARCH (bit 2) of capabilities(7)."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same of the capabilities from 32 on
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``runs_on`` says which executors a test that takes one runs on."""
    if "executor" not in metafunc.fixturenames:
        return
    parameters = []
    for name in metafunc.definition.get_closest_marker("runs_on").args:
        executor = Executor(name)
        reason = executor.unavailable()
        marks = [pytest.mark.gpu] if name == "gpu" else []
        marks += [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param(executor, id=name, marks=marks))
    metafunc.parametrize("executor", parameters)


def _parameters(places: list[Place]) -> list:
    return [pytest.param(p, id=str(p), marks=[pytest.mark.gpu] if p.device != "cpu" else []) for p in places]


@pytest.fixture(scope="session", params=_parameters(PLACES))
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend, device and dtype."""
    return request.param


@pytest.fixture(scope="session", params=_parameters([p for p in PLACES if p.name == "float32"]))
def place32(request: pytest.FixtureRequest) -> Place:
    """Every backend and device, in float32."""
    return request.param


@pytest.fixture(scope="session", params=_parameters([p for p in PLACES if p.dtype.itemsize == 2]))
def place16(request: pytest.FixtureRequest) -> Place:
    """Every backend and device, in bfloat16 and float16."""
    return request.param
