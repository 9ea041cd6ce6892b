"""Where the CUDA backend runs, and what it says where it does not: by architecture, driver and dtype."""

from __future__ import annotations

import pytest
import torch

from refinenet_fast import _native, backends
from refinenet_fast.backends import choose
from refinenet_fast.backends.cuda import _runs_on

if _native._C is None:
    pytest.skip("needs the compiled core", allow_module_level=True)
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize(
    "arch, runs, not_on",
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("80", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("80-virtual", [(8, 0), (9, 0)], [(7, 5)]),
        ("90a-real", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("103f-virtual", [(10, 3)], [(10, 0), (12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0), (9, 0)]),
    ],
)
def test_what_was_built_runs_where_cuda_says(arch, runs, not_on):
    assert all(_runs_on(arch, *capability) for capability in runs)
    assert not any(_runs_on(arch, *capability) for capability in not_on)


@pytest.fixture
def machine(monkeypatch):
    """A machine with these GPUs, this driver and this build, as far as the backend can tell."""

    def machine(capabilities, archs=("80-real", "90a-real"), driver=13000, built=13000, reason=None):
        cuda = {"built": reason is None, "archs": list(archs), "reason": reason}
        monkeypatch.setattr(_native, "build_info", lambda: {"cuda": cuda})
        monkeypatch.setattr(_native._C, "cuda_built_version", lambda: built, raising=False)
        monkeypatch.setattr(_native._C, "cuda_driver_version", lambda: driver, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        of = lambda device: capabilities[getattr(device, "index", device)]  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", of)
        return backends.get("cuda")

    return machine


def listed() -> backends.BackendInfo:
    return next(info for info in backends.list_backends() if info.name == "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_it_runs_what_it_was_built_for(machine, capability):
    kernels = machine([capability])
    assert all(kernels.can_run(FIRST, dtype) is None for dtype in kernels.dtypes)
    assert kernels.can_run(FIRST, torch.float64) == "needs one of float32, float16, bfloat16, got float64"
    assert kernels.can_run(torch.device("cpu"), torch.float32) == "needs tensors on device type 'cuda', got 'cpu'"
    assert listed().available


def test_each_device_by_its_own_architecture(machine):
    kernels = machine([(12, 0), (9, 0)])
    assert kernels.can_run(FIRST, torch.float16) == "built for 80-real, 90a-real, and cuda:0 is sm_120"
    assert kernels.can_run(SECOND, torch.float16) is None and listed().available
    with pytest.raises(RuntimeError, match=r"^rcu: backend 'cuda' is forced .*: built for .* and cuda:0 is sm_120$"):
        choose._resolve("rcu", "cuda", "cuda", 0, torch.float16)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"capabilities": []}, "no CUDA device is available"),
        ({"capabilities": [(7, 5), (12, 0)]}, "built for 80-real, 90a-real, and there is only sm_120"),
        ({"capabilities": [(7, 5)], "archs": ["80"]}, "built for 80, and there is only sm_75"),
        ({"capabilities": [(9, 0)], "driver": 12080}, "built with CUDA 13, and the driver runs up to CUDA 12"),
        ({"capabilities": [(9, 0)], "driver": 0}, "built with CUDA 13, and the driver runs up to CUDA 0"),
        ({"capabilities": [(9, 0)], "reason": "there is no nvcc"}, "built without CUDA: there is no nvcc"),
    ],
)
def test_why_it_cannot_run_at_all(machine, given, said):
    kernels = machine(**given)
    assert kernels.unavailable() == kernels.can_run(FIRST, torch.float32) == said
    assert not listed().available and listed().reason == said


def test_an_older_minor_version_of_the_driver_and_a_newer_major_one_do(machine):
    for driver in (13000, 13020, 14010):
        assert machine([(9, 0)], driver=driver, built=13010).can_run(FIRST, torch.float16) is None


def test_without_the_compiled_core(machine, monkeypatch):
    kernels = machine([(9, 0)])
    monkeypatch.setattr(_native, "missing", "the compiled core cannot be imported")
    assert kernels.unavailable() == "the compiled core cannot be imported"
