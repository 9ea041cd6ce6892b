"""Which backend runs: listed, forced in a block or by the environment, or chosen by ``auto``."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import refinenet_fast
from common import Log, run_python
from refinenet_fast import backends, list_backends, ops, use_backend
from refinenet_fast.testing import Data, crp_call

NAMES = ["reference", "cpu", "triton", "cuda"]


def running(dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """The backend that an op runs on now."""
    x, w, *_ = crp_call((1, 2, 3, 3), Data(dtype, device), stages=1).tensors
    with Log() as log:
        ops.crp(x, [w])
    ((_, backend),) = log.own
    return backend


def test_the_list_names_every_backend_and_gives_reasons():
    listed = {info.name: info for info in list_backends()}
    assert list(listed) == NAMES
    assert listed["reference"].available and listed["reference"].proven and listed["reference"].reason is None
    for info in listed.values():
        assert info.available or info.reason, f"{info.name} is not available, and no reason is given"
        assert info.proven or info.reason, f"{info.name} is unproven, and it is not said"
    assert any("16 bytes" in limit for limit in listed["cuda"].limits), "what the fast loop cannot take is said"


def test_the_compiled_core_is_there():
    info = refinenet_fast.build_info()
    assert {"version", "cxx_compiler", "build_type", "openmp", "cpu_isas", "cuda", "cpu_isa"} <= set(info)
    assert info["cuda"]["built"] or info["cuda"]["reason"], "a core without CUDA says why"
    assert next(i for i in list_backends() if i.name == "cpu").available
    assert info["openmp"]


@pytest.mark.parametrize(
    ("dtype", "want"),
    [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "reference"), (torch.float16, "reference")],
)
def test_auto_on_the_cpu(dtype, want):
    assert running(dtype) == want
    with use_backend("reference"), use_backend("auto"):
        assert running(dtype) == want


def test_auto_never_picks_what_is_unproven(monkeypatch):
    cuda = backends.get("cuda")
    monkeypatch.setattr(type(cuda), "can_run", lambda self, device, dtype: None)
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 3, device="cuda:0")
    for proven, want in ((False, "reference"), (True, "cuda")):
        monkeypatch.setattr(type(cuda), "proven", proven)
        assert backends.resolve("crp", x) == want
        assert next(i for i in list_backends() if i.name == "cuda").proven == proven


def test_blocks_nest_and_end_with_an_exception():
    before = running()
    with use_backend("reference"):
        assert running() == "reference"
        with use_backend("auto"):
            assert running() == before
            with pytest.raises(KeyError), use_backend("reference"):
                raise KeyError
            assert running() == before
        assert running() == "reference"
    assert running() == before
    block = use_backend("reference")  # one block, entered twice
    with block:
        assert running() == "reference"
    with block:
        assert running() == "reference"
    assert running() == before


def test_one_block_within_itself():
    with use_backend("auto"):  # whatever this leaves behind ends here
        before, block = running(), use_backend("reference")
        with block, block:
            assert running() == "reference"
        assert running() == before


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 3])
def test_an_unknown_backend_is_answered_with_the_known_ones(name):
    for function in (use_backend, backends.get):
        with pytest.raises(ValueError, match="reference, cpu, triton, cuda") as error:
            function(name)
        assert repr(name) in str(error.value)
    x, w, *_ = crp_call((1, 2, 3, 3), Data(), stages=1).tensors
    if isinstance(name, str):
        with pytest.raises(ValueError, match="reference, cpu, triton, cuda"):
            torch.ops.refinenet_fast.crp([x, w, None], "pool-conv", True, name)


def test_a_forced_backend_that_cannot_run_says_why():
    with use_backend("cpu"):
        for dtype in (torch.float64, torch.float16):
            with pytest.raises(RuntimeError, match=r"crp: .*'cpu'.*float32, bfloat16.*got float"):
                running(dtype)
    if not torch.cuda.is_available():
        reason = next(i for i in list_backends() if i.name == "cuda").reason
        with use_backend("cuda"), pytest.raises(RuntimeError, match=r"rcu: .*'cuda'") as error:
            ops.rcu(*[torch.ones(1, 1, 1, 1)] * 2, None, torch.ones(1, 1, 1, 1))
        assert reason in str(error.value)


RESOLVE = """
import torch, refinenet_fast

def resolve(dtype):
    return refinenet_fast.backends.resolve("crp", torch.empty(0, dtype=dtype))

print(resolve(torch.float32))
with refinenet_fast.use_backend("auto"):
    print(resolve(torch.float32))
print(resolve(torch.float64))
"""


def test_the_environment_forces_a_backend_and_a_block_overrides_it():
    done = run_python(RESOLVE, REFINENET_FAST_BACKEND="reference")
    assert done.stdout.split() == ["reference", "cpu", "reference"], done.stderr


def test_the_environment_forces_a_backend_that_cannot_run():
    done = run_python(RESOLVE, REFINENET_FAST_BACKEND="cpu")
    assert done.returncode == 1 and done.stdout.split() == ["cpu", "cpu"]
    assert "RuntimeError: crp: backend 'cpu' is forced and cannot run this: needs one of float32" in done.stderr


def test_an_unknown_backend_in_the_environment():
    done = run_python("import refinenet_fast", REFINENET_FAST_BACKEND="fastest")
    assert done.returncode == 1
    assert "REFINENET_FAST_BACKEND: expected one of auto, reference, cpu, triton, cuda, got 'fastest'" in done.stderr


def test_shapes_can_be_asked_for_without_memory():
    x, w, *_ = crp_call((2, 3, 5, 4), Data(), stages=1).tensors
    y = ops.crp(x.to("meta"), [w.to("meta")])
    assert (y.device.type, y.shape) == ("meta", x.shape)
