"""Every kernel that the CUDA backend's convolutions and weight gradients are compiled to runs here, against float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from emulator.compilers import CSRC, nvcc, start
from executors import needs_nvcc
from triton_cases import check_conv, check_grads

pytestmark = pytest.mark.usefixtures("exact")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# As they are mangled: arithmetics and their types, elements, ways in.
MATHS = {"4Tf32": FP32, "6Tf32x3": FP32, "8BFloat16": BF16, "7Float16": FP16}
ELEMENTS = {FP32: "f", BF16: "13__nv_bfloat16", FP16: "6__half"}
WAYS_IN = ("9Rectified", "9Unchanged")
ON_SM80, ON_SM90A = ("conv3x3", "pool_conv3x3", "conv3x3_splits", "weight_grad"), ("conv3x3_sm90",)
# (copies, tile, shape, K): pixels and channels end within a tile and a slice.
ROUTES = (
    ("10CopyChunks", 64, (2, 40, 5, 7), 24),
    ("10CopyChunks", 128, (2, 24, 3, 7), 72),
    ("10CopyPieces", 64, (1, 21, 3, 7), 13),
)


class Case(NamedTuple):
    """A convolution or a weight gradient, and the kernels that it is to launch."""

    names: tuple[str, ...]  # in their mangled ones
    math: str
    tile: int
    shape: tuple[int, int, int, int]  # (N, C, H, W)
    k: int
    options: dict[str, Any]  # of the check
    splits: int = 1

    def __str__(self) -> str:
        return "-".join([*self.names, *map(str, self.options.values())])


def way_of(math: str, way_in: str) -> str:
    """Sums of small integers are exact in TF32 too; what is resampled is not."""
    return "gradient" if way_in == "9Unchanged" else "first of an rcu" if math == "4Tf32" else "everything"


def convolutions() -> Iterator[Case]:
    for math, way_in, (copy, tile, shape, k) in product(MATHS, WAYS_IN, ROUTES):
        name = f"conv_kernelINS0_{math}ENS0_{way_in}ENS0_{copy}ELi{tile}E"
        yield Case((name,), math, tile, shape, k, {"way": way_of(math, way_in)})


def pools() -> Iterator[Case]:
    """Tiles over an edge."""
    routes = (64, (1, 40, 3, 9), 24), (256, (1, 24, 3, 5), 136)
    for math, side, (tile, shape, k) in product(MATHS, (1, 3), routes):
        if (math, tile) != ("6Tf32x3", 256):
            way = way_of(math, "9Rectified")
            name = f"pool_kernelINS0_{math}ELi{side}ELi{tile}E"
            yield Case((name,), math, tile, shape, k, {"way": way, "taps": side * side, "pool": True})


def splits() -> Iterator[Case]:
    """Of output channels in whole chunks, and one by one."""
    for math, k in product(("6Tf32x3", "8BFloat16", "7Float16"), (24, 21)):
        lanes = 1 if k == 21 else 4 if math == "6Tf32x3" else 8
        names = (
            f"conv_kernelINS0_{math}ENS0_9RectifiedENS0_10CopyChunksELi64E",
            f"splits_kernelI{ELEMENTS[MATHS[math]]}Li{lanes}E",
        )
        yield Case(names, math, 64, (1, 72, 3, 5), k, {"way": "everything"}, splits=2)


def of_sm90a() -> Iterator[Case]:
    """Both operands A, from registers and from shared memory, and both ways out, by threads and by TMA."""
    routes = (256, (1, 8, 5, 3), 136), (128, (1, 8, 5, 9), 72), (64, (1, 72, 5, 3), 40)
    ways = ("everything", WAYS_IN[0]), ("first of an rcu", WAYS_IN[0]), ("gradient", WAYS_IN[1]), ("plain", WAYS_IN[1])
    for math, (way, way_in), (tile, shape, k) in product(("8BFloat16", "7Float16"), ways, routes):
        name = f"wgmma_kernelINS0_{math}ENS0_{way_in}ELi{tile}E"
        yield Case((name,), math, tile, shape, k, {"way": way})


def gradients() -> Iterator[Case]:
    """Of weights in float32, as autocast has them, where nothing is rectified; else in the activations' type."""
    for math, way_in, (copy, tile, shape, k) in product(MATHS, WAYS_IN, ROUTES):
        if (math, tile) != ("6Tf32x3", 128):
            rectified = way_in == "9Rectified"
            gw_dtype = MATHS[math] if rectified else FP32
            names = (
                f"grad_kernelINS0_{math}ENS0_{way_in}ENS0_{copy}ELi{tile}E",
                f"sum_kernelI{ELEMENTS[gw_dtype]}E",
            )
            taps = 9 if (math, way_in) == ("8BFloat16", "9Rectified") else 1
            options = {"taps": taps, "relu_in": rectified, "weight_dtype": gw_dtype}
            yield Case(names, math, tile, shape, k, options)


CASES = {
    "conv": (*convolutions(), *pools(), *splits()),
    "sm90a": tuple(of_sm90a()),
    "grad": tuple(gradients()),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc() and CSRC.exists():
        compile_all()


def compile_all():
    """PTX, in the background, of every source that has products."""
    return [
        start(CSRC / "cuda" / f"{name}.cu", arch)
        for arch, names in (("sm_80", ON_SM80), ("sm_90a", ON_SM90A))
        for name in names
    ]


@pytest.fixture
def check(executor, monkeypatch):
    """Holds one case to float64, where ``executor`` runs it, by the kernels it names."""

    def check(case, function):
        kernels, launched = executor.kernels(), []
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", case.math == "4Tf32")
        for name, value in (("tile", case.tile), ("splits", case.splits), ("sm80_loop", case in CASES["conv"])):
            monkeypatch.setattr(kernels, name, value)
        if executor.name != "gpu":
            real = kernels._launches
            monkeypatch.setattr(kernels, "_launches", lambda *args: launched.extend(found := real(*args)) or found)
        error, limit = function(kernels, case.shape, case.k, MATHS[case.math], device=executor.device, **case.options)
        assert error <= limit or (case in CASES["grad"] and case.math == "4Tf32" and error <= 1e-3)
        assert executor.name == "gpu" or [launch.name for launch in launched] == list(case.names)

    return check


@pytest.mark.runs_on("emulator", "gpu")
@pytest.mark.parametrize("case", CASES["conv"], ids=str)
def test_convolutions(check, case):
    check(case, check_conv)


@pytest.mark.runs_on("emulator-sm90a", "gpu")
@pytest.mark.parametrize("case", CASES["sm90a"], ids=str)
def test_convolutions_on_sm90a(check, case):
    check(case, check_conv)


@pytest.mark.runs_on("emulator", "gpu")
@pytest.mark.parametrize("case", CASES["grad"], ids=str)
def test_gradients(check, case):
    check(case, check_grads)


@needs_nvcc
def test_no_kernel_is_left_out():
    """Each entry of the PTX is one that a case above launches."""
    ptx = "".join(future.result() for future in compile_all())
    entries = re.findall(r"^(?:\.visible )?\.entry (\w+)\(", ptx, flags=re.M)
    names = {name for cases in CASES.values() for case in cases for name in case.names}
    found = {name: [entry for entry in entries if name in entry] for name in names}
    assert all(len(those) == 1 for those in found.values()), found
    assert sorted(entries) == sorted(entry for those in found.values() for entry in those)
