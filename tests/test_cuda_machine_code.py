"""The machine code of the CUDA convolutions, read from the built extension (benchmarks/cuda_machine_code.py)."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import refinenet_fast

pytest.importorskip("triton")  # whose wheel has the disassembler
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
mc = pytest.importorskip("cuda_machine_code", reason="needs the checkout's benchmarks/")
if not refinenet_fast.build_info()["cuda"]["built"]:
    pytest.skip("built without CUDA", allow_module_level=True)

read = cache(mc.read)


@pytest.mark.parametrize("arch", mc.architectures())
def test_every_instance(arch):
    found = read(arch)
    assert len(found) == mc.INSTANCES
    assert {str(code): what for code in found if (what := mc.violations(code))} == {}


def one(**fields):
    (found,) = (c for c in read(mc.architectures()[0]) if all(getattr(c, name) == v for name, v in fields.items()))
    return found


def test_what_is_wrong_is_seen():
    code = one(kernel="conv", arithmetic="BFloat16", way_in="Rectified", copy="Chunks", tile=128)
    spilled = replace(code, sass=(*code.sass, "STL [R1], R2"), memory=16)
    assert mc.violations(spilled) == ["spills: 1 instructions, 16 bytes"]
    (text,) = mc.multiplies_as_intended(replace(code, arithmetic="Float16"))
    assert text.startswith("multiplies by {'HMMA.16816.F32.BF16': 64}")
    stored = replace(code, loop=(*code.loop, "STS.128 [R1], R4"))
    assert mc.copies_ahead(stored) == ["8 LDGSTS, 1 STS, 0 LDG in the main loop"]
    assert mc.fragments_by_matrices(replace(code, kernel="grad")) == ["16 LDSM, 0 transposed, of 16"]
    promoted = tuple(text.replace("HMNMX2", "FMNMX") for text in code.loop)
    assert mc.relu_is_native(replace(code, loop=promoted))[0].startswith("a 16-bit ReLU in float32")
