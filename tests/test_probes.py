"""Every probe kernel, CUDA's and Triton's, executed by the emulator under several schedules."""

from __future__ import annotations

import functools
import json

import pytest

import golden
from emulator import EmulatorError, parse
from emulator.compilers import CHECKED, PROBES, compiled, nvcc, nvcc_version, start
from emulator.machine import Machine
from probes import all_probes, conv_probes
from probes.run import SCHEDULES, emulated, emulated_triton, wrong

triton = pytest.importorskip("triton")
from probes import triton_probes  # noqa: E402

needs_nvcc = pytest.mark.skipif(not nvcc() or not PROBES.exists(), reason="needs an nvcc")
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
CUDA = [*all_probes.PROBES, *conv_probes.PROBES]
RECORDED = PROBES / "triton-3.6"
METADATA = json.loads((RECORDED / "metadata.json").read_text())
TRITON = [
    pytest.param(probe, arch, id=f"{probe.name}-sm{arch}")
    for probe in triton_probes.PROBES
    for arch in probe.archs
    if triton_probes.runs_with(probe, triton.__version__)
]
# What the emulator found in Triton 3.6's PTX, and what 3.9 emits otherwise. wgmma reads through the async proxy what
# cp.async has written through the generic one, and no fence.proxy.async stands between; and where wgmma takes operand A
# from registers, the next iteration's ldmatrix overwrites them while up to three groups are in flight.
FINDINGS = dict.fromkeys(
    (
        *(f"matmul_pointers_{kind}-sm90" for kind in ("f16", "tf32")),
        *(f"conv3x3_pointers_{kind}-sm90" for kind in ("f16", "bf16", "tf32")),
    ),
    ("proxies", "no proxy fence"),
) | dict.fromkeys(
    (f"conv3x3_descriptors_tile_{kind}-sm90" for kind in ("bf16", "f16_kn")),
    ("registers", "is in flight"),
)
TRITON_36 = [p for p in TRITON if p.id in METADATA]


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead():
    """The second core compiles while the first one emulates."""
    if nvcc():
        for source, arch in dict.fromkeys((p.source, p.arch) for p in CUDA):
            start(PROBES / source, arch)


def test_the_compilers_are_those_it_was_checked_with():
    """Another version: run the suite, read what is new in its PTX, and add it to the table."""
    assert triton.__version__ in CHECKED["triton"]
    if nvcc():
        assert nvcc_version() in CHECKED["nvcc"]


@needs_nvcc
@by_schedule
@pytest.mark.parametrize("probe", CUDA, ids=lambda p: p.name)
def test_cuda(probe, schedule):
    assert not wrong(probe, emulated(probe, schedule))


@functools.lru_cache(maxsize=4)
def _triton(name: str, arch: int, recorded: bool):
    """(kernel, metadata) by the present Triton, or as 3.6 has compiled it."""
    probe = next(p for p in triton_probes.PROBES if p.name == name)
    if recorded:
        text, metadata = (RECORDED / f"{name}-sm{arch}.ptx").read_text(), METADATA[f"{name}-sm{arch}"]
    else:
        text, metadata = triton_probes.compile_ptx(probe, arch)
    (kernel,) = parse(text).values()
    return kernel, metadata


@pytest.mark.parametrize("architecture", ["sm_90"])
def test_golden(architecture):
    """The emulator leaves what a real GPU has left (benchmarks/golden_probe.py)."""
    dump = golden.load(architecture)
    if dump is None:
        pytest.skip(f"no dump of {architecture} has been made yet")
    for probe in CUDA:
        outputs = emulated(probe, SCHEDULES["blocks in lockstep, copies early"])
        for position, output in zip(probe.outputs, outputs, strict=True):
            agrees, words = golden.compare(output, dump[golden.key(probe.name, position)], probe.tolerance)
            assert agrees, f"{probe.name}: output {position}: {words}"


@by_schedule
@pytest.mark.parametrize("probe, arch", TRITON)
def test_triton(probe, arch, schedule):
    assert not wrong(probe, emulated_triton(probe, *_triton(probe.name, arch, False), schedule))


@pytest.mark.runs_on("interpreter", "emulator", "gpu")
@pytest.mark.parametrize(
    "name", ["matmul_pointers_f16", "matmul_descriptors_f16_b_nk", "conv3x3_pointers_f32", "maxpool3_descriptors_f32"]
)
def test_triton_wherever_it_runs(name, executor):
    """Triton's own interpreter, which reads no PTX, and the emulator, which reads nothing else, agree."""
    probe = next(p for p in triton_probes.PROBES if p.name == name)
    assert not wrong(probe, executor.outputs(probe))


@pytest.mark.parametrize("probe, arch", TRITON_36)
def test_triton_3_6(probe, arch):
    """Its PTX is kept; one schedule, with everything late, is enough beside the newer one's three."""
    kernel, metadata = _triton(probe.name, arch, True)
    schedule, (rule, said) = SCHEDULES["warps, copies late"], FINDINGS.get(f"{probe.name}-sm{arch}", ("", ""))
    if rule:
        with pytest.raises(EmulatorError, match=said):
            emulated_triton(probe, kernel, metadata, schedule)
    assert not wrong(probe, emulated_triton(probe, kernel, metadata, schedule, [rule]))


def test_every_opcode_is_known():
    """Of the probes and of Triton; those of the project's kernels are seen to in test_emulator."""
    texts = [path.read_text() for path in RECORDED.glob("*.ptx")]
    kernels = [kernel for text in texts for kernel in parse(text).values()]
    if nvcc():
        kernels += [
            k for s, a in dict.fromkeys((p.source, p.arch) for p in CUDA) for k in compiled(PROBES / s, a).values()
        ]
    assert kernels
    assert not set().union(*map(Machine.unknown, kernels))


@needs_nvcc
def test_a_source_that_does_not_compile():
    with pytest.raises(EmulatorError, match=r"nvcc .* error"):
        compiled(PROBES / "mma.cu", "sm_80", "this is no CUDA")
