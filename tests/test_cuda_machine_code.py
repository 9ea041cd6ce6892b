"""The machine code of the CUDA kernels, read from the built extension (benchmarks/cuda_machine_code.py)."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import refinenet_fast
from refinenet_fast import _native

pytest.importorskip("triton")  # whose wheel has the disassembler
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
mc = pytest.importorskip("cuda_machine_code", reason="needs the checkout's benchmarks/")
if not refinenet_fast.build_info()["cuda"]["built"]:
    pytest.skip("built without CUDA", allow_module_level=True)

read = cache(mc.read)


@pytest.mark.parametrize("arch", mc.architectures())
def test_every_instance(arch):
    found = read(arch)
    assert len(found) == mc.INSTANCES + mc.HOPPER_INSTANCES * arch.startswith("sm_90a")
    assert {str(code): what for code in found if (what := mc.violations(code))} == {}


@pytest.mark.parametrize("arch", mc.architectures())
def test_no_kernel_spills(arch):
    """Convolutions, gradients, sums of their parts, pools, bilinear: whatever is there but three that are named."""
    found = mc.memory_of_all(arch)
    assert len(found) == mc.INSTANCES + mc.OTHERS + mc.HOPPER_INSTANCES * arch.startswith("sm_90a")
    assert mc.spills(arch) == {}
    known = [memory for name, (memory, _) in found.items() if mc.SPILLS.search(name)]
    assert len(known) == 3 and max(known) <= 64


def test_the_core_is_no_larger_than_it_may_be():
    """30 MB of three architectures."""
    assert Path(_native._C.__file__).stat().st_size <= 10_000_000 * max(3, len(mc.architectures()))


def one(arch=None, **fields):
    codes = read(arch or mc.architectures()[0])
    (found,) = (c for c in codes if all(getattr(c, name) == v for name, v in fields.items()))
    return found


def test_what_is_wrong_is_seen():
    code = one(kernel="conv", arithmetic="BFloat16", way_in="Rectified", copy="Chunks", tile=128)
    spilled = replace(code, sass=(*code.sass, "STL [R1], R2"), memory=16)
    assert mc.violations(spilled) == ["spills: 1 instructions, 16 bytes"]
    (text,) = mc.multiplies_as_intended(replace(code, arithmetic="Float16"))
    assert text.startswith("multiplies by {'HMMA.16816.F32.BF16': 64}")
    stored = replace(code, loop=(*code.loop, "STS.128 [R1], R4"))
    assert mc.copies_ahead(stored) == ["8 LDGSTS, 1 STS, 0 LDG in the main loop"]
    assert mc.fragments_by_matrices(replace(code, kernel="grad")) == ["16 LDSM, 0 transposed, of 20"]
    promoted = tuple(text.replace("HMNMX2", "FMNMX") for text in code.loop)
    assert mc.relu_is_native(replace(code, loop=promoted))[0].startswith("a 16-bit ReLU in float32")


@pytest.mark.skipif("sm_90a" not in mc.architectures(), reason="built without sm_90a")
def test_what_is_wrong_on_sm90a_is_seen():
    code = one("sm_90a", kernel="wgmma", arithmetic="BFloat16", way_in="Rectified", tile=256)
    assert mc.violations(replace(code, loop=(*code.loop, "MEMBAR.ALL.GPU"))) == ["1 fences in the main loop"]
    assert mc.operands_as_intended(replace(code, way_in="Unchanged")) == ["4 operands A in registers"]
    assert mc.fragments_by_matrices(replace(code, way_in="Unchanged")) == ["4 LDSM in the main loop"]
    assert mc.multiplies_as_intended(replace(code, tile=128))[0].startswith("multiplies by {'HGMMA.64x256x16.F32.BF16'")
    stored = replace(code, loop=(*code.loop, "STS.128 [R1], R4"))
    assert mc.copies_ahead(stored)[0].startswith("1 copies in the main loop")
    drained = tuple(text.replace("gsb0, 0x1", "gsb0, 0x0") for text in code.loop)
    assert mc.loads_overlap_products(replace(code, loop=drained))[0].startswith("1 waits for operands; products")
    without = tuple(text for text in code.loop if not text.startswith("SYNCS.PHASECHK"))
    assert mc.loads_overlap_products(replace(code, loop=without))[0].startswith("0 waits for operands")
    kept = tuple(text for text in code.sass if not text.startswith("USETMAXREG.DEALLOC"))
    assert mc.violations(replace(code, sass=kept)) == ["(1, 0) USETMAXREG that take and give registers"]
    pool = one(kernel="pool", arithmetic="BFloat16", side=1, tile=256)
    again = replace(pool, loop=(*pool.loop, "LDS.64 R2, [R4]"))
    assert mc.copies_ahead(again) == ["(13, 25, 16) LDGSTS, LDS.64 and STS.64 in the main loop, not (13, 24, 16)"]
